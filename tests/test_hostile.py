"""What somebody else made, and what careless users type: one line, and nothing is destroyed."""

import contextlib
import json
import os
import re
import resource
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import in_child
from hostile import CASES
from test_checkpoint import make_state
from test_data import write
from test_train import errors, logged, main, saved

import checkpoint
import convert
import data
import files
import prepare_data
import train as training
from checkpoint import CheckpointError
from logger import RunLog, open_run, run
from train import train


def within_limits(function, *arguments):
    """Call it in a child with 300 MB of memory above what importing torch took, and 3 seconds."""

    def limited():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + 300 * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        start = time.process_time()
        function(*arguments)
        return 0 if time.process_time() - start < 3 else 3

    assert in_child(limited) == 0


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("whose", ["ours", "nanoGPT's"])
def test_hostile_checkpoints_are_one_line_within_limits(tmp_path, kind, whose):
    says, make = CASES[kind]
    path = tmp_path / "ckpt.pt"
    make(path)

    def refused():
        load = checkpoint.load if whose == "ours" else convert.read_nanogpt
        with pytest.raises(CheckpointError, match=says if whose == "ours" else "") as error:
            load(path)
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"{path}: not usable, ") and len(line) < 400, line

    within_limits(refused)


# ---------------------------------------------------------------- links


LINKS = {
    "train": "checkpoints/.lock checkpoints/.lock_holder checkpoints/.checkpoint.pt.tmp "
    "checkpoints/final_checkpoint.pt runs/a/.lock runs/a/.lock_holder runs/a/config.json "
    "runs/a/.config.json.tmp runs/a/metrics.jsonl runs/a/.metrics.jsonl.tmp runs/a/.checkpoint_dir",
    "prepare": "new/.lock new/.lock_holder new/.meta.json.tmp new/.tokenizer.json.tmp "
    "new/tokenizer.json new/train.bin new/.unfinished/train.bin new/.unfinished/tokenizer.json "
    "new/.unfinished/.progress.json.tmp new/.unfinished/.meta.json.tmp",
    "adopt": "data/.lock_holder data/.tokenizer.json.tmp data/.meta.json.tmp data/tokenizer.json",
}


def work(name, config, folder):
    """The exit code of a script that writes into folder."""
    if name == "train":
        return main(replace(config, max_iters=1), "--run_name", "a", "--preset", "none")
    if name == "adopt":
        for inside in ("meta.json", "tokenizer.json"):
            (folder / "data" / inside).unlink(missing_ok=True)
        return run(prepare_data.main, ["--adopt", str(folder / "data")])
    text = ["--input", str(folder / "data.txt"), "--tokenizer", "char"]
    return run(prepare_data.main, [*text, "--data_dir", str(folder / "new")])


@pytest.mark.parametrize("link", [f"{w} {n}" for w, names in LINKS.items() for n in names.split()])
def test_no_link_in_a_folder_is_written_through(
    tiny_config, tmp_path, link, gpt2_vocabulary, capfd
):
    script, name = link.split()
    precious, path = tmp_path / "precious", tmp_path / name
    precious.write_text("precious")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(precious)
    assert work(script, tiny_config, tmp_path) in (0, 2, 3, 4)
    assert precious.read_text() == "precious" and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["runs/a", "new/.unfinished", "new/.unfinished/download/x"])
def test_a_folder_of_ours_is_no_link(tiny_config, tmp_path, name, capfd):
    precious, path = tmp_path / "precious", tmp_path / name
    precious.mkdir()
    for inside in ("config.json", "meta.json", "train.bin", "x.incomplete"):
        (precious / inside).write_text("precious")
    path.parent.mkdir(parents=True)
    path.symlink_to(precious)
    assert work("train" if name == "runs/a" else "prepare", tiny_config, tmp_path) == 2
    assert len(errors(capfd)) == 1
    assert [p.read_text() for p in precious.iterdir()] == 4 * ["precious"]


# ---------------------------------------------------------------- JSON

DEEP = "[" * 100_000
HUGE = 10**400


SOURCE = {"name": "x", "bytes": 1, "sha256": None}


