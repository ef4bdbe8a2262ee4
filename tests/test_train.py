"""The training loop: what it logs and saves, and that no way of ending it loses anything. Runs that
are killed are forked children.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TEXT, fork, in_child, prepare, same

import checkpoint
import convert
import evaluate
import state as run_state
import train as training
from config import GPT2_CONFIGS, GPT2Config, derived
from data import BatchSampler, TokenDataset
from files import lock
from logger import run
from model import GPT2
from optim import learning_rate
from sampling import sample_text
from state import FoundInf, NonFiniteError
from tokenizer import load_tokenizer
from train import train

OLD = Path(__file__).parent / "old"  # made before the redesign: see expected.json there
KILLS = [*range(5), *(pytest.param(i, marks=pytest.mark.slow) for i in range(5, 50))]


def flags(config):
    """The same config as a command line."""
    values = {name: v for name, v in vars(config).items() if v is not None}
    del values["vocab_size"]  # comes from the data set
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


def errors(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]


def assert_same_run(one, other):
    a, b = saved(one), saved(other)
    for key in ("step", "best_val_loss", "model", "optimizer", "scaler", "rng"):
        assert same(a[key], b[key]), key
    assert logged(one) == logged(other)


def undisturbed(config, *more):
    """The config of the same run elsewhere, which nothing has disturbed."""
    config = elsewhere(config, f"{config.log_dir}/undisturbed")
    assert in_child(main, config, *more) == 0
    return config


def during(step, action, micro_step=1, patch=setattr):
    """Have action called in the middle of update number `step` (from 0), before a micro-batch."""
    batch = BatchSampler.batch

    def watched(sampler, now, micro=0):
        if (now, micro) == (step, micro_step):
            action()
        return batch(sampler, now, micro)

    patch(BatchSampler, "batch", watched)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(config, step, *more, micro_step=1):
    """Train, and die by SIGKILL in the middle of update number `step`."""
    during(step, die, micro_step)
    return main(config, *more)


def poisoned_at(steps, patch):
    """The gradients of these updates are NaN; the loss is as it was."""
    forward, batch, now = GPT2.forward, BatchSampler.batch, [None]

    def watched(sampler, step, micro_step=0):
        now[0] = step
        return batch(sampler, step, micro_step)

    def poisoned(model, *arguments, **options):
        logits, loss = forward(model, *arguments, **options)
        if loss is not None and loss.requires_grad and now[0] in steps:
            loss.register_hook(lambda grad: grad * math.nan)
        return logits, loss

    patch(BatchSampler, "batch", watched)
    patch(GPT2, "forward", poisoned)


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, dropout=0.1, preset="none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_samples):
    """A finished run that others are compared with, which are killed, say."""
    folder = tmp_path_factory.mktemp("finished")
    values = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.1}
    values |= {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    values |= {"max_iters": 12, "eval_interval": 3, "eval_iters": 2, "log_interval": 1}
    values |= {"checkpoint_interval": 4, "device": "cpu", "dtype": "float32", "preset": "none"}
    data_dir = str(prepare(TEXT, folder / "data"))
    config = elsewhere(GPT2Config(data_dir=data_dir, **values), folder)
    assert in_child(main, config) == 0
    return config


@pytest.fixture
def again(finished, tmp_path):
    """The config of the same run in another folder."""
    return elsewhere(finished, tmp_path)


@pytest.fixture
def val_losses(monkeypatch):
    """What the evaluations shall find, one after the other, once it is filled."""
    losses = []
    monkeypatch.setattr(training, "estimate_loss", lambda *_: losses.pop(0))
    return losses


# ---------------------------------------------------------------- what a run leaves


def test_a_run_logs_and_saves_what_it_promises(config):
    last = train(replace(config, eval_interval=5))
    (folder,) = Path(config.log_dir).iterdir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 21)) and records[-1] == last
    names = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds"}
    assert all(names <= record.keys() for record in records)
    assert [r["step"] for r in records if "val_loss" in r] == [5, 10, 15, 20]
    assert records[-1]["loss"] < records[0]["loss"] < math.log(80)
    assert all(r["lr"] == learning_rate(r["step"] - 1, derived(config)) for r in records)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert list(folder.glob("events.out.tfevents.*"))
    written = json.loads((folder / "config.json").read_text())
    assert GPT2Config(**written) == replace(config, eval_interval=5, vocab_size=40)
    kept = {"checkpoint.pt", "previous_checkpoint.pt", "best_checkpoint.pt", "final_checkpoint.pt"}
    assert kept <= set(os.listdir(config.checkpoint_dir))
    state = saved(config)
    assert (state["step"], state["run"]) == (20, folder.name) and set(state) == set(checkpoint.KEYS)
    assert state["best_val_loss"] == min(r["val_loss"] for r in records if "val_loss" in r)


def test_tensorboard_shows_each_step_once(config, val_losses):
    """Of a run that was cut short after step 8, saved at step 5, and then made to its end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    val_losses += [3.1, 2.9, 3.2, 2.8]
    config = replace(config, eval_interval=5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        during(8, Mock(side_effect=KeyboardInterrupt), patch=patch.setattr)
        train(config)
    train(config)
    (folder,) = Path(config.log_dir).iterdir()
    shown = EventAccumulator(str(folder)).Reload()
    for tag, name in {"loss/train": "loss", "loss/val": "val_loss", "lr": "lr"}.items():
        points = [(event.step, event.value) for event in shown.Scalars(tag)]
        assert points == [(r["step"], np.float32(r[name])) for r in logged(config) if name in r]
    best = [event.value for event in shown.Scalars("best_val_loss")]
    assert best == pytest.approx([3.1, 2.9, 2.9, 2.8])
    memory = [event.value for event in shown.Scalars("memory_mb")]
    assert 100 < memory[0] and memory == sorted(memory)  # torch alone takes more
    (config_text, *_), samples = (shown.Tensors(tag) for tag in ("config", "sample"))
    assert b'"n_embd": 32' in config_text.tensor_proto.string_val[0]
    assert [event.step for event in samples] == [5, 10, 15, 20]


def test_the_last_step_is_logged_and_evaluated_and_few_numbered_checkpoints_stay(config):
    often = {"checkpoint_interval": 2, "keep_checkpoints": 2}
    last = train(replace(config, max_iters=7, log_interval=5, eval_interval=100, **often))
    assert [record["step"] for record in logged(config)] == [5, 7]
    assert last["step"] == 7 and "val_loss" in last
    numbered = {path.name for path in Path(config.checkpoint_dir).glob("checkpoint_iter_*.pt")}
    assert numbered == {"checkpoint_iter_4.pt", "checkpoint_iter_6.pt"}


def test_a_run_of_no_steps_leaves_the_checkpoint_that_it_names(config):
    assert train(replace(config, max_iters=0)) == {"step": 0}
    assert saved(config, "checkpoint.pt")["step"] == 0


def test_best_is_replaced_only_by_a_lower_loss_and_patience_ends_a_run(config, val_losses, capfd):
    val_losses += [3.0, 2.0, 2.5, 2.2]
    config = replace(config, max_iters=100, eval_interval=5, patience=2)
    assert train(config)["step"] == 20
    assert saved(config, "best_checkpoint.pt")["step"] == 10
    assert saved(config)["best_val_loss"] == 2.0
    assert train(config)["step"] == 20  # there is nothing to go on with
    assert "--patience none trains it for longer" in capfd.readouterr().err


@pytest.mark.slow
def test_compile_works_or_says_that_it_does_not(config, capfd):
    train(replace(config, max_iters=3, compile=True))
    assert "compil" in capfd.readouterr().err
    assert not any("_orig_mod" in name for name in saved(config)["model"])


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nlong story"), AssertionError()])
def test_training_goes_on_where_compile_is_not_possible(config, monkeypatch, capfd, error):
    monkeypatch.setattr(torch, "compile", lambda model: Mock(side_effect=error))
    assert train(replace(config, max_iters=3, compile=True))["step"] == 3
    reason = "no compiler" if str(error) else "AssertionError"
    said = f"torch.compile does not work here ({reason}); training goes on without it"
    assert capfd.readouterr().err.count(said) == 1


@pytest.mark.parametrize(
    "dtype, optimizer",
    [("float32", "muon"), ("bfloat16", "adamw"), ("float16", "muon"), ("float64", "adamw")],
)
def test_every_precision_learns(config, dtype, optimizer):
    """With the other optimizer than where test_resume_is_bit_exact resumes it."""
    config.dtype = getattr(torch, dtype)  # as from Python; a name is what flags have
    train(replace(config, optimizer=optimizer, learning_rate=1e-2))
    losses = [record["loss"] for record in logged(config)]
    assert losses[-1] < losses[0] - 0.3 and saved(config)["config"]["dtype"] == dtype


def test_a_run_whose_messages_nobody_reads_goes_on_to_its_end(again):
    """`python train.py 2>&1 | head` is no reason to stop, and to call it done."""

    def unheard():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        sys.stderr = open(2, "w", closefd=False)
        return main(again)

    assert in_child(unheard) == 0
    assert saved(again)["step"] == 12


# ---------------------------------------------------------------- the same numbers


def test_accumulation_equals_one_large_batch(config, monkeypatch):
    """4 micro-batches of 2: loss and gradients of one batch of 8, and the weights of 40 steps."""
    config = replace(config, dropout=0.0, dtype="float64", max_iters=40)
    clip, gradients, runs = torch.nn.utils.clip_grad_norm_, [], []

    def watched(parameters, limit):
        parameters = list(parameters)
        gradients[-1] = gradients[-1] or [p.grad.clone() for p in parameters]
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    for batch_size, accumulation in ((8, 1), (2, 4)):
        values = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        runs.append(replace(elsewhere(config, f"{config.log_dir}/{batch_size}"), **values))
        gradients.append(None)
        train(runs[-1])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-12
    weights = [saved(there)["model"] for there in runs]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-12 for name in weights[0])
    for one, other in zip(*map(logged, runs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)


def test_updates_and_evaluations_ask_for_deterministic_kernels_and_samples_do_not(
    config, monkeypatch
):
    """As with compiled kernels of a CPU; the cumulative sum of a sample has none on CUDA."""
    asked, state = {}, torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr("state.compile_model", lambda model: model)
    config = replace(config, compile=True)
    monkeypatch.setattr(training, "estimate_loss", lambda *_: asked.update(loss=state()) or 1.0)
    monkeypatch.setattr(training, "sample_text", lambda *_, **__: asked.update(sample=state()))
    during(3, lambda: asked.update(update=state()), patch=monkeypatch.setattr)
    for on in (True, False):
        train(elsewhere(replace(config, max_iters=4, deterministic=on), f"{config.log_dir}/{on}"))
        assert asked == {"update": on, "loss": on, "sample": False} and not state()


def test_evaluating_and_logging_change_nothing(finished, again):
    train(replace(again, eval_interval=2, log_interval=5))
    for key in ("model", "optimizer", "rng"):
        assert same(saved(finished)[key], saved(again)[key])


def test_a_checkpoint_and_a_data_set_of_before_the_redesign_go_on(tmp_path, capsys):
    """Muon with its AdamW, dropout, accumulation: the losses that the old code would have made,
    the loss and the text that it found.
    """
    expected = json.loads((OLD / "expected.json").read_text())
    config = GPT2Config(**checkpoint.load(OLD / "checkpoint.pt")["config"])
    config = replace(elsewhere(config, tmp_path), data_dir=str(OLD / "data"), max_iters=105)
    Path(config.checkpoint_dir).mkdir()
    path = str(shutil.copy(OLD / "checkpoint.pt", config.checkpoint_dir))
    flags = ["--checkpoint", path, "--data_dir", config.data_dir, "--dtype", "float32", "--json"]
    assert evaluate.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    model, tokenizer = checkpoint.load_model(path, "cpu", "float32")
    assert sample_text(model, tokenizer, "the cat", 60, temperature=0) == expected["text"]
    train(config, resume=True)
    for one, other in zip(logged(config), expected["resumed"], strict=True):
        assert one == pytest.approx(other, abs=1e-6)


# ---------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize(
    "optimizer, dtype, position",
    [
        ("adamw", "float32", "learned"),
        ("muon", "bfloat16", "rope"),
        ("adamw", "float16", "alibi"),
    ],
)
def test_resume_is_bit_exact(config, optimizer, dtype, position):
    config = replace(config, optimizer=optimizer, dtype=dtype, position=position, max_iters=40)
    for step in sorted(random.Random(0).sample(range(1, 40), 2)):
        assert in_child(killed_at, config, step) == -signal.SIGKILL
    assert in_child(main, config) == 0
    assert_same_run(config, undisturbed(config))
    assert [record["step"] for record in logged(config)] == list(range(1, 41))
    assert ("transformer.wpe.weight" in saved(config)["model"]) == (position == "learned")


