"""Weights in and out: the one way from a checkpoint to a model that is ready for use.

    from convert import load_model
    model, tokenizer = load_model()

Without a name it is checkpoints/best_checkpoint.pt, else checkpoints/checkpoint.pt.
"""

from pathlib import Path

import torch

import checkpoint
from checkpoint import CheckpointError
from config import DTYPES, GPT2Config, dtype_name
from model import GPT2
from tokenizer import load_tokenizer
from utils import log, pick_device, pick_dtype


def load_model(spec=None, device=None, dtype=None):
    """The model of a checkpoint, in eval mode, and its tokenizer; says on stderr which.

    spec: the checkpoint's path; without one, the best of ./checkpoints, else the latest.
    device and dtype (names or torch's own): what fits this machine where not given.
    Raises CheckpointError where there is no usable checkpoint, ValueError for device and dtype.
    """
    device, _ = pick_device(None if device is None else str(device))
    dtype = _checked_dtype(dtype, device)
    path = find_default() if spec is None else Path(spec)
    state = _load(path)
    config = checkpoint.model_config(state)
    tokenizer = _tokenizer(state, config, path)
    with device:  # the first random weights are made where the model will be: a GPU is quick at it
        model = GPT2(config)
    checkpoint.load_weights(model, state)
    best = state["best_val_loss"]
    log(
        f"model      {path}: step {state['step']:,}, "
        f"validation loss {'unknown' if best is None else format(best, '.4f')}, "
        f"{model.num_params():,} parameters, {dtype} on {device}"
    )
    return model.to(dtype=getattr(torch, dtype)).eval(), tokenizer


def _load(path):
    try:
        return checkpoint.load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --checkpoint PATH names another") from error


def find_default() -> Path:
    """The checkpoint for whoever names none."""
    folder = Path(GPT2Config().checkpoint_dir)
    for name in (checkpoint.BEST, checkpoint.LATEST):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"no checkpoint in {folder}: `python train.py` makes one, --checkpoint PATH names another"
    )


def _checked_dtype(dtype, device):
    """The name of a floating type that the device can compute in."""
    name = pick_dtype(device) if dtype is None else dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: must be one of {', '.join(DTYPES)}")
    if name == "float64" and device.type == "mps":
        raise ValueError("--dtype float64: Apple GPUs have none; use float32, or --device cpu")
    return name


def _tokenizer(state, config, path):
    """The checkpoint's tokenizer; one that does not fit its model makes the file unusable."""
    try:
        tokenizer = load_tokenizer(state["tokenizer"])
    except ValueError as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be used ({error})") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size:,} tokens, "
            f"its model {config.vocab_size:,}"
        )
    return tokenizer
