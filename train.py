"""Train GPT-2: a data set in, checkpoints and curves out. A killed run resumes where it stopped.
The defaults in --help are GPT-2 124M's; what you do not set, preset auto fits to device and text.

    python train.py                       # what fits this machine and this text
    python train.py --data novel.txt --tokenizer char --prompt "It was"
    python train.py --n_layer 6 --n_embd 192 --dropout 0.1 --compile false
    python train.py --preset gpt2 --data_dir data/mytext            # GPT-2 124M
    python train.py --init_from gpt2 --data novel.txt               # fine-tuning
    python train.py --resume --max_iters 4000  # train a finished run for longer
    python train.py --fresh                    # set it aside, start from scratch
    torchrun --nproc_per_node 8 train.py --preset gpt2 --data_dir data/mytext

Every field of GPT2Config is a flag. From Python: `from train import train; train(GPT2Config())`.
"""

import os

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:  # before torch is loaded
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle OpenMP threads sleep sooner

import contextlib
import math
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import config as settings
import logger
import utils
from config import GPT2_CONFIGS, MODEL_FIELDS, GPT2Config
from data import BatchSampler, TokenDataset, validation_starts, windows_at
from files import lock, read_json
from logger import from_here, log_row, open_run, perplexity, rank, run, world_size
from optim import full_tensor, learning_rate
from options import FolderName, integer, named, parse, problems, validate
from parallel import StopSignals, all_reduce_sum, broadcast_from_rank0, gradient_sync, process_group
from sampling import sample_text
from state import build_state, check_vocabulary, find_checkpoint, load_initial, save_state
from tokenizer import KINDS, load_tokenizer
from utils import autocast, deterministic, pick_device, to_device


class Interrupted(Exception):
    """A signal ended the run; its state is saved."""

    def __init__(self, signum: int, where: str):
        go_on = "the same command without --fresh goes on from there"
        super().__init__(f"{signal.Signals(signum).name} after step {where}; {go_on}")
        self.exit_code = 128 + signum


