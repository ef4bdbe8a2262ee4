"""How good a model is: mean loss, perplexity and bits per byte over a whole split.

    python evaluate.py
    python evaluate.py --checkpoint checkpoints/checkpoint.pt --data_dir data/mytext --json

Without --data_dir it is the data set that the checkpoint was trained on.
"""

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from config import DTYPES, dtype_name
from convert import load_model
from data import TokenDataset, validation_starts, windows_at
from utils import ArgumentParser, autocast, perplexity, pick_device, pick_dtype, run


@torch.no_grad()
def mean_loss(
    model,
    tokens,
    block_size: int,
    batch_size: int,
    device,
    max_windows: int | None = None,
    vocab_size: int | None = None,
    autocast=nullcontext(),  # noqa: B008  (it has no state)
) -> float:
    """Mean cross-entropy in nats a token over fixed windows that cover a split evenly.

    Every token counts alike, whatever the batches; all windows unless max_windows says fewer. The
    model's mode is put back, no random numbers are drawn, and the device is waited for only once.
    """
    device = torch.device(device)
    starts = validation_starts(tokens, block_size, max_windows)
    if len(starts) == 0:
        raise ValueError(
            f"{len(tokens)} tokens to evaluate on, needs {block_size + 1} (block_size)"
        )
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=device)
    was_training = model.training
    model.eval()
    try:
        with autocast:
            for first in range(0, len(starts), batch_size):
                some = starts[first : first + batch_size]
                x, y = full_batch(windows_at(tokens, some, block_size, vocab_size), batch_size)
                _, loss = model(to(x, device), to(y, device))
                total += loss.to(wide) * len(some)
    finally:
        model.train(was_training)
    return total.item() / len(starts)


def full_batch(batch, batch_size):
    """Fill up the last batch with targets that do not count: a compiled model wants one shape."""
    x, y = batch  # (B, T) each
    missing = batch_size - len(x)
    return (
        torch.cat([x, x[:1].expand(missing, -1)]),
        torch.cat([y, torch.full_like(y[:1], -1).expand(missing, -1)]),
    )


def to(tensor, device):
    """tensor on the device, without waiting for what the device still has to do."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def evaluate_split(model, dataset, split, batch_size, device, dtype) -> dict:
    """Loss, perplexity and bits per byte of one split: what main prints.

    Bits per byte measure the text itself, so that they compare across tokenizers; None where the
    data set does not know how long its text was.
    """
    tokens, block_size = getattr(dataset, split), model.config.block_size
    mixed = autocast(device, dtype)
    loss = mean_loss(model, tokens, block_size, batch_size, device, None, dataset.vocab_size, mixed)
    text_bytes = dataset.meta["splits"][split].get("bytes")
    bits = loss * len(tokens) / math.log(2)
    return {
        "task": "val",
        "data_dir": str(dataset.data_dir),
        "split": split,
        "tokens": len(tokens),
        "windows": len(validation_starts(tokens, block_size)),
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits / text_bytes if text_bytes else None,
    }


def find_dataset(data_dir, model, tokenizer) -> TokenDataset:
    """The data set to evaluate on; ValueError if its ids are not those that the model knows.

    A checkpoint may come from anywhere: the folder that it names is opened only below this one.
    """
    if data_dir is None:
        data_dir = model.config.data_dir
        if not Path(data_dir).resolve().is_relative_to(Path.cwd()):
            raise ValueError(
                f"trained on {data_dir}, outside this folder; --data_dir DIR allows it"
            )
    dataset = TokenDataset(data_dir)
    made_with = dataset.meta["tokenizer"]
    if made_with["sha256"] != tokenizer.hash():
        raise ValueError(
            f"{data_dir} was made with another tokenizer ({made_with['kind']}, "
            f"{dataset.vocab_size:,} tokens) than the checkpoint's ({tokenizer.kind}, "
            f"{tokenizer.vocab_size:,} tokens); name a fitting data set with --data_dir"
        )
    return dataset


def table(result: dict) -> str:
    bits = result["bits_per_byte"]
    return (
        f"data        {result['data_dir']}, {result['split']}: {result['tokens']:,} tokens, "
        f"{result['windows']:,} windows\n"
        f"loss        {result['loss']:.4f} nats a token\n"
        f"perplexity  {result['perplexity']:.2f}\n"
        f"bits/byte   {'unknown' if bits is None else format(bits, '.4f')}"
    )


def main(argv=None) -> int:
    parser = ArgumentParser(prog="evaluate.py", description="Measure a model.")
    parser.add_argument("--checkpoint", metavar="PATH", help="none: the best of ./checkpoints")
    parser.add_argument("--data_dir", metavar="DIR", help="none: what the model was trained on")
    parser.add_argument("--split", choices=["train", "val"], default="val", help="of the data set")
    parser.add_argument("--task", choices=["val"], default="val", help="what to measure")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="windows at a time")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; none: the best there is")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; none: the best there is")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise ValueError(f"--batch_size {options.batch_size}: must be at least 1")

    device, _ = pick_device(options.device)
    dtype = dtype_name(options.dtype or pick_dtype(device))
    half = dtype in ("bfloat16", "float16")  # as in training: float32 weights under autocast
    model, tokenizer = load_model(options.checkpoint, device, "float32" if half else dtype)
    dataset = find_dataset(options.data_dir, model, tokenizer)
    result = evaluate_split(model, dataset, options.split, options.batch_size, device, dtype)
    print(json.dumps(result) if options.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
