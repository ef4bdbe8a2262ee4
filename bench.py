"""How fast, and against whom: ours and others take turns in one run.

    python bench.py train --nanogpt nanoGPT --batch_size 4 --block_size 256
    python bench.py generate --nanogpt nanoGPT --streams 8 --busy 1
    python bench.py prepare --nanogpt nanoGPT --megabytes 200
    python bench.py plan --preset gpt2-xl --gpus 64     # memory, days; no run
    python bench.py to_loss 1.89 --nanogpt nanoGPT   # seconds to a loss
    python bench.py gpu --nanogpt nanoGPT --save gpu.jsonl   # ten minutes

nanoGPT is a checkout of karpathy/nanoGPT; transformers and CTranslate2 take part where installed.
Each runs in its own process, and they take turns, one sample at a time: A B A B ... Medians are
printed as a table, with the share of what the machine does at most, measured in the same run:
matrix products while training, memory read while generating. Then all of it as a line of JSON.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import operator
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from config import GPT2_CONFIGS, GPT2Config, apply_preset, edited_fields, to_dict
from files import atomic_write
from huggingface import tensors_to_hf
from logger import log, run
from model import GPT2
from optim import make_optimizer
from options import Problem, integer, parse, problems, validate
from parallel import compile_model
from quantize import pack_linears, to_int8
from sampling import Sampling, generate_ids
from utils import autocast, deterministic, peak_mb, pick_device, pick_dtype, set_up_device

HERE = Path(__file__).parent


@dataclass(kw_only=True)
class Compared:
    # with whom, and what is kept
    nanogpt: str | None = None  # a checkout of nanoGPT to compare with
    save: str | None = None  # write the JSON to this file too

    def problems(self):
        if self.nanogpt and not (Path(self.nanogpt) / "model.py").is_file():
            yield Problem(("nanogpt",), f"--nanogpt {self.nanogpt}: not a checkout of nanoGPT")


@dataclass(kw_only=True)
class BenchOptions(Compared):
    # what to measure (every setting of train.py is a flag, too)
    work: Literal["train", "generate", "prepare"]  # the others: `bench.py plan --help` ...
    samples: integer(1) = 5  # turns of each contender
    busy: integer(0) = 0  # processes that spin beside the benchmark
    # train
    steps: integer(1) = 1  # training steps in a sample
    # generate
    streams: integer(1) = 1  # texts generated at once
    new_tokens: integer(1) = 200  # tokens in a text
    nanogpt_share: integer(1) = 1  # nanoGPT generates 1/N of these tokens
    # prepare
    megabytes: integer(1) = 200  # size of the text


# ---------------------------------------------------------------- taking turns


def take_turns(contenders: dict, samples: int) -> dict:
    """Let all contenders warm up together, then take `samples` turns; log and return what they
    measure.

    contenders: name -> function for one sample, which returns units, seconds, peak memory in MB.
    """
    turns = {name: [] for name in contenders}
    with ThreadPoolExecutor() as pool:  # together, because compiling takes a minute on one core
        list(pool.map(lambda sample: sample(), contenders.values()))
    for _ in range(samples):
        for name, sample in contenders.items():
            turns[name].append(sample())
            log(f"{name}: {turns[name][-1][0] / turns[name][-1][1]:,.1f} a second")
    results, first = {}, None
    for name, taken in turns.items():
        units, seconds, peaks = zip(*taken, strict=True)
        speed = statistics.median(map(operator.truediv, units, seconds))
        first = first or speed
        results[name] = {"per_second": speed, "first/this": first / speed, "peak_mb": peaks[-1]}
        results[name] |= {"units": units, "seconds": seconds}
    return results


def compare(contenders: dict, options) -> dict:
    """take_turns of contenders that each have a process of their own.

    contenders: name -> a function of options and config that returns a function for one sample,
    which returns units; and the config.
    """
    with spinning(options.busy), contextlib.ExitStack() as stack:

        def alone(setup, config):
            process = stack.enter_context(own_process())
            return lambda: process.submit(timed_sample, setup, options, config).result()

        samples = {name: alone(*contender) for name, contender in contenders.items()}
        return take_turns(samples, options.samples)


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


def gemm_flops(config) -> float:
    """FLOP/s of the best of some large matrix products."""
    n = 8192 if on_cuda(config) else 2048
    a = torch.randn(n, n, device=config.device, dtype=getattr(torch, config.dtype))
    return 2 * n**3 / least_seconds(lambda: a @ a, config)


def read_bandwidth(config) -> float:
    """Bytes a second that the device reads from its memory at best."""
    a = torch.zeros(2**32 if on_cuda(config) else 2**28, device=config.device)
    return a.nbytes / least_seconds(a.sum, config)


def least_seconds(function, config) -> float:
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        synchronize(config)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def synchronize(config):
    if on_cuda(config):
        torch.cuda.synchronize()


def on_cuda(config) -> bool:
    return config.device.startswith("cuda")


# ---------------------------------------------------------------- train


def ours_training(options, config):
    set_up_device(torch.device(config.device))
    model = GPT2(config).to(config.device)
    forward = compile_model(model) if config.compile else model
    return training(forward, make_optimizer(model, config), options, config)


def nanogpt_training(options, config):
    torch.backends.cuda.matmul.allow_tf32 = True  # as in its train.py
    model, optimizer = nanogpt_model(options, config)
    model = torch.compile(model, disable=not config.compile)
    return training(model, optimizer, options, config)


def nanogpt_model(options, config):
    """nanoGPT's model in config's shape, and its optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", f"{options.nanogpt}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    shape = module.GPTConfig(**{name: getattr(config, name) for name in names})
    kind, betas = torch.device(config.device).type, (config.beta1, config.beta2)
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does
        model = module.GPT(shape).to(config.device)
        return model, model.configure_optimizers(0.1, config.learning_rate, betas, kind)


