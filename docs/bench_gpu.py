"""What one GPU shows in ten minutes: speed beside others, memory beside the plan, a kill.

python bench.py gpu --save gpu.jsonl --nanogpt nanoGPT
python bench.py gpu --stages profiles xl --position rope
python bench.py gpu --dry_run    # each stage with a tiny model on a CPU: does it run?
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import bench_common as common
import torch
from bench_generate import GenerateOptions, compare_generating, others, ours_generating
from bench_plan import peak_memory
from bench_to_loss import LossOptions, race
from bench_train import TrainOptions, compare_training, ours_training
from torch.profiler import ProfilerActivity

import checkpoint
import optim
import sampling
from config import GPT2_CONFIGS, apply_preset
from files import open_to_append, writing
from logger import log, log_row
from model import GPT2
from options import number
from train import train
from utils import peak_flops, peak_mb, set_up_device

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2}
TINY |= {"vocab_size": 65, "device": "cpu", "dtype": "float32", "compile": False, "max_iters": 60}


def sized(options, config, preset=None, **values):
    """config with a preset's values and these; tiny in a dry run."""
    config = apply_preset(config, GPT2_CONFIGS.get(preset, {}), set())
    return replace(config, **values | (TINY if options.dry_run else {}))


def steps(options, count) -> TrainOptions:
    """Turns of so many steps each; one of one in a dry run."""
    samples, count = (1, 1) if options.dry_run else (3, count)
    return TrainOptions(nanogpt=options.nanogpt, samples=samples, steps=count)


# ---------------------------------------------------------------- the stages


def limits(options, config):
    """the most it does: bf16 matrix products (FLOP/s), memory read, memory copied (bytes/s)"""
    a = torch.zeros(2, 2**24 if options.dry_run else 2**31, device=config.device)
    found = {"copy": a.nbytes / common.least_seconds(lambda: a[0].copy_(a[1]), config)}
    found |= {"products": common.gemm_flops(config), "read": common.read_bandwidth(config)}
    return {"unit": "", "results": {name: {"per_second": value} for name, value in found.items()}}


def train_12(options, config):
    """training 124M, 12 x 1,024 tokens a step: tokens/s, MFU, memory; free: not deterministic"""
    config = sized(options, config, batch_size=12)
    return training(WAYS, steps(options, 20), config)


def train_64(options, config):
    """the same with 64 x 1,024 tokens"""
    config = sized(options, config, batch_size=64)  # more than three do not fit together
    return training(("ours", "ours free"), steps(options, 10), config)


def cudnn_64(options, config):
    """the same with cuDNN's attention, which has no deterministic way"""
    config = sized(options, config, batch_size=64)
    return training(["cuDNN free"], replace(steps(options, 10), nanogpt=None), config)


def training(ways, options, config):
    contenders = {name: (WAYS[name][0], replace(config, **WAYS[name][1])) for name in ways}
    report = compare_training(options, config, contenders)
    peak = peak_flops(torch.device(config.device), config.dtype)
    for result in report["results"].values():
        result["mfu"] = peak and result["utilisation"] * report["gemm_flops"] / peak
    return report


def cudnn_training(options, config):
    sample = ours_training(options, config)
    torch.backends.cuda.enable_cudnn_sdp(True)
    return sample


WAYS = {
    "ours": (ours_training, {}),
    "ours free": (ours_training, {"deterministic": False}),
    "cuDNN free": (cudnn_training, {"deterministic": False}),
    "eager": (ours_training, {"compile": False}),
}


def resume(options, config):
    """shakespeare-gpu killed and resumed, the compiler's cache always empty: bitwise the same?"""
    with tempfile.TemporaryDirectory() as folder:

        def start(name, cache):
            flags = train_flags(options, config, f"{folder}/{name}", max_iters=60, eval_interval=30)
            command = [
                sys.executable,
                f"{common.HERE}/train.py",
                *flags,
                "--checkpoint_interval=20",
            ]
            caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
            places = {variable: f"{folder}/{variable}-{cache}" for variable in caches}
            return subprocess.Popen(command, env=os.environ | places)

        undisturbed, killed = start("undisturbed", 1), start("killed", 2)
        numbered = Path(folder, "killed", "checkpoint_iter_20.pt")
        while killed.poll() is None and not numbered.exists():
            time.sleep(0.01)
        killed.kill()
        killed_by = killed.wait()
        codes = start("killed", 3).wait(), undisturbed.wait()
        if (killed_by, *codes) != (-9, 0, 0):
            raise RuntimeError(f"exits {killed_by}, {codes[0]} (resumed), {codes[1]} (undisturbed)")
        one, other = (tensors(f"{folder}/{name}") for name in ("undisturbed", "killed"))
    unlike = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    counts = {"tensors": len(one), "unlike": len(unlike)}
    return {"unit": "", "results": {"resumed": counts | {"names": unlike[:10]}}}


