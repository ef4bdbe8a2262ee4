"""How fast, and against whom: ours, nanoGPT and transformers take turns in one run.

    python bench.py train --nanogpt nanoGPT --batch_size 4 --block_size 256
    python bench.py train --nanogpt nanoGPT --to_loss 1.89    # seconds to a loss
    python bench.py generate --nanogpt nanoGPT --streams 8
    python bench.py prepare --nanogpt nanoGPT --megabytes 200
    python bench.py plan --preset gpt2-xl --gpus 64     # memory, days; no run

nanoGPT is a checkout of karpathy/nanoGPT; transformers takes part if it is installed. Each runs in
its own process, and they take turns, one sample at a time: A B A B ... Medians are printed as a
table, then everything as one line of JSON.
"""

import functools
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.benchmark import Timer

from config import GPT2_CONFIGS, GPT2Config, apply_preset, edited_fields, to_dict
from data import TokenDataset, validation_starts, windows_at
from files import atomic_write
from logger import log, log_row, run
from model import GPT2
from optim import learning_rate, make_optimizer
from options import Problem, integer, number, parse, problems, validate
from sampling import Sampling, generate_ids, pack_linears
from utils import autocast, peak_mb, pick_device, pick_dtype, set_up_device

HERE = Path(__file__).parent


@dataclass
class BenchOptions:
    # what to measure (every setting of train.py is a flag, too)
    work: Literal["train", "generate", "prepare"]  # plan: see `bench.py plan --help`
    nanogpt: str | None = None  # a checkout of nanoGPT to compare with
    samples: integer(1) = 5  # turns of each contender
    save: str | None = None  # write the JSON to this file too
    # train
    steps: integer(1) = 1  # training steps in a sample
    to_loss: number() | None = None  # measure the seconds to this validation loss instead
    flags: str = ""  # for train.py under --to_loss: "--max_iters 500"
    # generate
    streams: integer(1) = 1  # texts generated at once
    new_tokens: integer(1) = 200  # tokens in a text
    nanogpt_share: integer(1) = 1  # nanoGPT generates 1/N of these tokens
    # prepare
    megabytes: integer(1) = 200  # size of the text

    def problems(self):
        if self.nanogpt and not (Path(self.nanogpt) / "model.py").is_file():
            yield Problem(("nanogpt",), f"--nanogpt {self.nanogpt}: not a checkout of nanoGPT")


# ---------------------------------------------------------------- taking turns


def take_turns(contenders: dict, samples: int) -> dict:
    """Let each contender warm up, then take `samples` turns; log and return what they measure.

    contenders: name -> function for one sample, which returns units, seconds, peak memory in MB.
    """
    results = {name: {"seconds": [], "units": [], "peak_mb": None} for name in contenders}
    for turn in range(samples + 1):
        for name, sample in contenders.items():
            units, seconds, results[name]["peak_mb"] = sample()
            if turn > 0:
                results[name]["units"].append(units)
                results[name]["seconds"].append(seconds)
                log(f"{name}: {units / seconds:,.1f} a second")
    return results


def compare(setups: dict, options, config) -> dict:
    """take_turns of the available contenders, each in a process of its own.

    setups: name -> function of options and config that returns a function for one sample, which
    returns units.
    """
    context, contenders = multiprocessing.get_context("spawn"), {}
    available = {
        "ours": True,
        "nanoGPT": options.nanogpt,
        "transformers": importlib.util.find_spec("transformers"),
    }
    for name in filter(available.get, setups):
        process = ProcessPoolExecutor(1, context, set_up, (setups[name], options, config))
        contenders[name] = lambda process=process: process.submit(timed_sample).result()
    return take_turns(contenders, options.samples)


def set_up(setup, options, config):
    """Runs once in a contender's process, which keeps the sample function."""
    global sample, device
    sample, device = setup(options, config), torch.device(config.device)


def timed_sample():
    start = time.perf_counter()
    units = sample()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return units, time.perf_counter() - start, peak_mb(device)


