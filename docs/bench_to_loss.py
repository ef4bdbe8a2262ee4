"""Seconds until training reaches a validation loss, beside nanoGPT's recipe for tiny Shakespeare.

    python bench.py to_loss 1.89 --nanogpt nanoGPT
    python bench.py to_loss 1.6 --data_dir data/novel --flags="--max_iters 500"

Ours is train.py as a user starts it, its evaluations included; nanoGPT's are left out. Both losses
are over the whole validation split.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_common import HERE, Compared, on_cuda, run_work, spinning
from bench_train import as_nanogpt, nanogpt_model, training_step

from config import GPT2Config, derived
from data import TokenDataset, validation_starts, windows_at
from optim import learning_rate
from options import integer, number
from utils import autocast, to_device

# nanoGPT's: "I only have a macbook" in its README, config/train_shakespeare_char.py
ADAMW = {"bias": False, "learning_rate": 1e-3, "warmup_iters": 100, "beta2": 0.99}
RECIPES = {
    "cpu": GPT2Config(65, 64, 4, 4, 128, 0.0, batch_size=12, max_iters=2000, **ADAMW),
    "cuda": GPT2Config(65, 256, 6, 6, 384, 0.2, batch_size=64, max_iters=5000, **ADAMW),
}


@dataclass(kw_only=True)
class LossOptions(Compared):
    # what to measure
    loss: number()  # the validation loss to reach
    flags: str = ""  # for train.py: "--max_iters 500"
    busy: integer(0) = 0  # processes that spin beside it


def race(options, config) -> dict:
    """A report of the seconds until each is at most at the loss, and of their curves."""
    with spinning(options.busy):
        curves = {"ours": our_curve(options, config)}
        if options.nanogpt:
            curves["nanoGPT"] = nanogpt_curve(options, config)
    results = {}
    for name, curve in curves.items():  # (seconds, loss) at each evaluation
        reached = next((seconds for seconds, loss in curve if loss <= options.loss), None)
        curve = [(round(seconds, 1), round(loss, 4)) for seconds, loss in curve]
        results[name] = {"to_loss": reached, "in_all": curve[-1][0], "last_loss": curve[-1][1]}
        results[name]["curve"] = curve
    return {"unit": "seconds", "loss": options.loss, "results": results}


def our_curve(options, config) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"{HERE}/train.py", "--data_dir", config.data_dir]
        command += ["--device", config.device, "--checkpoint_dir", f"{folder}/c"]
        command += ["--log_dir", f"{folder}/r", *shlex.split(options.flags)]
        if code := subprocess.call(command):
            raise SystemExit(code)  # it has said why
        (path,) = Path(folder).glob("r/*/metrics.jsonl")
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(r["seconds"], r["val_loss"]) for r in records if "val_loss" in r]


def nanogpt_curve(options, config) -> list[tuple[float, float]]:
    """Its recipe for this device, until it reaches the loss."""
    dataset, device, curve, seconds = TokenDataset(config.data_dir), config.device, [], 0.0
    here = {"device": device, "compile": config.compile, "vocab_size": dataset.vocab_size}
    config = as_nanogpt(derived(replace(RECIPES["cuda" if on_cuda(config) else "cpu"], **here)))
    torch.manual_seed(1337)
    model, optimizer = nanogpt_model(options, config)
    forward = torch.compile(model, disable=not config.compile)
    B, T = config.batch_size, config.block_size
    val_x, val_y = windows_at(dataset.val, validation_starts(dataset.val, T), T)
    since = time.perf_counter()
    for step in range(config.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        starts = torch.randint(len(dataset.train) - T, (B,)).tolist()
        x, y = windows_at(dataset.train, starts, T)
        x, y = (to_device(ids.contiguous(), torch.device(device)) for ids in (x, y))  # it views y
        loss = training_step(forward, optimizer, x, y, config.dtype)
        if step % 100 == 99:
            loss.item()  # waits for the device
            seconds += time.perf_counter() - since
            with torch.no_grad(), autocast(x.device, config.dtype):
                _, loss = model.eval()(val_x.to(device), val_y.contiguous().to(device))
            curve.append((seconds, loss.item()))
            if loss.item() <= options.loss:
                break
            model.train()
            since = time.perf_counter()
    return curve


def main(argv) -> int:
    usage = "LOSS [--nanogpt DIR] [--data_dir DIR]"
    return run_work("to_loss", argv, __doc__, LossOptions, race, usage)