def die_while_saving(moment):
    """SIGKILL at the n-th of the writes, syncs and renames of all saves."""
    left, save = iter(range(moment)), torch.save

    def tick():
        if next(left, None) is None:
            die()

    def ticking(function):
        return lambda *arguments, **options: (tick(), function(*arguments, **options))[1]

    def save_by_halves(state, file):
        def write(data):
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                tick()
                file.write(half)
                file.flush()
            return len(data)

        save(state, SimpleNamespace(write=write, flush=file.flush))

    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, ticking(getattr(os, name)))
    torch.save = save_by_halves


@pytest.mark.parametrize("moment", KILLS)
def test_atomic_save_survives_a_kill_at_any_moment(finished, again, moment):
    """Two of them: after any time, and in the middle of saving."""
    chance = random.Random(moment)
    pid = fork(main, again)
    time.sleep(chance.uniform(0.02, 0.4))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    def killed():
        die_while_saving(chance.randrange(20, 900))
        return main(again)

    assert in_child(killed) in (0, -signal.SIGKILL)
    before = checkpoint.latest(again.checkpoint_dir)
    assert before is None or before[2] == []  # nothing damaged, ever
    assert in_child(main, again) == 0
    assert not list(Path(again.checkpoint_dir).glob(".*.tmp"))
    assert_same_run(again, finished)