def as_nanogpt(config):
    """config with nanoGPT's own defaults: float32 on a CPU, bf16 on CUDA, a padded vocabulary."""
    dtype, V = "bfloat16" if on_cuda(config) else "float32", config.vocab_size
    return replace(config, dtype=dtype, deterministic=False, vocab_size=50304 if V == 50257 else V)


def training(model, optimizer, options, config):
    """Steps on a random batch as train.py makes them."""
    shape = config.batch_size, config.block_size + 1
    idx = torch.randint(config.vocab_size, shape, device=config.device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()  # (B, T) each

    def sample():
        with deterministic(config.deterministic and idx.is_cuda):
            for _ in range(options.steps):
                training_step(model, optimizer, x, y, config.dtype)
        return options.steps * x.numel()

    return sample


def training_step(model, optimizer, x, y, dtype):
    """Returns the loss."""
    with autocast(x.device, dtype):
        _, loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def bench_train(options, config, ours=None) -> dict:
    """Their share is that of a large matrix product's FLOP/s."""
    contenders = ours or {"ours": (ours_training, config)}
    if options.nanogpt:
        contenders["nanoGPT"] = nanogpt_training, as_nanogpt(config)
    results = compare(contenders, options)
    with torch.device("meta"):
        flops = GPT2(config).flops_per_token()
    peak = gemm_flops(config)
    for result in results.values():
        result["utilisation"] = result["per_second"] * flops / peak
    return {"unit": "tokens", "gemm_flops": peak, "results": results}


# ---------------------------------------------------------------- generate


def bench_generate(options, config) -> dict:
    contenders = {"ours": (ours_generating, config)}
    if config.device == "cpu":
        contenders["ours int8"] = ours_generating, replace(config, dtype="int8")
    if options.nanogpt:
        contenders["nanoGPT"] = nanogpt_generating, as_nanogpt(config)
    if importlib.util.find_spec("transformers"):
        contenders["transformers"] = transformers_generating, config
        if config.device == "cpu" and importlib.util.find_spec("ctranslate2"):
            import ctranslate2

            dtypes = {"int8", "bfloat16", "float32"}
            for dtype in sorted(dtypes & ctranslate2.get_supported_compute_types("cpu")):
                other = ctranslate2_generating, replace(config, dtype=dtype)
                contenders[f"CTranslate2 {dtype}"] = other
    report = compare_generating(contenders, options, config)
    if config.block_size >= 1024:
        report["late_over_early"] = late_over_early(options, config)
    return report


def compare_generating(contenders, options, config) -> dict:
    """Their share is that of the read bandwidth: a step reads all weights but the positions'."""
    results = compare(contenders, options)
    with torch.device("meta"):
        parameters = GPT2(replace(config, position="rope")).num_params()
    bandwidth = read_bandwidth(config)
    for name, result in results.items():
        size = parameters * getattr(torch, contenders[name][1].dtype).itemsize
        result["utilisation"] = result["per_second"] / options.streams * size / bandwidth
    return {"unit": "tokens", "read_bandwidth": bandwidth, "results": results}


def ours_generating(options, config):
    model, prompts = our_model(config, options.streams), prompts_of(options, config).tolist()
    sampling = Sampling(max_new_tokens=options.new_tokens, temperature=1.0, top_k=200)
    return lambda: len(list(generate_ids(model, prompts, sampling))) * options.streams


def our_model(config, rows):
    """As generate.py prepares it for so many rows."""
    torch.manual_seed(0)
    model = GPT2(config).to(config.device).eval()
    model = to_int8(model) if config.dtype == "int8" else model.to(getattr(torch, config.dtype))
    pack_linears(model, rows)
    return model


def prompts_of(options, config):
    """The same 10 tokens for everyone, a row a stream."""
    idx = torch.arange(10, device=config.device) % config.vocab_size
    return idx.expand(options.streams, -1)


def nanogpt_generating(options, config):
    """nanoGPT's sample.py; it has no cache."""
    model, idx = nanogpt_model(options, config)[0].eval(), prompts_of(options, config)
    new_tokens = max(1, options.new_tokens // options.nanogpt_share)

    def sample():
        with torch.no_grad(), autocast(idx.device, config.dtype):
            model.generate(idx, new_tokens, temperature=1.0, top_k=200)
        return new_tokens * options.streams

    return sample


def transformers_generating(options, config):
    model = transformers_model(config).to(config.device, getattr(torch, config.dtype))
    idx = prompts_of(options, config)
    how = {"do_sample": True, "top_k": 200, "temperature": 1.0, "pad_token_id": 0}
    how |= dict.fromkeys(("max_new_tokens", "min_new_tokens"), options.new_tokens)
    return lambda: model.generate(idx, **how)[:, 10:].numel()


def transformers_model(config):
    """transformers' GPT-2 with our weights."""
    import transformers

    shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    shape |= {"n_positions": config.block_size, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    ours = our_model(replace(config, device="cpu", dtype="float32"), 1)
    model.load_state_dict(tensors_to_hf(ours.state_dict()), strict=False)  # the head is tied
    return model


def ctranslate2_generating(options, config):
    """Converted as ctranslate2.converters does it, with the ids as the words of its vocabulary."""
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    loader, words = GPT2Loader(), list(map(str, range(config.vocab_size)))
    spec = loader.get_model_spec(transformers_model(config))
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[0]
    loader.set_vocabulary(spec, words)
    spec.validate()
    spec.optimize(quantization=config.dtype)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        threads = torch.get_num_threads()
        model = ctranslate2.Generator(folder, compute_type=config.dtype, intra_threads=threads)
    prompts = [list(map(str, row)) for row in prompts_of(options, config).tolist()]
    how = {"sampling_topk": min(200, len(words)), "include_prompt_in_result": False}
    how |= dict.fromkeys(("max_length", "min_length"), options.new_tokens)
    return lambda: sum(len(r.sequences_ids[0]) for r in model.generate_batch(prompts, **how))


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


# ---------------------------------------------------------------- reports


def table(report) -> str:
    """A row a result with its numbers in columns; below, the numbers of the report itself."""
    numbers = {name: numbers_in(result) for name, result in report["results"].items()}
    rows = {report["unit"]: next(iter(numbers.values()))}
    rows |= {name: found.values() for name, found in numbers.items()}
    return columns(rows | {name: [number] for name, number in numbers_in(report).items()})


def numbers_in(values: dict) -> dict[str, str]:
    """Those of the values that are numbers as they are shown; None is one that nobody knows."""

    def shown(value):
        if value is None:
            return "n/a"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"

    return {n: shown(v) for n, v in values.items() if v is None or isinstance(v, (int, float))}


def columns(rows: dict) -> str:
    """A line a row: its name and its cells."""
    lines = (f"{name:22}" + "".join(f"{cell:>13}" for cell in row) for name, row in rows.items())
    return "\n".join(lines)


def settings(argv, doc, cls, usage) -> tuple:
    """A cls and the config that the flags describe, by default gpt2, and the names of the flags."""
    (options, flags), given, found = parse(argv, doc, cls, GPT2Config, usage=usage)
    if found := found or problems(options):
        raise ValueError("\n".join(problem.message for problem in found))
    preset = apply_preset(GPT2Config(), GPT2_CONFIGS.get(flags.preset, {}), edited_fields())
    config = replace(preset, **{name: getattr(flags, name) for name in given & vars(flags).keys()})
    validate(config)
    return options, config, given


def on_device(config) -> GPT2Config:
    """config with what this machine decides where it is not set."""
    device, _ = pick_device(config.device)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    dtype = config.dtype or pick_dtype(device)
    return replace(config, device=str(device), dtype=dtype, compile=compiled)


def publish(text, work, options, config, report):
    """Print text(report), and all of it as a line of JSON, which --save writes too."""
    report = {"work": work, "options": vars(options) | {"config": to_dict(config)}} | report
    line = json.dumps(report) + "\n"
    if options.save is not None:
        with atomic_write(options.save, "w") as file:
            file.write(line)
    print(text(report), line, sep="\n", end="")


def machine(device) -> dict:
    """Its name, and the versions of what is measured."""
    cpu, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux knows it better
        cpu = (re.findall(r"model name\s*: (.*)", cpuinfo.read_text("utf-8")) or [cpu])[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    report = {"name": name, "device": str(device), "threads": torch.get_num_threads()}
    for package in ("torch", "transformers", "ctranslate2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            report[package] = importlib.metadata.version(package)
    return report | {"python": platform.python_version()}


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("plan", "to_loss", "gpu"):  # each imports what it needs of this file
        script = [sys.executable, str(HERE / "docs" / f"{argv[0]}.py"), *argv[1:]]
        return subprocess.call(script, env=os.environ | {"PYTHONPATH": str(HERE)})
    usage = "bench.py {train,generate,prepare,plan,to_loss,gpu} [flags below]"
    options, config, _ = settings(argv, __doc__, BenchOptions, usage)
    config = on_device(config)
    measure = {"train": bench_train, "generate": bench_generate, "prepare": bench_prepare}
    report = {"machine": machine(torch.device(config.device))}
    report |= measure[options.work](options, config)
    publish(table, options.work, options, config, report)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
