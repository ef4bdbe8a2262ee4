"""On a CUDA device (`-m gpu`; a forked child could not use it): numbers of a CPU, no waiting."""

import copy
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import bench_plan
import bench_train
import pytest
import torch
from conftest import ROOT, same
from test_train import assert_same_run, during, elsewhere, flags, poisoned_at, saved

import sampling
import train as training
from config import GPT2Config
from logger import run
from model import GPT2
from parallel import compile_model, full_state
from sampling import Sampling, generate_ids, use_graph
from state import FoundInf, build_state
from train import train
from utils import autocast

DEVICE, NO_DEVICE = "cuda", "-m gpu on a CUDA device runs it"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_DEVICE)]
CHANGES = [{}, {"position": "rope"}, {"activation_checkpointing": True}]
MIXED = [("adamw", "bfloat16"), ("muon", "float16")]


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, device=DEVICE, compile=False, preset="none")


def sized(**values):
    """A small GPT-2 with the vocabulary of the large one."""
    shape = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64, "batch_size": 2}
    return GPT2Config(**shape | {"device": DEVICE, "dtype": "float32"} | values)


def loss_and_gradients(model, dtype="float32"):
    """Of all parameters, on a CPU and in float64; half of the targets do not count."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    idx, targets = torch.randint(50257, (2, 2, 64), generator=generator).to(device)
    targets[:, 1::2] = -1
    with autocast(device, dtype):
        loss = model(idx, targets)[1]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [tensor.detach().double().cpu() for tensor in (loss, *gradients)]


def assert_close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def assert_weights_agree(one, other):
    ours, theirs = saved(one)["model"], saved(other)["model"]
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-9 for name in theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_five_steps_in_float64_are_those_of_a_cpu(config, tmp_path, optimizer):
    config = replace(config, dtype="float64", optimizer=optimizer, max_iters=5)
    other = replace(elsewhere(config, tmp_path / "cpu"), device="cpu")
    train(config)
    train(other)
    assert_weights_agree(config, other)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_loss_and_gradients_are_those_of_float64(dtype, tolerance):
    torch.backends.cuda.matmul.allow_tf32 = False  # as a run before may have left it
    model = GPT2(sized())
    theirs = loss_and_gradients(copy.deepcopy(model).double())
    assert_close(loss_and_gradients(model.to(DEVICE), dtype), theirs, tolerance)


def test_a_checkpoint_goes_to_the_cpu_and_back_bit_by_bit(config):
    train(config)
    first = state = saved(config)
    for device in (DEVICE, "cpu", DEVICE):
        built = build_state(replace(config, vocab_size=40), torch.device(device), state)
        weights, optimizer = full_state(built.model, built.optimizer)
        state = state | {"model": weights, "optimizer": optimizer}
    assert same(state["model"], first["model"]) and same(state["optimizer"], first["optimizer"])


TWO = """
import sys, torch.distributed as dist
sys.path.insert(0, {root!r})
join = dist.init_process_group
dist.init_process_group = lambda backend, device_id=None, **how: join("gloo", **how)
from logger import run
from train import main
sys.exit(run(main))
"""


def test_two_processes_on_one_device_give_the_weights_of_one(config, tmp_path):
    """Over gloo, as NCCL wants a device for each."""
    config = replace(config, dtype="float64", device=f"{DEVICE}:0", max_iters=5)
    one = elsewhere(config, tmp_path / "one")
    train(one)
    (tmp_path / "two.py").write_text(TWO.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, str(tmp_path / "two.py"), *flags(config)], check=True)
    assert_weights_agree(config, one)


@pytest.mark.parametrize("change", [*CHANGES, {"position": "alibi"}])
def test_the_compiled_model_is_one_graph_and_gives_what_the_plain_one_gives(change):
    torch.backends.cuda.matmul.allow_tf32 = False  # as a run before may have left it
    model = GPT2(sized(**change)).to(DEVICE)
    torch._dynamo.reset()
    forward = compile_model(model)
    assert forward is not model  # it does not fall back
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert_close(loss_and_gradients(forward), loss_and_gradients(model), 1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["aot_autograd"]["ok"] == counters["aot_autograd"]["total"] == 1


@pytest.mark.parametrize("optimizer, dtype", MIXED)
def test_a_step_does_not_wait_for_the_device(config, monkeypatch, optimizer, dtype):
    config = replace(config, optimizer=optimizer, dtype=dtype, max_iters=6, log_interval=100)
    for step, mode in ((2, "error"), (5, "default")):
        switch = partial(torch.cuda.set_sync_debug_mode, mode)
        during(step, switch, micro_step=0, patch=monkeypatch.setattr)
    try:
        train(config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer, dtype", MIXED)
def test_a_poisoned_step_changes_neither_weights_nor_state(config, tmp_path, dtype, optimizer):
    config = replace(config, dtype=dtype, optimizer=optimizer, lr_decay_iters=20, warmup_iters=0)
    two = replace(elsewhere(config, tmp_path / "two"), max_iters=2)
    train(two)
    with pytest.MonkeyPatch.context() as patch:
        poisoned_at([2], patch.setattr)
        patch.setattr(FoundInf, "raise_if_stuck", Mock())  # which would end the run
        train(replace(config, max_iters=3))
    ours, theirs = saved(config), saved(two)
    assert same(ours["model"], theirs["model"]) and same(ours["optimizer"], theirs["optimizer"])
    assert dtype != "float16" or ours["scaler"]["scale"] == theirs["scaler"]["scale"] / 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("how", ["adamw bfloat16", "muon bfloat16", "adamw float16"])
def test_a_run_that_breaks_off_ends_as_others(config, tmp_path, compiled, recompute, how):
    optimizer, dtype = how.split()
    config = replace(config, dropout=0.1, activation_checkpointing=recompute, compile=compiled)
    config = replace(config, optimizer=optimizer, dtype=dtype)
    undisturbed = elsewhere(config, tmp_path / "undisturbed")
    train(undisturbed)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        during(14, Mock(side_effect=KeyboardInterrupt), patch=patch.setattr)
        train(config)
    torch._dynamo.reset()  # as in another process
    train(config)
    assert_same_run(config, undisturbed)


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_graphed_decoding_gives_the_tokens_of_plain_decoding(position, monkeypatch):
    model = GPT2(sized(position=position, block_size=16, vocab_size=500)).double().to(DEVICE).eval()
    assert use_graph(torch.device(DEVICE)) or DEVICE == "cpu"
    batches = [[[7] * n for n in lengths] for lengths in ([3, 9, 5], [12], [7, 7])]
    graphed = [list(generate_ids(model, rows, Sampling(30))) for rows in batches]
    monkeypatch.setattr(sampling, "use_graph", lambda device: False)
    assert [list(generate_ids(model, rows, Sampling(30))) for rows in batches] == graphed


@pytest.mark.parametrize(
    "change", [*CHANGES, {"dtype": "float32"}, {"dropout": 0.1}, {"optimizer": "muon"}]
)
def test_a_step_takes_the_memory_of_the_plan(change):
    config = GPT2Config(batch_size=8, gradient_accumulation_steps=1, dtype="bfloat16")
    config = replace(config, device=DEVICE, compile=False, **change)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bench_train.ours_training(bench_train.TrainOptions(steps=2), config)()
    measured = torch.cuda.max_memory_allocated() - before
    with torch.device("meta"):
        planned = bench_plan.peak_memory(config, GPT2(config), gpus=1)["bytes"]
    assert measured == pytest.approx(planned, rel=0.1)


def test_out_of_memory_is_one_line(config, capfd):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        assert run(training.main, flags(replace(config, n_embd=1024))) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert re.search("^error: .*out of memory.*--batch_size", capfd.readouterr().err, re.M)


def test_command_lines_cause_no_warnings(config):
    checkpoint = f"--checkpoint={config.checkpoint_dir}/final_checkpoint.pt"
    errors = ["-Werror::UserWarning", "-Werror::RuntimeWarning"]  # torch has others of its own
    for script, *words in (
        ["train.py", *flags(replace(config, compile=True))],
        ["generate.py", checkpoint, "--prompt=line", "--device", DEVICE],
        ["evaluate.py", checkpoint, "--device", DEVICE, "--data_dir", config.data_dir],
    ):
        command = [sys.executable, *errors, str(ROOT / script), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
