"""Checkpoints are whole or absent, damage is found, and no file can run code."""

import contextlib
import errno
import hashlib
import os
import pickle
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import in_child

import checkpoint
from checkpoint import CheckpointError, latest, load, save, save_latest, save_numbered
from config import GPT2Config, derived, to_dict
from model import GPT2
from optim import make_optimizer, optimizer_state
from tokenizer import CharTokenizer

CONFIG = derived(GPT2Config(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=16))


def make_state(step=3, seed=0):
    torch.manual_seed(seed)
    model = GPT2(CONFIG)
    optimizer = make_optimizer(model, CONFIG)
    model(torch.zeros(1, 4, dtype=torch.int64))[0].sum().backward()
    optimizer.step()
    return {
        "format": 1,
        "step": step,
        "best_val_loss": 2.5,
        "model": dict(model.state_dict()),
        "optimizer": optimizer_state(optimizer, model),
        "scaler": {},
        "rng": {"torch": torch.get_rng_state()},
        "config": to_dict(CONFIG),
        "tokenizer": CharTokenizer.train("abcdefghijklmnopqrst").to_dict(),
        "data_hash": "0" * 64,
        "run": "2026-01-01_00-00-00",
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one == other


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_checkpoint_reads_back_what_was_saved(tmp_path):
    state = make_state()
    save(tmp_path / "checkpoint.pt", state)
    assert same(load(tmp_path / "checkpoint.pt"), state)
    assert same(torch.load(tmp_path / "checkpoint.pt", weights_only=True), state)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_atomic_save_writes_syncs_renames_and_syncs_the_folder(tmp_path, monkeypatch):
    order = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        order.append(f"fsync {kind}")
        real["fsync"](descriptor)

    def replace(source, target):
        order.append(f"rename to {Path(target).name}")
        real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path / "checkpoint.pt", make_state())
    assert order == ["fsync file", "rename to checkpoint.pt", "fsync folder"]


def test_latest_keeps_the_one_before(tmp_path):
    for step in (1, 2, 3):
        save_latest(tmp_path, make_state(step))
    assert load(tmp_path / "checkpoint.pt")["step"] == 3
    assert load(tmp_path / "previous_checkpoint.pt")["step"] == 2
    assert len(os.listdir(tmp_path)) == 2


def test_latest_keeps_the_one_before_without_hard_links(tmp_path, monkeypatch):
    def no_links(*paths):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    test_latest_keeps_the_one_before(tmp_path)


def test_only_the_newest_numbered_checkpoints_are_kept(tmp_path):
    for step in (5, 100, 20, 30):
        save_numbered(tmp_path, make_state(step), keep=2)
    names = {"checkpoint_iter_30.pt", "checkpoint_iter_100.pt"}
    assert set(os.listdir(tmp_path)) == names


def test_atomic_save_on_a_full_disk_leaves_all_as_it_was(tmp_path, monkeypatch):
    save_latest(tmp_path, make_state(1))
    save_latest(tmp_path, make_state(2))
    before = {name: digest(tmp_path / name) for name in os.listdir(tmp_path)}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*checkpoint\.pt.*needs about .* are free"):
        save_latest(tmp_path, make_state(3))
    assert {name: digest(tmp_path / name) for name in os.listdir(tmp_path)} == before


def test_a_write_that_the_system_refuses_half_way_is_told_in_its_words(tmp_path):
    """torch answers it with an error of its own, about positions in its file."""

    def save_in_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"checkpoint\.pt: File too large; it needs"):
            save(tmp_path / "checkpoint.pt", {"model": {"weight": torch.zeros(300_000)}})

    assert in_child(save_in_little_room) == 0
    assert os.listdir(tmp_path) == []


def test_memory_that_could_not_be_read_again_is_not_written(tmp_path):
    """Of an optimizer that somebody added, say: its checkpoints would count as damaged."""
    state = make_state()
    for memory in state["optimizer"].values():
        memory["row_var"] = torch.zeros(3)
    with pytest.raises(ValueError, match="not AdamW's or Muon's memory"):
        save(tmp_path / "checkpoint.pt", state)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- damage


def damage_cut(path, at):
    data = path.read_bytes()
    path.write_bytes(data[: at(len(data))])


