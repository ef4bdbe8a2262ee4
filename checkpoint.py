"""Checkpoints: whole or absent on disk, checked before use, unable to run code; and models by
name, wherever they come from. A checkpoint is one file that torch.load can read, too: State.

    from checkpoint import load_model
    model, tokenizer = load_model("gpt2")  # or a checkpoint's path, or a Hugging Face folder
"""

import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, FiniteFloat, JsonValue
from torch.overrides import TorchFunctionMode
from typing_extensions import TypedDict

import files
from archive import read_archive
from config import DTYPES, GPT2Config, dtype_name
from huggingface import EMBEDDING, HEAD, download_model, hub_name, read_hf
from logger import command_for, log_row, quoted, warn
from model import GPT2
from options import FolderName, integer, number, validate
from quantize import to_int8
from tokenizer import load_tokenizer
from utils import pick_device, pick_dtype

FORMAT = 1  # incremented when an older reader would misread a newer file
LATEST, PREVIOUS = "checkpoint.pt", "previous_checkpoint.pt"  # PREVIOUS: the latest before LATEST
BEST, FINAL = "best_checkpoint.pt", "final_checkpoint.pt"  # lowest validation loss; end of a run
EARLIER = "????-??-??_??-??-??*/*.pt*"  # runs that were set aside
NUMBERED = "checkpoint_iter_{}.pt"  # every checkpoint_interval steps
# optimizer state per parameter; Muon's is for the blocks' matrices alone, the others have AdamW's
OPTIMIZER_KEYS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"step", "momentum_buffer"}}
ON_DISK = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


class CheckpointError(Exception):
    """No usable checkpoint: missing, damaged, hostile, or of a different model."""

    exit_code = 3


def plain_tensor(tensor):
    """tensor, if it is contiguous and holds finite numbers; ValueError otherwise."""
    if not (type(tensor) is torch.Tensor and tensor.dtype in ON_DISK and tensor.is_contiguous()):
        raise ValueError("not a plain tensor")
    # the extremes show NaN and infinity too, fifty times as fast as torch.isfinite(tensor)
    if tensor.numel() > 0 and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ValueError("has values that are not finite")
    return tensor


Tensor = Annotated[Any, AfterValidator(plain_tensor)]


SCALER = {  # float16's loss scale, as torch.amp.GradScaler keeps it
    "scale": number(above=0, most=1e30),
    "growth_factor": number(above=1, most=1e3),
    "backoff_factor": number(above=0, below=1),
    "growth_interval": integer(1, 2**31 - 1),
    "_growth_tracker": integer(0, 2**31 - 1),
}


class State(BaseModel):
    """What a checkpoint holds."""

    format: integer(most=FORMAT)
    step: integer(0, 2**40)  # optimizer steps done
    best_val_loss: FiniteFloat | None
    model: dict[str, Tensor]  # the weights, in float32 or in the type they were imported with
    optimizer: dict[str, dict[str, Tensor]]  # the state of each weight, by its name
    scaler: TypedDict("Scaler", SCALER, total=False, closed=True)  # {} unless float16
    rng: dict[Literal["torch"], Tensor]
    config: dict[str, JsonValue]
    tokenizer: dict[str, JsonValue]  # {} without one
    data_hash: str | None
    run: FolderName | None  # its folder in log_dir


def save(path, state: dict):
    """Write state to path atomically; the LATEST that it replaces stays as PREVIOUS. WriteError."""
    previous = Path(path).with_name(PREVIOUS) if Path(path).name == LATEST else None
    try:
        with files.atomic_write(path, keep=previous) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's own, about file positions, hides the system's
                raise (error.__context__ or error) from None
    except files.WriteError as error:
        parts = state["model"], *state["optimizer"].values()
        needed = sum(t.nbytes for part in parts for name, t in part.items() if name != HEAD) / 1e6
        raise files.WriteError(f"{error}; the checkpoint needs {needed:,.1f} MB") from error