@pytest.mark.parametrize("name", ["best", "checkpoint_iter_12", "final", "checkpoint.pt"])
def test_resume_makes_up_for_a_kill_between_the_saves_of_a_step(finished, again, name):
    def killed():
        save = checkpoint.save

        def dying(path, state, previous=None):
            if state["step"] == 12 and Path(path).name.startswith(name):
                die()
            save(path, state, previous)

        checkpoint.save = dying
        return main(again)

    assert in_child(killed) == -signal.SIGKILL
    assert in_child(main, again) == 0
    assert_same_run(again, finished)
    assert set(os.listdir(again.checkpoint_dir)) == set(os.listdir(finished.checkpoint_dir))


def test_resume_survives_damage_to_the_latest(finished, again, capfd):
    """Which, with the one before it, is also written with the numbered checkpoints."""
    assert in_child(killed_at, again, 8) == -signal.SIGKILL
    path = Path(again.checkpoint_dir) / "checkpoint.pt"
    assert checkpoint.load(path)["step"] == 8
    path.write_bytes(path.read_bytes()[:-1])
    assert in_child(main, again) == 0
    err = capfd.readouterr().err
    assert f"{path}: not usable" in err and path.with_name(f"{path.name}.damaged").exists()
    assert "previous_checkpoint.pt (the newest intact checkpoint), step 6" in err
    assert_same_run(again, finished)