def train_flags(options, config, folder, **values) -> list[str]:
    """Of train.py for shakespeare-gpu, with these values."""
    values |= {key: TINY[key] for key in TINY.keys() - {"vocab_size"}} if options.dry_run else {}
    values |= {"data_dir": config.data_dir, "checkpoint_dir": folder, "log_dir": f"{folder}/runs"}
    return ["--preset=shakespeare-gpu", *(f"--{name}={value}" for name, value in values.items())]


def tensors(folder) -> dict:
    """Weights and optimizer state of its last checkpoint by name."""
    state = checkpoint.load(Path(folder, checkpoint.FINAL))
    named = {f"{name} {key}": t for name, s in state["optimizer"].items() for key, t in s.items()}
    return state["model"] | named


def generate_1(options, config):
    """200 tokens of 124M, one stream: graphed, plain, others"""
    return generating(options, config, 1)


def generate_8(options, config):
    """the same, 8 streams at once"""
    return generating(options, config, 8)


def generating(options, config, streams):
    samples, new_tokens = (1, 4) if options.dry_run else (3, 200)
    how = {"nanogpt": options.nanogpt, "samples": samples, "new_tokens": new_tokens}
    how = GenerateOptions(**how, streams=streams, nanogpt_share=4)
    contenders = {"ours": (ours_generating, config), "ours plain": (plain_generating, config)}
    return compare_generating(contenders | others(how, config), how, config)


def plain_generating(options, config):  # without a CUDA graph
    sampling.use_graph = lambda device: False
    return ours_generating(options, config)


def shakespeare(options, config):
    """seconds of shakespeare-gpu to the loss 1.4697 that nanoGPT names, beside its recipe's"""
    flags = [flag for flag in train_flags(options, config, "") if "_dir" not in flag]
    loss = 9.9 if options.dry_run else 1.4697
    wanted = LossOptions(loss=loss, nanogpt=options.nanogpt, flags=" ".join(flags))
    return race(wanted, config)


def xl(options, config):
    """the most memory of a step of gpt2-xl, 12 x 1,024 tokens, eager, beside the plan's"""
    config = sized(options, config, "gpt2-xl", compile=False, gradient_accumulation_steps=1)
    ours_training(steps(options, 2), config)()
    with torch.device("meta"):
        planned = peak_memory(config, GPT2(config), gpus=1)["bytes"] / 1e6
    most = {"measured": peak_mb(torch.device(config.device)), "planned": planned}
    return {"unit": "", "results": {name: {"peak_mb": value} for name, value in most.items()}}


def muon(options, config):
    """Muon's update of 124M by how many numbers it orthogonalizes at once"""
    contenders = {f"2^{n}": (partial(muon_update, 2**n), config) for n in (21, 24, 26)}
    return {"unit": "updates", "results": common.compare(contenders, steps(options, 10))}


def muon_update(most, options, config):
    device = torch.device(config.device)
    set_up_device(device)
    optim.ORTHOGONALIZE_AT_ONCE[device.type] = most
    model = GPT2(config).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = optim.make_optimizer(model, replace(config, optimizer="muon"))

    def sample():
        for _ in range(options.steps):
            optimizer.step()
        return options.steps

    return sample


def profiles(options, config):
    """kernels of a step of 124M, compiled and eager, and of shakespeare-gpu's whole loop"""
    results = {}
    for name, compiled in (("compiled", config.compile), ("eager", False)):
        sample = ours_training(steps(options, 3), replace(config, compile=compiled))
        sample()
        results[name] = kernels(sample, config)
    with tempfile.TemporaryDirectory() as folder:
        places = {"data_dir": config.data_dir, "checkpoint_dir": folder, "log_dir": folder}
        loop = sized(options, config, "shakespeare-gpu", max_iters=300, eval_interval=300, **places)
        results["shakespeare-gpu"] = kernels(lambda: train(loop), config)
    return {"unit": "", "results": results}