def load(path, check=None) -> dict:
    """A checkpoint, every byte's checksum compared, every value checked; CheckpointError only."""
    try:
        with files.open_file(path) as file:
            state = read_archive(file, os.fstat(file.fileno()).st_size)
        (check or check_state)(state)
    except Exception as error:
        line = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
        if not (line and isinstance(error, (ValueError, RuntimeError, OSError))):  # KeyError: 'x'
            line = "cut short, damaged or no checkpoint"
        raise CheckpointError(f"{path}: not usable, {line.removeprefix('--')[:200]}") from error
    return state


def check_state(state):
    """ValueError unless state is a complete checkpoint of one model."""
    if type(state) is dict and "model_args" in state:
        raise ValueError("nanoGPT's: `python convert.py from_nanogpt FILE model.pt` makes it ours")
    files.check_json(state, State)
    build_model(state)
    found = {key: {k: t.shape for k, t in s.items()} for key, s in state["optimizer"].items()}
    expected, kind = {}, state["config"].get("optimizer", "adamw")
    for name, weight in state["model"].items():
        by_muon = kind == "muon" and ".h." in name and weight.ndim > 1
        shapes = dict.fromkeys(OPTIMIZER_KEYS["muon" if by_muon else "adamw"], weight.shape)
        expected[name] = shapes | {"step": torch.Size()}
    del expected[HEAD]
    if found not in ({}, expected):  # {} before the first step
        raise ValueError(f"optimizer is not the state that {kind} keeps of these weights")


def model_config(state: dict) -> GPT2Config:
    """A checkpoint's config, without fields that are unknown here; ValueError for bad values."""
    names = {field.name for field in fields(GPT2Config)} & state["config"].keys()
    return validate(GPT2Config(**{name: state["config"][name] for name in names}))


class EmptyInit(TorchFunctionMode):
    """New modules skip torch.nn.init, which on the meta device imports torch._dynamo: 1 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def build_model(state: dict) -> GPT2:
    """A model whose weights are a checkpoint's tensors, not copies. ValueError if some differ."""
    config, tensors = model_config(state), state["model"]
    if len(tensors) < config.n_layer:  # do not build a large model for a small file
        raise ValueError("its config describes a larger model than it holds")
    with torch.device("meta"), EmptyInit():
        model = GPT2(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError("\n".join(str(error).split("\n\t")[1:12])) from None  # after a heading
    if not torch.equal(tensors[HEAD].to(tensors[EMBEDDING]), tensors[EMBEDDING]):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}: the head is not tied")
    model.lm_head.weight = model.transformer.wte.weight  # assigning has untied them
    return model


def latest(folder, rename: bool = True) -> tuple[Path, dict] | None:
    """Path and state of a folder's newest intact checkpoint, None if it has none. Warns of newer,
    damaged ones and, if asked, renames them; if none is intact, CheckpointError names them all.
    """
    damaged = {}
    for path in _newest_first(Path(folder)):
        try:
            state = load(path)
        except CheckpointError as error:
            damaged[path] = str(error)
        else:
            for bad, problem in damaged.items():
                warn(f"passed over{' and kept as *.damaged' if rename else ''}: {problem}")
                if rename:
                    os.replace(bad, files.free_name(f"{bad}.damaged"))
            return path, state
    if damaged:
        remedy = "no usable checkpoint is left; --fresh sets these files aside"
        raise CheckpointError("\n".join([*damaged.values(), remedy]))


def _newest_first(folder):
    others = [p for name in (FINAL, BEST, NUMBERED.format("*")) for p in folder.glob(name)]
    others.sort(key=os.path.getmtime, reverse=True)
    return [*folder.glob(LATEST), *folder.glob(PREVIOUS), *others]


def set_aside(folder):
    """Move a run's checkpoints, if there are any, into a new dated subfolder."""
    folder = Path(folder)
    if paths := [*_newest_first(folder), *folder.glob("*.pt.damaged*")]:
        dated = files.own_folder(files.free_name(folder / time.strftime("%Y-%m-%d_%H-%M-%S")))
        for path in paths:
            os.replace(path, dated / path.name)
        size = sum(path.stat().st_size for path in folder.glob(EARLIER)) / 1e9
        so_far = f"{size:,.2f} GB are set aside by now; `rm {quoted(folder)}/{EARLIER}` deletes it"
        log_row("set aside", f"the earlier run's checkpoints, in {dated}\n{so_far}")