# ---------------------------------------------------------------- signals


def signalled_at(config, step, signum, times=1):
    during(step, lambda: [os.kill(os.getpid(), signum) for _ in range(times)])
    return main(config)


@pytest.mark.parametrize(  # in the first step, in the middle, in one that an evaluation follows
    "signum, step", [(signal.SIGINT, 0), (signal.SIGTERM, 6), (signal.SIGINT, 8)]
)
def test_signal_finishes_the_step_saves_and_resumes_bit_exactly(
    finished, again, signum, step, capfd
):
    assert in_child(signalled_at, again, step, signum) == 128 + signum
    assert saved(again, "checkpoint.pt")["step"] == step + 1
    said = f"stopped    {signum.name} after step {step + 1} of 12; saved in"
    assert said in capfd.readouterr().err
    assert in_child(main, again) == 0
    assert_same_run(again, finished)


def test_second_signal_leaves_at_once_with_earlier_files_intact(again):
    assert in_child(signalled_at, again, 7, signal.SIGTERM, 2) == 143
    assert saved(again, "checkpoint.pt")["step"] == saved(again, "best_checkpoint.pt")["step"] == 6


# ---------------------------------------------------------------- bad numbers


def test_a_gradient_that_is_not_finite_changes_no_weight(config, monkeypatch):
    build, built, kept = training.build_state, [], []

    def keep():
        kept.append({name: p.clone() for name, p in built[0].model.state_dict().items()})

    for step in (5, 6):
        during(step, keep, patch=monkeypatch.setattr)
    monkeypatch.setattr(training, "build_state", lambda *how: built.append(build(*how)) or built[0])
    poisoned_at({6}, monkeypatch.setattr)
    with pytest.raises(NonFiniteError, match="step 7") as error:
        train(replace(config, eval_interval=3))
    assert error.value.exit_code == 5
    keep()
    assert same(kept[2], kept[1]) and not same(kept[1], kept[0])
    assert saved(config, "checkpoint.pt")["step"] == 6


