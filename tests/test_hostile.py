"""What somebody else made, and what a careless user types: one line, in little time and memory, and
nothing is destroyed. hostile.py makes the checkpoints.
"""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import in_child, prepare
from hostile import FILES
from test_checkpoint import make_state
from test_data import write
from test_train import errors, flags, logged, main, saved

import checkpoint
import convert
import data
import files
import logger
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


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("whose", ["ours", "nanoGPT's"])
def test_hostile_checkpoints_are_one_line_within_limits(tmp_path, kind, whose):
    make, says = FILES[kind]
    path = tmp_path / "ckpt.pt"
    make(path)

    def refused():
        load = checkpoint.load if whose == "ours" else convert.read_nanogpt
        with pytest.raises(CheckpointError, match=says if whose == "ours" else "") as error:
            load(path)
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"{path}: not usable, ") and len(line) < 400, line

    within_limits(refused)


def test_a_link_to_a_checkpoint_that_the_user_has_made_is_read(tmp_path):
    checkpoint.save(tmp_path / "a.pt", make_state())
    (tmp_path / "b.pt").symlink_to(tmp_path / "a.pt")
    assert checkpoint.load(tmp_path / "b.pt")["step"] == 3


# ---------------------------------------------------------------- links


def everything(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


LINKS = {
    "train": "checkpoints/.lock checkpoints/.lock_holder checkpoints/.checkpoint.pt.tmp "
    "checkpoints/final_checkpoint.pt runs/a/.lock runs/a/.lock_holder runs/a/config.json "
    "runs/a/.config.json.tmp runs/a/metrics.jsonl runs/a/.metrics.jsonl.tmp runs/a/.checkpoint_dir",
    "prepare": "new/.lock new/.lock_holder new/.meta.json.tmp new/.tokenizer.json.tmp "
    "new/tokenizer.json new/train.bin new/.unfinished/train.bin new/.unfinished/tokenizer.json "
    "new/.unfinished/.progress.json.tmp new/.unfinished/meta.json.tmp",
    "adopt": "data/.lock_holder data/.tokenizer.json.tmp data/.meta.json.tmp data/tokenizer.json",
}


@pytest.mark.parametrize("link", [f"{w} {n}" for w, names in LINKS.items() for n in names.split()])
def test_no_link_in_a_folder_is_written_through(
    tiny_config, tmp_path, link, gpt2_vocabulary, capfd
):
    work, name = link.split()
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    if work == "adopt":
        for inside in ("meta.json", "tokenizer.json"):
            (tmp_path / "data" / inside).unlink()
    (tmp_path / name).symlink_to(precious)
    if work == "train":
        code = main(replace(tiny_config, max_iters=1), "--run_name", "a", "--preset", "none")
    elif work == "adopt":
        code = run(prepare_data.main, ["--adopt", str(tmp_path / "data")])
    else:
        flags = ["--tokenizer", "char", "--data_dir", str(tmp_path / "new")]
        code = run(prepare_data.main, ["--input", str(tmp_path / "data.txt"), *flags])
    assert code in (0, 2, 3, 4) and precious.read_text() == "precious"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["runs/a", "new/.unfinished"])
def test_a_folder_of_ours_is_no_link(tiny_config, tmp_path, name, capfd):
    precious = tmp_path / "precious"
    precious.mkdir()
    for inside in ("config.json", "meta.json", "train.bin", "x.incomplete"):
        (precious / inside).write_text("precious")
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).symlink_to(precious)
    before = everything(precious)
    if name == "runs/a":
        code = main(replace(tiny_config, max_iters=1), "--run_name", "a", "--preset", "none")
    else:
        flags = ["--tokenizer", "char", "--data_dir", str(tmp_path / "new")]
        code = run(prepare_data.main, ["--input", str(tmp_path / "data.txt"), *flags])
    assert code == 2 and len(errors(capfd)) == 1 and everything(precious) == before


# ---------------------------------------------------------------- JSON

DEEP = "[" * 100_000
HUGE = 10**400


