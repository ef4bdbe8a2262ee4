"""What a training run needs on GPUs: memory, steps, days. Nothing is run.

    python bench.py plan --preset gpt2-xl --gpus 64
    python bench.py plan --preset gpt2 --gpu rtx4090 --gpus 1 --batch_size 8

docs/scaling.md explains the formulas, under the same letters.
"""

import bisect
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from bench_common import columns, publish, settings

from config import GPT2_CONFIGS
from logger import human_time
from model import GPT2
from optim import ORTHOGONALIZE_AT_ONCE
from options import integer, number
from utils import PEAK_FLOPS

GPUS = {  # name in PEAK_FLOPS, GB of memory (the makers' figures)
    "h200": ("H200", 141),
    "h100": ("H100", 80),
    "h100-pcie": ("H100 PCIe", 80),
    "a100": ("A100", 80),
    "a100-40gb": ("A100", 40),
    "l40s": ("L40S", 48),
    "rtx4090": ("RTX 4090", 24),
    "rtx3090": ("RTX 3090", 24),
}


@dataclass
class PlanOptions:
    # the machine and the work (every setting of train.py is a flag, too)
    gpus: integer(1) = 8  # one process each
    gpu: Literal[*GPUS] = "h100"  # h200, h100, h100-pcie, a100, a100-40gb, l40s, rtx4090, rtx3090
    tokens: number(1) | None = None  # to train on; unset: what --max_iters makes
    mfu: number(above=0, most=1) = 0.3  # share of the peak; see docs/scaling.md
    save: str | None = None  # write the JSON to this file too


def make_plan(options, config) -> dict:
    """Memory, steps and days of a run by the formulas of docs/scaling.md; nothing is run."""
    gpus, (name, gigabytes) = options.gpus, GPUS[options.gpu]
    if config.gradient_accumulation_steps % gpus:
        count = f"--gradient_accumulation_steps {config.gradient_accumulation_steps}"
        raise ValueError(f"{count}: not divisible by {gpus} processes, over which it counts")
    with torch.device("meta"):
        model = GPT2(config)
    tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
    steps = config.max_iters if options.tokens is None else math.ceil(options.tokens / tokens)
    report = {"gpu_gb": gigabytes, "parameters": model.num_params(), "tokens_per_step": tokens}
    report |= {"steps": steps, "tokens": steps * tokens, "tokens_per_second": None, "days": None}
    if config.dtype in ("bfloat16", "float16"):
        flops = model.flops_per_token() * (4 / 3 if config.activation_checkpointing else 1)
        report["tokens_per_second"] = gpus * options.mfu * PEAK_FLOPS[name] / flops
        report["days"] = report["tokens"] / report["tokens_per_second"] / 86400

    alone = config.parallel == "fsdp" or gpus == 1 or config.dtype == "float16"
    report["memory"], room = {}, gigabytes * 1e9
    for way in [config.parallel] if alone else ["ddp", "fsdp"]:

        def memory(batch_size, way=way):
            return peak_memory(replace(config, parallel=way, batch_size=batch_size), model, gpus)

        plan = report["memory"][way] = memory(config.batch_size)
        plan["fits"], sizes = plan["bytes"] <= room, range(1, 4097)
        plan["largest_batch_size"] = bisect.bisect(sizes, room, key=lambda n: memory(n)["bytes"])
    return report


