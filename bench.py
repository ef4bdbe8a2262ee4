"""How fast, and against whom: ours, nanoGPT and transformers take turns in one run.

    python bench.py train --nanogpt nanoGPT --batch_size 4 --block_size 256
    python bench.py train --nanogpt nanoGPT --to_loss 1.89    # seconds to a loss
    python bench.py generate --nanogpt nanoGPT --streams 8
    python bench.py prepare --nanogpt nanoGPT --megabytes 200
    python bench.py save                      # a checkpoint against a step
    python bench.py train --processes 1,2     # what several processes gain
    python bench.py plan --preset gpt2-xl --gpus 64     # memory, days; no run

nanoGPT is a checkout of karpathy/nanoGPT; transformers takes part where it is installed. Each
contender lives in a process of its own and does one sample when it is its turn: A B A B ... Medians
are printed as a table, then everything as one line of JSON (--save FILE keeps it).
"""

import bisect
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from config import (
    FIELD_TYPES,
    GPT2_CONFIGS,
    GPT2Config,
    add_flags,
    apply_preset,
    edited_fields,
    parse_values,
    problems,
    to_dict,
)
from data import TokenDataset, validation_starts, windows_at
from generate import Sampling, decoder, generate_ids, new_cache
from model import GPT2, MOST_SCORES, logits_at_once
from optim import AT_ONCE, learning_rate, make_optimizer, optimizer_state
from utils import (
    PEAK_FLOPS,
    ArgumentParser,
    autocast,
    human_time,
    log,
    log_row,
    peak_mb,
    pick_device,
    pick_dtype,
    process_group,
    run,
    set_up_device,
    world_size,
)

HERE = Path(__file__).parent
# nanoGPT's README, "I only have a macbook": the recipe for a CPU
RECIPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0}


# ---------------------------------------------------------------- taking turns


def take_turns(contenders: dict, samples: int, options, processes: dict | None = None) -> dict:
    """Let each contender (name -> function of options that gives a function for one sample) warm
    up, then take `samples` turns. For each: seconds and units of its samples, peak memory in MB.

    processes: name -> how many of them share the contender's work, as torchrun would start them.
    """
    workers = {}
    for name, setup in contenders.items():
        workers[name] = _start(setup, options, 1 if processes is None else processes[name])
    results = {name: {"seconds": [], "units": []} for name in contenders}
    for turn in range(-1, samples):  # turn -1 is the warm-up
        for name, members in workers.items():
            answers = _ask(members, "go")
            units, seconds = answers[0][0], max(seconds for _, seconds in answers)
            if turn >= 0:
                results[name]["units"].append(units)
                results[name]["seconds"].append(seconds)
                log(f"{name}: {units / seconds:,.1f} a second")
    for name, members in workers.items():
        peaks = _ask(members, "end")
        results[name]["peak_mb"] = None if None in peaks else max(peaks)
        for _, process in members:
            process.join()
    return results


