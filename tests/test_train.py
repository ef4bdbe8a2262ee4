"""The training loop: what it logs and saves, and that no way of ending it loses anything.

Runs that are killed are forked children (torch is imported once), on one thread each, because
OpenMP's threads do not survive a fork.
"""

import errno
import json
import math
import os
import random
import re
import signal
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, in_child

import checkpoint
import convert
import train as training
from config import GPT2Config
from generate import batch_generate
from model import GPT2
from optim import learning_rate
from tokenizer import load_tokenizer
from train import NonFiniteError, Trainer, start_from, train
from utils import lock, run

KILLS = range(5)
MANY_KILLS = [pytest.param(i, marks=pytest.mark.slow) for i in range(5, 50)]


def flags(config):
    """The same config as a command line."""
    values = {name: v for name, v in vars(config).items() if v is not None}
    return [word for name, v in values.items() for word in (f"--{name}", str(v))]


def main(config, *more):
    return run(training.main, [*flags(config), *more])


def elsewhere(config, folder):
    return replace(config, checkpoint_dir=f"{folder}/checkpoints", log_dir=f"{folder}/runs")


def logged(config):
    """metrics.jsonl of the only run, without what depends on the clock."""
    (path,) = Path(config.log_dir).glob("*/metrics.jsonl")
    clock = ("tokens_per_second", "mfu", "seconds")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def saved(config, name="final_checkpoint.pt"):
    return checkpoint.load(Path(config.checkpoint_dir) / name)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one == other


def assert_same_run(one, other):
    a, b = saved(one), saved(other)
    for key in ("step", "best_val_loss", "model", "optimizer", "scaler", "rng"):
        assert same(a[key], b[key]), key
    assert logged(one) == logged(other)


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, dropout=0.1, max_iters=40, preset="none")


# ---------------------------------------------------------------- what a run leaves


def test_a_run_logs_and_saves_what_it_promises(config):
    last = train(config)
    (folder,) = Path(config.log_dir).iterdir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 41)) and records[-1] == last
    names = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds"}
    assert all(names <= record.keys() for record in records)
    assert [r["step"] for r in records if "val_loss" in r] == [10, 20, 30, 40]
    assert records[-1]["loss"] < records[0]["loss"] < math.log(80)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert list(folder.glob("events.out.tfevents.*")) and (folder / "config.json").exists()
    kept = {"checkpoint.pt", "previous_checkpoint.pt", "best_checkpoint.pt", "final_checkpoint.pt"}
    assert kept <= set(os.listdir(config.checkpoint_dir))
    state = saved(config)
    assert (
        state["step"] == 40 and state["run"] == folder.name and set(state) == set(checkpoint.KEYS)
    )
    assert state["best_val_loss"] == min(r["val_loss"] for r in records if "val_loss" in r)


