"""How fast, and against whom: ours, nanoGPT and transformers take turns in one run.

    python bench.py train --nanogpt DIR --batch_size 4 --block_size 256
    python bench.py train --nanogpt DIR --to_loss 1.89     # seconds to a validation loss
    python bench.py generate --nanogpt DIR --streams 8
    python bench.py prepare --nanogpt DIR --megabytes 200
    python bench.py save                                   # a checkpoint against a training step

DIR is a checkout of karpathy/nanoGPT; transformers takes part where it is installed. Each contender
lives in a process of its own and does one sample when it is its turn: A B A B ... Medians are
printed as a table, then everything as one line of JSON (--save FILE keeps it).
"""

import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import checkpoint
from config import GPT2_CONFIGS, GPT2Config, apply_preset
from data import TokenDataset, validation_starts, windows_at
from generate import Sampling, decoder, generate_ids, new_cache
from model import GPT2
from optim import learning_rate, make_optimizer, optimizer_state
from utils import ArgumentParser, autocast, log, pick_device, pick_dtype, run, set_up_device

HERE = Path(__file__).parent
# nanoGPT's README, "I only have a macbook": the recipe for a CPU
RECIPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0}


# ---------------------------------------------------------------- taking turns


def take_turns(contenders: dict, samples: int, options) -> dict:
    """Let each contender (name -> function of options that gives a function for one sample) warm
    up, then take `samples` turns. For each: seconds and units of its samples, peak memory in MB.
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, setup in contenders.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(setup, options, theirs), daemon=True)
        process.start()
        theirs.close()
        workers[name] = ours, process
    results = {name: {"seconds": [], "units": []} for name in contenders}
    for turn in range(-1, samples):  # turn -1 is the warm-up
        for name, (pipe, _) in workers.items():
            pipe.send("go")
            units, seconds = pipe.recv()
            if turn >= 0:
                results[name]["units"].append(units)
                results[name]["seconds"].append(seconds)
                log(f"{name}: {units / seconds:,.1f} a second")
    for name, (pipe, process) in workers.items():
        pipe.send("end")
        results[name]["peak_mb"] = pipe.recv()
        process.join()
    return results


def _worker(setup, options, pipe):
    sample = setup(options)
    device, _ = pick_device(options.device)
    while pipe.recv() == "go":
        start = time.perf_counter()
        units = sample()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send((units, time.perf_counter() - start))
    pipe.send(_peak_mb(device))


def _peak_mb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    kilobyte = 1e6 if sys.platform == "darwin" else 1e3  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kilobyte


def gemm_peak(device, dtype) -> float:
    """FLOP/s of the best of some large matrix products: what this device can do at most."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def load_nanogpt(options):
    """nanoGPT's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", f"{options.nanogpt}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- train


def our_config(options) -> GPT2Config:
    device, _ = pick_device(options.device)
    config = apply_preset(GPT2Config(), GPT2_CONFIGS[options.preset], set())
    return replace(
        config,
        block_size=options.block_size or config.block_size,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        device=str(device),
        dtype=options.dtype or pick_dtype(device),
    )


def random_batch(config, device):
    shape = (config.batch_size, config.block_size + 1)
    idx = torch.randint(config.vocab_size, shape, device=device)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def ours_training(options):
    """Training steps as train.py makes them: forward, backward, clip, update."""
    config = our_config(options)
    device = torch.device(config.device)
    set_up_device(device)
    model = GPT2(config).to(device)
    optimizer = make_optimizer(model, config)
    x, y = random_batch(config, device)
    forward = torch.compile(model) if device.type == "cuda" else model
    return training_sample(model, forward, optimizer, x, y, autocast(device, config.dtype), options)


def nanogpt_training(options):
    """nanoGPT's loop: on a CPU float32, its default there; on CUDA bf16 and compiled."""
    config = our_config(options)
    device = torch.device(config.device)
    if device.type == "cuda":
        set_up_device(device)  # TF32, as its train.py sets it; nothing of ours on a CPU
    nanogpt = load_nanogpt(options)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    model = nanogpt.GPT(nanogpt.GPTConfig(**{name: getattr(config, name) for name in names}))
    model.to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    x, y = random_batch(config, device)
    forward = torch.compile(model) if device.type == "cuda" else model
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return training_sample(model, forward, optimizer, x, y, autocast(device, dtype), options)