def train(
    config: GPT2Config,
    resume: bool = False,
    fresh: bool = False,
    initial: dict | None = None,
    eval_only: bool = False,
    run_name: str | None = None,
) -> dict:
    """Train as config says, resuming from the latest checkpoint in checkpoint_dir if there is one;
    return the last object logged to metrics.jsonl.

    resume requires a checkpoint, fresh sets an earlier run's aside; initial is a checkpoint's dict
    whose weights a new run starts from (emptied then); eval_only returns step and val_loss, and
    changes nothing; run_name names the run's folder. All ranks call it alike. ValueError for user
    errors, CheckpointError, WriteError, NonFiniteError, Interrupted, PeerError.
    """
    to_save, config, dataset, device = resolve(config)
    if initial is not None:
        check_vocabulary(initial, dataset)
    with contextlib.ExitStack() as stack:
        may_differ = (
            config.compile or device.type == "cuda"
        )  # eager CPU kernels are deterministic anyway
        stack.enter_context(deterministic(config.deterministic and may_differ))
        alike = asdict(replace(config, device=None)) | {"data set": dataset.hash}
        group = stack.enter_context(process_group(device, config.peer_timeout, alike))
        if not eval_only:
            signals = stack.enter_context(StopSignals(group))
            broadcast_from_rank0(lambda: stack.enter_context(lock(config.checkpoint_dir)))
        saved = None
        if not (fresh or (eval_only and initial)):
            saved = find_checkpoint(to_save, dataset, resume, rename=not eval_only)

        # a batch is a function of (seed, step, micro-step): no loader's state to restore
        B, T = config.batch_size, config.block_size
        micro_batches = config.gradient_accumulation_steps
        seed, vocab_size, place = config.seed, config.vocab_size, (rank(), world_size())
        sampler = BatchSampler(dataset.train, T, B, micro_batches, seed, *place, vocab_size)
        state = build_state(config, device, saved, initial)
        for loaded in filter(None, (saved, initial)):
            loaded.clear()  # frees the tensors
        describe_run(state, config, dataset, device)
        if eval_only:
            val_loss = estimate_loss(state.forward, dataset.val, config, device)
            return {"step": state.step, "val_loss": val_loss}
        opening = open_run(config.log_dir, config.checkpoint_dir, state.run, state.step, run_name)
        state.run, records = broadcast_from_rank0(lambda: stack.enter_context(opening))
        if fresh:
            broadcast_from_rank0(lambda: checkpoint.set_aside(config.checkpoint_dir))
        log = logger.RunLog(Path(config.log_dir) / state.run, records, state.step, config.max_iters)
        if state.step == 0:
            save_state(state, to_save, dataset, [checkpoint.LATEST])
        finished = state.step >= config.max_iters or out_of_patience(log, config)
        if not finished:
            stack.enter_context(contextlib.closing(log))
            log.start(asdict(to_save))

        model, optimizer, scaler = state.model, state.optimizer, state.scaler
        micro_steps, tokens = micro_batches // world_size(), B * T * micro_batches
        peak = utils.peak_flops(device, config.dtype)
        since, since_step = time.perf_counter(), state.step
        while not finished:
            # learning rate
            lr = learning_rate(state.step, config)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr

            # forward and backward; gradients add up over the micro-batches
            loss = 0.0
            for micro_step in range(micro_steps):
                number = sampler.global_micro_step(micro_step)
                torch.manual_seed(utils.derived_seed(config.seed, state.step, number))  # dropout's
                x, y = (to_device(ids, device) for ids in sampler.batch(state.step, micro_step))
                gradient_sync(state.forward, last=micro_step == micro_steps - 1)
                with autocast(device, config.dtype):
                    # don't bind the logits: they would stay alive through backward
                    micro_loss = state.forward(x, y)[1] / micro_steps
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
            loss = all_reduce_sum(loss) / world_size()

            # clip; skip the update if loss or norm is not finite (found_inf replaces scaler.step)
            scaler.unscale_(optimizer)
            limit = math.inf if config.grad_clip is None else config.grad_clip
            grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
            if state.found_inf.check(loss, grad_norm, optimizer):
                optimizer.step()
            scaler.update()
            state.zero_grad()
            state.step += 1
            log.advance(state.step)

            # log and evaluate
            finished = state.step == config.max_iters
            evaluate = finished or state.step % config.eval_interval == 0
            due, sample = [], None
            if evaluate or state.step % config.log_interval == 0:
                state.found_inf.raise_if_stuck(state.step)  # waits for the device
                speed = (state.step - since_step) * tokens / (time.perf_counter() - since)
                mfu = speed * model.flops_per_token() / (world_size() * peak) if peak else None
                record = {"step": state.step, "loss": loss.item(), "lr": lr}
                record |= {"grad_norm": grad_norm.item(), "tokens_per_second": speed, "mfu": mfu}
                if evaluate:
                    val_loss = estimate_loss(state.forward, dataset.val, config, device)
                    record["val_loss"] = val_loss
                    with autocast(device, config.dtype), deterministic(False):  # for CUDA's cumsum
                        sample = sample_text(model, dataset.tokenizer, "", 200, seed=config.seed)
                    best = math.inf if state.best_val_loss is None else state.best_val_loss
                    if val_loss < best:  # false for NaN
                        state.best_val_loss = val_loss
                        due.append(checkpoint.BEST)
                log.write(record, sample, utils.peak_mb(device))
                finished = finished or (evaluate and out_of_patience(log, config))
                since, since_step = time.perf_counter(), state.step

            # save, checkpoint.pt last: a run killed in between resumes from the one before
            signum = signals.received()
            if state.step % config.checkpoint_interval == 0:
                due.append(checkpoint.NUMBERED)
            if finished:
                due.append(checkpoint.FINAL)
            if due or evaluate or signum:
                save_state(state, to_save, dataset, [*due, checkpoint.LATEST])
                since, since_step = time.perf_counter(), state.step
            if signum and not finished:
                where = f"{state.step} of {config.max_iters}, saved in {config.checkpoint_dir}"
                raise Interrupted(signum, where)
    return report(state, config, log)


@torch.no_grad()
def estimate_loss(model, tokens, config, device) -> float:
    """Mean loss in nats a token over fixed windows that cover a split evenly. Ranks share the
    batches, whose windows do not depend on the number of ranks.
    """
    B, T = config.batch_size, config.block_size
    starts = validation_starts(tokens, T, config.eval_iters * B)
    widest = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=widest, device=device)
    model.eval()
    for first in range(0, len(starts), B * world_size()):
        mine = starts[first + rank() * B : first + (rank() + 1) * B]
        # Ranks without a batch still run the forward pass: sharded layers need every rank.
        x, y = windows_at(tokens, mine if len(mine) else starts[:1], T, config.vocab_size)
        padding = B - len(x)  # a compiled model wants one shape; targets of -1 do not count
        x = torch.cat([x, x[:1].expand(padding, T)])  # (B, T)
        y = torch.cat([y, torch.full_like(y[:1], -1).expand(padding, T)])  # (B, T)
        with autocast(device, config.dtype):
            _, loss = model(to_device(x, device), to_device(y, device))
        total += loss.to(widest) * len(mine)
    model.train()
    return all_reduce_sum(total).item() / len(starts)


def out_of_patience(log, config) -> bool:
    """Whether the last `patience` evaluations did not improve on an earlier one."""
    losses, patience = log.val_losses(), config.patience
    if patience is None or not losses or losses.index(min(losses)) >= len(losses) - patience:
        return False
    log_row("patience", f"no better validation loss in {patience} evaluations: stopping")
    return True