def test_a_step_that_was_not_finite_is_not_saved_as_made(config):
    """Also if it was not logged: only a log, an evaluation or a save asks the device."""
    found_inf = FoundInf(torch.device("cpu"), 0, config.checkpoint_dir)
    for loss in (1.0, math.nan, 1.0):  # after the second no step is taken
        taken = found_inf.check(torch.tensor(loss), torch.tensor(1.0), None)
    state = SimpleNamespace(found_inf=found_inf, step=6)
    with pytest.raises(NonFiniteError, match="step 5;"):
        run_state.save_state(state, config, None, None, ["checkpoint.pt"])
    assert not taken


def test_float16_skips_some_steps_but_not_without_end(config, monkeypatch):
    poisoned_at({3, 4, 5, *range(7, 40)}, monkeypatch.setattr)
    with pytest.raises(NonFiniteError, match="step 28"):
        train(replace(config, dtype="float16", max_iters=40))


def test_what_is_not_finite_is_null_in_metrics_and_never_the_best(
    config, monkeypatch, val_losses, capfd
):
    """A float16 step that was skipped, and an evaluation that overflowed; resumed, too."""
    poisoned_at({3}, monkeypatch.setattr)
    val_losses += [math.nan, 3.0, 3.0, 3.0]
    config = replace(config, dtype="float16", eval_interval=5, patience=2)
    for steps in (7, 15):
        train(replace(config, max_iters=steps))

    (path,) = Path(config.log_dir).glob("*/metrics.jsonl")
    records = [
        json.loads(line, parse_constant=Mock(side_effect=ValueError)) for line in path.open()
    ]
    assert records[3]["grad_norm"] is None and records[3]["loss"] > 0
    assert [r["val_loss"] for r in records if "val_loss" in r] == [None, 3.0, 3.0, 3.0]
    assert saved(config, "best_checkpoint.pt")["step"] == 7
    err = capfd.readouterr().err
    assert "norm nan" in err and "val loss nan" in err


def test_a_first_loss_far_from_ln_v_is_warned_of(config, monkeypatch, capfd):
    train(replace(config, max_iters=1))
    assert "warning" not in capfd.readouterr().err
    init = GPT2._init_weights
    large = lambda model: (init(model), model.lm_head.weight.data.mul_(99))  # noqa: E731
    monkeypatch.setattr(GPT2, "_init_weights", large)
    train(elsewhere(replace(config, max_iters=1), f"{config.log_dir}/again"))
    assert "warning: the first loss is" in capfd.readouterr().err


# ---------------------------------------------------------------- what does not fit