# ---------------------------------------------------------------- a model by its name


@dataclass
class ModelOptions:
    """The arguments of load_model, as the first options of each script that needs a model."""

    # which model
    checkpoint: str | None = None  # file, folder or hub name; unset: the best of ./checkpoints
    device: str | None = None  # cuda, cuda:1, mps or cpu; unset: the best there is
    dtype: Literal[*DTYPES, "int8"] | None = None  # precision; int8: on a CPU; unset: the best


def load_model(spec=None, device=None, dtype=None):
    """A model in eval mode and its tokenizer; logs which.

    spec: a checkpoint's path, a Hugging Face folder, or a name on the hub (gpt2-xl, org/name);
    None: the best of ./checkpoints, else the latest. device, dtype: names or torch's own, or int8;
    None: the best for this machine. CheckpointError without a usable one, ValueError for the rest.
    """
    device = pick_device(None if device is None else str(device))
    dtype = dtype_name(dtype) or pick_dtype(device)
    kept = validate(GPT2Config(device=str(device), dtype="float32" if dtype == "int8" else dtype))
    state, name = load_state(spec)
    model, tokenizer = build(state, name)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it can neither read nor write text")
    model = model.to(device, getattr(torch, kept.dtype)).eval()
    loss = "" if (best := state["best_val_loss"]) is None else f", validation loss {best:.4f}"
    history = f" (step {state['step']:,}{loss})" if state["step"] else ""
    log_row("model", f"{name}{history}\n{describe_model(model, tokenizer)}, {dtype} on {device}")
    return to_int8(model) if dtype == "int8" else model, tokenizer


def best_in(folder) -> Path | None:
    """A folder's checkpoint of the lowest validation loss, else the latest."""
    paths = Path(folder, BEST), Path(folder, LATEST)
    return next((path for path in paths if path.is_file()), None)


def load_state(spec=None) -> tuple[dict, str]:
    """A checkpoint's dict (see State) and its name, for any spec of load_model."""
    folder = GPT2Config().checkpoint_dir
    if spec is None and (spec := best_in(folder)) is None:
        hint = "`python train.py` makes one, --checkpoint names another"
        raise CheckpointError(f"no checkpoint in {folder}: {hint}")
    path, name = Path(spec), str(spec)
    if path.is_file():
        return load(path), name
    if not path.is_dir():
        if (name := hub_name(name)) is None:
            raise CheckpointError(f"{spec}: no file or folder, nor a hub name (gpt2, org/name)")
        path = download_model(name)
    return new_state(*read_hf(path, name), name), name


def new_state(config: GPT2Config, tensors: dict, tokenizer, name: str = "the model") -> dict:
    """The checkpoint of a model from elsewhere; ValueError, with name, if config is another's."""
    state = (
        {"format": FORMAT, "step": 0, "best_val_loss": None, "model": dict(tensors)}
        | {"optimizer": {}, "scaler": {}, "rng": {}, "config": asdict(config)}
        | {"tokenizer": tokenizer.to_dict() if tokenizer else {}, "data_hash": None, "run": None}
    )
    try:
        check_state(state)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    state["model"][HEAD] = state["model"][EMBEDDING]  # tied: saved once
    return state


def build(state: dict, name: str):
    """A checkpoint's model and its tokenizer or None; CheckpointError if that does not fit it."""
    model, spec = build_model(state), state["tokenizer"]
    try:
        return model, load_tokenizer(spec, model.config.vocab_size) if spec else None
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def describe_model(model, tokenizer) -> str:
    kind = "no tokenizer" if tokenizer is None else f"{tokenizer.kind} tokenizer"
    return f"{model.num_params():,} parameters, {kind} ({model.config.vocab_size:,} tokens)"


def log_next_generate(checkpoint=None, device=None, dtype=None):
    """Log the generate.py command for the model that load_model finds by these arguments."""
    flags = {"--checkpoint": checkpoint, "--device": device, "--dtype": dtype}
    words = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    log_row("next", command_for("generate.py", *words, "--interactive"), fold=False)
