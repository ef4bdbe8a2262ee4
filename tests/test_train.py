"""The training loop: what it logs and saves, and that no way of ending it loses anything."""

import json
import math
import os
import random
import shutil
import signal
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TEXT, fork, in_child, prepare, same

import checkpoint
import evaluate
import train as training
from config import GPT2Config, derived
from data import BatchSampler, TokenDataset
from files import lock
from logger import run
from model import GPT2
from optim import learning_rate
from sampling import sample_text
from state import NonFiniteError
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


def undisturbed(config):
    """The config of the same run elsewhere, which nothing has disturbed."""
    config = elsewhere(config, f"{config.log_dir}/undisturbed")
    assert in_child(main, config) == 0
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


def killed_at(config, step, micro_step=1):
    during(step, die, micro_step)
    return main(config)


def poisoned_at(steps, patch):
    """The gradients of these updates are NaN; the loss is as it was."""
    forward, due = GPT2.forward, []

    def poisoned(model, *arguments, **options):
        logits, loss = forward(model, *arguments, **options)
        if due and due.pop():
            loss.register_hook(lambda grad: grad * math.nan)
        return logits, loss

    for step in steps:
        during(step, lambda: due.append(True), patch=patch)
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


def test_a_run_logs_and_saves_what_it_promises_each_step_once(config, monkeypatch, capfd):
    """Cut short after step 8, saved at step 5; then gone on with until patience ends it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(training, "estimate_loss", Mock(side_effect=[3.1, 2.8, 3.2, 2.9]))
    config = replace(config, max_iters=100, eval_interval=5, patience=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        during(8, Mock(side_effect=KeyboardInterrupt), patch=patch.setattr)
        train(config)
    last = train(config)
    (folder,) = Path(config.log_dir).iterdir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == list(range(1, 21)) and records[-1] == last
    names = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds"}
    assert all(names <= record.keys() for record in records)
    assert [r["step"] for r in records if "val_loss" in r] == [5, 10, 15, 20]
    assert records[-1]["loss"] < records[0]["loss"] < math.log(80)
    assert all(r["lr"] == learning_rate(r["step"] - 1, derived(config)) for r in records)
    assert sorted(records, key=lambda record: record["seconds"]) == records
    written = json.loads((folder / "config.json").read_text())
    assert GPT2Config(**written) == replace(config, vocab_size=40)
    state = saved(config)
    assert (state["step"], state["run"], state["best_val_loss"]) == (20, folder.name, 2.8)
    assert saved(config, "best_checkpoint.pt")["step"] == 10
    shown = EventAccumulator(str(folder)).Reload()
    for tag, name in {"loss/train": "loss", "loss/val": "val_loss", "lr": "lr"}.items():
        points = [(event.step, event.value) for event in shown.Scalars(tag)]
        assert points == [(r["step"], np.float32(r[name])) for r in records if name in r]
    assert min(event.value for event in shown.Scalars("memory_mb")) > 100  # torch takes more
    assert [event.step for event in shown.Tensors("sample")] == [5, 10, 15, 20]
    assert b'"n_embd": 32' in shown.Tensors("config")[0].tensor_proto.string_val[0]
    assert train(config) == last  # there is nothing to go on with
    assert "--patience none trains it for longer" in capfd.readouterr().err


def test_the_last_step_is_logged_and_evaluated_and_few_numbered_checkpoints_stay(config):
    config = replace(config, max_iters=13, checkpoint_interval=2, keep_checkpoints=2)
    last = train(replace(config, log_interval=5, eval_interval=100))
    assert [record["step"] for record in logged(config)] == [5, 10, 13]
    assert last["step"] == 13 and "val_loss" in last
    numbered = {f"checkpoint_iter_{step}.pt" for step in (10, 12)}  # by number, not by name
    latest = {f"{kind}checkpoint.pt" for kind in ("", "previous_", "best_", "final_")}
    assert latest | numbered <= set(os.listdir(config.checkpoint_dir))
    assert len(list(Path(config.checkpoint_dir).glob("*.pt"))) == 6


def test_accumulation_equals_one_large_batch(config, monkeypatch):
    """4 micro-batches of 2: loss and gradients of one batch of 8, and the weights of 40 steps."""
    config = replace(config, dropout=0.0, dtype="float64", max_iters=40)
    clip, gradients, runs = torch.nn.utils.clip_grad_norm_, [], []

    def watched(parameters, limit):
        parameters = list(parameters)
        gradients.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    for size, count in ((8, 1), (2, 4)):
        there = elsewhere(config, f"{config.log_dir}/{size}")
        runs.append(replace(there, batch_size=size, gradient_accumulation_steps=count))
        train(runs[-1])
    weights = [saved(there)["model"].values() for there in runs]
    for pair in ((gradients[0], gradients[40]), weights):
        assert all((one - other).abs().max() < 1e-12 for one, other in zip(*pair, strict=True))
    for one, other in zip(*map(logged, runs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)


def test_a_checkpoint_and_a_data_set_of_before_the_redesign_go_on(tmp_path, capsys):
    """With the loss and the text that the old code found; and with Muon, dropout, accumulation."""
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


@pytest.mark.parametrize(
    "how", ["adamw float32 learned", "muon bfloat16 rope", "adamw float16 alibi"]
)
def test_resume_is_bit_exact(config, how):
    optimizer, dtype, position = how.split()
    config = replace(config, optimizer=optimizer, dtype=dtype, position=position, max_iters=40)
    for step in sorted(random.Random(0).sample(range(1, 40), 2)):
        assert in_child(killed_at, config, step) == -signal.SIGKILL
    assert in_child(main, config) == 0
    assert_same_run(config, undisturbed(config))
    losses = [record["loss"] for record in logged(config)]
    assert len(losses) == 40 and losses[-1] < losses[0]


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
    assert in_child(main, again) == 0  # and nothing is damaged, which would be renamed
    assert set(os.listdir(again.checkpoint_dir)) == set(os.listdir(finished.checkpoint_dir))
    assert_same_run(again, finished)


def signalled_at(config, step, signum, times=1):
    during(step, lambda: [os.kill(os.getpid(), signum) for _ in range(times)])
    return main(config)


@pytest.mark.parametrize("step", [0, 6, 8])  # the first, another, one that an evaluation follows
def test_signal_finishes_the_step_saves_and_resumes_bit_exactly(finished, again, step, capfd):
    signum = signal.SIGTERM if step == 6 else signal.SIGINT
    assert in_child(signalled_at, again, step, signum) == 128 + signum
    assert saved(again, "checkpoint.pt")["step"] == step + 1
    said = f"\n{signum.name} after step {step + 1} of 12, saved in"
    assert said in capfd.readouterr().err
    assert in_child(main, again) == 0
    assert_same_run(again, finished)


def test_second_signal_leaves_at_once_with_earlier_files_intact(again):
    assert in_child(signalled_at, again, 7, signal.SIGTERM, 2) == 143
    assert saved(again, "checkpoint.pt")["step"] == saved(again, "best_checkpoint.pt")["step"] == 6


@pytest.mark.parametrize("log_interval", [1, 100])  # only what asks the device notices
def test_a_gradient_that_is_not_finite_changes_no_weight(config, monkeypatch, log_interval):
    build, built = training.build_state, []
    monkeypatch.setattr(training, "build_state", lambda *how: built.append(build(*how)) or built[0])
    poisoned_at({6}, monkeypatch.setattr)
    with pytest.raises(NonFiniteError, match="step 7;") as error:
        train(replace(config, eval_interval=3, log_interval=log_interval))
    before = saved(config, "checkpoint.pt")
    assert error.value.exit_code == 5 and before["step"] == 6
    assert same(dict(built[0].model.state_dict()), before["model"])


def test_float16_skips_some_steps_but_not_without_end(config, monkeypatch):
    poisoned_at({3, 4, 5, *range(7, 40)}, monkeypatch.setattr)
    with pytest.raises(NonFiniteError, match="step 28"):
        train(replace(config, dtype="float16", max_iters=40))


def test_what_is_not_finite_is_null_in_metrics_and_never_the_best(config, monkeypatch, capfd):
    """A float16 step that was skipped, and an evaluation that overflowed; resumed, too."""
    poisoned_at({3}, monkeypatch.setattr)
    val_losses = [math.nan, 3.0, 3.0, 3.0]
    monkeypatch.setattr(training, "estimate_loss", Mock(side_effect=val_losses))
    config = replace(config, dtype="float16", eval_interval=5, patience=2)
    for steps in (7, 15):
        train(replace(config, max_iters=steps))
    records = logged(config)
    assert records[3]["grad_norm"] is None and records[3]["loss"] > 0
    assert [r["val_loss"] for r in records if "val_loss" in r] == [None, 3.0, 3.0, 3.0]
    assert saved(config, "best_checkpoint.pt")["step"] == 7
    err = capfd.readouterr().err
    assert "norm nan" in err and "val loss nan" in err


def test_bad_input_flags_are_all_reported_at_once(config, capfd):
    wrong = {
        "--n_layers 3": "--n_layers; try --n_layer",
        "--dropout 2": "--dropout 2",
        "--n_head x": "--n_head x",
        "--lr_decay_iters 1 --warmup_iters 2": "--lr_decay_iters 1: less than --warmup_iters 2",
        "--max_new_tokens -3": "--max_new_tokens -3",
        "--resume --fresh": "--fresh: not with --resume",
    }
    assert main(config, *" ".join(wrong).split()) == 2
    found = "\n".join(errors(capfd))
    assert all(part in found for part in wrong.values())
    assert main(config, "--prompt", "café") == 2
    assert "U+00E9" in errors(capfd)[0]
    assert not Path(config.checkpoint_dir).exists()


@pytest.mark.parametrize(
    "given, says",
    [
        ("--n_embd 64", "finished"),  # the preset has 4 heads
        ("--preset gpt2-medium --n_head 8 --n_layer 1 --block_size 8", "finished"),
        ("--n_embd 66 --n_head 5", "--n_embd 66: not divisible by --n_head 5"),
        ("--min_lr 1", "--min_lr 1.0: more than --learning_rate 0.008"),
    ],
)
def test_flags_are_held_against_the_preset_not_against_gpt2(config, given, says, capfd):
    own = f"--checkpoint_dir {config.checkpoint_dir} --log_dir {config.log_dir} --device cpu"
    own = f"{own} --data_dir {config.data_dir} --max_iters 0 {given}"
    assert run(training.main, own.split()) == (0 if says == "finished" else 2)
    assert says in capfd.readouterr().err


def test_flags_go_before_a_config_file_and_that_before_the_preset(config, tmp_path, capfd):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"dropout": 0.3, "n_head": 2, "data_dir": config.data_dir}))
    argv = ["--config", str(path), "--n_head", "8", "--device", "cpu"]
    _, given, chosen = training.parse_command_line(argv)
    found = training.with_preset(given, chosen, TokenDataset(config.data_dir))
    assert (found.n_head, found.dropout) == (8, 0.3) and found.n_embd != given.n_embd
    assert "preset     shakespeare-cpu, for cpu and" in capfd.readouterr().err


def test_bad_input_checkpoint_of_another_run_names_each_difference(config, capfd, tmp_path):
    train(replace(config, max_iters=2))
    before = sorted(os.listdir(config.checkpoint_dir))
    assert main(replace(config, n_embd=64, n_layer=3)) == 2
    lines = ["error: n_layer: checkpoint 2, config 3", "error: n_embd: checkpoint 32, config 64"]
    found = errors(capfd)
    assert found[:2] == lines and "--fresh" in found[2]
    other = prepare("other text entirely\n" * 50, tmp_path / "other")
    assert main(replace(config, data_dir=str(other))) == 2
    found = "\n".join(errors(capfd))
    assert "tokenizer: checkpoint char, config char" in found and "data set: checkpoint" in found
    assert sorted(os.listdir(config.checkpoint_dir)) == before


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
    """From the checkpoint before, if the latest is damaged."""
    config = replace(config, max_iters=3)
    train(config)
    assert main(config) == 0
    err = capfd.readouterr().err
    assert "--max_iters 100 trains it for longer" in err and "changed" not in err
    path = Path(config.checkpoint_dir) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(replace(config, max_iters=5, learning_rate=1e-4, seed=7), "--resume") == 0
    err = capfd.readouterr().err
    assert f"passed over and kept as *.damaged: {path}" in err and "previous_checkpoint.pt" in err
    assert "changed" in err and "learning_rate: checkpoint 0.001, config 0.0001" in err
    assert "max_iters: checkpoint 3, config 5" in err and saved(config)["step"] == 5


def test_bad_input_second_trainer_in_one_folder_names_the_first(config, capfd):
    with lock(config.checkpoint_dir):
        assert in_child(main, config) == 2
    (error,) = errors(capfd)
    assert f"process {os.getpid()}" in error


def test_out_of_memory_is_one_line_with_the_remedy(config, capfd, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    monkeypatch.setattr(GPT2, "forward", Mock(side_effect=error))
    assert main(config) == 2
    (line,) = errors(capfd)
    assert "--batch_size (now 4)" in line and "--gradient_accumulation_steps (now 2)" in line
    assert saved(config, "checkpoint.pt")["step"] == 0


def test_eval_only_prints_the_loss_and_waits_for_no_run_that_goes_on(finished, capfd):
    loss = logged(finished)[-1]["val_loss"]
    with lock(finished.checkpoint_dir):
        assert in_child(main, finished, "--eval_only") == 0
    said = f"step 12: validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}\n"
    assert capfd.readouterr().out == said


def test_init_from_begins_with_those_weights_and_a_new_optimizer(again, finished, monkeypatch):
    """The table of positions may be cropped; what was loaded is not kept in memory."""
    trained = f"{finished.checkpoint_dir}/final_checkpoint.pt"
    weights, table = checkpoint.load(trained)["model"], "transformer.wpe.weight"
    build, loaded = training.build_state, []

    def watched(*how):
        loaded.append(weakref.ref(how[-1]["model"][table]))
        return build(*how)

    monkeypatch.setattr(training, "build_state", watched)
    monkeypatch.setattr(training, "describe_run", lambda *_: loaded.append(loaded[0]()))
    assert main(replace(again, max_iters=0, block_size=5), "--init_from", trained) == 0
    state = saved(again, "checkpoint.pt")
    assert same(state["model"], weights | {table: weights[table][:5]})
    assert (state["step"], state["optimizer"], state["best_val_loss"]) == (0, {}, None)
    assert loaded[1] is None


def test_init_from_what_does_not_fit_is_a_line_each(again, finished, tmp_path, capfd):
    trained = f"{finished.checkpoint_dir}/final_checkpoint.pt"
    more = ["--n_layer", "3", "--block_size", "9", "--position", "rope"]
    assert main(again, "--init_from", trained, *more) == 2
    for line, field in zip(errors(capfd), ("block_size", "n_layer", "position"), strict=True):
        assert f"--init_from {trained}: {field}: checkpoint " in line
    assert main(again, "--init_from", "nowhere.pt") == 3
    other = replace(again, data_dir=str(prepare("abc " * 500, tmp_path / "abc")))
    assert main(other, "--init_from", trained) == 2
    assert "knows 40 tokens (char)" in errors(capfd)[1]
    assert not Path(again.checkpoint_dir).exists()


def test_init_from_reads_new_text_with_the_models_tokenizer(finished, tmp_path, monkeypatch, capfd):
    trained = f"{finished.checkpoint_dir}/final_checkpoint.pt"
    monkeypatch.chdir(tmp_path)
    Path("fox.txt").write_text("the lazy fox jumps over the quick brown dog. " * 60, "utf-8")
    argv = ["--device", "cpu", "--max_iters", "3", "--data", "fox.txt", "--init_from", trained]
    assert run(training.main, argv) == 0  # with the preset finetune
    config = checkpoint.load("checkpoints/checkpoint.pt")["config"]
    shape = config["n_layer"], config["n_embd"], config["block_size"], config["learning_rate"]
    assert shape == (1, 16, 8, 5e-5)
    assert run(training.main, [*argv, "--resume", "--max_iters", "5", "--prompt", "the"]) == 0
    assert capfd.readouterr().out.startswith("the")
    dataset = TokenDataset("data/fox-char-as-given")
    assert dataset.tokenizer.to_dict() == checkpoint.load(trained)["tokenizer"]
    assert dataset.tokenizer.decode(dataset.train[:8].tolist()) == "the lazy"
    Path("fox.txt").write_text("ünknown " * 60, "utf-8")  # what the model has never seen
    with pytest.raises(SystemExit, match="2"):
        run(training.main, [*argv, "--data_dir", "u"])