def test_bad_input_flags_are_all_reported_at_once(config, capfd):
    """nanoGPT's among them."""
    wrong = "--n_layers 3 --wandb_log=True --dropout 2 --n_head x --lr_decay_iters 1"
    wrong += " --warmup_iters 2 --max_new_tokens -3 --resume --fresh --init_from=resume"
    assert main(config, *wrong.split()) == 2
    found = "\n".join(errors(capfd))
    for part in (
        "--n_layers; did you mean --n_layer?",
        "unknown flag --wandb_log",
        "--dropout 2",
        "--n_head x",
        "--lr_decay_iters 1: less than --warmup_iters 2",
        "--max_new_tokens -3",
        "--fresh: not with --resume",
        "--init_from resume: a run goes on by itself",
    ):
        assert part in found
    assert main(config, "config/train_shakespeare_char.py") == 2
    assert "unexpected argument 'config/train" in errors(capfd)[0]
    assert main(config, "--prompt", "café") == 2
    assert "U+00E9" in errors(capfd)[0]
    assert not Path(config.checkpoint_dir).exists()


@pytest.mark.parametrize(
    "given, refused",
    [
        (("--n_embd", "64"), None),  # the preset has 4 heads
        (("--preset", "gpt2-medium", "--n_head", "8", "--n_layer", "1", "--block_size", "8"), None),
        (("--min_lr", "1e-3"), None),  # the preset's learning rate is 8e-3
        (("--n_embd", "66"), "--n_embd 66: not divisible by --n_head 4"),
        (("--n_embd", "66", "--n_head", "5"), "--n_embd 66: not divisible by --n_head 5"),
        (("--min_lr", "1"), "--min_lr 1.0: more than --learning_rate 0.008"),
    ],
)
def test_flags_are_held_against_the_preset_not_against_gpt2(config, given, refused, capfd):
    own = ["--data_dir", config.data_dir, "--checkpoint_dir", config.checkpoint_dir]
    own += ["--log_dir", config.log_dir, "--device", "cpu", "--max_iters", "0"]
    assert run(training.main, [*own, *given]) == (2 if refused else 0)
    assert (refused or "finished") in capfd.readouterr().err


def test_flags_go_before_a_config_file_an_edited_default_and_the_preset(
    config, tmp_path, monkeypatch, capfd
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"dropout": 0.3, "n_head": 2, "data_dir": config.data_dir}))
    monkeypatch.setitem(GPT2_CONFIGS["gpt2"], "n_layer", 11)  # so 12 looks edited
    argv = ["--config", str(path), "--n_head", "8", "--device", "cpu"]
    _, given, chosen = training.parse_command_line(argv)
    resolved = training.with_preset(given, chosen)
    assert (resolved.n_head, resolved.dropout, resolved.n_layer) == (8, 0.3, 12)
    assert resolved.n_embd == GPT2_CONFIGS["shakespeare-cpu"]["n_embd"] != given.n_embd
    assert "preset     shakespeare-cpu, for cpu and" in capfd.readouterr().err
    path.write_text('{"n_layers": 3, "n_head": "x"}')
    assert main(config, "--config", str(path), "--dropout", "2") == 2
    found = "\n".join(errors(capfd))
    assert "did you mean n_layer?" in found and "--dropout 2" in found


def test_bad_input_checkpoint_of_another_run_names_each_difference(config, capfd, tmp_path):
    train(replace(config, max_iters=2))
    before = sorted(os.listdir(config.checkpoint_dir))
    assert main(replace(config, n_embd=64, n_layer=3)) == 2
    found = errors(capfd)
    assert "error: n_layer: checkpoint 2, config 3" in found
    assert "error: n_embd: checkpoint 32, config 64" in found
    assert any("--fresh" in line for line in found)
    other = prepare("other text entirely\n" * 50, tmp_path / "other")
    assert main(replace(config, data_dir=str(other))) == 2
    found = "\n".join(errors(capfd))
    assert "tokenizer: checkpoint" in found and "data set: checkpoint" in found
    assert sorted(os.listdir(config.checkpoint_dir)) == before


def test_bad_input_a_converted_model_in_the_place_of_a_checkpoint(config, capfd):
    model = GPT2(replace(config, vocab_size=TokenDataset(config.data_dir).vocab_size))
    state = checkpoint.new_state(model.config, model.state_dict(), None)
    checkpoint.save(Path(config.checkpoint_dir) / "checkpoint.pt", state)
    assert main(config) == 2
    assert "error: tokenizer: checkpoint none, config char (another vocabulary)" in errors(capfd)


