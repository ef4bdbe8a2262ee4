"""Several processes: the numbers of one, and no silence when one is lost."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import test_train
import torch
import torch._dynamo.backends.distributed  # these: once here, not in every child
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
from conftest import ROOT, in_child, in_processes
from test_train import assert_same_run, during, elsewhere, flags, killed_at, logged, main, saved

from logger import rank

KILLED = -signal.SIGKILL
TWO = ("--standalone", "--nproc_per_node", "2")  # processes that meet at a free port


@pytest.fixture
def config(tiny_config):
    """40 steps of 4 micro-batches in float64, where only the order of sums can differ."""
    steps = {"max_iters": 40, "gradient_accumulation_steps": 4}
    return replace(tiny_config, **steps, dtype="float64", preset="none")


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def assert_equal_up_to_rounding(one, other):
    a, b = saved(one), saved(other)
    assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
    assert largest_difference(a["model"], b["model"]) <= 1e-12
    assert a["optimizer"].keys() == b["optimizer"].keys()
    for name, state in a["optimizer"].items():
        assert largest_difference(state, b["optimizer"][name]) <= 1e-12
    assert len(logged(one)) == len(logged(other)) == one.max_iters
    for x, y in zip(logged(one), logged(other), strict=True):
        assert x == pytest.approx(y, rel=1e-12, abs=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_give_the_losses_and_weights_of_one(config, optimizer):
    """With dropout: what it draws depends on the micro-batch, not on the rank that has it."""
    config = replace(config, optimizer=optimizer, dropout=0.1)
    assert in_child(main, config) == 0
    for parallel in ("ddp", "fsdp"):
        two = replace(elsewhere(config, f"{config.log_dir}/{parallel}"), parallel=parallel)
        two.activation_checkpointing = parallel == "fsdp"  # which changes no number
        assert in_processes(2, main, two) == [0, 0]
        assert_equal_up_to_rounding(config, two)


def test_a_run_goes_on_under_another_number_of_processes_after_kills(config):
    """1 -> 2 by fsdp -> 4 by ddp -> 1 process, each ended by SIGKILL in the middle of a step."""
    assert in_child(killed_at, config, 13) == KILLED
    assert in_processes(2, killed_at, replace(config, parallel="fsdp"), 23) == [KILLED] * 2
    assert in_processes(4, killed_at, replace(config, eval_interval=5), 31, 0) == [KILLED] * 4
    assert in_child(main, config) == 0
    together = test_train.undisturbed(config)
    assert largest_difference(saved(config)["model"], saved(together)["model"]) <= 1e-12
    losses = [[record["loss"] for record in logged(c)] for c in (config, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_resume_is_bit_exact_with_three_processes(config):
    """Also with dropout, and with sums of three whose order the buckets of DDP decide."""
    config = replace(config, dropout=0.1, dtype="float32", max_iters=20, eval_interval=5)
    config.gradient_accumulation_steps = 3
    other = elsewhere(config, f"{config.log_dir}/undisturbed")
    assert in_processes(3, main, other) == [0, 0, 0]
    assert in_processes(3, killed_at, config, 13, 0) == [KILLED] * 3
    assert in_processes(3, main, config) == [0, 0, 0]
    assert_same_run(config, other)


def test_fsdp_in_bfloat16_keeps_float32_weights_and_moments(config):
    config = replace(config, dtype="bfloat16", parallel="fsdp", position="rope", max_iters=10)
    assert in_processes(2, main, config) == [0, 0]
    model, optimizer = saved(config)["model"], saved(config)["optimizer"]
    tensors = *model.values(), *optimizer["transformer.wte.weight"].values()
    assert {t.dtype for t in tensors} == {torch.float32}
    alone = replace(elsewhere(config, f"{config.log_dir}/alone"), dtype="float32")
    assert in_child(main, alone) == 0
    assert logged(config)[-1]["loss"] == pytest.approx(logged(alone)[-1]["loss"], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("thrifty", [False, True], ids=["", "activation_checkpointing"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_processes_give_the_numbers_of_one_plain_one(config, parallel, thrifty):
    """Stopped half-way, and gone on with."""
    config = replace(config, dtype="float32", max_iters=20, lr_decay_iters=20, warmup_iters=2)
    assert in_child(main, config) == 0
    compiled = replace(elsewhere(config, f"{config.log_dir}/compiled"), parallel=parallel)
    compiled = replace(compiled, compile=True, activation_checkpointing=thrifty)
    for steps in (10, 20):
        err = ended(torchrun(replace(compiled, max_iters=steps), *TWO))
        assert "compiling" in err and "does not work here" not in err
    assert saved(compiled)["model"].keys() == saved(config)["model"].keys()
    assert largest_difference(saved(compiled)["model"], saved(config)["model"]) < 1e-4
    for key in ("loss", "val_loss"):
        found = [[r[key] for r in logged(c) if key in r] for c in (config, compiled)]
        assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_where_one_process_cannot_compile_none_does(config, capfd):
    def no_compiler(*arguments):
        raise RuntimeError("no compiler\nlong story")

    def patched():  # torch.compile does nothing in process 0, and fails in process 1
        torch.compile = lambda model: model if rank() == 0 else no_compiler
        return main(replace(config, compile=True, max_iters=2, peer_timeout=10))

    assert in_processes(2, patched) == [0, 0]
    err = capfd.readouterr().err
    said = "torch.compile does not work here (no compiler); training goes on without it"
    assert err.count(said) == 1 and "compiling" not in err


def test_what_cannot_be_shared_is_exit_2_in_one_line(config, capfd):
    def unlike():
        return main(replace(config, learning_rate=[1e-3, 1e-2][rank()]))

    odd = replace(config, gradient_accumulation_steps=3)
    for says, *how in (
        ("take 4", main, odd),
        ("prepare_data.py", main, config, "--data", "novel.txt"),
        ("process 1 has another learning_rate than process 0", unlike),
    ):
        assert in_processes(2, *how) == [2, 2]
        (line,) = test_train.errors(capfd)
        assert says in line and not Path(config.checkpoint_dir).exists()


def test_a_signal_to_one_process_stops_and_saves_all(config):
    def signalled():
        if rank() == 1:
            during(13, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return main(config)

    assert in_processes(2, signalled) == [143, 143]
    assert saved(config, "checkpoint.pt")["step"] == 14


def test_a_number_that_is_not_finite_in_one_process_stops_all_before_the_step(config, capfd):
    def poisoned():
        if rank() == 1:
            test_train.poisoned_at({6}, setattr)
        return main(replace(config, eval_interval=3))

    assert in_processes(2, poisoned) == [5, 5]
    assert saved(config, "checkpoint.pt")["step"] == 6
    err = capfd.readouterr().err
    assert err.count("error:") == 1 and "in step 7" in err


@pytest.mark.parametrize("lost", [1, 2])
def test_a_process_that_hangs_is_named_within_the_stated_time(config, capfd, lost):
    def hanging():
        if rank() == lost:
            during(5, lambda: time.sleep(60), micro_step=0)
            signal.alarm(6)  # the test need not wait for it
        return main(replace(config, gradient_accumulation_steps=3, peer_timeout=2))

    codes, started = [1, 1, 1], time.monotonic()
    codes[lost] = -signal.SIGALRM
    assert in_processes(3, hanging) == codes and time.monotonic() - started < 20
    err = capfd.readouterr().err
    assert err.count("error:") == 2 and err.count(f"process {lost} of 3 did not answer") == 2


def torchrun(config, *more):
    command = [sys.executable, "-m", "torch.distributed.run", *more, str(ROOT / "train.py")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *flags(config)], start_new_session=True, **quiet)


def ended(launcher):
    """What it has written to stderr, once it has ended with exit code 0."""
    err = launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 0, err[-2000:]
    return err


def wait_for_step(config, step, launcher):
    until = time.monotonic() + 90
    while not any(p.read_text().count("\n") >= step for p in Path(config.log_dir).glob("*/*l")):
        assert launcher.poll() is None, launcher.communicate()[1][-2000:]
        assert time.monotonic() < until
        time.sleep(0.02)


def test_torchrun_restarts_after_a_killed_worker_and_loses_nothing(config):
    config = replace(config, dropout=0.1, dtype="float32", max_iters=80)
    other = elsewhere(config, f"{config.log_dir}/undisturbed")
    assert in_processes(2, main, other) == [0, 0]
    launcher = torchrun(config, *TWO, "--max-restarts", "3")
    wait_for_step(config, 15, launcher)
    holder = (Path(config.checkpoint_dir) / ".lock_holder").read_text()
    os.kill(int(re.search(r"process (\d+)", holder)[1]), signal.SIGKILL)
    assert "resuming" in ended(launcher)
    assert_same_run(config, other)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the worker with pgrep")
def test_two_nodes_give_the_numbers_of_one_and_survive_the_loss_of_one(config):
    assert [node.wait(100) for node in two_nodes(config)] == [0, 0]
    assert_equal_up_to_rounding(config, test_train.undisturbed(config))

    long = replace(elsewhere(config, f"{config.log_dir}/long"), max_iters=4000, peer_timeout=10)
    first, second = two_nodes(long)
    wait_for_step(long, 25, first)
    worker = subprocess.check_output(["pgrep", "-P", str(second.pid)])
    for pid in (second.pid, int(worker)):
        os.kill(pid, signal.SIGKILL)
    started, err = time.monotonic(), first.communicate(timeout=60)[1]
    assert first.returncode == 1 and time.monotonic() - started < 10 + 30
    assert "process 1 of 2 did not answer" in err, err[-2000:]
    step = saved(long, "checkpoint.pt")["step"]
    assert f"step {step}" in ended(torchrun(replace(long, max_iters=step + 20), *TWO))
    assert saved(long)["step"] == step + 20


def two_nodes(config):
    """Two agents of torchrun, each with one process; the first has rank 0 and the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = f"--master-addr 127.0.0.1 --master-port {port} --nnodes 2 --nproc_per_node 1 --node-rank"
    return [torchrun(config, *meet.split(), str(node)) for node in range(2)]
