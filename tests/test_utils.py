"""The machine: what is picked is there, and what is said of it is so."""

import pytest
import torch

import utils


def test_bad_input_a_device_that_is_none_is_named_and_more_processes_than_gpus(monkeypatch):
    for name in ("gpu", "meta", "cpu:x", "cpu:1000", ""):
        with pytest.raises(ValueError, match=f"--device {name}: .*use "):
            utils.pick_device(name)
    assert utils.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in (None, "cuda", "cuda:2"):
        with pytest.raises(ValueError, match="--device cuda:2: there are 2 GPUs"):
            utils.pick_device(name)


def test_the_peak_of_a_similar_gpu_is_not_taken_for_its_own(monkeypatch):
    peaks = {"A100-SXM4-80GB": 312e12, "GH200 480GB": 989e12, "H100 NVL": 835e12, "GB200": None}
    peaks |= {"T400 4GB": None, "GeForce RTX 4090 Laptop GPU": None}
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: f"NVIDIA {name}")
        assert utils.peak_flops(torch.device("cuda"), "bfloat16") == peak
    assert utils.peak_flops(torch.device("cpu"), "bfloat16") is None


def test_seeds_are_the_same_everywhere_and_differ_by_every_number():
    assert utils.derived_seed(1337, 0) == 1783029923428753473
    numbers = [(), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (2**64 - 2,)]
    seeds = {utils.derived_seed(*n) for n in numbers}
    assert len(seeds) == len(numbers) and all(0 <= seed < 2**63 for seed in seeds)


def test_out_of_memory_ends_with_the_remedy_and_other_errors_stay():
    texts = "CUDA out of memory.", "CUBLAS_STATUS_ALLOC_FAILED when calling `x`"
    for error in (MemoryError(), *map(RuntimeError, texts)):
        with pytest.raises(ValueError, match="out of memory: less"), utils.out_of_memory("less"):
            raise error
    with pytest.raises(ValueError, match="out of memory: less"), utils.out_of_memory("less"):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="do not fit"), utils.out_of_memory("less"):
        raise RuntimeError("mat1 and mat2 do not fit")


def test_deterministic_kernels_are_asked_for_as_long_as_they_are_wanted():
    asked = torch.are_deterministic_algorithms_enabled
    with pytest.raises(KeyError), utils.deterministic():
        with utils.deterministic(False):
            assert not asked()
        assert asked()
        raise KeyError
    assert not asked()