@pytest.mark.parametrize(
    "change",
    [
        *({"vocab_size": value} for value in (0, "65", float("inf"), HUGE, None)),
        {"format": 2},
        {"dtype": "uint8"},
        {"tokenizer": {"kind": "char"}},
        {"splits": {"train": {}, "val": {}}},
        {"splits": {name: {"tokens": -1, "bytes": 1, "sha256": ""} for name in ("train", "val")}},
        {"splits": {"../../x": {}}},
        *({"sources": [SOURCE | {"name": name}]} for name in (3, "../../x", "/etc/x")),
        {"sources": [SOURCE | {"bytes": -1}]},
        {"sources": []},
        {"settings": []},
        DEEP,
        '{"a":' * 100_000,
        "",
        "\ufeff{",
    ],
    ids=lambda change: str(change)[:50],
)
def test_a_meta_json_of_any_content_is_one_line_that_names_the_field(tmp_path, change):
    meta = write(tmp_path, range(9))
    is_text = isinstance(change, str)
    field = "" if is_text else next(iter(change))
    (tmp_path / "meta.json").write_text(change if is_text else json.dumps(meta | change))

    def refused():
        with pytest.raises(ValueError, match=rf"meta\.json: .*{field}") as error:
            data.TokenDataset(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400

    within_limits(refused)


def test_a_vocabulary_unlike_the_tokenizer_s_is_noticed_at_the_start(tiny_config, capfd):
    path = Path(tiny_config.data_dir, "meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 41}))
    assert main(tiny_config, "--preset", "none") == 2
    assert "it has 40 tokens, not 41" in errors(capfd)[0]
    assert not Path(tiny_config.checkpoint_dir).exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"n_layer": ' + DEEP + "}", "recursion limit"),
        ('{"learning_rate": 1' + 400 * "0" + "}", "--learning_rate"),
        ('{"n_layer": 1' + 400 * "0" + "}", "--n_layer"),
        ('{"learning_rate": NaN, "beta1": Infinity}', "--learning_rate"),
        ('{"data_dir": "a\\u0000b"}', "null|no data set"),
        ('{"n_layer": {"a": [1]}, "bias": "yes"}', "--n_layer"),
        ('{"\\u001b[2J": 1}', r"\\x1b"),
        ("[1]", "object"),
        ("", "EOF"),
    ],
    ids=lambda text: text[:20],
)
def test_a_config_file_of_any_content_is_refused_in_lines(tmp_path, text, says, capfd):
    path = tmp_path / "config.json"
    path.write_text(text)

    def refused():
        assert run(training.main, ["--config", str(path), "--preset", "none"]) == 2

    within_limits(refused)
    found = errors(capfd)
    assert found and re.search(says, "\n".join(found)) and max(map(len, found)) < 400


LINE = '{"step": 1, "loss": 3.0, "lr": 0.1, "seconds": 0.5}\n'
METRICS = ["", "\n", "null\n", "{}\n", '{"seconds": 1}\n', "\ufeff{}\n", "\0\n", "x" * 10**6 + "\n"]
METRICS += [DEEP + "\n", '{"a":' * 100_000 + "\n"]
METRICS += [LINE.replace("1", value, 1) for value in ('"1"', "-1", "0", "1.5", str(HUGE))]
METRICS += [LINE.replace("3.0", value) for value in ('"1"', "{}", "true", "1e999", str(HUGE))]


@pytest.mark.parametrize("text", METRICS, ids=lambda text: repr(text[:30]))
def test_metrics_of_any_content_never_prevent_resuming(tmp_path, text, capfd):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(LINE + text + LINE.replace("1", "2", 1))
    before, kept = path.read_text(), [1] if text else [1, 2]

    def resumed():
        with open_run(tmp_path, tmp_path / "checkpoints", "run", 2) as (name, records):
            assert name == "run" and [record["step"] for record in records] == kept
            log = RunLog(tmp_path / name, records, 2, 4)
            with contextlib.closing(log):
                log.start({"n_layer": 2})
                record = {"step": 3, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "mfu": None}
                log.write(record | {"tokens_per_second": 9.0, "val_loss": 2.0})
            assert log.val_losses() == [2.0]

    within_limits(resumed)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 3]
    if text:
        assert path.with_name("metrics.jsonl.damaged").read_text() == before
        assert "warning: " in capfd.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, partial(os.symlink, "/dev/zero")])
def test_metrics_of_any_kind_never_prevent_resuming(tmp_path, make):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    make(path)
    with open_run(tmp_path, tmp_path / "checkpoints", "run", 2) as (name, records):
        log = RunLog(tmp_path / name, records, 2, 4)
        log.start({})
        log.close()
    assert path.is_file() and not path.is_symlink() and path.read_text() == ""


# ---------------------------------------------------------------- control characters


def test_what_a_checkpoint_says_cannot_steer_a_terminal(tmp_path, capfd):
    state = make_state()
    state["config"]["position"] = "\x1b[2J\x1b]0;owned\x07"
    torch.save(state, tmp_path / "a.pt")
    assert run(lambda argv: checkpoint.load_model(str(tmp_path / "a.pt"), "cpu")) == 3
    err = capfd.readouterr().err
    assert "\x1b" not in err and "\x07" not in err and r"\x1b[2J" in err


# ---------------------------------------------------------------- copied runs


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, max_iters=4, eval_interval=2, preset="none")