def resolve(config) -> tuple[GPT2Config, GPT2Config, TokenDataset, torch.device]:
    """Check config against data and machine. Returns it as checkpoints save it, and with all unset
    fields filled in; the data set; the device. ValueError for conflicts.
    """
    validate(config)
    logger.check_torchrun_variables()
    micro_batches, processes = config.gradient_accumulation_steps, world_size()
    if missing := -micro_batches % processes:
        remedy = f"not divisible by {processes} processes; take {micro_batches + missing}"
        raise ValueError(f"--gradient_accumulation_steps {micro_batches}: {remedy}")
    device = pick_device(config.device)
    dataset = TokenDataset(config.data_dir)
    dataset.require(config.block_size)
    to_save = replace(config, vocab_size=dataset.tokenizer.vocab_size)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    dtype = config.dtype or utils.pick_dtype(device)
    config = settings.derived(replace(to_save, device=str(device), dtype=dtype, compile=compiled))
    validate(config)  # what the machine decided, too
    return to_save, config, dataset, device


def describe_run(state, config, dataset, device):
    """Log device, model, data and schedule."""
    shared = f", {world_size()} processes ({config.parallel})" if world_size() > 1 else ""
    is_cuda, threads = device.type == "cuda", torch.get_num_threads()
    hardware = torch.cuda.get_device_name(device) if is_cuda else f"{threads} threads"
    log_row("device", f"{device} ({hardware}), {config.dtype}{shared}")
    size = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels"
    log_row("model", f"{state.model.num_params():,} parameters: {size}")
    kind = f"{dataset.tokenizer.kind}, a vocabulary of {config.vocab_size:,}"
    splits = f"{len(dataset.train):,} tokens to train on, {len(dataset.val):,} to validate with"
    log_row("data", f"{config.data_dir} ({kind})\n{splits}")
    sequences = config.batch_size * config.gradient_accumulation_steps
    step = f"{sequences:,} x {config.block_size:,} = {sequences * config.block_size:,} tokens"
    epochs = config.max_iters * sequences * config.block_size / len(dataset.train)
    log_row("training", f"{config.max_iters:,} steps of {step} ({epochs:.1f} epochs)")
    rates = f"{config.learning_rate:g} to {config.min_lr:g} ({config.lr_schedule})"
    log_row("optimizer", f"{config.optimizer}, learning rate {rates}")