@pytest.mark.parametrize(
    "change",
    [
        *({"vocab_size": value} for value in (0, -1, "65", float("inf"), 1.5, HUGE, None, True)),
        *({"format": value} for value in (0, 2, "1", None)),
        *({"dtype": value} for value in ("uint8", 2, None)),
        *({"tokenizer": value} for value in (None, "char", {}, {"kind": "char"}, {"sha256": 1})),
        *({"splits": value} for value in ({}, [], {"train": {}, "val": {}}, {"../../x": {}})),
        *({"sources": [value]} for value in (None, "a.txt", {"name": 3, "bytes": 1}, {"bytes": 1})),
        {"sources": [{"name": "../../x", "bytes": 1, "sha256": None}]},
        {"sources": [{"name": "/etc/x", "bytes": 1, "sha256": None}]},
        {"sources": [{"name": "x", "bytes": -1, "sha256": None}]},
        {"settings": []},
        *(("tokens", value) for value in (-1, "9", None, HUGE, 1.5)),
        *(("sha256", value) for value in (None, 3)),
        *(("bytes", value) for value in (-1, "9", HUGE)),
        *("tokens sha256 bytes".split()),
        *("vocab_size format dtype tokenizer splits sources settings".split()),
        DEEP,
        '{"a":' * 100_000,
        "",
        "null",
        "\ufeff{",
    ],
    ids=lambda change: str(change)[:50],
)
def test_a_meta_json_of_any_content_is_one_line_that_names_the_field(tmp_path, change):
    meta, field = write(tmp_path, range(9)), ""
    if isinstance(change, dict):
        meta, (field,) = meta | change, change
    elif isinstance(change, tuple):
        field = change[0]
        meta["splits"]["val"][field] = change[1]
    elif change in meta:
        field = change
        del meta[field]
    elif change in meta["splits"]["val"]:
        field = change
        del meta["splits"]["val"][field]
    text = json.dumps(meta) if field else change
    (tmp_path / "meta.json").write_text(text)
    (tmp_path / "progress.json").write_text(text)

    def refused():
        for read in (
            lambda: data.TokenDataset(tmp_path),
            lambda: files.read_json(tmp_path / "progress.json", prepare_data.Progress),
        ):
            with pytest.raises(ValueError, match=field) as error:
                read()
            (line,) = str(error.value).splitlines()
            assert len(line) < 400 and ".json: " in line, line

    within_limits(refused)


@pytest.mark.parametrize("position", [None, "0", [1], [0, -1], [0, HUGE], [0.5, 1], DEEP])
def test_a_progress_json_of_any_position_is_one_line(tmp_path, position):
    progress = write(tmp_path, range(9)) | {"revision": None, "position": position}
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(ValueError, match=r"progress.json: position"):
        files.read_json(tmp_path / "progress.json", prepare_data.Progress)


