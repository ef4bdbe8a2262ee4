"""State on disk: checkpoints that are whole or absent, checked before use, and unable to run code.

A checkpoint is one file that torch.load(path, weights_only=True) reads: a dict with the keys below,
of plain tensors, numbers, strings, lists and dicts. This file alone knows the checkpoints' names:

    checkpoint.pt           the latest            best_checkpoint.pt    lowest validation loss
    previous_checkpoint.pt  the one before it     final_checkpoint.pt   at the end of a run
    checkpoint_iter_N.pt    every checkpoint_interval steps
"""

import contextlib
import os
import pickle
import re
import shutil
import time
import zipfile
from pathlib import Path

import torch

from config import FIELD_TYPES, GPT2Config, problems

FORMAT = 1  # raised when an older reader would misread a newer file
KEYS = {  # key -> the types that its value may have
    "format": (int,),
    "step": (int,),
    "best_val_loss": (float, type(None)),
    "model": (dict,),
    "optimizer": (dict,),
    "scaler": (dict,),
    "rng": (dict,),
    "config": (dict,),
    "tokenizer": (dict,),
    "data_hash": (str, type(None)),
    "run": (str, type(None)),
}
# what AdamW and Muon remember of a weight; another optimizer's keys belong here too
MEMORIES = ({"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum_buffer"})
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
LATEST, PREVIOUS = "checkpoint.pt", "previous_checkpoint.pt"
BEST, FINAL = "best_checkpoint.pt", "final_checkpoint.pt"
NUMBERED = "checkpoint_iter_{}.pt"


class CheckpointError(Exception):
    """No usable checkpoint: missing, damaged, hostile, or of another model."""

    exit_code = 3


# ---------------------------------------------------------------- writing


def save(path, state: dict, previous=None):
    """Write state to path atomically: aside, fsync, rename. What was there stays until then, and
    after it under the name `previous`, where that is given.

    Raises OSError (exit code 4) that says what was needed and what is free, ValueError for an
    optimizer's memory that could not be read again.
    """
    path, state = Path(path), _plain(state, {})
    _check_memory(state.get("optimizer", {}), state.get("model", {}))
    aside = path.parent / f".{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(aside, path)
        fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch wraps some write errors in a RuntimeError
        raise OSError(_why_not_written(path, state, error)) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def save_latest(folder, state: dict):
    """Save checkpoint.pt; the one that it replaces stays as previous_checkpoint.pt."""
    save(Path(folder) / LATEST, state, previous=Path(folder) / PREVIOUS)


def _keep(path, previous):
    """Give path's file the name `previous` too, so that at no moment there is no path."""
    aside = previous.parent / f".{previous.name}.tmp"
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
        os.replace(aside, previous)
    except OSError:  # a file system without hard links
        os.replace(path, previous)


def save_numbered(folder, state: dict, keep: int):
    """Save checkpoint_iter_N.pt and remove all but the newest `keep` of its kind."""
    save(Path(folder) / NUMBERED.format(state["step"]), state)
    for path in sorted(Path(folder).glob(NUMBERED.format("*")), key=_step_of)[: -keep or None]:
        path.unlink(missing_ok=True)


def _plain(value, seen):
    """value with its tensors detached and in host memory; tensors that share memory still do."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu":
            return value.detach()
        key = value.data_ptr(), value.shape
        return seen.setdefault(key, value.detach().cpu())
    if isinstance(value, dict):
        return {key: _plain(part, seen) for key, part in value.items()}
    return value


def fsync_folder(folder):
    """Make a rename survive a power cut, where the operating system can (Windows cannot)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _why_not_written(path, state, error):
    needed = sum(t.numel() * t.element_size() for _, t in _tensors(state))
    if isinstance(error.__context__, OSError):  # torch has answered it with words of its own
        error = error.__context__
    line = f"could not write {path}: {getattr(error, 'strerror', None) or error}"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        line += f"; it needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
    return f"{line}; earlier checkpoints are intact"


# ---------------------------------------------------------------- reading


def load(path) -> dict:
    """The checkpoint at path, every byte of it checked.

    Raises CheckpointError for what is damaged (CRC-32 of each record), hostile or of another kind.
    """
    return read(path, _check_state)


def read(path, check) -> dict:
    """What torch.save wrote to path, if it is plain data and `check` finds nothing wrong with it.

    Raises CheckpointError, also for whatever `check` raises.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; `python train.py` makes checkpoints")
    try:
        with open(path, "rb") as file:
            _check_archive(file, path.stat().st_size)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        check(state)
    except Exception as error:  # whatever a hostile file makes zipfile or torch raise
        raise CheckpointError(f"{path}: not usable, {_reason(error)}") from error
    return state


def _reason(error) -> str:
    """Why a file cannot be used, in words for who has never seen inside one."""
    if isinstance(error, zipfile.BadZipFile):
        return "the file is cut short, damaged or no checkpoint"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something else than plain data, which might run code when opened"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def latest(folder) -> tuple[Path, dict, list[str]] | None:
    """The newest intact checkpoint of a folder: its path, its state, and what is wrong with each
    newer file, which is renamed to NAME.damaged. None where there is no checkpoint at all.

    Raises CheckpointError, naming each file and touching none, where not one is intact.
    """
    damaged = {}
    for path in _candidates(Path(folder)):
        try:
            state = load(path)
        except CheckpointError as error:
            damaged[path] = str(error)
            continue
        for bad in damaged:
            os.replace(bad, _free_name(bad))
        return path, state, list(damaged.values())
    if damaged:
        lines = [*damaged.values(), "no usable checkpoint is left; --fresh sets these files aside"]
        raise CheckpointError("\n".join(lines))
    return None


def _candidates(folder):
    """Checkpoints of a folder, newest first."""
    first = [folder / LATEST, folder / PREVIOUS]
    rest = set(folder.glob(NUMBERED.format("*"))) | {folder / FINAL, folder / BEST}
    rest = sorted((p for p in rest if p.exists()), key=lambda p: p.stat().st_mtime, reverse=True)
    return [path for path in first if path.exists()] + rest


def _free_name(path):
    for number in range(1, 1_000_000):
        name = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not name.exists():
            return name
    raise OSError(f"no free name for {path}")


def _step_of(path):
    number = re.search(r"checkpoint_iter_(\d+)\.pt$", path.name)
    return int(number[1]) if number else -1


def _check_archive(file, size):
    """torch's file is a zip of stored records: refuse anything else, and find flipped bits."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("compressed records")
        if sum(member.file_size for member in members) > size:
            raise ValueError("records larger than the file")
        bad = archive.testzip()
        if bad is not None:
            raise ValueError(f"damaged: its part {bad} does not match the checksum")


