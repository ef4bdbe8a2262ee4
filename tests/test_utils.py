"""The machine: what is picked is there, and what is said of it is so."""

import pytest
import torch

import utils


@pytest.mark.parametrize("name", [None, "cuda", "cuda:2"])
def test_bad_input_more_processes_than_gpus_is_one_line(monkeypatch, name):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"--device cuda:2: there are 2 GPUs"):
        utils.pick_device(name)


@pytest.mark.parametrize("name, why", [("gpu", "not a device"), ("meta", "has none; try")])
def test_bad_input_a_device_that_is_none_is_named(name, why):
    with pytest.raises(ValueError, match=f"--device {name}: .*{why}"):
        utils.pick_device(name)
    assert utils.pick_device("cpu") == (torch.device("cpu"), "as asked")


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GB200", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_of_a_similar_gpu_is_not_taken_for_its_own(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert utils.peak_flops(torch.device("cuda"), "bfloat16") == peak
    assert utils.peak_flops(torch.device("cpu"), "bfloat16") is None


def test_seeds_are_the_same_everywhere_and_differ_by_every_number():
    assert utils.derived_seed(1337, 0) == 1783029923428753473
    numbers = [(), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (2**64 - 2,)]
    seeds = {utils.derived_seed(*n) for n in numbers}
    assert len(seeds) == len(numbers) and all(0 <= seed < 2**63 for seed in seeds)


def test_out_of_memory_ends_with_the_remedy_and_other_errors_stay():
    for error in (MemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `x`")):
        with pytest.raises(ValueError, match="out of memory: less"), utils.out_of_memory("less"):
            raise error
    with pytest.raises(ValueError, match="out of memory: less"), utils.out_of_memory("less"):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="do not fit"), utils.out_of_memory("less"):
        raise RuntimeError("mat1 and mat2 do not fit")


def test_deterministic_kernels_are_asked_for_as_long_as_they_are_wanted():
    states = []
    with pytest.raises(KeyError), utils.deterministic():
        states.append(torch.are_deterministic_algorithms_enabled())
        with utils.deterministic(False):
            states.append(torch.are_deterministic_algorithms_enabled())
        raise KeyError
    assert states == [True, False] and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="-m gpu on a CUDA device runs it")
def test_a_batch_arrives_on_the_gpu_and_memory_is_measured():
    device, why = utils.pick_device()
    utils.set_up_device(device)
    batch = torch.arange(10**6).view(1000, 1000).T
    assert torch.equal(utils.to_device(batch, device).cpu(), batch)
    assert "NVIDIA" in why and utils.peak_mb(device) >= 8