def peak_memory(config, model, gpus) -> dict:
    """Bytes on a GPU at the fullest moment of a step, by row and in all, and while saving. Letters
    and formulas are those of docs/scaling.md.
    """
    B, T, C, V = config.batch_size, config.block_size, config.n_embd, config.vocab_size
    L, N, M, E = config.n_layer, model.num_params(), 12 * config.n_layer * C * C, V * C
    w = 8 if config.dtype == "float64" else 4  # bytes of a weight
    h = 2 if config.dtype in ("bfloat16", "float16") else w  # bytes of an activation
    fsdp = gpus > 1 and config.parallel == "fsdp"
    muon, recompute = config.optimizer == "muon", config.activation_checkpointing
    share = 1 / gpus if fsdp else 1

    buckets = w * N if gpus > 1 and not fsdp else 0  # DDP's, in which the gradients lie
    before = buckets or w * N * (config.gradient_accumulation_steps > gpus)
    after = before or w * N * share
    table = E * (h if fsdp else w)  # the head's part of wte's gradient
    cast = h * (N - M + 2 * M / L) if fsdp else h * (M + E) * (h < w)
    cast_later = h * E * (h < w) if recompute and not fsdp else cast
    token = C * (2 * w + h * (16 if config.position == "rope" else 14) + 2 * (config.dropout > 0))
    block = B * T * (token + 4 * (4 + config.n_head))
    block += h * config.n_head * T * T * (config.position == "alibi" and h < w)
    inputs = L * B * T * C * (h if fsdp else w)
    kept = B * T * C * (w + h) + (inputs if recompute else L * block)
    scores, compiled = B * T * V, config.compile is not False  # compiled on CUDA by default
    batch = max(4 * C * C, min(ORTHOGONALIZE_AT_ONCE["cuda"], M // 3))  # a third has one shape

    always = {"weights": w * N * share, "optimizer": w * (2 * N - M * muon) * share}
    names = ("gradients", "weights in use", "activations", "logits and loss", "orthogonalizing")
    moments = {
        "forward": (before, cast, kept, scores * (h if compiled else 2 * w + h * (h < w))),
        "loss": (before, cast_later, kept, scores * (2 * h if compiled else 3 * w)),
        "embedding": (after + table * (2 if before else 1), 0, block + B * T * C * (w + 5 * h), 0),
        "update": (after, 0, 0, 0, *[w * M + batch * (w + 4 * h)] * muon),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    rows = always | dict(zip(names, moments[moment], strict=False))
    rows = {row: round(size) for row, size in rows.items()}
    saving = round(sum(always.values()) + (w * E if fsdp else buckets))
    report = {"rows": rows, "moment": moment, "step_bytes": sum(rows.values())}
    return report | {"saving_bytes": saving, "bytes": max(report["step_bytes"], saving)}


PLAN = """\
{parameters:,} parameters, {gpus} x {gpu}, {dtype}, {optimizer}
{steps:,} steps of {tokens_per_step:,} tokens, {tokens:,} in all
a step: {processes}, {rounds} times {batch_size} sequences of {block_size} each \
(--batch_size {batch_size} --gradient_accumulation_steps {gradient_accumulation_steps})
"""


def plan_text(report) -> str:
    """A column for each way of sharing the work, a row for each thing that takes memory."""
    values, plans = report["options"]["config"] | report["options"] | report, report["memory"]
    gpus, speed = values["gpus"], report["tokens_per_second"]
    processes = "1 process" if gpus == 1 else f"{gpus} processes"
    rounds = values["gradient_accumulation_steps"] // gpus
    text = PLAN.format(**values, processes=processes, rounds=rounds)
    if speed is not None:
        text += f"{values['days']:.2f} days ({human_time(values['days'] * 86400)}) at {speed:,.0f} "
        text += f"tokens/s, assuming an MFU of {values['mfu']:g} (--mfu)\n"
    names = dict.fromkeys(name for plan in plans.values() for name in plan["rows"])
    rows = {name: [plan["rows"].get(name, 0) for plan in plans.values()] for name in names}
    rows["a step in all"] = [plan["step_bytes"] for plan in plans.values()]
    rows["saving"] = [plan["saving_bytes"] for plan in plans.values()]
    rows = {name: [f"{size / 1e9:.2f}" for size in row] for name, row in rows.items()}
    rows["fullest in a step"] = [plan["moment"] for plan in plans.values()]
    rows[f"fits {report['gpu_gb']} GB"] = ["yes" if p["fits"] else "no" for p in plans.values()]
    rows["largest batch_size"] = [plan["largest_batch_size"] for plan in plans.values()]
    return f"{text}\n{columns({'GB a process': plans} | rows)}"


def main(argv) -> int:
    usage = "bench.py plan [--gpus N] [--gpu NAME] [any setting of train.py]"
    options, config, given = settings(argv, __doc__, PlanOptions, usage)
    config.dtype, gpus = config.dtype or "bfloat16", options.gpus
    if "gradient_accumulation_steps" not in given:  # the fewest for no smaller a step than preset's
        preset = GPT2_CONFIGS["gpt2"] | GPT2_CONFIGS.get(config.preset, {})
        sequences = preset["batch_size"] * preset["gradient_accumulation_steps"]
        config.gradient_accumulation_steps = math.ceil(sequences / config.batch_size / gpus) * gpus
    publish(plan_text, "plan", options, config, make_plan(options, config))
    return 0