def training_sample(model, forward, optimizer, x, y, precision, options):
    def sample():
        for _ in range(options.steps):
            with precision:
                _, loss = forward(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return options.steps * x.numel()

    return sample


def bench_train(options):
    if options.to_loss is not None:
        return bench_to_loss(options)
    contenders = {"ours": ours_training}
    if options.nanogpt:
        contenders["nanoGPT"] = nanogpt_training
    results = take_turns(contenders, options.samples, options)
    config = our_config(options)
    peak = gemm_peak(torch.device(config.device), config.dtype)
    with torch.device("meta"):
        flops = GPT2(config).flops_per_token()
    for result in results.values():
        result["utilisation"] = rate(result) * flops / peak
    return {"unit": "tokens", "gemm_peak_flops": peak, "results": results}


# ---------------------------------------------------------------- train to a loss


def bench_to_loss(options):
    """Seconds until the validation loss (over the whole split) is at most to_loss: train.py as a
    user starts it, its evaluations included; nanoGPT's recipe for a CPU, its evaluations left out.
    """
    ours = time_train_py(options)
    results = {"ours": ours}
    if options.nanogpt:
        results["nanoGPT"] = nanogpt_recipe(options)
    for name, result in results.items():
        log(f"{name}: {result['seconds_to_loss']} s to {options.to_loss}; {result['curve']}")
    return {"unit": "seconds", "to_loss": options.to_loss, "results": results}


def time_train_py(options):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HERE / "train.py", "--data_dir", options.data_dir]
        command += ["--checkpoint_dir", f"{folder}/c", "--log_dir", f"{folder}/r"]
        subprocess.run([*map(str, command), *options.flags], check=True)
        (path,) = Path(folder).glob("r/*/metrics.jsonl")
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    curve = [(r["seconds"], r["val_loss"]) for r in records if "val_loss" in r]
    return curve_result(curve, options.to_loss)


def curve_result(curve, to_loss):
    reached = [seconds for seconds, loss in curve if loss <= to_loss]
    rounded = [(round(seconds, 1), round(loss, 4)) for seconds, loss in curve]
    return {"seconds_to_loss": reached[0] if reached else None, "curve": rounded}


def nanogpt_recipe(options):
    """2,000 steps of 12 x 64 characters, AdamW 1e-3 to 1e-4, beta2 0.99, float32."""
    nanogpt, dataset = load_nanogpt(options), TokenDataset(options.data_dir)
    torch.manual_seed(1337)
    names = RECIPE | {"vocab_size": dataset.vocab_size, "bias": False}
    model = nanogpt.GPT(nanogpt.GPTConfig(**names))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    schedule = replace(GPT2Config(), learning_rate=1e-3, min_lr=1e-4, warmup_iters=100)
    schedule = replace(schedule, max_iters=2000, lr_decay_iters=2000)
    curve, seconds = [], 0.0
    for step in range(2000):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        firsts = torch.randint(len(dataset.train) - 64, (12,)).tolist()
        x, y = windows_at(dataset.train, firsts, 64)
        _, loss = model(x, y.contiguous())  # it views them
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - start
        if (step + 1) % 100 == 0:
            curve.append((seconds, whole_split_loss(model, dataset.val)))
    return curve_result(curve, options.to_loss)


@torch.no_grad()
def whole_split_loss(model, tokens):
    model.eval()
    starts, total = validation_starts(tokens, 64), 0.0
    for part in np.array_split(starts, 20):
        x, y = windows_at(tokens, part, 64)
        total += model(x, y.contiguous())[1].item() * len(part)
    model.train()
    return total / len(starts)


# ---------------------------------------------------------------- generate