def steps(folder):
    text = Path(folder, "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_a_copied_run_goes_on_in_a_folder_of_its_own_with_what_was_logged(
    config, tmp_path, capfd, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    config = replace(config, checkpoint_dir="mine")
    train(config)
    (first,) = Path(config.log_dir).iterdir()
    shutil.copytree("mine", "copy/mine")
    train(replace(config, max_iters=6))
    monkeypatch.chdir("copy")  # where the relative path is the same
    train(replace(config, max_iters=8))
    second = Path(config.log_dir, saved(config)["run"])
    assert steps(first) == [1, 2, 3, 4, 5, 6] and steps(second) == [*range(1, 9)]
    assert f"{second} goes on from step 4 of {first}" in capfd.readouterr().err
    assert [e.step for e in EventAccumulator(str(second)).Reload().Scalars("lr")] == steps(second)
    train(replace(config, max_iters=10))
    assert len(os.listdir(config.log_dir)) == 2 and steps(second) == [*range(1, 11)]


def test_a_folder_of_logs_has_one_writer(config, capfd):
    train(config)
    (folder,) = Path(config.log_dir).iterdir()
    with files.lock(folder):
        assert in_child(main, replace(config, max_iters=6)) == 2
    (line,) = errors(capfd)
    assert f"{folder} is in use by process {os.getpid()}" in line and steps(folder) == [1, 2, 3, 4]


def test_a_run_has_the_name_that_it_is_given_or_gets_it_later(config, capfd, tmp_path):
    assert main(replace(config, max_iters=2), "--run_name", "a") == 0
    assert main(replace(config, max_iters=4), "--run_name", "a") == 0
    assert main(replace(config, max_iters=6), "--run_name", "b") == 0
    assert steps(f"{config.log_dir}/a") == [1, 2, 3, 4] and len(steps(f"{config.log_dir}/b")) == 6
    other = replace(config, checkpoint_dir=str(tmp_path / "other"))
    for name, says in (("a", "holds a run"), ("../a", "--run_name ../a: "), ("", "--run_name")):
        assert main(other, "--run_name", name) == 2
        assert says in errors(capfd)[0]
    assert main(config, "--fresh", "--run_name", "a") == 2
    assert saved(config)["step"] == 6  # nothing was set aside


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    "variables", [{"RANK": "0"}, {"LOCAL_RANK": "abc", "WORLD_SIZE": "9" * 5000}]
)
def test_torchrun_s_variables_without_torchrun_are_one_line(config, variables, monkeypatch, capfd):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"=.*: not set by torchrun"):
        train(config)
    for name, value in variables.items():  # which that has dropped
        monkeypatch.setenv(name, value)
    assert main(config) == 2 and not Path(config.checkpoint_dir).exists()
    (line,) = errors(capfd)
    assert all(f"{name}=" in line for name in variables) and len(line) < 300


# ---------------------------------------------------------------- a disk that fills


def test_a_disk_that_fills_under_the_logs_ends_training_in_one_line(config, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(files, "open_to_append", lambda path: open("/dev/full", "ab"))
        assert main(config) == 4
    (line,) = errors(capfd)
    assert f"could not write {config.log_dir}" in line and "No space" in line and "MB are" in line
    assert main(config) == 0  # there is room again
    assert [record["step"] for record in logged(config)] == [1, 2, 3, 4]


# ---------------------------------------------------------------- small things


def test_a_finished_run_s_advice_trains(config, capfd):
    train(config)
    for steps_then in (100, 200):
        assert main(replace(config, max_iters=2)) == 0  # as it was started, or with less
        advice = re.search(r"--max_iters (\d+) trains it for longer", capfd.readouterr().err)
        assert main(replace(config, max_iters=int(advice[1]))) == 0
        assert saved(config)["step"] == steps_then


def test_nanogpt_s_character_data_gets_a_command_that_works(config, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("nanoGPT/data/shakespeare_char")
    folder.mkdir(parents=True)
    shutil.copy(f"{config.data_dir}.txt", folder / "input.txt")
    for name in ("train.bin", "val.bin"):
        shutil.copy(f"{config.data_dir}/{name}", folder)
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n.")
    assert main(replace(config, data_dir=str(folder))) == 2
    command = errors(capfd)[0].split("`")[1].split()[2:]
    assert run(prepare_data.main, command) == 0
    assert main(replace(config, data_dir="data/shakespeare_char")) == 0


def test_a_split_of_one_token_is_refused(config, tmp_path, capfd):
    write(tmp_path / "data", range(99), [1])
    assert main(replace(config, data_dir=str(tmp_path / "data"))) == 2
    assert "val has 1 tokens" in errors(capfd)[0]


def test_a_vocabulary_size_that_is_not_the_data_set_s_is_refused(config, capfd):
    assert main(config, "--vocab_size", "50304") == 2
    (line,) = errors(capfd)
    assert "--vocab_size 50304: " in line and "has 40, " in line


def test_fresh_says_how_much_is_set_aside_and_how_to_delete_it(config, capfd):
    for count in (1, 2):
        train(config)
        capfd.readouterr()
        assert main(replace(config, max_iters=0), "--fresh") == 0
        said = capfd.readouterr().err
        assert "GB are set aside by now; `rm " in said
        folders = [path for path in Path(config.checkpoint_dir).iterdir() if path.is_dir()]
        assert len(folders) == count
    command = said.split("`")[1]
    assert os.system(command) == 0
    assert list(Path(config.checkpoint_dir).glob("*/*")) == []
    assert saved(config, "checkpoint.pt")["step"] == 0