def kernels(function, config) -> dict:
    """Of the middle half of the kernels that function launches (on a CPU: operators): how many, the
    seconds in which they run, the share of these with any running, the longest with calls and ms.
    """
    kind = "CUDA" if common.on_cuda(config) else "CPU"
    with torch.profiler.profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        function()
        common.synchronize(config)
    events = [e for e in profiler.events() if e.device_type.name == kind]
    events = [(e.time_range, e.name) for e in events if not e.is_user_annotation]
    events.sort(key=lambda event: event[0].start)
    events = events[len(events) // 4 : -(len(events) // 4)]
    begin = until = events[0][0].start  # microseconds
    busy, calls, took = 0.0, Counter(), Counter()
    for time_range, name in events:
        busy += max(0.0, time_range.end - max(time_range.start, until))
        until = max(until, time_range.end)
        calls[name] += 1
        took[name] += (time_range.end - time_range.start) / 1e3
    longest = [(name, calls[name], ms) for name, ms in took.most_common(15)]
    found = {"launches": len(events), "seconds": (until - begin) / 1e6}
    return found | {"busy": busy / (until - begin), "longest": longest}


FIRST = limits, train_12, train_64, resume, generate_1, generate_8  # what a cut run should have
STAGES = {stage.__name__: stage for stage in (*FIRST, shakespeare, xl, muon, profiles, cudnn_64)}


# ---------------------------------------------------------------- running them


@dataclass(kw_only=True)
class GpuOptions(common.Compared):
    # what to do (--save appends a line a stage)
    stages: list[Literal[*STAGES]] | None = None  # of those below; unset: all
    minutes: number(above=0) = 9  # no stage starts later; the longest take one or two
    dry_run: bool = False  # tiny, on a CPU


def main(argv) -> int:
    about = [f"    {name:12} {stage.__doc__}" for name, stage in STAGES.items()]
    doc = "\n".join([__doc__.rstrip(), "    stages:", *about])
    usage = "bench.py gpu [--save FILE] [--nanogpt DIR] [any setting of train.py]"
    options, config, _ = common.settings(argv, doc, GpuOptions, usage)
    config = common.on_device(replace(config, **TINY) if options.dry_run else config)
    if not common.on_cuda(config) and not options.dry_run:
        raise ValueError(f"--device {config.device}: not a GPU; --dry_run does with a CPU")
    until, failed = time.monotonic() + 60 * options.minutes, []
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, data_dir=f"{folder}/data" if options.dry_run else config.data_dir)
        keep(options, {"stage": "machine"} | about_machine(config))
        prepare(options, config)
        for name in options.stages or STAGES:
            report = run_stage(name, options, config, until)
            failed += [name] * ("error" in report)
            keep(options, {"stage": name} | report)
    log_row("done", f"failed: {', '.join(failed)}" if failed else "every stage has run")
    return 1 if failed else 0


def run_stage(name, options, config, until) -> dict:
    """Its report, or why there is none; in a process of its own, which may crash."""
    log_row("stage", f"{name}: {STAGES[name].__doc__}")
    start = time.monotonic()
    if start > until and not options.dry_run:
        return {"error": f"not started, --minutes {options.minutes:g} are over"}
    try:
        with common.own_process() as process:
            report = process.submit(STAGES[name], options, config).result()
    except Exception as error:  # of any kind: the stages after it can still be measured
        reason = (str(error).strip() or "no message").splitlines()[0]
        return {"error": f"{type(error).__name__}: {reason}"}
    return {"took_seconds": time.monotonic() - start} | report


def keep(options, record):
    """Show a record, and append it to --save at once."""
    if options.save is not None:
        with writing(options.save), open_to_append(options.save) as file:
            file.write(f"{json.dumps(record)}\n".encode())
    text = common.table(record) if "results" in record else record.get("error", json.dumps(record))
    print(f"\n{record['stage']}\n{text}", flush=True)
    for name, result in record.get("results", {}).items():
        for kernel, calls, ms in result.get("longest", []):
            log(f"{name:16} {calls:6} {ms:10.2f} ms  {kernel[:80]}")


def about_machine(config) -> dict:
    about = common.machine(config)
    if common.on_cuda(config):
        about |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        ask = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm"]
        with contextlib.suppress(OSError):
            about["driver"] = subprocess.check_output([*ask, "--format=csv,noheader"], text=True)
    return about


def prepare(options, config):
    """Tiny Shakespeare by characters, in a dry run the sonnets."""
    command = [sys.executable, f"{common.HERE}/prepare_data.py", "--data_dir", config.data_dir]
    command += ["--tokenizer", "char"]
    command += ["--input", f"{common.HERE}/data/sonnets.txt"] if options.dry_run else []
    if not Path(config.data_dir, "meta.json").exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