def _check_state(state):
    if type(state) is not dict:
        raise ValueError(f"holds a {type(state).__name__}")
    if isinstance(state.get("format"), int) and state["format"] > FORMAT:
        raise ValueError(f"format {state['format']}, this code reads up to {FORMAT}")
    if "model_args" in state:
        raise ValueError("nanoGPT's: `python convert.py from_nanogpt FILE model.pt` makes it ours")
    for key, kinds in KEYS.items():
        if key not in state:
            raise ValueError(f"key {key!r} is missing")
        if type(state[key]) not in kinds:
            raise ValueError(f"key {key!r} is a {type(state[key]).__name__}")
    if state["step"] < 0:
        raise ValueError(f"step {state['step']}")
    if state["run"] is not None and not re.fullmatch(r"[\w][\w.\-]{0,127}", state["run"]):
        raise ValueError(f"run {state['run'][:80]!r} is not the name of a folder")
    for name, tensor in _tensors(state):
        check_tensor(name, tensor)
    config = model_config(state)
    _check_size(state["model"], config)
    _check_memory(state["optimizer"], state["model"])
    if state["rng"]:
        torch.Generator().set_state(state["rng"]["torch"])  # raises where it would not do


def _check_memory(optimizer, weights):
    for name, memory in optimizer.items():
        if name not in weights or set(memory) not in MEMORIES:
            raise ValueError(f"optimizer {name} is not AdamW's or Muon's memory of a weight")
        for key, value in memory.items():
            if value.shape != (() if key == "step" else weights[name].shape):
                raise ValueError(f"optimizer {name} {key} has shape {tuple(value.shape)}")


def _tensors(value, name=""):
    """(name, tensor) of everything in a nest of plain values; ValueError for what is not plain."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif type(value) is dict:
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}".lstrip("."))
    elif type(value) in (list, tuple):
        for part in value:
            yield from _tensors(part, name)
    elif type(value) not in (int, float, str, bool, type(None)):
        raise ValueError(f"{name} is a {type(value).__name__}")


def check_tensor(name: str, tensor):
    """ValueError for a tensor that is not plain numbers in host memory, or not finite."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{name} is not a plain tensor")
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES or not tensor.is_contiguous():
        raise ValueError(f"{name} is not a plain tensor ({tensor.device.type}, {tensor.dtype})")
    # the extremes show NaN and infinity too, fifty times as fast as torch.isfinite(tensor)
    if tensor.is_floating_point() and tensor.numel() > 0:
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise ValueError(f"{name} has values that are not finite")


def _check_size(tensors, config):
    """Refuse a config that asks for more numbers than the file holds, before a model is built."""
    held = {t.untyped_storage().data_ptr(): t.numel() for t in tensors.values()}
    blocks = 12 * config.n_layer * config.n_embd**2
    rows = config.vocab_size + (config.block_size if config.position == "learned" else 0)
    if sum(held.values()) < blocks + rows * config.n_embd:
        raise ValueError("its config describes a larger model than it holds")


def model_config(state: dict) -> GPT2Config:
    """The config of a checkpoint, its values checked; fields unknown here are left out."""
    values = {name: v for name, v in state["config"].items() if name in FIELD_TYPES}
    config = GPT2Config(**values)
    found = problems(config)
    if found:
        raise CheckpointError(f"config: {found[0]}")
    return config


def check_weights(model, state: dict):
    """CheckpointError unless a checkpoint's weights fit the model: every name, shape and type."""
    expected, found = model.state_dict(), state["model"]
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is not part of the model" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            lines.append(f"{name}: {tuple(found[name].shape)}, not {tuple(expected[name].shape)}")
        if not found[name].is_floating_point():
            lines.append(f"{name} is {found[name].dtype}")
    if lines:
        raise CheckpointError(f"the checkpoint does not fit the model: {lines[0]}")


def load_weights(model, state: dict, assign=False):
    """Copy a checkpoint's weights into model, if they fit.

    assign: make them the model's own instead, types included; it may have been built on "meta".
    """
    check_weights(model, state)
    model.load_state_dict(state["model"], assign=assign)


# ---------------------------------------------------------------- the folder


def clean(folder):
    """Remove what a killed save left behind; for the process that holds the folder's lock."""
    for path in Path(folder).glob(".*.pt.tmp"):
        path.unlink(missing_ok=True)


def set_aside(folder) -> Path | None:
    """Move a run's checkpoints into a dated folder among them, and name it; None without any."""
    paths = [*_candidates(Path(folder)), *Path(folder).glob("*.pt.damaged*")]
    if not paths:
        return None
    target = Path(folder) / time.strftime("%Y-%m-%d_%H-%M-%S")
    while target.exists():
        target = target.with_name(target.name + "_")
    target.mkdir()
    for path in paths:
        os.replace(path, target / path.name)
    return target