def report(state, config, log) -> dict:
    """Log the outcome, the output paths and the next command; return the last record."""
    last = log.records[-1] if log.records else {"step": state.step}
    if state.step > log.first_step:
        log_row("done", f"{state.step:,} steps in {logger.human_time(last['seconds'])}", "green")
    else:
        more = f"--max_iters {max(100, 2 * state.step)}"
        longer = more if state.step >= config.max_iters else "--patience none"
        where = f"this run is over, at step {state.step:,} of {config.max_iters:,}"
        log_row("finished", f"{where}\n{longer} trains it for longer, --fresh starts anew", "green")
    if (loss := state.best_val_loss) is not None:
        log_row("best", f"validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
    path = checkpoint.best_in(config.checkpoint_dir)
    log_row("checkpoint", str(path))
    log_row("curves", str(log.folder))
    is_default = path == checkpoint.best_in(GPT2Config().checkpoint_dir)
    checkpoint.log_next_generate(None if is_default else path)
    tensorboard = from_here(Path(sys.executable).with_name("tensorboard"))
    log_row("", logger.quoted(tensorboard, "--logdir", Path(config.log_dir)), fold=False)
    return last


# ---------------------------------------------------------------- the command line


@dataclass
class TrainOptions:
    """Flags of train.py in addition to GPT2Config's fields."""

    # what to train
    data: str | None = None  # prepare this text and train on it
    tokenizer: Literal[tuple(KINDS)] | None = None  # for --data; unset: the initial model's or gpt2
    init_from: str = "scratch"  # or a checkpoint, a Hugging Face folder, gpt2 ... gpt2-xl, org/name
    config: str | None = None  # settings as JSON, as a run writes them
    # which run (an earlier one that fits is continued)
    run_name: FolderName | None = None  # its folder in log_dir; unset: the date
    resume: bool = False  # fail if there is no checkpoint to resume from
    fresh: bool = False  # set an earlier run aside, start from scratch
    eval_only: bool = False  # print the validation loss, no more
    # when training ends
    prompt: str | None = None  # print a continuation of this
    max_new_tokens: integer(0) = 200  # its length

    def conflicts(self):
        if self.resume and self.fresh:
            yield "--fresh: not with --resume"
        if self.tokenizer and not self.data:
            yield "--tokenizer: only with --data FILE; a prepared data set has its own"
        if self.data and world_size() > 1:
            first = f"first `python prepare_data.py --input {self.data}`, then --data_dir"
            yield f"--data {self.data}: not under torchrun; {first}"


def main(argv=None) -> int:
    options, config, chosen = parse_command_line(argv)
    initial = None
    if options.init_from != "scratch":
        config, initial = load_initial(options.init_from, config, chosen)
    if options.data is not None:
        own_dir = config.data_dir if "data_dir" in chosen else None
        config.data_dir = prepare_text(options, own_dir, initial)
    dataset = TokenDataset(config.data_dir)
    if "vocab_size" in chosen and config.vocab_size != dataset.vocab_size:
        size = f"the data set has {dataset.vocab_size:,}, which the model itself pads"
        raise ValueError(f"--vocab_size {config.vocab_size}: {size}; leave it out")
    config = with_preset(config, chosen, dataset, initial)
    if options.prompt is not None:  # fail now, not at the end of the run
        dataset.tokenizer.encode(options.prompt)
    halve = f"halve --batch_size (now {config.batch_size}) and double"
    steps = f"--gradient_accumulation_steps (now {config.gradient_accumulation_steps})"
    with utils.out_of_memory(f"{halve} {steps}, or make the model smaller"):
        how = options.resume, options.fresh, initial, options.eval_only, options.run_name
        last = train(config, *how)
    if rank() > 0:
        return 0
    if options.eval_only:
        loss = last["val_loss"]
        print(f"step {last['step']}: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
    elif options.prompt is not None:
        path = checkpoint.best_in(config.checkpoint_dir)
        loaded = checkpoint.load_model(path, config.device)
        print(sample_text(*loaded, options.prompt, options.max_new_tokens, seed=config.seed))
    return 0


def parse_command_line(argv) -> tuple[TrainOptions, GPT2Config, set[str]]:
    """The script's own options, the config, and the names of the fields that the user has set.
    ValueError for every problem at once, but for those that a preset or an initial model may solve.
    """
    usage = "train.py [--preset NAME] [--data_dir DIR | --data FILE] [any flag below]"
    (options, config), given, found = parse(argv, __doc__, TrainOptions, GPT2Config, usage=usage)
    names = {field.name for field in fields(GPT2Config)}
    chosen = settings.edited_fields() | (given & names)
    if options.config is not None:
        values = read_json(options.config)
        found += [f"--config {options.config}: no setting {n}" for n in values if n not in names]
        config = replace(config, **{n: v for n, v in values.items() if n in names - given})
        chosen |= (values.keys() & names) - {"vocab_size"}  # a run writes that of its data set
    is_final = config.preset == "none"  # else a preset may still change what is not chosen
    found += [line for line in problems(config) if is_final or named(line) <= chosen]
    validate(options, found)
    return options, config, chosen


def prepare_text(options, data_dir, initial) -> str:
    """Prepare --data in data_dir, or in a folder named after it; return the folder. The tokenizer
    is --tokenizer, else that of the initial model, else gpt2's.
    """
    kind = tokenizer = options.tokenizer or "gpt2"
    with tempfile.TemporaryDirectory() as aside:
        if initial is not None and initial["tokenizer"] and options.tokenizer is None:
            kind, tokenizer = f"{initial['tokenizer']['kind']}-as-given", f"{aside}/tokenizer.json"
            load_tokenizer(initial["tokenizer"]).save(tokenizer)
        data_dir = data_dir or f"./data/{Path(options.data).stem}-{kind}"
        script = Path(__file__).with_name("prepare_data.py")
        command = [sys.executable, script, f"--input={options.data}", f"--tokenizer={tokenizer}"]
        done = subprocess.run([*command, f"--data_dir={data_dir}"], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return data_dir


def with_preset(config, chosen, dataset, initial=None) -> GPT2Config:
    """config with preset values for all fields not in `chosen`. With initial weights, auto means
    the finetune preset, and the model's shape is kept.
    """
    keep = chosen if initial is None else chosen | set(MODEL_FIELDS)
    values = GPT2_CONFIGS.get(config.preset, {})  # none is {}
    if config.preset == "auto":
        keep = chosen  # its one model field for initial weights: a block_size that fits the text
        device_type = pick_device(config.device).type
        sizes = len(dataset.train), len(dataset.val), dataset.vocab_size
        trained = None if initial is None else config.block_size
        name, values = settings.auto_preset(device_type, *sizes, world_size(), trained)
        log_row("preset", f"{name}, for {device_type} and {sizes[0]:,} tokens (--preset overrides)")
    return settings.apply_preset(config, values, keep)


if __name__ == "__main__":
    sys.exit(run(main))