def _start(setup, options, count):
    """`count` processes that find each other; for each the pipe to it and its handle."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ours, theirs = context.Pipe()
        arguments = setup, options, theirs, {name: str(value) for name, value in place.items()}
        process = context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        theirs.close()
        members.append((ours, process))
    return members


def _ask(members, word):
    """What each of the processes answers to a word sent to all."""
    for pipe, _ in members:
        pipe.send(word)
    return [pipe.recv() for pipe, _ in members]


def _worker(setup, options, pipe, place):
    os.environ.update(place)
    device, _ = pick_device(options.device)
    with process_group(device):
        sample = setup(options)
        while pipe.recv() == "go":
            start = time.perf_counter()
            units = sample()
            if device.type == "cuda":
                torch.cuda.synchronize()
            pipe.send((units, time.perf_counter() - start))
        pipe.send(peak_mb(device))


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


def our_training(options):
    """Our config, device, model and optimizer, and a random batch."""
    config = our_config(options)
    device = torch.device(config.device)
    set_up_device(device)
    model = GPT2(config).to(device)
    return config, device, model, make_optimizer(model, config), random_batch(config, device)


def ours_training(options):
    """Training steps as train.py makes them: forward, backward, clip, update."""
    config, device, model, optimizer, (x, y) = our_training(options)
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


def training_sample(model, forward, optimizer, x, y, precision, options, micro_steps=1):
    """Steps of micro_steps batches; several processes exchange gradients in the last of them."""

    def sample():
        for _ in range(options.steps):
            for micro_step in range(micro_steps):
                wait = isinstance(forward, DistributedDataParallel) and micro_step < micro_steps - 1
                with forward.no_sync() if wait else contextlib.nullcontext():
                    with precision:
                        _, loss = forward(x, y)
                    (loss / micro_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=world_size() == 1)
        return options.steps * micro_steps * world_size() * x.numel()

    return sample


def bench_train(options):
    if options.to_loss is not None:
        return bench_to_loss(options)
    if options.processes:
        return bench_processes(options)
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


# ---------------------------------------------------------------- train with several processes


def bench_processes(options):
    """The same step shared by 1, 2 ... processes (ddp). Efficiency: the tokens/s of n processes
    over n times those of one, or of the fewest.

    On a CPU every process has as many threads as the largest number of them leaves it, one alone
    too: else one would have all the cores already and nothing could be gained.
    """
    log(f"{threads_each(options)} threads in each process")
    names = {f"{n} process{'es' * (n > 1)}": n for n in options.processes}
    contenders = dict.fromkeys(names, shared_training)
    results = take_turns(contenders, options.samples, options, names)
    first = min(names, key=names.get)
    for name, result in results.items():
        share = rate(result) / names[name]
        result["efficiency"] = share / (rate(results[first]) / names[first])
    return {"unit": "tokens", "threads_each": threads_each(options), "results": results}


def threads_each(options) -> int:
    return max(1, os.cpu_count() // max(options.processes))


def shared_training(options):
    """Training steps of as many batches as any of the numbers of processes divides."""
    torch.set_num_threads(threads_each(options))
    config, device, model, optimizer, (x, y) = our_training(options)
    forward = torch.compile(model) if device.type == "cuda" else model
    if world_size() > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    micro_steps = math.lcm(*options.processes) // world_size()
    precision = autocast(device, config.dtype)
    return training_sample(model, forward, optimizer, x, y, precision, options, micro_steps)


def parse_processes(options):
    """--processes "1,2" as [1, 2]; ValueError for what this machine cannot run."""
    cuda = pick_device(options.device)[0].type == "cuda"
    there = torch.cuda.device_count() if cuda else os.cpu_count()
    counts = [int(part) if part.isdecimal() else 0 for part in options.processes.split(",")]
    if options.work != "train" or min(counts) < 1 or max(counts) > there:
        raise ValueError(
            f"--processes {options.processes}: for bench.py train, numbers from 1 to {there} with "
            f"commas between them (this machine's {'GPUs' if cuda else 'cores'})"
        )
    return counts


# ---------------------------------------------------------------- train to a loss


def bench_to_loss(options):
    """Seconds until the validation loss (over the whole split) is at most to_loss: train.py as a
    user starts it, its evaluations included; nanoGPT's recipe for a CPU, its evaluations left out.
    """
    ours = time_train_py(options)
    results = {"ours": ours}
    if options.nanogpt:
        results["nanoGPT"] = nanogpt_recipe(options)
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
            decode = decoder(model, cache)
            token = torch.zeros(1, dtype=torch.int64, device=config.device)
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
    config, device, model, optimizer, (x, y) = our_training(options)
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


# ---------------------------------------------------------------- plan

# --gpu -> its name in PEAK_FLOPS, GB of memory. The makers' round figures, some 7 % below what the
# cards have: that is left to CUDA, NCCL and the allocator. All of them compute in bf16.
GPUS = {
    "h200": ("H200", 141),
    "h100": ("H100", 80),
    "h100-pcie": ("H100 PCIe", 80),
    "a100": ("A100", 80),
    "a100-40gb": ("A100", 40),
    "l40s": ("L40S", 48),
    "rtx4090": ("RTX 4090", 24),
    "rtx3090": ("RTX 3090", 24),
    "cpu": (None, None),
}
MFU = 0.3  # from published runs, see docs/scaling.md
HOLES = 0.38  # on a CPU, of the memory that comes and goes in a step: measured, see docs/scaling.md


def plan_main(argv) -> int:
    options, config, columns = plan_arguments(argv)
    report = {"work": "plan", "options": vars(options) | {"config": to_dict(config)}}
    report |= bench_plan(options, config, columns)
    return show(report, plan_table(report), options.save)


def plan_arguments(argv):
    """Options, the config that they describe, and the ways of sharing the work to plan for.

    Raises ValueError with a line for each problem.
    """
    usage = "bench.py plan [--gpus N] [--gpu NAME] [any setting of train.py]"
    about = "What a run will need: memory, steps, days. The preset, if not named, is gpt2."
    parser = ArgumentParser(prog="bench.py plan", usage=usage, description=about)
    add = parser.add_argument_group("the machine and the work").add_argument
    add("--gpus", type=int, default=8, metavar="N", help="one process each (default: 8)")
    gpus = f"their kind: {', '.join(GPUS)} (default: h100)"
    add("--gpu", default="h100", choices=list(GPUS), metavar="NAME", help=gpus)
    tokens = "to train on (default: what --max_iters makes)"
    add("--tokens", type=float, metavar="N", help=tokens)
    add("--mfu", type=float, default=MFU, metavar="X", help=f"share of the peak (default: {MFU})")
    add("--save", metavar="FILE", help="write the JSON here too")
    add_flags(parser)
    options = parser.parse_args(argv)
    taken = [name for name in FIELD_TYPES if getattr(options, name) is not None]
    values, found = parse_values({name: getattr(options, name) for name in taken})
    for name in FIELD_TYPES:
        delattr(options, name)
    preset = apply_preset(
        GPT2Config(), GPT2_CONFIGS.get(values.get("preset", "gpt2"), {}), edited_fields()
    )
    config = replace(preset, **values)
    if config.dtype is None:
        cpu = options.gpu == "cpu"
        config.dtype = pick_dtype(torch.device("cpu")) if cpu else "bfloat16"
    found += problems(config) + plan_problems(options)
    if not found:
        config = sharing(config, preset, options.gpus, "gradient_accumulation_steps" in values)
    if found:
        raise ValueError("\n".join(found))
    one_way = "parallel" in values or options.gpus == 1 or config.dtype == "float16"
    return options, config, (config.parallel,) if one_way else ("ddp", "fsdp")


def plan_problems(options) -> list[str]:
    found = []
    if options.gpus < 1:
        found.append(f"--gpus {options.gpus}: must be at least 1")
    if not 0 < options.mfu <= 1:
        found.append(f"--mfu {options.mfu}: must be more than 0 and at most 1")
    if options.tokens is not None and not 1 <= options.tokens < math.inf:
        found.append(f"--tokens {options.tokens:g}: must be at least 1")
    return found


def sharing(config, preset, gpus, chosen) -> GPT2Config:
    """config with micro-batches that the GPUs can share: unless chosen, the fewest that make a step
    no smaller than the preset's.
    """
    if chosen and config.gradient_accumulation_steps % gpus:
        raise ValueError(
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps}: counts over all "
            f"processes and is not divisible by {gpus} of them; the next that is: "
            f"{math.ceil(config.gradient_accumulation_steps / gpus) * gpus}"
        )
    if chosen:
        return config
    sequences = preset.batch_size * preset.gradient_accumulation_steps
    rounds = math.ceil(sequences / (config.batch_size * gpus))
    return replace(config, gradient_accumulation_steps=rounds * gpus)


def bench_plan(options, config, columns) -> dict:
    """Memory, steps and days of a run by the formulas of docs/scaling.md; nothing is run."""
    name, gigabytes = GPUS[options.gpu]
    with torch.device("meta"):
        model = GPT2(config)
    tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
    steps = config.max_iters if options.tokens is None else math.ceil(options.tokens / tokens)
    speed = None
    if name is not None and config.dtype in ("bfloat16", "float16"):
        flops = model.flops_per_token() * (4 / 3 if config.activation_checkpointing else 1)
        speed = options.gpus * options.mfu * PEAK_FLOPS[name] / flops
    return {
        "gpu_gb": gigabytes,
        "parameters": model.num_params(),
        "tokens_per_step": tokens,
        "steps": steps,
        "tokens": steps * tokens,
        "tokens_per_second": speed,
        "days": speed and steps * tokens / speed / 86400,
        "memory": {
            parallel: memory_plan(replace(config, parallel=parallel), model, options)
            for parallel in columns
        },
    }


def memory_plan(config, model, options) -> dict:
    """What a GPU holds, and the largest batch_size with which it would fit."""
    gigabytes = GPUS[options.gpu][1]

    def total(batch_size):
        return peak_memory(replace(config, batch_size=batch_size), model, options.gpus)["bytes"]

    plan = peak_memory(config, model, options.gpus, on_cpu=options.gpu == "cpu")
    if gigabytes is not None:
        plan["fits"] = plan["bytes"] <= gigabytes * 1e9
        plan["largest_batch_size"] = bisect.bisect(range(1, 4097), gigabytes * 1e9, key=total)
    return plan


def peak_memory(config, model, processes, on_cpu=False) -> dict:
    """What a device holds at the fullest moment of a step, in bytes, by row and in all; how much
    while a checkpoint is saved; and the larger of both.
    """
    moments = memory_moments(config, model, processes, on_cpu)
    totals = {moment: round(sum(rows.values())) for moment, rows in moments.items()}
    saving = totals.pop("saving")
    moment = max(totals, key=totals.get)
    return {
        "rows": {row: round(size) for row, size in moments[moment].items()},
        "moment": moment,
        "step_bytes": totals[moment],
        "saving_bytes": saving,
        "bytes": max(totals[moment], saving),
    }


def memory_moments(config, model, processes, on_cpu=False) -> dict[str, dict[str, float]]:
    """Bytes on a device at each moment that may be the fullest of a run: {moment: {row: bytes}}.

    Names and formulas are those of docs/scaling.md; long, because it is one list of them.
    """
    w, h = widths(config)
    B, T, C, V, L = (
        getattr(config, name)
        for name in ("batch_size", "block_size", "n_embd", "vocab_size", "n_layer")
    )
    N, E, M = model.num_params(), V * C, 12 * L * C * C
    K = sum(p.numel() for p in model.transformer.h[0].parameters())
    sharded = processes > 1 and config.parallel == "fsdp"
    again = config.activation_checkpointing
    share = 1 / processes if sharded else 1

    optimizer = w * (2 * N - M * (config.optimizer == "muon"))
    buckets = w * N * (processes > 1 and not sharded)  # DDP's, in which the gradients lie
    before = buckets or w * N * (config.gradient_accumulation_steps > processes)
    after = before or w * N * share
    cast = h < w and not sharded  # by autocast
    waits = E * (h if sharded else w)  # wte's gradient by the output layer, for the embedding's
    copies = h * (N - L * K + 2 * K) if sharded else h * (M + E) * cast
    block = block_activations(config, w, h, sharded, on_cpu)
    inputs = L * B * T * C * (h if sharded else w)
    kept = end_activations(config, w, h, on_cpu) + (inputs if again else L * block)
    flow = B * T * C * (w + 5 * h)
    numbers = B * T * V
    making = h * E + max(h * numbers, cast * w * E)  # wte's gradient, of the logits'
    at_work = 2 * max(4, h) * min(numbers, logits_at_once("cpu" if on_cpu else "cuda"))
    saved = h * E if again and not sharded else copies

    columns = ("gradients", "weights in use", "activations", "logits and loss")
    moments = {
        "forward": (before, copies, kept, numbers * h + at_work),
        "loss": (before, saved, kept, numbers * 2 * h + at_work),
        "output layer": (before, saved, kept + B * T * C * h, making),
        "last block": (before + waits, saved, kept + block * again + flow, 0),
        "embedding": (after + waits * (2 if before else 1), saved / L, block + flow, 0),
        "update": (after, 0, 0, 0),
    }
    always = {"weights": w * N * share, "optimizer": optimizer * share}
    moments = {name: always | dict(zip(columns, row, strict=True)) for name, row in moments.items()}
    if config.optimizer == "muon":
        half = 2 if config.dtype == "bfloat16" else w
        at_once = max(4 * C * C, min(AT_ONCE, M // 3))  # a third: as many are of one shape
        moments["update"]["orthogonalizing"] = M * w + at_once * (w + 4 * half)
    if on_cpu and not (sharded or again):  # see utils.set_up_device
        passing = {m: sum(r.values()) - sum(always.values()) - before for m, r in moments.items()}
        holes = HOLES * (passing.pop("update") + max(passing.values()))
        moments = {moment: rows | {"holes": holes} for moment, rows in moments.items()}
    saving = always | {"gradients": buckets}
    if sharded:  # tensor by tensor; on a CPU the first process has them all in the end
        saving["put together"] = w * E + (w * N + optimizer) * on_cpu
    return moments | {"saving": saving}


def widths(config) -> tuple[int, int]:
    """Bytes of a weight, and of a number that passes between layers."""
    wide = 8 if config.dtype == "float64" else 4
    return wide, 2 if config.dtype in ("bfloat16", "float16") else wide


def block_activations(config, w, h, sharded, on_cpu) -> float:
    """Bytes that a block keeps for its backward pass."""
    B, T, C, H = config.batch_size, config.block_size, config.n_embd, config.n_head
    residual = h if sharded and on_cpu else w  # CUDA's autocast has layer norms in float32
    a_token = C * (2 * residual + 10 * h) + 4 * (4 + H)
    if attends_plainly(config, on_cpu):  # probabilities, in float32 and in h
        a_token += C * 4 * h + H * (T * (4 + h * (2 if config.dropout else 1)) - 4)
    elif on_cpu and config.dropout:  # no fused kernel: three tables of T x T
        a_token += C * h + max(4, h) * 3 * (C + H * T)
    else:
        a_token += C * h * (6 if config.position == "rope" else 4)
    if config.dropout:
        a_token += C * 2 * (h if on_cpu else 1)
    own_mask = config.position == "alibi" and h < w and not attends_plainly(config, on_cpu)
    return B * T * a_token + H * T * T * h * own_mask


def end_activations(config, w, h, on_cpu) -> float:
    """Bytes kept outside of blocks: the embedding's dropout, masks and angles, the last norm."""
    B, T, C = config.batch_size, config.block_size, config.n_embd
    dropped = (w if on_cpu else 1) if config.dropout else 0
    one_mask = config.position == "alibi" and h == w
    angles = 8 * T * (C // config.n_head) * (config.position == "rope")
    return B * T * C * (w + h + dropped) + 4 * config.n_head * T * T * one_mask + angles


def attends_plainly(config, on_cpu) -> bool:
    """See model.attention."""
    scores = config.batch_size * config.n_head * config.block_size**2
    few = MOST_SCORES * (2 if config.position == "alibi" else 1)
    return on_cpu and config.dtype == "bfloat16" and scores <= few


def plan_table(report) -> str:
    """A column for each way of sharing the work, a row for each thing that takes memory."""
    plans, cells = report["memory"], {}
    for row in dict.fromkeys(row for plan in plans.values() for row in plan["rows"]):
        cells[row] = [f"{plan['rows'].get(row, 0) / 1e9:.2f}" for plan in plans.values()]
    cells["a step in all"] = [f"{plan['step_bytes'] / 1e9:.2f}" for plan in plans.values()]
    cells["saving"] = [f"{plan['saving_bytes'] / 1e9:.2f}" for plan in plans.values()]
    cells["fullest in a step"] = [plan["moment"] for plan in plans.values()]
    if report["gpu_gb"] is not None:
        fits = [plan["fits"] for plan in plans.values()]
        cells[f"fits {report['gpu_gb']} GB"] = ["yes" if fit else "no" for fit in fits]
        cells["largest batch_size"] = [plan["largest_batch_size"] for plan in plans.values()]
    lines = [f"{row:22}" + "".join(f"{cell:>13}" for cell in line) for row, line in cells.items()]
    header = f"{'GB a process':22}" + "".join(f"{name:>13}" for name in plans)
    return "\n".join([plan_summary(report), "", header, *lines])


def plan_summary(report) -> str:
    options, config = report["options"], report["options"]["config"]
    processes = "1 process" if options["gpus"] == 1 else f"{options['gpus']} processes"
    rounds = config["gradient_accumulation_steps"] // options["gpus"]
    lines = [
        f"{report['parameters']:,} parameters, {options['gpus']} x {options['gpu']}, "
        f"{config['dtype']}, {config['optimizer']}",
        f"{report['steps']:,} steps of {report['tokens_per_step']:,} tokens, {report['tokens']:,} "
        "in all",
        f"a step: {processes}, {rounds} times {config['batch_size']} sequences of "
        f"{config['block_size']} each (--batch_size {config['batch_size']} "
        f"--gradient_accumulation_steps {config['gradient_accumulation_steps']})",
    ]
    if report["days"] is not None:
        lines.append(
            f"{report['days']:.2f} days ({human_time(report['days'] * 86400)}) at "
            f"{report['tokens_per_second']:,.0f} tokens/s, assuming an MFU of {options['mfu']:g} "
            "(--mfu)"
        )
    if options["gpu"] == "cpu":
        lines.append("on top: Python and PyTorch, about 0.23 GB")
    return "\n".join(lines)


# ---------------------------------------------------------------- the table


def rate(result) -> float:
    """Median of units a second."""
    pairs = zip(result["units"], result["seconds"], strict=True)
    return statistics.median(units / seconds for units, seconds in pairs)


def table(report) -> str:
    """A row a contender: its rate, how many times ours is faster, memory, utilisation (of several
    processes: their efficiency).
    """
    results = report["results"]
    if report["unit"] == "seconds":
        lines = [f"{'':14}{'seconds to ' + str(report['to_loss']):>20}{'seconds':>10}{'last':>8}"]
        for name, result in results.items():
            reached, (seconds, loss) = result["seconds_to_loss"], result["curve"][-1]
            reached = "never" if reached is None else f"{reached:.1f}"
            lines.append(f"{name:14}{reached:>20}{seconds:>10.1f}{loss:>8.4f}")
        return "\n".join(lines)
    first = rate(next(iter(results.values())))
    share = "efficiency" if "threads_each" in report else "utilisation"
    lines = [f"{'':14}{report['unit'] + '/s':>14}{'first / this':>14}{'peak MB':>10}{share[:5]:>7}"]
    for name, result in results.items():
        peak, used = result.get("peak_mb"), result.get(share)
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


def show(report, text, save) -> int:
    line = json.dumps(report, default=str)
    if save:
        Path(save).write_text(line + "\n", "utf-8")
    print(f"{text}\n{line}")
    return 0


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plan"]:
        return plan_main(argv[1:])
    options = parse(argv)
    here = machine(options)
    log_row("machine", f"{here['name']}, {here['device']}, torch {here['torch']}")
    report = {"work": options.work, "machine": here, "options": vars(options).copy()}
    report |= WORK[options.work](options)
    return show(report, table(report), options.save)


USAGE = "bench.py {train,generate,prepare,save} [flags below]\n       bench.py plan --help"
FLAGS = "what train.py gets under --to_loss, --max_iters 500 for example"


def parse(argv):
    parser = ArgumentParser(__doc__, prog="bench.py", usage=USAGE)
    parser.add_argument("work", choices=list(WORK), help="what to measure")
    add = parser.add_argument_group("what takes part").add_argument
    add("--nanogpt", metavar="DIR", help="a checkout of karpathy/nanoGPT to compare with")
    presets = f"the model: {', '.join(GPT2_CONFIGS)} (default: gpt2)"
    add("--preset", default="gpt2", choices=list(GPT2_CONFIGS), metavar="NAME", help=presets)
    add("--batch_size", type=int, default=4, metavar="N", help="sequences a step (default: 4)")
    add("--block_size", type=int, metavar="N", help="tokens a sequence (default: the preset's)")
    add("--optimizer", default="adamw", choices=["adamw", "muon"], help="ours (default: adamw)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", metavar="NAME", help="ours (default: the best the device has)")
    add = parser.add_argument_group("how much").add_argument
    add("--samples", type=int, default=5, metavar="N", help="turns of each (default: 5)")
    add("--steps", type=int, default=1, metavar="N", help="training steps a sample (default: 1)")
    add("--streams", type=int, default=1, metavar="N", help="texts made at once (default: 1)")
    add("--new_tokens", type=int, default=200, metavar="N", help="tokens a text (default: 200)")
    share = "nanoGPT makes 1/N of these tokens (default: 1)"
    add("--nanogpt_share", type=int, default=1, metavar="N", help=share)
    add("--megabytes", type=int, default=200, metavar="N", help="text to prepare (default: 200)")
    add = parser.add_argument_group("other ways to measure training").add_argument
    add("--processes", metavar="1,2", help="the speed of so many, one after the other")
    add("--to_loss", type=float, metavar="X", help="seconds to this validation loss")
    data_dir = "./data/shakespeare"
    add("--data_dir", default=data_dir, metavar="DIR", help=f"its data (default: {data_dir})")
    add("--flags", nargs="*", default=[], metavar="F", help=FLAGS)
    add = parser.add_argument_group("output").add_argument
    add("--save", metavar="FILE", help="write the JSON here too")
    options = parser.parse_args(argv)
    if options.nanogpt and not (Path(options.nanogpt) / "model.py").is_file():
        raise ValueError(
            f"--nanogpt {options.nanogpt}: no model.py in it; it comes with "
            "`git clone https://github.com/karpathy/nanoGPT`"
        )
    if min(options.samples, options.steps, options.streams, options.batch_size) < 1:
        raise ValueError("--samples, --steps, --streams and --batch_size must be at least 1")
    if options.processes:
        options.processes = parse_processes(options)
    return options


if __name__ == "__main__":
    sys.exit(run(main))