@pytest.fixture
def shown(config, monkeypatch):
    """What TensorBoard reads of a run that was cut short after step 15, saved at step 10, and then
    made to its end; its validation loss goes up and down.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def update_until_15(trainer):
        if trainer.step == 15:
            trainer.log.writer.flush()
            raise KeyboardInterrupt
        return update(trainer)

    update = Trainer.update
    monkeypatch.setattr(Trainer, "evaluate", lambda trainer: 3 + math.sin(trainer.step))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "update", update_until_15)
        train(config)
    train(config)
    (folder,) = Path(config.log_dir).iterdir()
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_shows_each_step_once(config, shown):
    for tag, name in {"loss/train": "loss", "loss/val": "val_loss", "lr": "lr"}.items():
        points = [(event.step, event.value) for event in shown.Scalars(tag)]
        assert points == [(r["step"], np.float32(r[name])) for r in logged(config) if name in r]
    losses = [event.value for event in shown.Scalars("loss/val")]
    best = [event.value for event in shown.Scalars("best_val_loss")]
    assert best == [min(losses[:n]) for n in range(1, 5)]
    memory = [event.value for event in shown.Scalars("memory_mb")]
    assert 100 < memory[0] and memory == sorted(memory)  # torch alone takes more


def test_tensorboard_has_a_layout_of_charts_and_a_row_of_settings(shown):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    layout = shown.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    charts = [chart for category in Layout.FromString(layout).category for chart in category.chart]
    tags = shown.Tags()["scalars"]
    drawn = [{t for t in tags if re.match("|".join(c.multiline.tag), t)} for c in charts]
    assert drawn[0] == {"loss/train", "loss/val"} and all(drawn)
    row = shown.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    row = parse_session_start_info_plugin_data(row).hparams
    assert row["n_embd"].number_value == 32 and row["device"].string_value == "cpu"
    assert row["bias"].string_value == "True" and "log_dir" not in row


def test_logged_loss_is_the_mean_over_all_micro_batches_of_the_step(config):
    config = replace(config, dropout=0.0, max_iters=1)
    train(config)
    trainer = Trainer(elsewhere(config, config.log_dir), training.TokenDataset(config.data_dir))
    with torch.no_grad():
        losses = [trainer.raw_model(*trainer.sampler.batch(0, m))[1].item() for m in range(2)]
    assert logged(config)[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_the_last_step_is_always_logged_and_evaluated(config):
    last = train(replace(config, max_iters=7, log_interval=5, eval_interval=100))
    assert [record["step"] for record in logged(config)] == [5, 7]
    assert last["step"] == 7 and "val_loss" in last


def test_numbered_checkpoints(config):
    train(replace(config, checkpoint_interval=5, keep_checkpoints=2))
    numbered = {p.name for p in Path(config.checkpoint_dir).glob("checkpoint_iter_*.pt")}
    assert numbered == {"checkpoint_iter_35.pt", "checkpoint_iter_40.pt"}


def test_best_checkpoint_is_replaced_only_by_a_lower_loss(config, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: next(losses))
    train(config)
    assert saved(config, "best_checkpoint.pt")["step"] == 20
    assert saved(config)["best_val_loss"] == 2.0


def test_patience_stops_a_run_that_gets_no_better(config, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: next(losses))
    assert train(replace(config, max_iters=100, patience=2))["step"] == 40


def test_the_python_snippet_of_the_design_works(config):
    for name, value in {"n_layer": 1, "n_head": 2, "n_embd": 16}.items():
        setattr(config, name, value)
    config.dtype, config.max_iters = torch.float16, 3
    assert train(config)["step"] == 3
    assert saved(config)["config"]["dtype"] == "float16"


@pytest.mark.slow
def test_compile_works_or_says_that_it_does_not(config, capfd):
    train(replace(config, max_iters=3, compile=True))
    assert "compil" in capfd.readouterr().err
    assert not any("_orig_mod" in name for name in saved(config)["model"])


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("no compiler found\nlong story"), "no compiler found"),
        (AssertionError(), "AssertionError"),
    ],
    ids=["a text", "no text"],
)
def test_training_goes_on_where_compile_is_not_possible(config, monkeypatch, capfd, error, reason):
    def broken(model):
        def call(*arguments):
            raise error

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert train(replace(config, max_iters=3, compile=True))["step"] == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if reason in line]
    assert len(lines) == 1 and "goes on without it" in lines[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_precision_learns(config, optimizer, dtype):
    train(replace(config, optimizer=optimizer, dtype=dtype, learning_rate=3e-3))
    losses = [record["loss"] for record in logged(config)]
    assert losses[-1] < losses[0] - 0.3


# ---------------------------------------------------------------- the same numbers


def test_accumulation_equals_one_large_batch(config):
    """Gradients of 4 micro-batches of 2 are those of one batch of 8."""

    def gradients(batch_size, accumulation):
        trainer = Trainer(
            replace(
                config,
                dropout=0.0,
                dtype="float64",
                batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
            ),
            training.TokenDataset(config.data_dir),
        )
        for micro_step in range(accumulation):
            trainer.forward_backward(micro_step)
        return [p.grad for p in trainer.raw_model.parameters()]

    for one, other in zip(gradients(8, 1), gradients(2, 4), strict=True):
        assert (one - other).abs().max() < 1e-12


def test_accumulation_equals_one_large_batch_after_40_steps(config):
    weights = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        there = elsewhere(config, f"{config.log_dir}/{batch_size}")
        values = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        train(replace(there, dropout=0.0, dtype="float64", **values))
        weights.append(saved(there)["model"])
    for name in weights[0]:
        assert (weights[0][name] - weights[1][name]).abs().max() < 1e-12


def test_dropout_depends_on_seed_step_and_micro_step_alone(config):
    config = replace(config, dropout=0.5)
    trainer = Trainer(config, training.TokenDataset(config.data_dir))

    def loss(step, micro_step, drawn_before):
        trainer.step = step
        torch.rand(drawn_before)
        return trainer.forward_backward(micro_step).item()

    assert loss(3, 1, 0) == loss(3, 1, 17)
    trainer.sampler.starts = lambda step, micro_step: [0, 20, 40, 60]  # the same data every time
    assert len({loss(3, 0, 0), loss(3, 1, 0), loss(4, 0, 0)}) == 3


def test_evaluating_and_logging_change_nothing(config):
    often = elsewhere(replace(config, eval_interval=3, log_interval=2), f"{config.log_dir}/often")
    train(config)
    train(often)
    for key in ("model", "optimizer", "rng"):
        assert same(saved(config)[key], saved(often)[key])


# ---------------------------------------------------------------- killed and resumed


def killed_at(config, step, *more):
    """Train, and die by SIGKILL in the middle of update number `step` (from 0)."""
    update = Trainer.forward_backward

    def forward_backward(self, micro_step):
        if self.step == step and micro_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, micro_step)

    Trainer.forward_backward = forward_backward
    return main(config, *more)


@pytest.mark.parametrize(
    "optimizer, dtype", [("adamw", "float32"), ("muon", "bfloat16"), ("adamw", "float16")]
)
def test_resume_is_bit_exact(config, optimizer, dtype):
    config = replace(config, optimizer=optimizer, dtype=dtype)
    undisturbed = elsewhere(config, f"{config.log_dir}/undisturbed")
    assert in_child(main, undisturbed) == 0
    moments = sorted(random.Random(0).sample(range(1, 40), 3))
    for step in moments:
        assert in_child(killed_at, config, step) == -signal.SIGKILL
    assert in_child(main, config) == 0
    assert_same_run(config, undisturbed)


class Bomb:
    """Counts the writes, syncs and renames of saving, and kills the process at the n-th."""

    def __init__(self, n):
        self.left = n

    def tick(self):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, function):
        def call(*arguments, **options):
            self.tick()
            return function(*arguments, **options)

        return call

    def plant(self):
        for name in ("fsync", "replace", "link", "unlink"):
            setattr(os, name, self.wrap(getattr(os, name)))
        save, bomb = torch.save, self

        class Writer:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                bomb.tick()
                data = memoryview(data).cast("B")
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                bomb.tick()
                self.file.write(data[len(data) // 2 :])
                return len(data)

            def flush(self):
                self.file.flush()

        torch.save = lambda state, file: save(state, Writer(file))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run that the killed ones are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    text = folder / "text.txt"
    text.write_text(TEXT, "utf-8")
    training.prepare_file(text, "char", folder / "data")
    values = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.1}
    values |= {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    values |= {"max_iters": 12, "eval_interval": 3, "eval_iters": 2, "log_interval": 1}
    values |= {"checkpoint_interval": 4, "device": "cpu", "dtype": "float32", "preset": "none"}
    config = elsewhere(GPT2Config(data_dir=str(folder / "data"), **values), folder)
    assert in_child(main, config) == 0
    return config


@pytest.mark.parametrize("moment", [*KILLS, *MANY_KILLS])
def test_atomic_save_survives_a_kill_at_any_moment(undisturbed, tmp_path, moment):
    config = elsewhere(undisturbed, tmp_path)

    def bombed():
        Bomb(random.Random(moment).randrange(20, 900)).plant()
        return main(config)

    code = in_child(bombed)
    assert code in (0, -signal.SIGKILL)
    before = checkpoint.latest(config.checkpoint_dir)
    assert before is None or before[2] == []  # nothing damaged, ever
    assert in_child(main, config) == 0
    assert not list(Path(config.checkpoint_dir).glob(".*.tmp"))
    assert_same_run(config, undisturbed)


@pytest.mark.parametrize("moment", [*KILLS, *MANY_KILLS])
def test_resume_survives_a_kill_after_any_time(undisturbed, tmp_path, moment):
    config, chance = elsewhere(undisturbed, tmp_path), random.Random(moment)
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            os._exit(main(config))
        time.sleep(chance.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert in_child(main, config) == 0
    assert_same_run(config, undisturbed)


@pytest.mark.parametrize("name", ["best", "checkpoint_iter_40", "final", "latest"])
def test_resume_makes_up_for_a_kill_between_the_saves_of_a_step(config, name):
    config = replace(config, checkpoint_interval=20)
    undisturbed = elsewhere(config, f"{config.log_dir}/undisturbed")
    assert in_child(main, undisturbed) == 0

    def killed():
        save = checkpoint.save

        def dying(path, state, previous=None):
            latest = Path(path).name == "checkpoint.pt"
            if state["step"] == 40 and (latest if name == "latest" else name in str(path.name)):
                os.kill(os.getpid(), signal.SIGKILL)
            save(path, state, previous)

        checkpoint.save = dying
        return main(config)

    assert in_child(killed) == -signal.SIGKILL
    assert in_child(main, config) == 0
    assert_same_run(config, undisturbed)
    names = set(os.listdir(undisturbed.checkpoint_dir))
    assert set(os.listdir(config.checkpoint_dir)) == names


def test_resume_survives_damage_to_the_latest(config, capfd):
    undisturbed = elsewhere(config, f"{config.log_dir}/undisturbed")
    train(undisturbed)
    in_child(killed_at, config, 25)
    path = Path(config.checkpoint_dir) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1])
    train(config)
    err = capfd.readouterr().err
    assert f"{path}: not usable" in err and "previous_checkpoint.pt (the newest intact" in err
    assert same(saved(config)["model"], saved(undisturbed)["model"]) or torch.get_num_threads() > 1


def test_resume_goes_on_from_a_numbered_checkpoint_newer_than_the_last_evaluation(config, capfd):
    config = replace(config, eval_interval=20, checkpoint_interval=5)
    assert in_child(killed_at, config, 17) == -signal.SIGKILL
    assert in_child(main, config) == 0
    assert "checkpoint.pt (the newest intact checkpoint), step 15" in capfd.readouterr().err


def test_resume_goes_on_in_the_same_folder_with_no_doubled_points(config):
    in_child(killed_at, config, 27)
    assert in_child(main, config) == 0
    assert [record["step"] for record in logged(config)] == list(range(1, 41))


# ---------------------------------------------------------------- signals


def signalled_at(config, step, signum, times=1):
    update = Trainer.forward_backward

    def forward_backward(self, micro_step):
        if self.step == step and micro_step == 1:
            for _ in range(times):
                os.kill(os.getpid(), signum)
        return update(self, micro_step)

    Trainer.forward_backward = forward_backward
    return main(config)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [0, 13, 19])
def test_signal_finishes_the_step_saves_and_resumes_bit_exactly(config, signum, code, step):
    undisturbed = elsewhere(config, f"{config.log_dir}/undisturbed")
    assert in_child(main, undisturbed) == 0
    assert in_child(signalled_at, config, step, signum) == code
    assert saved(config, "checkpoint.pt")["step"] == step + 1
    assert in_child(main, config) == 0
    assert_same_run(config, undisturbed)


def test_second_signal_leaves_at_once_with_earlier_files_intact(config):
    assert in_child(signalled_at, config, 15, signal.SIGTERM, 2) == 143
    assert saved(config, "checkpoint.pt")["step"] == 10
    assert saved(config, "best_checkpoint.pt")["step"] == 10


# ---------------------------------------------------------------- bad numbers


def poisoned_at(monkeypatch, steps):
    update = Trainer.forward_backward

    def forward_backward(self, micro_step):
        loss = update(self, micro_step)
        if self.step in steps:
            next(self.raw_model.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)


def test_a_gradient_that_is_not_finite_changes_no_weight(config, monkeypatch):
    kept = {}
    update = Trainer.update

    def watched(self):
        kept[self.step] = {name: p.clone() for name, p in self.raw_model.state_dict().items()}
        try:
            return update(self)
        except NonFiniteError:
            kept["after"] = self.raw_model.state_dict()
            raise

    poisoned_at(monkeypatch, {6})
    monkeypatch.setattr(Trainer, "update", watched)
    with pytest.raises(NonFiniteError, match="step 7") as error:
        train(replace(config, eval_interval=3))
    assert error.value.exit_code == 5
    assert same(kept["after"], kept[6]) and not same(kept[6], kept[5])
    assert saved(config, "checkpoint.pt")["step"] == 6


def test_a_step_that_was_not_made_is_not_saved_as_made(config):
    """On CUDA the answer comes one step late; a save must not go before it."""
    trainer = Trainer(config, training.TokenDataset(config.data_dir))
    trainer.finite, trainer.arrival = torch.tensor(False), None
    with pytest.raises(NonFiniteError):
        trainer.save("checkpoint.pt")
    assert not (Path(config.checkpoint_dir) / "checkpoint.pt").exists()


def test_float16_skips_some_steps_but_not_without_end(config, monkeypatch):
    poisoned_at(monkeypatch, {3, 4, 5})
    config = replace(config, dtype="float16")
    assert train(config)["step"] == 40
    poisoned_at(monkeypatch, set(range(10, 40)))
    with pytest.raises(NonFiniteError):
        train(elsewhere(config, f"{config.log_dir}/again"))


def test_what_is_not_finite_is_null_in_metrics_and_never_the_best(config, monkeypatch, capfd):
    """A float16 step that was skipped, and an evaluation that overflowed; resumed, too."""
    poisoned_at(monkeypatch, {3})
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {10: math.nan}.get(self.step, 3.0))
    config = replace(config, dtype="float16", patience=2)
    for steps in (12, 30):
        train(replace(config, max_iters=steps))

    def no_json(word):
        raise ValueError(f"{word} is not JSON")

    (path,) = Path(config.log_dir).glob("*/metrics.jsonl")
    records = [json.loads(line, parse_constant=no_json) for line in path.open()]
    assert records[3]["grad_norm"] is None and records[3]["loss"] > 0
    assert [r["val_loss"] for r in records if "val_loss" in r] == [None, 3.0, 3.0, 3.0]
    assert saved(config, "best_checkpoint.pt")["step"] == 12
    err = capfd.readouterr().err
    assert "norm nan" in err and "val loss nan" in err


def test_a_first_loss_far_from_ln_v_is_warned_of(config, monkeypatch, capfd):
    train(replace(config, max_iters=1))
    assert "warning" not in capfd.readouterr().err
    init = training.GPT2._init_weights
    monkeypatch.setattr(
        training.GPT2, "_init_weights", lambda self: (init(self), self.lm_head.weight.data.mul_(99))
    )
    train(elsewhere(replace(config, max_iters=1), f"{config.log_dir}/again"))
    assert "warning: the first loss is" in capfd.readouterr().err


# ---------------------------------------------------------------- what does not fit


def errors(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]


def test_bad_input_flags_are_all_reported_at_once(config, capfd):
    code = main(
        config,
        "--n_layers",
        "3",
        "--out_dir=x",
        "--dropout",
        "2",
        "--n_head=x",
        "--lr_decay_iters",
        "1",
    )
    found = "\n".join(errors(capfd))
    assert code == 2
    for part in (
        "--n_layers; did you mean --n_layer?",
        "--out_dir; did you mean --checkpoint_dir?",  # nanoGPT's
        "--dropout 2",
        "--n_head x",
        "--lr_decay_iters",
    ):
        assert part in found


@pytest.mark.parametrize(
    "given, refused",
    [
        (("--n_embd", "64"), None),  # the preset has 4 heads
        (("--preset", "gpt2-xl", "--n_head", "20", "--n_layer", "1", "--block_size", "8"), None),
        (("--min_lr", "1e-3"), None),  # the preset's learning rate is 8e-3
        (("--n_embd", "66"), "--n_embd 66: not divisible by --n_head 4"),
        (("--n_embd", "66", "--n_head", "5"), "--n_embd 66: not divisible by --n_head 5"),
        (("--min_lr", "1"), "--min_lr 1.0: must be from 0 to --learning_rate 0.008"),
    ],
)
def test_flags_are_held_against_the_preset_not_against_gpt2(config, given, refused, capfd):
    own = ["--data_dir", config.data_dir, "--checkpoint_dir", config.checkpoint_dir]
    own += ["--log_dir", config.log_dir, "--device", "cpu", "--max_iters", "0"]
    assert run(training.main, [*own, *given]) == (2 if refused else 0)
    assert (refused or "finished") in capfd.readouterr().err


def test_a_run_of_no_steps_leaves_the_checkpoint_that_it_names(config):
    assert train(replace(config, max_iters=0)) == {"step": 0}
    assert checkpoint.load(Path(config.checkpoint_dir) / checkpoint.LATEST)["step"] == 0


def test_what_a_resumed_run_does_otherwise_is_said(config, capfd):
    train(replace(config, max_iters=1))
    assert "changed" not in capfd.readouterr().err
    train(replace(config, max_iters=2, learning_rate=1e-4, seed=7))
    said = capfd.readouterr().err
    assert "changed" in said and f"learning_rate: checkpoint {config.learning_rate}" in said
    assert "max_iters: checkpoint 1, config 2" in said and "config 7" in said


def test_bad_input_checkpoint_of_another_run_names_each_difference(config, capfd, tmp_path):
    train(replace(config, max_iters=2))
    before = sorted(os.listdir(config.checkpoint_dir))
    assert main(replace(config, n_embd=64, n_layer=3)) == 2
    found = errors(capfd)
    assert "error: n_layer: checkpoint 2, config 3" in found
    assert "error: n_embd: checkpoint 32, config 64" in found
    assert any("--fresh" in line for line in found)
    other = tmp_path / "other.txt"
    other.write_text("other text entirely\n" * 50)
    training.prepare_file(other, "char", tmp_path / "other")
    assert main(replace(config, data_dir=str(tmp_path / "other"))) == 2
    found = "\n".join(errors(capfd))
    assert "tokenizer: checkpoint" in found and "data set: checkpoint" in found
    assert sorted(os.listdir(config.checkpoint_dir)) == before


def test_bad_input_a_converted_model_in_the_place_of_a_checkpoint(config, capfd):
    data = training.TokenDataset(config.data_dir)
    model = GPT2(replace(config, vocab_size=data.vocab_size))
    path = Path(config.checkpoint_dir) / "checkpoint.pt"
    checkpoint.save(path, convert.new_state(model.config, model.state_dict(), None))
    assert main(config) == 2
    assert "error: tokenizer: checkpoint none, config char (another vocabulary)" in errors(capfd)


@pytest.mark.parametrize(
    "habit, said",
    [
        ("config/train_shakespeare_char.py", "settings are flags, or JSON for --config"),
        ("--init_from=resume", "a run goes on by itself"),
        ("--wandb_log=True", "did you mean --log_dir?"),
    ],
)
def test_bad_input_of_nanogpts_users_is_answered_with_what_is_here(config, habit, said, capfd):
    assert main(config, habit) == 2
    (error,) = errors(capfd)
    assert said in error


def test_bad_input_resume_without_a_checkpoint(config, capfd):
    assert main(config, "--resume") == 3
    assert len(errors(capfd)) == 1


def test_bad_input_all_checkpoints_damaged(config, capfd):
    train(replace(config, max_iters=2))
    paths = list(Path(config.checkpoint_dir).glob("*.pt"))
    for path in paths:
        path.write_bytes(b"damaged")
    for more in ((), ("--resume",)):
        assert main(config, *more) == 3
        found = "\n".join(errors(capfd))
        assert all(path.name in found and path.read_bytes() == b"damaged" for path in paths)


def test_fresh_sets_the_earlier_run_aside_once_all_is_checked(config):
    train(replace(config, max_iters=2))
    folder = Path(config.checkpoint_dir)
    assert main(config, "--fresh", "--block_size", "100000") == 2
    assert saved(config)["step"] == 2
    assert main(config, "--fresh", "--max_iters", "3") == 0
    (aside,) = [path for path in folder.iterdir() if path.is_dir()]
    assert checkpoint.load(aside / "final_checkpoint.pt")["step"] == 2
    assert saved(config)["step"] == 3


def test_a_finished_run_says_so_and_can_go_on(config, capfd):
    train(replace(config, max_iters=3))
    capfd.readouterr()
    assert main(replace(config, max_iters=3)) == 0
    assert "finished" in capfd.readouterr().err
    assert main(replace(config, max_iters=5), "--resume") == 0
    assert saved(config)["step"] == 5


def test_bad_input_second_trainer_in_one_folder_names_the_first(config, capfd):
    with lock(config.checkpoint_dir):
        pid = os.getpid()
        assert in_child(main, config) == 2
    found = errors(capfd)
    assert len(found) == 1 and f"process {pid}" in found[0]
    assert main(replace(config, max_iters=1)) == 0


def test_a_lock_left_by_a_dead_process_does_not_block(config):
    assert in_child(killed_at, config, 5) == -signal.SIGKILL
    assert main(replace(config, max_iters=12)) == 0


def test_a_folder_of_logs_that_is_read_only_is_exit_4(config, capfd, monkeypatch):
    mkdir = os.mkdir

    def read_only(path, *mode):
        if str(path).startswith(config.log_dir):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", read_only)
    assert main(config) == 4
    assert errors(capfd) == [f"error: {config.log_dir}: Permission denied"]


def test_bad_input_id_beyond_the_vocabulary_in_the_data(config, capfd):
    path = Path(config.data_dir) / "train.bin"
    data = bytearray(path.read_bytes())
    data[1000:1002] = b"\xff\xff"
    path.write_bytes(data)
    assert main(replace(config, max_iters=60)) == 2  # more than an epoch: each window comes
    assert "token id 65535 at position 500" in errors(capfd)[0]


def test_bad_input_no_data_set(config, capfd, tmp_path):
    assert main(replace(config, data_dir=str(tmp_path / "none"))) == 2
    assert "prepare_data.py" in errors(capfd)[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate"),
        MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"),
    ],
    ids=["cuda", "mps", "cpu", "numpy"],
)
def test_out_of_memory_is_one_line_with_the_remedy(config, capfd, monkeypatch, error):
    def no_memory(self):
        raise error

    monkeypatch.setattr(Trainer, "update", no_memory)
    assert main(config) == 2
    found = errors(capfd)
    assert len(found) == 1 and "--batch_size (now 4)" in found[0]
    assert saved(config, "checkpoint.pt")["step"] == 0


# ---------------------------------------------------------------- the command line


def test_data_flag_prepares_trains_and_prints_a_sample(tmp_path, monkeypatch, capfd):
    text = tmp_path / "novel.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 60)
    monkeypatch.chdir(tmp_path)
    words = "--max_iters 5 --eval_interval 5 --batch_size 2 --block_size 32 --n_layer 1 --n_head 2"
    argv = ["--data", "novel.txt", "--tokenizer", "char", *words.split(), "--n_embd", "16"]
    argv += ["--device", "cpu", "--prompt", "It was", "--max_new_tokens", "20"]
    assert run(training.main, argv) == 0
    out = capfd.readouterr().out
    assert out.startswith("It was") and len(out.rstrip("\n")) <= len("It was") + 20


@pytest.mark.parametrize(
    "more, words",
    [(["--prompt", "café"], "U+00E9"), (["--max_new_tokens", "-3"], "--max_new_tokens -3")],
)
def test_bad_input_for_the_sample_is_told_before_training(config, capfd, more, words):
    assert main(config, *more) == 2
    assert words in errors(capfd)[0]
    assert not Path(config.checkpoint_dir).exists()


def test_no_flags_but_the_text_fit_themselves_to_a_tiny_text(tmp_path, monkeypatch):
    text = tmp_path / "note.txt"
    text.write_text("a small note, hardly anything at all. " * 8)
    monkeypatch.chdir(tmp_path)
    assert (
        run(training.main, ["--data", "note.txt", "--tokenizer", "char", "--max_iters", "3"]) == 0
    )


def test_a_run_whose_messages_nobody_reads_goes_on_to_its_end(config):
    """`python train.py 2>&1 | head` is no reason to stop, and to call it done."""

    def unheard():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        sys.stderr = open(2, "w", closefd=False)
        return main(config)

    assert in_child(unheard) == 0
    assert saved(config)["step"] == 40


def test_learning_rate_logged_is_that_of_the_schedule(config):
    train(config)
    full = training.settings.derived(config)
    for record in logged(config):
        assert record["lr"] == learning_rate(record["step"] - 1, full)


# ---------------------------------------------------------------- other weights to start from


def pretrained(config, folder, **changes):
    """A checkpoint of another run, of the same text."""
    other = replace(elsewhere(config, folder), max_iters=15, seed=7, **changes)
    train(other)
    return Path(other.checkpoint_dir) / "final_checkpoint.pt"


def test_init_from_begins_with_those_weights_and_a_new_optimizer(config, tmp_path):
    path = pretrained(config, tmp_path / "other")
    trainer = started(config, path)
    assert same(trainer.raw_model.state_dict(), checkpoint.load(path)["model"])
    assert trainer.step == 0 and not trainer.optimizer.state and trainer.best_val_loss is None


def started(config, path, chosen=()):
    given, start = start_from(path, config, chosen)
    return Trainer(given, training.TokenDataset(config.data_dir), start=start)


def test_init_from_resumes_saves_the_best_and_generates_bit_exactly(config, tmp_path, capsys):
    path = pretrained(config, tmp_path / "other")
    undisturbed = elsewhere(config, f"{config.log_dir}/undisturbed")
    more = ["--init_from", str(path), "--dropout", "0.2"]
    assert main(undisturbed, *more) == 0
    assert in_child(killed_at, config, 23, *more) == -signal.SIGKILL
    assert main(config, *more, "--prompt", "the quick") == 0
    assert_same_run(config, undisturbed)
    out, err = capsys.readouterr()
    assert out.startswith("the quick") and "resuming" in err
    first = logged(config)[0]["loss"]
    assert first < logged(elsewhere(config, tmp_path / "other"))[0]["loss"] - 0.2
    assert saved(config, "best_checkpoint.pt")["best_val_loss"] == min(
        record["val_loss"] for record in logged(config) if "val_loss" in record
    )


def test_init_from_keeps_what_it_began_with_no_longer_than_needed(config, tmp_path, monkeypatch):
    path, tables, held = pretrained(config, tmp_path / "other"), [], []
    load, update = training.load_state, Trainer.update

    def watched(spec):
        state, name = load(spec)
        tables.append(weakref.ref(state["model"]["transformer.wte.weight"]))
        return state, name

    def step(trainer):
        held.append(tables[0]() is not None)
        return update(trainer)

    monkeypatch.setattr(training, "load_state", watched)
    monkeypatch.setattr(Trainer, "update", step)
    assert main(replace(config, max_iters=2), "--init_from", str(path)) == 0
    assert held == [False, False]


def test_init_from_crops_the_table_of_positions(config, tmp_path):
    path = pretrained(config, tmp_path / "other")
    trainer = started(replace(config, block_size=9), path, {"block_size"})
    table = trainer.raw_model.transformer.wpe.weight
    assert torch.equal(table, checkpoint.load(path)["model"]["transformer.wpe.weight"][:9])


def test_init_from_with_a_preset_keeps_the_models_shape(config, tmp_path):
    path = pretrained(config, tmp_path / "other")
    given, start = start_from(path, GPT2Config(data_dir=config.data_dir))
    chosen = {"data_dir"}
    for preset in ("auto", "shakespeare-cpu", "finetune"):
        new = training.with_preset(replace(given, preset=preset), chosen, start)
        assert (new.n_layer, new.n_embd, new.block_size) == (2, 32, 16)
    assert training.with_preset(given, chosen, start).learning_rate == 5e-5


@pytest.mark.parametrize(
    "more, words",
    [
        (["--n_layer", "3"], ["--n_layer 3", "has 2"]),
        (["--block_size", "17"], ["--block_size 17", "has 16"]),
        (["--position", "rope"], ["--position rope", "has learned"]),
        (["--init_from", "nowhere.pt"], ["nowhere.pt"]),
    ],
)
def test_init_from_what_does_not_fit_is_one_line(config, tmp_path, capsys, more, words):
    path = pretrained(config, tmp_path / "other")
    capsys.readouterr()
    assert main(config, "--init_from", str(path), *more) in (2, 3)
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and all(word in err for word in words)
    assert not Path(config.checkpoint_dir).exists()


def test_init_from_reads_new_text_with_the_models_tokenizer(config, tmp_path, monkeypatch):
    path = pretrained(config, tmp_path / "other")
    text = tmp_path / "fox.txt"
    text.write_text("the lazy fox jumps over the quick brown dog. " * 60, "utf-8")
    monkeypatch.chdir(tmp_path)
    small = ["--device", "cpu", "--max_iters", "3", "--data", str(text)]
    assert run(training.main, [*small, "--init_from", str(path)]) == 0
    dataset = training.TokenDataset(tmp_path / "data" / "fox-char-as-given")
    model_s = load_tokenizer(checkpoint.load(path)["tokenizer"])
    assert dataset.meta["tokenizer"]["sha256"] == model_s.hash()
    assert model_s.decode(dataset.train[:8].tolist()) == "the lazy"
    assert run(training.main, [*small, "--init_from", str(path), "--max_iters", "5"]) == 0
    text.write_text("ünknown " * 60, "utf-8")
    other = [*small[:-1], str(text), "--data_dir", str(tmp_path / "u"), "--init_from", str(path)]
    assert run(training.main, other) == 2  # a character that the model has never seen


def test_init_from_a_model_of_another_vocabulary_is_refused(config, tmp_path, capsys):
    text = tmp_path / "other.txt"
    text.write_text("abc " * 500, "utf-8")
    other = replace(
        elsewhere(config, tmp_path / "abc"), max_iters=2, data_dir=str(tmp_path / "abc")
    )
    assert main(other, "--data", str(text), "--tokenizer", "char") == 0
    capsys.readouterr()
    path = Path(other.checkpoint_dir) / "final_checkpoint.pt"
    assert main(config, "--init_from", str(path)) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "knows 4 tokens (char)" in err


def test_fine_tuning_a_folder_resumes_generates_and_exports(config, tmp_path, capsys):
    """A random model in Hugging Face's format, as someone else's pretrained one would come."""
    pytest.importorskip("safetensors")
    data = training.TokenDataset(config.data_dir)
    torch.manual_seed(5)
    model = GPT2(replace(config, vocab_size=data.vocab_size, block_size=24))
    tokenizer = load_tokenizer(data.tokenizer_path)
    state = convert.new_state(model.config, model.state_dict(), tokenizer)
    checkpoint.save(tmp_path / "random.pt", state)
    folder, exported = tmp_path / "pretrained", tmp_path / "exported"
    convert.to_hf(str(tmp_path / "random.pt"), folder)

    undisturbed = elsewhere(config, f"{config.log_dir}/undisturbed")
    more = ["--init_from", str(folder)]
    assert main(undisturbed, *more) == 0
    assert in_child(killed_at, config, 23, *more) == -signal.SIGKILL
    assert main(config, *more) == 0
    assert_same_run(config, undisturbed)
    best = saved(config, "best_checkpoint.pt")
    assert best["best_val_loss"] == min(r["val_loss"] for r in logged(config) if "val_loss" in r)

    path = str(Path(config.checkpoint_dir) / "best_checkpoint.pt")
    texts = batch_generate(["the quick"], checkpoint=path, device="cpu", temperature=0)
    convert.to_hf(path, exported)
    assert (
        batch_generate(["the quick"], checkpoint=str(exported), device="cpu", temperature=0)
        == texts
    )
    assert capsys.readouterr().err.count("warning") == 0


# ---------------------------------------------------------------- only evaluating


def test_eval_only_prints_the_loss_and_leaves_everything_as_it_was(config, capsys):
    train(config)
    expected = logged(config)[-1]["val_loss"]
    before = {p: p.read_bytes() for p in Path(config.checkpoint_dir).parent.rglob("*.*")}
    capsys.readouterr()
    assert main(config, "--eval_only") == 0
    assert capsys.readouterr().out == (
        f"step 40: validation loss {expected:.4f}, perplexity {math.exp(expected):.2f}\n"
    )
    after = {p: p.read_bytes() for p in Path(config.checkpoint_dir).parent.rglob("*.*")}
    assert {p: b for p, b in after.items() if p.name != ".lock"} == {
        p: b for p, b in before.items() if p.name != ".lock"
    }


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_positions_without_a_table_train_resume_and_export_state(config, position):
    config = replace(config, position=position)
    undisturbed = elsewhere(config, f"{config.log_dir}/undisturbed")
    assert main(undisturbed) == 0
    assert in_child(killed_at, config, 17) == -signal.SIGKILL
    assert main(config) == 0
    assert_same_run(config, undisturbed)
    assert "transformer.wpe.weight" not in saved(config)["model"]
    assert logged(config)[-1]["val_loss"] < 3.3
