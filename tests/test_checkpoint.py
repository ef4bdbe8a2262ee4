"""Checkpoints are complete or absent, damage is found, and no file can run code."""

import io
import os
import pickle
import resource
import time
import zipfile

import pytest
import torch
from conftest import in_child, same

import checkpoint
from checkpoint import CheckpointError, latest, load, save
from config import GPT2Config
from files import WriteError
from model import GPT2
from tokenizer import CharTokenizer

CONFIG = GPT2Config(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=16)


def make_state(step=3):
    """A checkpoint as in the middle of a run, with an AdamW's state."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train("abcdefghijklmnopqrst")
    state = checkpoint.new_state(CONFIG, dict(GPT2(CONFIG).state_dict()), tokenizer)
    for name, w in state["model"].items():
        if name != "lm_head.weight":
            kept = {"step": torch.tensor(3.0), "exp_avg": w + 1, "exp_avg_sq": w**2}
            state["optimizer"][name] = kept
    state |= {"step": step, "best_val_loss": 2.5, "rng": {"torch": torch.get_rng_state()}}
    return state | {"data_hash": "0" * 64, "run": "2026-01-01_00-00-00"}


def contents(folder):
    """The bytes of each file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def two(tmp_path):
    """The path of the latest of two checkpoints, of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "checkpoint.pt", make_state(step))
    return tmp_path / "checkpoint.pt"


def test_checkpoint_reads_back_what_was_saved_and_the_one_before_stays(two):
    state = make_state(3)
    save(two, state)
    assert same(load(two), state) and same(torch.load(two, weights_only=True), state)
    assert same(load(two.parent / "previous_checkpoint.pt"), make_state(2))
    assert len(os.listdir(two.parent)) == 2


def test_atomic_save_on_a_full_disk_leaves_all_as_it_was(two):
    """Said in the system's words: torch raises an error of its own, about positions in its file."""

    def save_in_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        state = make_state(3) | {"optimizer": {"x": {"y": torch.zeros(300_000)}}}
        says = r"write .*checkpoint\.pt: File too large.* are free.* needs 1\.2 MB"
        with pytest.raises(WriteError, match=says):
            save(two, state)

    before = contents(two.parent)
    assert in_child(save_in_little_room) == 0
    assert contents(two.parent) == before


def changed(data, change):
    """A file's bytes with a change from the middle of its largest tensor on."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        tensors = [member for member in archive.infolist() if "/data/" in member.filename]
        largest = archive.read(max(tensors, key=lambda member: member.file_size))
    at = data.index(largest) + len(largest) // 2
    new = change(data[at:])
    return data[:at] + new + data[at + len(new) :]


DAMAGES = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one bit": lambda data: changed(data, lambda rest: bytes([rest[0] ^ 1])),
    "one page": lambda data: changed(data, lambda rest: bytes(4096)),
}


def damage(path, kind="one bit"):
    path.write_bytes(DAMAGES[kind](path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_the_one_before_is_used(two, kind, capfd):
    damage(two, kind)
    bad = two.read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not usable, cut short, damaged"):
        load(two)
    used, state = latest(two.parent)
    assert used.name == "previous_checkpoint.pt" and state["step"] == 1
    assert f"passed over and kept as *.damaged: {two}" in capfd.readouterr().err
    assert two.with_name("checkpoint.pt.damaged").read_bytes() == bad and not two.exists()


def test_damage_to_all_names_each_and_touches_none_until_another_is_there(two):
    for path in two.parent.iterdir():
        damage(path)
    before = contents(two.parent)
    with pytest.raises(CheckpointError) as error:
        latest(two.parent)
    assert all(name in str(error.value) for name in before) and error.value.exit_code == 3
    assert contents(two.parent) == before
    save(two.parent / "checkpoint_iter_7.pt", make_state(7))
    assert latest(two.parent)[1]["step"] == 7


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def weight(name, change):
    return lambda state, *_: state["model"].update({name: change(state["model"].get(name))})


def deflated(state, path, canary):
    torch.save(state, plain := path.with_suffix(".plain"))
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for member in source.infolist():
            out.writestr(member.filename, source.read(member))


WTE, HEAD, NORM = "transformer.wte.weight", "lm_head.weight", "transformer.ln_f.weight"
CODE, PLAIN = "might run code", "model.transformer.wte.weight: not a plain tensor"
HOSTILE = {  # what it is -> how a state is changed or a file is made, and the reason given
    "a pickle": (
        lambda _, path, canary: path.write_bytes(pickle.dumps(Canary(canary))),
        "no check",
    ),
    "a pickle inside torch's zip": (lambda s, _, canary: s.update(extra=Canary(canary)), CODE),
    "a deflated zip": (deflated, "compressed"),
    "a sparse tensor": (weight(WTE, lambda w: w.to_sparse()), CODE),
    "a meta tensor": (weight(WTE, lambda w: w.to("meta")), CODE),
    "a stride-0 tensor": (weight(WTE, lambda w: w[:1, :1].clone().expand(20, 16)), PLAIN),
    "quantized": (weight(WTE, lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), CODE),
    "weights that are not finite": (weight(WTE, lambda w: w / 0), "wte.weight: .*not finite"),
    "a wrong shape": (weight(NORM, lambda w: w[1:].clone()), "size mismatch for transformer.ln_f"),
    "a missing weight": (lambda s, *_: s["model"].pop(NORM), "Missing.*ln_f.weight"),
    "a weight too many": (weight("extra", lambda w: torch.zeros(3)), "Unexpected.*extra"),
    "a head of its own": (weight(HEAD, lambda w: w + 1), "the head is not tied"),
    "moments not finite": (lambda s, *_: s["optimizer"][WTE]["exp_avg"].div_(0), "not finite"),
    "moments of no weight": (lambda s, *_: s.update(optimizer={"other": {}}), "adamw keeps"),
    "a missing key": (lambda s, *_: s.pop("optimizer"), "optimizer: is missing"),
    "nanoGPT's": (lambda s, *_: s.update(model_args={}), "convert.py from_nanogpt"),
    "a key of a wrong type": (lambda s, *_: s.update(step="3"), "step: .*valid integer"),
    "a path as run": (lambda s, *_: s.update(run="../../x"), "run: must match"),
    "more than plain data": (lambda s, *_: s.update(scaler={"x": torch.zeros(1)}), "scaler.x"),
    "n_layer of a billion": (lambda s, *_: s["config"].update(n_layer=10**9), "n_layer"),
    "more layers than it holds": (lambda s, *_: s["config"].update(n_layer=1000), "larger model"),
    "a later format": (lambda s, *_: s.update(format=99), "format: must be at most 1"),
    "something else entirely": (lambda _, path, canary: torch.save([1], path), "valid dictionary"),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused_and_runs_nothing(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, canary = tmp_path / "checkpoint.pt", tmp_path / "canary"
    (change, reason), state = HOSTILE[kind], make_state()
    change(state, path, canary)
    if not path.exists():
        torch.save(state, path)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pt: .*{reason}") as error:
        load(path)
    assert error.value.exit_code == 3 and len(str(error.value).splitlines()) == 1
    assert time.perf_counter() - start < 2 and not canary.exists()