def nanogpt_model(options, config):
    """nanoGPT's model in config's shape; its own defaults: float32 on a CPU, bf16 on CUDA."""
    config.dtype = "bfloat16" if config.device.startswith("cuda") else "float32"
    spec = importlib.util.spec_from_file_location("nanogpt_model", f"{options.nanogpt}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    shape = module.GPTConfig(**{name: getattr(config, name) for name in names})
    return module.GPT(shape).to(config.device)


# ---------------------------------------------------------------- train


def ours_training(options, config):
    set_up_device(torch.device(config.device))
    model = GPT2(config).to(config.device)
    return training(model, make_optimizer(model, config), options, config)


def nanogpt_training(options, config):
    device = torch.device(config.device)
    if device.type == "cuda":
        set_up_device(device)  # TF32, as in its train.py; on a CPU it gets none of our settings
    model = nanogpt_model(options, config)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    return training(model, optimizer, options, config)


def training(model, optimizer, options, config):
    """Steps on a random batch as train.py makes them; on CUDA the model is compiled."""
    forward = torch.compile(model) if config.device.startswith("cuda") else model
    shape = config.batch_size, config.block_size + 1
    idx = torch.randint(config.vocab_size, shape, device=config.device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()  # (B, T) each

    def sample():
        for _ in range(options.steps):
            training_step(forward, optimizer, x, y, config.dtype)
        return options.steps * x.numel()

    return sample


def training_step(model, optimizer, x, y, dtype):
    with autocast(x.device, dtype):
        _, loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def bench_train(options, config) -> dict:
    if options.to_loss is not None:
        return bench_to_loss(options, config)
    results = compare({"ours": ours_training, "nanoGPT": nanogpt_training}, options, config)
    # what the device can do at most: the best of some large matrix products
    n = 8192 if config.device.startswith("cuda") else 2048
    a = torch.randn(n, n, device=config.device, dtype=getattr(torch, config.dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    peak = 2 * n**3 / min(timer.timeit(1).mean for _ in range(20))
    with torch.device("meta"):
        flops = GPT2(config).flops_per_token()
    for result in results.values():
        result["utilisation"] = rate(result) * flops / peak
    return {"unit": "tokens", "gemm_peak_flops": peak, "results": results}


def bench_to_loss(options, config) -> dict:
    """Seconds until the loss on the whole validation split is at most to_loss; ours is train.py as
    a user starts it, its evaluations included.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "train.py"), "--data_dir", config.data_dir]
        command += ["--checkpoint_dir", f"{folder}/c", "--log_dir", f"{folder}/r"]
        subprocess.run(command + shlex.split(options.flags), check=True)
        (path,) = Path(folder).glob("r/*/metrics.jsonl")
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    curves = {"ours": [(r["seconds"], r["val_loss"]) for r in records if "val_loss" in r]}
    if options.nanogpt:
        curves["nanoGPT"] = nanogpt_curve(options, config)
    results = {}
    for name, curve in curves.items():  # (seconds, loss) at each evaluation
        reached = next((seconds for seconds, loss in curve if loss <= options.to_loss), None)
        curve = [(round(seconds, 1), round(loss, 4)) for seconds, loss in curve]
        results[name] = {"seconds_to_loss": reached, "curve": curve}
    return {"unit": "seconds", "to_loss": options.to_loss, "results": results}


def nanogpt_curve(options, config) -> list[tuple[float, float]]:
    """The recipe for a CPU in nanoGPT's README ("I only have a macbook"), its evaluations left out:
    2,000 steps of 12 x 64 tokens, AdamW 1e-3 to 1e-4, beta2 0.99, float32.
    """
    dataset, curve, seconds = TokenDataset(config.data_dir), [], 0.0
    config = GPT2Config(dataset.vocab_size, 64, 4, 4, 128, bias=False, device="cpu")
    schedule = replace(config, learning_rate=1e-3, min_lr=1e-4)
    schedule.warmup_iters, schedule.lr_decay_iters = 100, 2000
    torch.manual_seed(1337)
    model = nanogpt_model(options, config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    val_x, val_y = windows_at(dataset.val, validation_starts(dataset.val, 64), 64)
    for step in range(2000):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        starts = torch.randint(len(dataset.train) - 64, (12,)).tolist()
        x, y = windows_at(dataset.train, starts, 64)
        training_step(model, optimizer, x, y.contiguous(), "float32")  # it views them
        seconds += time.perf_counter() - start
        if step % 100 == 99:
            with torch.no_grad():  # without dropout, training or not
                curve.append((seconds, model(val_x, val_y.contiguous())[1].item()))
    return curve


# ---------------------------------------------------------------- generate


def ours_generating(options, config):
    model, prompts = our_model(config, options.streams), prompts_of(options, config).tolist()
    sampling = Sampling(max_new_tokens=options.new_tokens, temperature=1.0, top_k=200)
    return lambda: len(list(generate_ids(model, prompts, sampling))) * options.streams


def our_model(config, rows):
    model = GPT2(config).to(config.device, getattr(torch, config.dtype)).eval()
    pack_linears(model, rows)
    return model


def prompts_of(options, config):
    """The same 10 tokens for everyone, a row a stream."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, (1, 10), generator=generator)
    return idx.expand(options.streams, -1).to(config.device)


def nanogpt_generating(options, config):
    """nanoGPT's sample.py; it has no cache."""
    model, idx = nanogpt_model(options, config).eval(), prompts_of(options, config)
    new_tokens = max(1, options.new_tokens // options.nanogpt_share)

    def sample():
        with torch.no_grad(), autocast(idx.device, config.dtype):
            model.generate(idx, new_tokens, temperature=1.0, top_k=200)
        return new_tokens * options.streams

    return sample


def transformers_generating(options, config):
    import transformers

    shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    model, idx = model.to(config.device, getattr(torch, config.dtype)), prompts_of(options, config)
    settings = {"do_sample": True, "top_k": 200, "temperature": 1.0, "pad_token_id": 0}
    settings |= dict.fromkeys(("max_new_tokens", "min_new_tokens"), options.new_tokens)
    return lambda: model.generate(idx, **settings)[:, 10:].numel()


def bench_generate(options, config) -> dict:
    setups = {"ours": ours_generating, "nanoGPT": nanogpt_generating}
    results = compare(setups | {"transformers": transformers_generating}, options, config)
    late = late_over_early(options, config) if config.block_size >= 1024 else None
    return {"unit": "tokens", "late_over_early": late, "results": results}


def late_over_early(options, config) -> float:
    """The time of 20 tokens from position 1,000 over that from position 100; medians, in turns."""
    model, seconds = our_model(config, 1), {100: [], 1000: []}
    for _ in range(options.samples):
        for position, times in seconds.items():
            stream = generate_ids(model, [[0] * position], Sampling(22, temperature=0))
            next(stream), next(stream)  # the prompt is read, and on a GPU the graph is made
            start = time.perf_counter()
            list(stream)
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[1000]) / statistics.median(seconds[100])


# ---------------------------------------------------------------- prepare


def bench_prepare(options, config) -> dict:
    """Whole processes: prepare_data.py, and nanoGPT's data/shakespeare/prepare.py on that text,
    which is the bundled sonnets' words in a seeded random order.
    """
    words = np.array((HERE / "data" / "sonnets.txt").read_text("utf-8").split(" "))
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/input.txt", "w", encoding="utf-8") as file:
            while file.tell() < options.megabytes * 1e6:
                file.write(" ".join(generator.choice(words, 100_000)) + "\n")
            megabytes = file.tell() / 1e6
        ours = [str(HERE / "prepare_data.py"), "--input", file.name, "--tokenizer", "gpt2"]
        ours += ["--data_dir", f"{folder}/ours", "--overwrite"]
        contenders = {"ours": functools.partial(time_script, ours, megabytes)}
        if options.nanogpt:  # it reads the input.txt next to it
            script = shutil.copy(Path(options.nanogpt) / "data/shakespeare/prepare.py", folder)
            contenders["nanoGPT"] = functools.partial(time_script, [script], megabytes)
        return {"unit": "MB", "results": take_turns(contenders, options.samples)}


# a process that forks has its own memory counted in its child's peak: a small one starts the script
MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)
"""


def time_script(script, units):
    """units, wall seconds and peak resident memory in MB of a script's whole process."""
    command = [sys.executable, "-c", MEASURE, sys.executable, *script]
    code, seconds, peak = map(float, subprocess.check_output(command).split())
    if code != 0:
        raise ValueError(f"{shlex.join(script)}: exit {code:.0f}")
    return units, seconds, peak


# ---------------------------------------------------------------- the table


def rate(result) -> float:
    """Median of units a second."""
    pairs = zip(result["units"], result["seconds"], strict=True)
    return statistics.median(units / seconds for units, seconds in pairs)


def table(report) -> str:
    """A row a contender: its rate, how many times as fast the first is, memory, utilisation."""
    unit, results, extra = report["unit"], report["results"], []
    if unit == "seconds":
        rows = [("", f"to {report['to_loss']}", "in all", "last loss")]
        for name, result in results.items():
            reached, (seconds, loss) = result["seconds_to_loss"], result["curve"][-1]
            reached = "never" if reached is None else f"{reached:.1f}"
            rows.append((name, reached, f"{seconds:.1f}", f"{loss:.4f}"))
    else:
        rows = [("", f"{unit}/s", "first / this", "peak MB", "utilisation")]
        speeds = {name: rate(result) for name, result in results.items()}
        for (name, result), speed in zip(results.items(), speeds.values(), strict=True):
            times, peak, used = speeds["ours"] / speed, result["peak_mb"], result.get("utilisation")
            peak = "n/a" if peak is None else f"{peak:,.0f}"
            used = "n/a" if used is None else f"{used:.0%}"
            rows.append((name, f"{speed:,.2f}", f"{times:.2f}", peak, used))
        extra = [f"{name} {value:.4g}" for name, value in report.items() if type(value) is float]
    lines = [f"{name:14}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in rows]
    return "\n".join(lines + extra)


def settings(argv) -> tuple[BenchOptions, GPT2Config]:
    """Options and the config that the flags describe; its preset, if none is named, is gpt2."""
    usage = "bench.py {train,generate,prepare,plan} [flags below]"
    (options, flags), given, found = parse(argv, __doc__, BenchOptions, GPT2Config, usage=usage)
    if found := found or problems(options):
        raise ValueError("\n".join(problem.message for problem in found))
    preset = apply_preset(GPT2Config(), GPT2_CONFIGS.get(flags.preset, {}), edited_fields())
    config = replace(preset, **{name: getattr(flags, name) for name in given & vars(flags).keys()})
    validate(config)
    device, _ = pick_device(config.device)
    return options, replace(config, device=str(device), dtype=config.dtype or pick_dtype(device))


def machine(device) -> dict:
    cpu, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux knows it better
        cpu = (re.findall(r"model name\s*: (.*)", cpuinfo.read_text("utf-8")) or [cpu])[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"name": name, "device": str(device), "threads": torch.get_num_threads()} | versions


WORK = {"train": bench_train, "generate": bench_generate, "prepare": bench_prepare}


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plan"]:  # a separate calculation, next to the page that explains it
        plan = [sys.executable, str(HERE / "docs" / "plan.py"), *argv[1:]]
        return subprocess.call(plan, env=os.environ | {"PYTHONPATH": str(HERE)})
    options, config = settings(argv)
    here = machine(torch.device(config.device))
    log_row("machine", f"{here['name']}, {here['device']}, torch {here['torch']}")
    report = {"work": options.work, "options": vars(options) | {"config": to_dict(config)}}
    report |= {"machine": here} | WORK[options.work](options, config)
    line = json.dumps(report) + "\n"
    if options.save is not None:
        with atomic_write(options.save, "w") as file:
            file.write(line)
    print(table(report), line, sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