def test_bad_input_no_checkpoint_or_none_that_is_usable(config, capfd):
    assert main(config, "--resume") == 3
    assert len(errors(capfd)) == 1
    path = Path(config.checkpoint_dir) / "checkpoint.pt"
    path.write_bytes(b"damaged")
    for more in ((), ("--resume",)):
        assert main(config, *more) == 3
        assert str(path) in errors(capfd)[0] and path.read_bytes() == b"damaged"


def test_fresh_sets_the_earlier_run_aside_once_all_is_checked(config):
    train(replace(config, max_iters=2))
    assert main(config, "--fresh", "--block_size", "100000") == 2
    assert saved(config)["step"] == 2
    assert main(config, "--fresh", "--max_iters", "3") == 0
    (aside,) = [path for path in Path(config.checkpoint_dir).iterdir() if path.is_dir()]
    assert checkpoint.load(aside / "final_checkpoint.pt")["step"] == 2
    assert saved(config)["step"] == 3


def test_a_finished_run_says_so_and_can_go_on_otherwise(config, capfd):
    train(replace(config, max_iters=3))
    assert main(replace(config, max_iters=3)) == 0
    err = capfd.readouterr().err
    assert "finished" in err and "--max_iters 100 trains it for longer" in err
    assert "changed" not in err
    assert main(replace(config, max_iters=5, learning_rate=1e-4, seed=7), "--resume") == 0
    err = capfd.readouterr().err
    assert "changed" in err and "learning_rate: checkpoint 0.001, config 0.0001" in err
    assert "max_iters: checkpoint 3, config 5" in err and "config 7" in err
    assert saved(config)["step"] == 5


def test_bad_input_second_trainer_in_one_folder_names_the_first(config, capfd):
    with lock(config.checkpoint_dir):
        assert in_child(main, config) == 2
    (error,) = errors(capfd)
    assert f"process {os.getpid()}" in error
    assert main(replace(config, max_iters=1)) == 0


def test_a_folder_of_logs_that_cannot_be_written_is_exit_4(config, capfd):
    Path(config.log_dir).write_text("a file")
    assert main(config) == 4
    (error,) = errors(capfd)
    assert error.startswith(f"error: could not write {config.log_dir}")


def test_bad_input_in_the_data(config, capfd, tmp_path):
    assert main(replace(config, data_dir=str(tmp_path / "none"))) == 2
    assert "prepare_data.py" in errors(capfd)[0]
    path = Path(config.data_dir) / "train.bin"
    data = bytearray(path.read_bytes())
    data[1000:1002] = b"\xff\xff"
    path.write_bytes(data)
    assert main(replace(config, batch_size=100)) == 2  # more than an epoch: each window comes
    assert "token id 65535 at position 500" in errors(capfd)[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate"),
        MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"),
    ],
)
def test_out_of_memory_is_one_line_with_the_remedy(config, capfd, monkeypatch, error):
    monkeypatch.setattr(GPT2, "forward", Mock(side_effect=error))
    assert main(config) == 2
    (line,) = errors(capfd)
    assert "--batch_size (now 4)" in line and "--gradient_accumulation_steps (now 2)" in line
    assert saved(config, "checkpoint.pt")["step"] == 0


# ---------------------------------------------------------------- the command line