def prompt_of(options):
    """The same 10 tokens for everyone, a row a stream."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = our_config(options).vocab_size
    return torch.randint(vocab_size, (1, 10), generator=generator).expand(options.streams, -1)


def ours_generating(options):
    config = our_config(options)
    model = GPT2(config).to(config.device, getattr(torch, config.dtype)).eval()
    prompts = prompt_of(options).tolist()
    sampling = Sampling(options.new_tokens, temperature=1.0, top_k=200)

    def sample():
        for _ in generate_ids(model, prompts, sampling):
            pass
        return options.new_tokens * options.streams

    return sample


def nanogpt_generating(options):
    """nanoGPT's sample.py: no cache; on a CPU float32."""
    config, nanogpt = our_config(options), load_nanogpt(options)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    model = nanogpt.GPT(nanogpt.GPTConfig(**{name: getattr(config, name) for name in names}))
    model.to(config.device).eval()
    device = torch.device(config.device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    idx = prompt_of(options).to(device)
    few = max(1, options.new_tokens // options.nanogpt_share)

    def sample():
        with torch.no_grad(), autocast(device, dtype):
            model.generate(idx, few, temperature=1.0, top_k=200)
        return few * options.streams

    return sample


def transformers_generating(options):
    import transformers

    config = our_config(options)
    theirs = transformers.GPT2Config(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd
    )
    model = transformers.GPT2LMHeadModel(theirs).to(config.device, getattr(torch, config.dtype))
    idx = prompt_of(options).to(config.device)
    settings = {"do_sample": True, "top_k": 200, "temperature": 1.0, "pad_token_id": 0}
    length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}

    def sample():
        with torch.no_grad():
            model.eval().generate(idx, **settings, **length)
        return options.new_tokens * options.streams

    return sample


def bench_generate(options):
    contenders = {"ours": ours_generating}
    if options.nanogpt:
        contenders["nanoGPT"] = nanogpt_generating
    if importlib.util.find_spec("transformers"):
        contenders["transformers"] = transformers_generating
    results = take_turns(contenders, options.samples, options)
    return {"unit": "tokens", "late_over_early": late_over_early(options), "results": results}


@torch.inference_mode()
def late_over_early(options, early=100, late=1000, tokens=20):
    """A token's time at position 1,000 over that at position 100; medians, interleaved."""
    config = our_config(options)
    if config.block_size < late + tokens:
        return None
    model = GPT2(config).to(config.device, getattr(torch, config.dtype)).eval()
    seconds = {early: [], late: []}
    for _ in range(options.samples):
        for position in seconds:
            cache = new_cache(model, 1)
            model(torch.zeros(1, position, dtype=torch.int64, device=config.device), cache=cache)
            decode, token = (
                decoder(model, cache),
                torch.zeros(1, dtype=torch.int64).to(config.device),
            )
            decode(token)
            start = time.perf_counter()
            for _ in range(tokens):
                decode(token).argmax().item()
            seconds[position].append(time.perf_counter() - start)
    return statistics.median(seconds[late]) / statistics.median(seconds[early])


# ---------------------------------------------------------------- prepare


def write_text(path, megabytes):
    """Text of the bundled sonnets' words in a seeded random order."""
    words = np.array((HERE / "data" / "sonnets.txt").read_text("utf-8").split(" "))
    generator = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.write(" ".join(generator.choice(words, 100_000)) + "\n")


def bench_prepare(options):
    """Whole processes: prepare_data.py, and nanoGPT's data/shakespeare/prepare.py on that text."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "input.txt"
        write_text(text, options.megabytes)
        size = text.stat().st_size / 1e6
        command = [sys.executable, HERE / "prepare_data.py", "--input", text, "--overwrite"]
        commands = {"ours": [*command, "--tokenizer", "gpt2", "--data_dir", f"{folder}/ours"]}
        if options.nanogpt:
            script = Path(folder) / "prepare.py"  # it reads the input.txt beside it
            source = Path(options.nanogpt) / "data" / "shakespeare" / "prepare.py"
            script.write_bytes(source.read_bytes())
            commands["nanoGPT"] = [sys.executable, script]
        results = {name: {"seconds": [], "units": [], "peak_mb": 0.0} for name in commands}
        for turn in range(-1, options.samples):
            for name, command in commands.items():
                seconds, peak = time_process(command)
                if turn >= 0:
                    results[name]["seconds"].append(seconds)
                    results[name]["units"].append(size)
                    results[name]["peak_mb"] = max(peak, results[name]["peak_mb"])
                    log(f"{name}: {size / seconds:.1f} MB/s")
    return {"unit": "MB", "results": results}


def time_process(command):
    """Wall seconds and peak resident memory in MB of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise ValueError(f"{' '.join(map(str, command))}: exit status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


# ---------------------------------------------------------------- save


def bench_save(options):
    """Seconds to save a whole checkpoint, and seconds of a training step, in turns."""
    config = our_config(options)
    device = torch.device(config.device)
    set_up_device(device)
    model = GPT2(config).to(device)
    optimizer = make_optimizer(model, config)
    x, y = random_batch(config, device)
    step = training_sample(model, model, optimizer, x, y, autocast(device, config.dtype), options)
    step()
    results = {"save": {"seconds": [], "units": []}, "step": {"seconds": [], "units": []}}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for _ in range(options.samples):
            state = {"model": model.state_dict(), "optimizer": optimizer_state(optimizer, model)}
            for name, work in (
                ("save", lambda state=state: checkpoint.save(Path(folder) / "c.pt", state)),
                ("step", step),
            ):
                start = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                results[name]["seconds"].append(time.perf_counter() - start)
                results[name]["units"].append(1)
        size = (Path(folder) / "c.pt").stat().st_size / 1e6
    return {"unit": "saves or steps", "checkpoint_mb": size, "results": results}


# ---------------------------------------------------------------- the table


def rate(result) -> float:
    """Median of units a second."""
    pairs = zip(result["units"], result["seconds"], strict=True)
    return statistics.median(units / seconds for units, seconds in pairs)


def table(report) -> str:
    """A row a contender: its rate, how many times ours is faster, memory, utilisation."""
    results = report["results"]
    if report["unit"] == "seconds":
        rows = [f"{name:14}{result['seconds_to_loss']}" for name, result in results.items()]
        return "\n".join([f"seconds to validation loss {report['to_loss']}", *rows])
    first = rate(next(iter(results.values())))
    lines = [f"{'':14}{report['unit'] + '/s':>14}{'first / this':>14}{'peak MB':>10}{'util':>7}"]
    for name, result in results.items():
        peak, used = result.get("peak_mb"), result.get("utilisation")
        lines.append(
            f"{name:14}{rate(result):>14,.2f}{first / rate(result):>14.2f}"
            f"{'n/a' if peak is None else format(peak, ',.0f'):>10}"
            f"{'n/a' if used is None else format(used, '.0%'):>7}"
        )
    extra = {k: v for k, v in report.items() if isinstance(v, float)}
    return "\n".join([*lines, *(f"{name} {value:.4g}" for name, value in extra.items())])


def machine(options) -> dict:
    device, _ = pick_device(options.device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux knows it better
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        name = next(names, name)
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


WORK = {
    "train": bench_train,
    "generate": bench_generate,
    "prepare": bench_prepare,
    "save": bench_save,
}


def main(argv=None) -> int:
    parser = ArgumentParser(prog="bench.py", description="Measure speed side by side.")
    add = parser.add_argument
    add("work", choices=list(WORK))
    add("--nanogpt", metavar="DIR", help="a checkout of karpathy/nanoGPT to compare with")
    add("--preset", default="gpt2", choices=list(GPT2_CONFIGS), help="the model (gpt2)")
    add("--batch_size", type=int, default=4, metavar="N", help="sequences a step (4)")
    add("--block_size", type=int, metavar="N", help="tokens a sequence (the preset's)")
    add("--optimizer", default="adamw", choices=["adamw", "muon"], help="ours (adamw)")
    add("--steps", type=int, default=1, metavar="N", help="training steps a sample (1)")
    add("--samples", type=int, default=5, metavar="N", help="turns of each contender (5)")
    add("--streams", type=int, default=1, metavar="N", help="texts generated at once (1)")
    add("--new_tokens", type=int, default=200, metavar="N", help="tokens a text (200)")
    add("--nanogpt_share", type=int, default=1, metavar="N", help="nanoGPT makes 1/N of them (1)")
    add("--megabytes", type=int, default=200, metavar="N", help="of text to prepare (200)")
    add("--to_loss", type=float, metavar="X", help="train: seconds to this validation loss")
    add("--data_dir", default="./data/shakespeare", metavar="DIR", help="for --to_loss")
    add("--flags", nargs="*", default=[], metavar="F", help="for train.py under --to_loss")
    add("--device", help="cuda, mps or cpu (the best there is)")
    add("--dtype", help="ours (the best the device has)")
    add("--save", metavar="FILE", help="write the JSON here too")
    options = parser.parse_args(argv)
    if options.nanogpt and not (Path(options.nanogpt) / "model.py").is_file():
        raise ValueError(f"--nanogpt {options.nanogpt}: no model.py in it")
    if min(options.samples, options.steps, options.streams, options.batch_size) < 1:
        raise ValueError("--samples, --steps, --streams and --batch_size must be at least 1")
    report = {"work": options.work, "machine": machine(options), "options": vars(options).copy()}
    report |= WORK[options.work](options)
    text = json.dumps(report, default=str)
    if options.save:
        Path(options.save).write_text(text + "\n", "utf-8")
    print(f"{table(report)}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