def tensor_offset(path):
    """The middle of the largest tensor's data in the file."""
    with zipfile.ZipFile(path) as archive:
        tensors = [member for member in archive.infolist() if "/data/" in member.filename]
        largest = max(tensors, key=lambda member: member.file_size)
        data = archive.read(largest)
    return path.read_bytes().index(data) + len(data) // 2


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[tensor_offset(path)] ^= 1
    path.write_bytes(data)


def damage_page(path):
    data = bytearray(path.read_bytes())
    start = tensor_offset(path) // 4096 * 4096
    data[start : start + 4096] = bytes(4096)
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda path: damage_cut(path, lambda n: 0),
    "one byte": lambda path: damage_cut(path, lambda n: 1),
    "half": lambda path: damage_cut(path, lambda n: n // 2),
    "one byte short": lambda path: damage_cut(path, lambda n: n - 1),
    "one bit": damage_bit,
    "one page": damage_page,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_the_one_before_is_used(tmp_path, kind):
    save_latest(tmp_path, make_state(1))
    save_latest(tmp_path, make_state(2))
    path = tmp_path / "checkpoint.pt"
    DAMAGES[kind](path)
    bad = digest(path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not usable"):
        load(path)
    used, state, damaged = latest(tmp_path)
    assert used.name == "previous_checkpoint.pt" and state["step"] == 1
    assert len(damaged) == 1 and str(path) in damaged[0]
    assert digest(tmp_path / "checkpoint.pt.damaged") == bad and not path.exists()


def test_damage_to_all_names_each_and_touches_none(tmp_path):
    save_latest(tmp_path, make_state(1))
    save_latest(tmp_path, make_state(2))
    save_numbered(tmp_path, make_state(2), keep=3)
    for path in tmp_path.iterdir():
        damage_bit(path)
    before = {name: digest(tmp_path / name) for name in os.listdir(tmp_path)}
    with pytest.raises(CheckpointError) as error:
        latest(tmp_path)
    assert all(name in str(error.value) for name in before) and error.value.exit_code == 3
    assert {name: digest(tmp_path / name) for name in os.listdir(tmp_path)} == before


def test_no_checkpoint_is_none_and_older_kinds_are_fallen_back_on(tmp_path):
    assert latest(tmp_path) is None
    save_numbered(tmp_path, make_state(7), keep=3)
    save(tmp_path / "checkpoint.pt", make_state(8))
    damage_bit(tmp_path / "checkpoint.pt")
    assert latest(tmp_path)[1]["step"] == 7


# ---------------------------------------------------------------- hostile files


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def edited(change):
    def write(path, canary):
        state = make_state()
        change(state)
        torch.save(state, path)

    return write


def pickled(path, canary):
    path.write_bytes(pickle.dumps(Canary(canary)))


def pickled_in_zip(path, canary):
    torch.save(make_state() | {"extra": Canary(canary)}, path)


def deflated(path, canary):
    plain = path.with_suffix(".plain")
    torch.save(make_state(), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for member in source.infolist():
            out.writestr(member.filename, source.read(member))


WTE = "transformer.wte.weight"


def model(change):
    return edited(lambda state: change(state["model"]))


HOSTILE = {  # what it is -> how it is made, and the reason given
    "a pickle": (pickled, "no checkpoint"),
    "a pickle inside torch's zip": (pickled_in_zip, "might run code"),
    "a deflated zip": (deflated, "compressed"),
    "a sparse tensor": (model(lambda m: m.update({WTE: m[WTE].to_sparse()})), "not a plain tensor"),
    "a meta tensor": (model(lambda m: m.update({WTE: m[WTE].to("meta")})), "not a plain tensor"),
    "a stride-0 tensor": (
        model(lambda m: m.update({WTE: torch.zeros(1).expand(20, 16)})),
        "not a plain tensor",
    ),
    "a huge stride-0 tensor": (
        model(lambda m: m.update({WTE: torch.zeros(1).expand(10**6, 10**6)})),
        "not a plain tensor",
    ),
    "a quantized tensor": (
        model(lambda m: m.update({WTE: torch.quantize_per_tensor(m[WTE], 0.1, 0, torch.qint8)})),
        "not a plain tensor",
    ),
    "a parameter": (
        model(lambda m: m.update({WTE: torch.nn.Parameter(m[WTE])})),
        "not a plain tensor",
    ),
    "weights that are not finite": (model(lambda m: m[WTE].fill_(float("nan"))), "not finite"),
    "optimizer memory that is not finite": (
        edited(lambda s: s["optimizer"][WTE]["exp_avg"].fill_(float("inf"))),
        "not finite",
    ),
    "optimizer memory of a wrong shape": (
        edited(lambda s: s["optimizer"][WTE].update(exp_avg=torch.zeros(3, 3))),
        "has shape",
    ),
    "optimizer memory without a step": (
        edited(lambda s: s["optimizer"][WTE].pop("step")),
        "not AdamW's or Muon's memory",
    ),
    "optimizer memory of no weight": (
        edited(lambda s: s["optimizer"].update(other=s["optimizer"][WTE])),
        "optimizer other is not",
    ),
    "a random state that is none": (
        edited(lambda s: s.update(rng={"torch": torch.zeros(3, dtype=torch.uint8)})),
        "state",
    ),
    "a missing key": (edited(lambda s: s.pop("optimizer")), "'optimizer' is missing"),
    "nanoGPT's": (edited(lambda s: s.update(model_args={})), "convert.py from_nanogpt"),
    "a key of a wrong type": (edited(lambda s: s.update(step="3")), "'step' is a str"),
    "a path as run": (edited(lambda s: s.update(run="../../x")), "not the name of a folder"),
    "n_layer of a billion": (edited(lambda s: s["config"].update(n_layer=10**9)), "n_layer"),
    "a larger model than it holds": (
        edited(lambda s: s["config"].update(n_embd=2**14, n_head=1)),
        "larger model",
    ),
    "a config of wrong types": (edited(lambda s: s["config"].update(n_layer="2")), "n_layer"),
    "a later format": (edited(lambda s: s.update(format=99)), "format 99"),
    "something else entirely": (lambda path, canary: torch.save([1, 2], path), "holds a list"),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused_and_runs_nothing(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, canary = tmp_path / "checkpoint.pt", tmp_path / "canary"
    make, reason = HOSTILE[kind]
    make(path, canary)
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pt: .*{reason}") as error:
        load(path)
    assert error.value.exit_code == 3 and len(str(error.value).splitlines()) == 1
    assert not canary.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_hostile_files_cost_little_time_and_memory(tmp_path):
    """Under 2 s and 200 MB each, beyond what importing torch takes."""
    paths = []
    for number, (make, _) in enumerate(HOSTILE.values()):
        paths.append(tmp_path / f"{number}.pt")
        make(paths[-1], tmp_path / "canary")

    def costs_little(path):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        with contextlib.suppress(CheckpointError):
            load(path)
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return 0 if time.perf_counter() - start < 2 and kilobytes < 200_000 else 2

    for path in paths:
        assert in_child(costs_little, path) == 0, path


HOSTILE_WEIGHTS = {
    "a wrong shape": lambda w: w.update({"transformer.ln_f.bias": torch.zeros(17)}),
    "a missing name": lambda w: w.pop("transformer.h.1.ln_2.weight"),
    "a name too many": lambda w: w.update({"extra": torch.zeros(3)}),
    "whole numbers": lambda w: w.update({WTE: torch.zeros(20, 16, dtype=torch.int64)}),
}


@pytest.mark.parametrize("kind", HOSTILE_WEIGHTS)
def test_hostile_weights_leave_the_model_as_it_is(tmp_path, kind):
    state = make_state(seed=1)
    HOSTILE_WEIGHTS[kind](state["model"])
    state["optimizer"] = {}
    torch.save(state, tmp_path / "checkpoint.pt")
    model = GPT2(CONFIG)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load_weights(model, load(tmp_path / "checkpoint.pt"))
    assert same(model.state_dict(), before)


# ---------------------------------------------------------------- the folder


def test_clean_removes_what_a_killed_save_left(tmp_path):
    save_latest(tmp_path, make_state())
    (tmp_path / ".checkpoint.pt.tmp").write_bytes(b"half")
    checkpoint.clean(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_set_aside_moves_a_run_into_a_dated_folder(tmp_path):
    assert checkpoint.set_aside(tmp_path) is None
    save_latest(tmp_path, make_state(1))
    save_latest(tmp_path, make_state(2))
    target = checkpoint.set_aside(tmp_path)
    assert sorted(os.listdir(target)) == ["checkpoint.pt", "previous_checkpoint.pt"]
    assert os.listdir(tmp_path) == [target.name]