def test_data_flag_prepares_a_tiny_text_fits_itself_to_it_and_prints_a_sample(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("a small note, hardly anything at all. " * 8)
    argv = ["--data", "note.txt", "--tokenizer", "char", "--max_iters", "3", "--device", "cpu"]
    assert run(training.main, [*argv, "--prompt", "a small", "--max_new_tokens", "20"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("a small") and len(out.rstrip("\n")) <= len("a small") + 20
    Path("note.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(SystemExit, match="2"):  # what prepare_data.py ends with
        run(training.main, [*argv, "--data_dir", "bad"])
    assert capfd.readouterr().err.count("error: ") == 1


def test_eval_only_prints_the_loss_and_leaves_everything_as_it_was(finished, capsys):
    expected = logged(finished)[-1]["val_loss"]

    def content():
        paths = Path(finished.checkpoint_dir).parent.rglob("*.*")
        return {path: path.read_bytes() for path in paths if path.name != ".lock"}

    before = content()
    assert main(finished, "--eval_only") == 0
    assert capsys.readouterr().out == (
        f"step 12: validation loss {expected:.4f}, perplexity {math.exp(expected):.2f}\n"
    )
    assert content() == before


# ---------------------------------------------------------------- other weights to begin with


@pytest.fixture
def trained(finished):
    """The checkpoint of another run, of the same text."""
    return f"{finished.checkpoint_dir}/final_checkpoint.pt"


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_init_from_begins_with_those_weights_and_a_new_optimizer(again, trained, tmp_path, kind):
    """Of a checkpoint or a Hugging Face folder; the table of positions may be cropped."""
    weights, table, spec = checkpoint.load(trained)["model"], "transformer.wpe.weight", trained
    if kind == "folder":
        pytest.importorskip("safetensors")
        spec = str(tmp_path / "folder")
        convert.to_hf(trained, spec)
    assert main(replace(again, max_iters=0, block_size=5), "--init_from", spec) == 0
    state = saved(again, "checkpoint.pt")
    assert same(state["model"], weights | {table: weights[table][:5]})
    assert (state["step"], state["optimizer"], state["best_val_loss"]) == (0, {}, None)


def test_init_from_resumes_bit_exactly_and_generates(again, trained, capfd):
    more = ["--init_from", trained, "--dropout", "0.2", "--seed", "7"]
    other = undisturbed(again, *more)
    assert in_child(killed_at, again, 7, *more) == -signal.SIGKILL
    capfd.readouterr()
    assert main(again, *more, "--prompt", "the quick") == 0
    assert_same_run(again, other)
    out, err = capfd.readouterr()
    assert out.startswith("the quick") and "resuming" in err
    assert logged(again)[0]["loss"] < math.log(40) - 0.2  # an untrained model's


def test_init_from_with_a_preset_keeps_the_models_shape(again, trained):
    given, initial = run_state.load_initial(trained, GPT2Config(data_dir=again.data_dir))
    for preset in ("auto", "shakespeare-cpu", "finetune"):
        new = training.with_preset(replace(given, preset=preset), {"data_dir"}, initial)
        assert (new.n_layer, new.n_embd, new.block_size) == (1, 16, 8)
    assert training.with_preset(given, {"data_dir"}, initial).learning_rate == 5e-5


def test_init_from_what_does_not_fit_is_a_line_each(again, trained, tmp_path, capfd):
    more = ["--n_layer", "3", "--block_size", "9", "--position", "rope"]
    assert main(again, "--init_from", trained, *more) == 2
    found = errors(capfd)
    for line, flag in zip(found, ("block_size 9", "n_layer 3", "position rope"), strict=True):
        assert f"--{flag}: the model of --init_from {trained} has " in line
    assert main(again, "--init_from", "nowhere.pt") == 3
    other = replace(again, data_dir=str(prepare("abc " * 500, tmp_path / "abc")))
    assert main(other, "--init_from", trained) == 2
    found = errors(capfd)
    assert "nowhere.pt" in found[0] and "knows 40 tokens (char)" in found[1]
    assert not Path(again.checkpoint_dir).exists()


def test_init_from_reads_new_text_with_the_models_tokenizer(trained, tmp_path, monkeypatch):
    text = tmp_path / "fox.txt"
    text.write_text("the lazy fox jumps over the quick brown dog. " * 60, "utf-8")
    monkeypatch.chdir(tmp_path)
    argv = ["--device", "cpu", "--max_iters", "3", "--data", "fox.txt", "--init_from", trained]
    assert run(training.main, argv) == 0
    dataset = TokenDataset(tmp_path / "data" / "fox-char-as-given")
    tokenizer = load_tokenizer(checkpoint.load(trained)["tokenizer"])
    assert dataset.meta["tokenizer"]["sha256"] == tokenizer.hash()
    assert tokenizer.decode(dataset.train[:8].tolist()) == "the lazy"
    assert run(training.main, [*argv, "--max_iters", "5"]) == 0
    text.write_text("ünknown " * 60, "utf-8")  # a character that the model has never seen
    with pytest.raises(SystemExit, match="2"):
        run(training.main, [*argv, "--data_dir", str(tmp_path / "u")])