def test_a_vocabulary_unlike_the_tokenizer_s_is_noticed_at_the_start(tiny_config, capfd):
    path = Path(tiny_config.data_dir, "meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 41}))
    assert main(tiny_config, "--preset", "none") == 2
    assert "40 tokens, meta.json says 41" in errors(capfd)[0]
    assert not Path(tiny_config.checkpoint_dir).exists()


@pytest.mark.parametrize(
    "text, says",
    [
        (DEEP, "recursion limit"),
        ('{"n_layer": ' + DEEP + "}", "recursion limit"),
        ('{"learning_rate": 1' + 400 * "0" + "}", "--learning_rate"),
        ('{"n_layer": 1' + 400 * "0" + "}", "--n_layer"),
        ('{"n_layer": 1' + 5000 * "0" + "}", "out of range"),
        ('{"learning_rate": NaN, "beta1": Infinity}', "--learning_rate"),
        ('{"data_dir": "a\\u0000b"}', "null|no data set"),
        ('{"n_layer": {"a": [1]}, "bias": "yes"}', "--n_layer"),
        ('{"\\u001b[2J": 1}', r"\\x1b"),
        ("[1]", "object"),
        ("", "EOF"),
        ("n_layer = 3", "JSON"),
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


def test_a_config_file_may_begin_with_a_byte_order_mark(tiny_config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"max_iters": 3}', "utf-8-sig")
    words = [word for word in flags(tiny_config) if word != "--max_iters"]
    words.remove("20")
    _, config, _ = training.parse_command_line([*words, "--config", str(path)])
    assert config.max_iters == 3


LINE = '{"step": 1, "loss": 3.0, "lr": 0.1, "seconds": 0.5}\n'
WRONG = {  # name -> values, as JSON
    "step": ('"1"', "-1", "0", "1.5", "null", "[]", str(HUGE)),
    "seconds": ('"1"', "-1", "null", "NaN", "1e999"),
    "loss": ('"1"', "[]", "{}", "true", str(HUGE)),
    "val_loss": ('"1"', "Infinity"),
}
METRICS = ["", "\n", "null\n", "[]\n", "{}\n", '"x"\n', "3\n", "{\n", "\ufeff{}\n", "\0\n"]
METRICS += ["x" * 10**6 + "\n", DEEP + "\n", '{"a":' * 100_000 + "\n"]
METRICS += ['{"step": 1}\n', '{"seconds": 1}\n']
METRICS += [
    LINE.replace("}", f', "{name}": {value}}}')
    for name, values in WRONG.items()
    for value in values
]


@pytest.mark.parametrize("text", METRICS, ids=lambda text: repr(text[:30]))
def test_metrics_of_any_content_never_prevent_resuming(tmp_path, text, capfd):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(LINE + text + LINE.replace("1", "2"))
    before = path.read_text()

    def resumed():
        with open_run(tmp_path, tmp_path / "checkpoints", "run", 2) as (name, records):
            assert name == "run" and [record["step"] for record in records] == [1, 2]
            log = RunLog(tmp_path / name, records, 2, 4)
            with contextlib.closing(log):
                log.start({"n_layer": 2})
                record = {"step": 3, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "mfu": None}
                log.write(record | {"tokens_per_second": 9.0, "val_loss": 2.0})
            assert log.val_losses() == [2.0]

    within_limits(resumed)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    aside = path.with_name("metrics.jsonl.damaged")
    if text.strip() or text == "\n":
        assert aside.read_text() == before and "warning: " in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["fifo", "folder", "zeros", "nothing", "large", "binary"])
def test_metrics_of_any_kind_never_prevent_resuming(tmp_path, kind, monkeypatch):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    make = {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "zeros": lambda: path.symlink_to("/dev/zero"),
        "nothing": lambda: path.symlink_to("/no/such"),
        "large": lambda: path.write_text(LINE * 100),
        "binary": lambda: path.write_bytes(bytes(range(256)) * 50),
    }
    make[kind]()
    monkeypatch.setattr(logger, "MOST_METRICS", 5000)
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


def test_a_copied_run_goes_on_in_a_folder_of_its_own_with_what_was_logged(config, tmp_path, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config)
    (first,) = Path(config.log_dir).iterdir()
    copy = str(tmp_path / "copy")
    shutil.copytree(config.checkpoint_dir, copy)
    train(replace(config, max_iters=6))
    train(replace(config, max_iters=8, checkpoint_dir=copy))
    second = Path(config.log_dir, checkpoint.load(f"{copy}/checkpoint.pt")["run"])
    assert steps(first) == [1, 2, 3, 4, 5, 6] and steps(second) == [*range(1, 9)]
    assert f"{second} goes on from step 4 of {first}" in capfd.readouterr().err
    assert [e.step for e in EventAccumulator(str(second)).Reload().Scalars("lr")] == steps(second)
    train(replace(config, max_iters=10, checkpoint_dir=copy))
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
    assert main(config, "--eval_only", "--run_name", "c") == 2


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    "environment",
    [
        *({name: value} for name in ("RANK", "LOCAL_RANK") for value in ("1", "", "abc", "-1")),
        *({"WORLD_SIZE": value} for value in ("2", "", "abc", "0", "-1", "1e3", "9" * 5000)),
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    ],
    ids=lambda environment: "-".join(f"{k}={v[:5]}" for k, v in environment.items()),
)
def test_torchrun_s_variables_without_torchrun_are_one_line(
    config, environment, monkeypatch, capfd
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(config) == 2
    (line,) = errors(capfd)
    assert all(f"{name}=" in line for name in environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"=.*: not as torchrun sets"):
        train(config)
    assert not Path(config.checkpoint_dir).exists()


def test_one_process_may_say_that_it_is_one(config, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(config) == 0 and saved(config)["step"] == 4


# ---------------------------------------------------------------- a disk that fills


class Full:
    """A file on a disk that fills with the second thing written to it."""

    def __init__(self, file):
        self.file, self.count = file, 0

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.count += 1
        if self.count > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)


def test_a_disk_that_fills_under_the_logs_ends_training_in_one_line(config, monkeypatch, capfd):
    real = logger.open_to_append
    with monkeypatch.context() as patch:
        patch.setattr(logger, "open_to_append", lambda path: Full(real(path)))
        assert main(config) == 4
    (line,) = errors(capfd)
    assert f"could not write {config.log_dir}" in line and "No space" in line and "MB are" in line
    assert main(config) == 0  # there is room again
    assert [record["step"] for record in logged(config)] == [1, 2, 3, 4]


# ---------------------------------------------------------------- small things


def test_a_finished_run_s_advice_trains(config, capfd):
    train(config)
    assert main(replace(config, max_iters=2)) == 0
    assert "--max_iters 100 trains it for longer" in capfd.readouterr().err
    state = type("S", (), {"step": 1100, "best_val_loss": None})()
    log = type("L", (), {"records": [], "first_step": 1100, "folder": Path("runs/a")})()
    training.report(state, replace(config, max_iters=100), log)
    assert "--max_iters 2200 trains it for longer" in capfd.readouterr().err


def test_a_vocabulary_size_that_is_not_the_data_set_s_is_refused(config, capfd):
    assert main(config, "--vocab_size", "50304") == 2
    (line,) = errors(capfd)
    assert "--vocab_size 50304: " in line and "has 40; leave it out" in line
    assert main(config, "--vocab_size", "40") == 0


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


def test_eval_only_needs_no_folder_that_can_be_written_and_no_fresh(config, tmp_path, capfd):
    train(config)
    final = tmp_path / "final.pt"
    shutil.copy(f"{config.checkpoint_dir}/final_checkpoint.pt", final)
    other = replace(config, data_dir=str(prepare("other text\n" * 90, tmp_path / "other")))
    assert main(other, "--eval_only") == 2
    with files.lock(config.checkpoint_dir):  # as a run that goes on holds it
        assert in_child(main, config, "--eval_only") == 0
        assert in_child(main, config, "--eval_only", "--init_from", str(final)) == 0
    before = everything(config.checkpoint_dir)
    os.chmod(config.checkpoint_dir, 0o500)
    try:
        assert main(config, "--eval_only") == 0
    finally:
        os.chmod(config.checkpoint_dir, 0o700)
    assert everything(config.checkpoint_dir) == before


def test_a_split_of_one_token_is_refused(config, tmp_path, capfd):
    write(tmp_path / "data", range(99), [1])
    assert main(replace(config, data_dir=str(tmp_path / "data"))) == 2
    assert "val has 1 tokens" in errors(capfd)[0]


def test_a_file_for_a_folder_is_said_in_words(config, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert main(replace(config, checkpoint_dir=str(tmp_path / "file"))) == 2
    assert errors(capfd) == [f"error: {tmp_path / 'file'} is no folder; name one"]


def test_fresh_says_how_much_is_set_aside_and_how_to_delete_it(config, capfd):
    for count in (1, 2):
        train(config)
        capfd.readouterr()
        assert main(replace(config, max_iters=0), "--fresh") == 0
        said = capfd.readouterr().err
        assert "GB are set aside by now: `rm " in said
        folders = [path for path in Path(config.checkpoint_dir).iterdir() if path.is_dir()]
        assert len(folders) == count
    command = said.split("`")[1]
    assert os.system(command) == 0
    assert list(Path(config.checkpoint_dir).glob("*/*")) == []
    assert saved(config, "checkpoint.pt")["step"] == 0
