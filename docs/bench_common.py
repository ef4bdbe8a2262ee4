"""What the works of bench.py share: taking turns, the machine, flags and tables."""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import timeit
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from config import GPT2_CONFIGS, GPT2Config, apply_preset, edited_fields
from files import write_file
from logger import log
from options import integer, parse, validate
from utils import peak_mb, pick_device, pick_dtype

HERE = Path(__file__).parent.parent  # where the scripts are
LIMIT = "the machine"  # among the results of `compare`


@dataclass(kw_only=True)
class Compared:
    # with whom, and what is kept
    nanogpt: str | None = None  # a checkout of nanoGPT to compare with
    save: str | None = None  # write the JSON to this file too

    def conflicts(self):
        if self.nanogpt and not (Path(self.nanogpt) / "model.py").is_file():
            yield f"--nanogpt {self.nanogpt}: not a checkout of nanoGPT"


@dataclass(kw_only=True)
class InTurns(Compared):
    # how often
    samples: integer(1) = 5  # turns of each contender
    busy: integer(0) = 0  # processes that spin beside the benchmark


# ---------------------------------------------------------------- taking turns


def take_turns(contenders: dict, options) -> dict:
    """Let all contenders warm up together, then take turns; log and return what they measure.

    contenders: name -> function for one sample, which returns units, seconds, peak memory in MB.
    """
    turns = {name: [] for name in contenders}
    with spinning(options.busy):
        with ThreadPoolExecutor() as pool:  # together: compiling takes a minute on one core
            list(pool.map(lambda sample: sample(), contenders.values()))
        for _ in range(options.samples):
            for name, sample in contenders.items():
                units, seconds, _ = turn = sample()
                turns[name].append(turn)
                log(f"{name}: {units / seconds:,.1f} a second")
    results, first = {}, None
    for name, taken in turns.items():
        units, seconds, peaks = zip(*taken, strict=True)
        speed = statistics.median(n / s for n, s, _ in taken)
        first = first or speed
        results[name] = {"per_second": speed, "first/this": first / speed, "peak_mb": peaks[-1]}
        results[name] |= {"units": units, "seconds": seconds}
    return results


def compare(contenders: dict, options, limit=None) -> dict:
    """take_turns of contenders that each have a process of their own.

    contenders: name -> a function of options and config that returns a function for one sample,
    which returns its units; and the config. limit() is what the machine does a second at most; it
    is asked in each turn, because that changes from minute to minute.
    """
    with contextlib.ExitStack() as stack:

        def alone(name, setup, config):
            process = stack.enter_context(own_process())
            wait = {"GOMP_SPINCOUNT": "10000"} if name.startswith("ours") else {}  # as in train.py
            with mock.patch.dict(os.environ, wait | os.environ):
                process.submit(os.getpid).result()  # starts it
            return lambda: process.submit(timed_sample, setup, options, config).result()

        samples = {name: alone(name, *contender) for name, contender in contenders.items()}
        if limit is not None:
            samples[LIMIT] = lambda: (limit(), 1.0, None)
        return take_turns(samples, options)


def own_process():
    """A pool of one process that ends when this one does, however it ends."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)


def end_with_parent():
    wait = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (wait(), os._exit(1)), daemon=True).start()


def timed_sample(setup, options, config):
    """Runs in a contender's process, which is set up in the first call."""
    global sample
    if "sample" not in globals():
        sample = setup(options, config)
    start = time.perf_counter()
    units = sample()
    synchronize(config)
    return units, time.perf_counter() - start, peak_mb(torch.device(config.device))


@contextlib.contextmanager
def spinning(count):
    """`count` processes beside this one that only compute, at the same priority."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- the machine


def least_seconds(function, config) -> float:
    def once():
        function()
        synchronize(config)

    return min(timeit.repeat(once, number=1, repeat=10))


def gemm_flops(config) -> float:
    """FLOP/s of the best of some large matrix products."""
    n = 8192 if on_cuda(config) else 2048
    a = torch.randn(n, n, device=config.device, dtype=getattr(torch, config.dtype))
    return 2 * n**3 / least_seconds(lambda: a @ a, config)


def read_bandwidth(config) -> float:
    """Bytes a second that the device reads from its memory at best."""
    a = torch.zeros(2**32 if on_cuda(config) else 2**28, device=config.device)
    return a.nbytes / least_seconds(a.sum, config)


def synchronize(config):
    if on_cuda(config):
        torch.cuda.synchronize()


def on_cuda(config) -> bool:
    return config.device.startswith("cuda")


def machine(config) -> dict:
    """Its name, and the versions of what is measured."""
    name = platform.processor()
    with contextlib.suppress(OSError, TypeError):  # Linux knows it better
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))[1]
    name = torch.cuda.get_device_name(config.device) if on_cuda(config) else name
    found = {"name": name, "device": config.device, "threads": torch.get_num_threads()}
    for package in importlib.metadata.distributions():
        if package.name in ("torch", "transformers", "ctranslate2"):
            found[package.name] = package.version
    return found | {"python": platform.python_version()}


# ---------------------------------------------------------------- in and out


def settings(argv, doc, cls, usage) -> tuple:
    """A cls and the config that the flags describe, by default gpt2, and the names of the flags."""
    (options, flags), given, found = parse(argv, doc, cls, GPT2Config, usage=usage)
    validate(options, found)
    preset = apply_preset(GPT2Config(), GPT2_CONFIGS.get(flags.preset, {}), edited_fields())
    config = replace(preset, **{name: getattr(flags, name) for name in given & vars(flags).keys()})
    validate(config)
    return options, config, given


def on_device(config) -> GPT2Config:
    """config with what this machine decides where it is not set."""
    device = pick_device(config.device)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    dtype = config.dtype or pick_dtype(device)
    return replace(config, device=str(device), dtype=dtype, compile=compiled)


def publish(text, work, options, config, report):
    """Print text(report), and all of it as a line of JSON, which --save writes too."""
    report = {"work": work, "options": vars(options) | {"config": asdict(config)}} | report
    line = json.dumps(report) + "\n"
    if options.save is not None:
        write_file(options.save, line)
    print(text(report), line, sep="\n", end="")


def table(report) -> str:
    """A row a result with its numbers in columns; below, the numbers of the report itself."""
    numbers = {name: numbers_in(result) for name, result in report["results"].items()}
    rows = {report["unit"]: next(iter(numbers.values()))}
    rows |= {name: found.values() for name, found in numbers.items()}
    return columns(rows | {name: [number] for name, number in numbers_in(report).items()})


def numbers_in(values: dict) -> dict[str, str]:
    """Those of the values that are numbers as they are shown; None is one that nobody knows."""
    return {n: written(v) for n, v in values.items() if isinstance(v, int | float | None)}


def written(value) -> str:
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def columns(rows: dict) -> str:
    """A line a row: its name and its cells."""
    lines = (f"{name:22}" + "".join(f"{cell:>13}" for cell in row) for name, row in rows.items())
    return "\n".join(lines)


def run_work(work, argv, doc, cls, measure, usage="[flags below]") -> int:
    """The main of a work; measure makes its report of a cls and a config."""
    options, config, _ = settings(argv, doc, cls, f"bench.py {work} {usage}")
    config = on_device(config)
    publish(table, work, options, config, {"machine": machine(config)} | measure(options, config))
    return 0
