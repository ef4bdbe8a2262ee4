"""Train GPT-2: a data set in, checkpoints and curves out. Killed at any moment, it goes on.

    python train.py                       # what fits this machine and this text
    python train.py --data novel.txt --tokenizer char --prompt "It was"
    python train.py --n_layer 6 --n_embd 192 --dropout 0.1 --compile false
    python train.py --preset gpt2 --data_dir data/mytext            # GPT-2 124M
    python train.py --init_from gpt2 --data novel.txt               # fine-tuning
    python train.py --resume --max_iters 4000       # on with a run that finished
    python train.py --fresh                         # set it aside and start anew
    torchrun --nproc_per_node 8 train.py --preset gpt2 --data_dir data/mytext

Every field of GPT2Config is a flag. From Python: `from train import train; train(GPT2Config())`.
"""

import contextlib
import math
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

import checkpoint
import config as settings
from config import GPT2_CONFIGS, GPT2Config
from convert import load_model, load_state
from data import BatchSampler, TokenDataset
from evaluate import mean_loss, to
from generate import check_prompts, sample_text
from generate import problems as sampling_problems
from model import GPT2
from optim import (
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    whole,
    whole_in_first,
)
from prepare_data import prepare_file
from tokenizer import load_tokenizer
from utils import (
    ArgumentParser,
    RunLog,
    autocast,
    command_for,
    derived_seed,
    from_first,
    gather_from_processes,
    human_time,
    lock,
    log_next,
    log_row,
    outline_from_first,
    peak_flops,
    perplexity,
    pick_device,
    pick_dtype,
    process_group,
    program,
    quoted,
    rank,
    run,
    set_up_device,
    sum_over_processes,
    tensor_from_first,
    warn,
    world_size,
)

MOST_SKIPPED = 20  # steps in a row that float16 may skip while its loss scale settles


class NonFiniteError(Exception):
    exit_code = 5


class OwnError(ValueError):
    """What one process has found for itself alone, and has to say itself: see utils.run."""

    own = True


class Interrupted(Exception):
    def __init__(self, signum, message):
        super().__init__(message)
        self.exit_code = 128 + signum


# ---------------------------------------------------------------- the training loop


def train(
    config: GPT2Config,
    resume: bool = False,
    fresh: bool = False,
    start: dict | None = None,
    eval_only: bool = False,
) -> dict:
    """Train as config says, going on from checkpoint_dir's latest checkpoint where it fits; return
    the last object logged to metrics.jsonl.

    resume insists on a checkpoint, fresh sets an earlier run's aside; start is a checkpoint's dict
    whose weights a new run begins with (see start_from); eval_only measures the validation loss,
    {"step": ..., "val_loss": ...}, and changes nothing. Under torchrun all processes call it alike.
    Raises ValueError for what the user can mend, CheckpointError, OSError (could not write),
    NonFiniteError, Interrupted, PeerError.
    """
    settings.validate(config)
    if config.gradient_accumulation_steps % world_size():
        raise ValueError(
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps}: counts over all "
            f"processes and is not divisible by {world_size()} of them; the next that is: "
            f"{math.ceil(config.gradient_accumulation_steps / world_size()) * world_size()}"
        )
    device, why = pick_device(config.device)
    dataset = TokenDataset(config.data_dir)
    dataset.require(config.block_size)
    if start is not None:
        check_vocabulary(start, dataset)
    set_up_device(device, thrifty=is_sharded(config) or config.activation_checkpointing)
    folder = config.checkpoint_dir
    with (
        process_group(device, config.peer_timeout) as group,
        contextlib.nullcontext() if eval_only else StopSignals(group) as stop,
    ):
        check_alike(config, dataset)
        with share_lock(folder):
            state = None
            if not fresh:
                state = outline_from_first(lambda: find_checkpoint(config, dataset, resume))
            trainer = Trainer(config, dataset, state, stop, start)
            del state, start  # or all of it would be in memory as long as the run
            trainer.describe(why)
            try:
                if eval_only:
                    return {"step": trainer.step, "val_loss": trainer.evaluate()}
                if fresh:
                    from_first(lambda: set_aside(folder))
                return trainer.run()
            except ValueError as error:  # in the data, of which each process sees another part
                raise OwnError(str(error)) from error


class Trainer:
    """Everything that a run changes as it goes, and the steps that change it."""

    def __init__(self, config, dataset, state=None, stop=None, start=None):
        device, _ = pick_device(config.device)
        dtype = settings.dtype_name(config.dtype or pick_dtype(device))
        compiled = device.type == "cuda" if config.compile is None else config.compile
        self.given = config = replace(config, vocab_size=dataset.vocab_size)  # what is saved
        self.config = config = settings.derived(
            replace(config, device=str(device), dtype=dtype, compile=compiled)
        )
        settings.validate(config)  # what the machine decided, too
        torch.manual_seed(config.seed)  # of the weights
        self.device, self.dataset, self.stop = device, dataset, stop or StopSignals()
        self.tokenizer = load_tokenizer(dataset.tokenizer_path)
        self.sampler = BatchSampler(
            dataset.train,
            config.block_size,
            config.batch_size,
            config.gradient_accumulation_steps,
            config.seed,
            rank(),
            world_size(),
            config.vocab_size,
        )
        self.micro_steps = config.gradient_accumulation_steps // world_size()
        sequences = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = sequences * config.block_size
        self.step, self.best_val_loss, self.run_name = 0, None, None
        self.skipped, self.finite = 0, None
        self.pretrained = start is not None
        self.build(state, start)

    def build(self, state, start):
        """The model, wrapped for this machine, and the optimizer; with a checkpoint's state, or
        with the weights of start.
        """
        config = self.config
        wide = torch.float64 if config.dtype == "float64" else torch.float32
        self.raw_model = GPT2(config).to(self.device, wide)
        if state is not None:
            checkpoint.check_weights(self.raw_model, state)
            for name, weights in self.raw_model.state_dict().items():
                weights.copy_(tensor_from_first(state["model"][name]))
        elif start is not None:
            checkpoint.load_weights(self.raw_model, cropped(start, config.block_size))
        self.sharded = is_sharded(config)
        self.replicated = world_size() > 1 and not self.sharded
        if config.activation_checkpointing:
            recompute_activations(self.raw_model)
        if self.sharded:
            shard(self.raw_model, self.device, config.dtype)
        self.optimizer = make_optimizer(self.raw_model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        if state is not None:
            self.load_state(state)
        self.model = compile_model(self) if config.compile else self.raw_model
        self.synced = self.model  # the model whose backward pass exchanges gradients
        if self.replicated:
            self.synced = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            self.warm_up()

    def run(self) -> dict:
        """Train to max_iters, evaluating, saving and logging when due."""
        config, step_limit = self.config, self.config.max_iters
        self.log = RunLog(config.log_dir, self.run_name, settings.to_dict(self.given), self.step)
        self.run_name = self.log.name
        if self.step == 0:
            self.save(checkpoint.LATEST)
        if self.step >= step_limit or self.out_of_patience():
            return self.already_finished()
        self.log.start(self.step, step_limit, self.tokens_per_step, settings.to_dict(config))
        with contextlib.closing(self.log):  # no live line shall stand before an error
            while self.step < step_limit:
                loss, grad_norm = self.update()
                self.step += 1
                self.log.advance(self.step)
                if self.step == 1:
                    self.check_initial_loss(loss.item())
                last = self.step == step_limit
                evaluating = last or self.step % config.eval_interval == 0
                val_loss = None
                if evaluating or self.step % config.log_interval == 0:
                    record = self.measure(loss, grad_norm)
                    if evaluating:
                        record["val_loss"] = val_loss = self.evaluate()
                    self.log.write(record, self.sample() if evaluating else None)
                if evaluating:
                    last = last or self.out_of_patience()
                with self.log.paused():
                    self.save_what_is_due(val_loss, last)
                signum = self.stop.asked()
                if last:
                    break
                if signum is not None:
                    self.leave(signum, saved=evaluating)
        return self.finish()

    def update(self):
        """One optimizer step; its loss (mean over the micro-batches of all processes) and gradient
        norm, on device.

        The weights stay as they are if either is not finite. On CUDA the run stops one step later,
        when the answer has long arrived, so that nothing waits for the device.
        """
        config = self.config
        rate = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        for micro_step in range(self.micro_steps):
            with self.exchange_at(micro_step):
                loss += self.forward_backward(micro_step)
        loss = sum_over_processes(loss) / world_size()
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if config.grad_clip is None else config.grad_clip
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), limit))
        self.read_finite()
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self.ask_finite(finite)
        if self.device.type == "cuda":
            self.optimizer.found_inf = (~finite).float()  # the kernel itself then changes nothing
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.scaler.update()
        self.clear_gradients()
        return loss, grad_norm

    def forward_backward(self, micro_step):
        """Add a micro-batch's gradients; its share of the step's loss.

        Dropout draws from a seed made of (seed, step, micro-step), never from what ran before.
        """
        number = self.sampler.global_micro_step(micro_step)
        torch.manual_seed(derived_seed(self.config.seed, self.step, number))
        loss = self.loss_of(self.synced, micro_step) / self.micro_steps
        self.scaler.scale(loss).backward()
        return loss.detach()

    def loss_of(self, model, micro_step=0):
        """model's loss on this process's micro-batch of the step."""
        x, y = (to(ids, self.device) for ids in self.sampler.batch(self.step, micro_step))
        with autocast(self.device, self.config.dtype):
            return model(x, y)[1]  # without a name the logits go when they are not needed

    def exchange_at(self, micro_step):
        """Gradients are exchanged once a step, in the backward pass of its last micro-batch; until
        then they add up in each process. The exchange takes their mean.
        """
        last = micro_step == self.micro_steps - 1
        if self.sharded:
            self.raw_model.set_requires_gradient_sync(last)
        elif self.replicated and not last:
            return self.synced.no_sync()
        return contextlib.nullcontext()

    def warm_up(self):
        """One backward pass for nothing: DDP arranges its buckets anew after the first, and with
        them the order of its sums, which would differ between a run and a resumed one.
        """
        self.loss_of(self.synced).backward()
        self.clear_gradients()

    def clear_gradients(self):
        """DDP's lie in the buckets that it exchanges, and have to stay there: made anew, they would
        add up over micro-batches beside the buckets.
        """
        self.optimizer.zero_grad(set_to_none=not self.replicated)

    def ask_finite(self, finite):
        """Send for the answer without waiting for it; on a CPU it is there at once."""
        on_cuda = self.device.type == "cuda"
        self.finite, self.arrival = finite.to("cpu", non_blocking=on_cuda), None
        if on_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record()
        else:
            self.read_finite()

    def read_finite(self):
        """Learn whether the last step's numbers were finite, and stop if they were not."""
        if self.finite is None:
            return
        if self.arrival is not None:
            self.arrival.synchronize()
        finite, self.finite = bool(self.finite), None
        self.skipped = 0 if finite else self.skipped + 1
        if finite or (self.scaler.is_enabled() and self.skipped <= MOST_SKIPPED):
            return
        raise NonFiniteError(
            f"loss or gradient is not finite near step {self.step + 1}; weights were left as they "
            f"were, the last checkpoint is in {self.config.checkpoint_dir}; try a smaller "
            "--learning_rate, a longer --warmup_iters or --dtype float32"
        )

    def measure(self, loss, grad_norm) -> dict:
        """The numbers of the step just made, as metrics.jsonl has them."""
        self.read_finite()
        loss, grad_norm = loss.item(), grad_norm.item()  # waits for the device, so before the clock
        speed = self.log.tokens_per_second(self.step)
        peak = peak_flops(self.device, self.config.dtype)
        flops = self.raw_model.flops_per_token()
        mfu = None if peak is None else speed * flops / (peak * world_size())
        rate = self.optimizer.param_groups[0]["lr"]
        record = {"step": self.step, "loss": loss, "lr": rate, "grad_norm": grad_norm}
        return record | {"tokens_per_second": speed, "mfu": mfu}

    def check_initial_loss(self, loss):
        expected = math.log(self.config.vocab_size)
        if loss - expected > 0.5 or (expected - loss > 0.5 and not self.pretrained):
            warn(
                f"the first loss is {loss:.3f}, an untrained model's is near "
                f"ln({self.config.vocab_size}) = {expected:.3f}; is the data what it should be?"
            )

    def evaluate(self) -> float:
        """Mean loss over fixed windows of the validation split, in nats a token."""
        config = self.config
        return mean_loss(
            self.model,
            self.dataset.val,
            config.block_size,
            config.batch_size,
            self.device,
            max_windows=config.eval_iters * config.batch_size,
            vocab_size=config.vocab_size,
            autocast=autocast(self.device, config.dtype),
        )

    def sample(self) -> str:
        with autocast(self.device, self.config.dtype):
            return sample_text(self.raw_model, self.tokenizer, "", 200, seed=self.config.seed)

    # ---- state

    def state(self) -> dict:
        """All that resuming needs; see checkpoint.KEYS. Every process must call it, to put together
        what fsdp has spread over them; the first has it then.
        """
        return {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "best_val_loss": self.best_val_loss,
            "model": self.weights(),
            "optimizer": optimizer_state(self.optimizer, self.raw_model),
            "scaler": self.scaler.state_dict(),
            "rng": {"torch": torch.get_rng_state()},
            "config": settings.to_dict(self.given),
            "tokenizer": self.tokenizer.to_dict(),
            "data_hash": self.dataset.hash,
            "run": self.run_name,
        }

    def weights(self) -> dict:
        """Every parameter by name; a tied one is the same tensor under both of its names."""
        named = list(self.raw_model.named_parameters(remove_duplicate=False))
        tensors = {p: whole_in_first(p.detach()) for p in self.raw_model.parameters()}
        return {name: tensors[p] for name, p in named}

    def load_state(self, state):
        """All but the weights, which were there before the optimizer was."""
        load_optimizer_state(self.optimizer, self.raw_model, state["optimizer"], tensor_from_first)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if state["rng"]:
            torch.set_rng_state(tensor_from_first(state["rng"]["torch"]))
        self.step, self.best_val_loss = state["step"], state["best_val_loss"]
        self.run_name = state["run"]

    def save_what_is_due(self, val_loss, last):
        """The checkpoints that are due after a step; val_loss is None where none was measured, and
        is no best one where it is not finite.

        checkpoint.pt comes last: after a kill between two of them the step is made again, and with
        it the files that were missing.
        """
        due = []
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        if val_loss is not None and val_loss < best:
            self.best_val_loss = val_loss
            due.append(checkpoint.BEST)
        if self.step % self.config.checkpoint_interval == 0:
            due.append(checkpoint.NUMBERED)
        if last:
            due.append(checkpoint.FINAL)
        if due or val_loss is not None:
            self.save(*due, checkpoint.LATEST)

    def save(self, *names):
        """Write the state under these names; the first process does."""
        self.read_finite()  # a step that was not made shall not be saved as made
        folder, state = Path(self.config.checkpoint_dir), self.state()
        for name in names if rank() == 0 else ():
            if name == checkpoint.LATEST:
                checkpoint.save_latest(folder, state)
            elif name == checkpoint.NUMBERED:
                checkpoint.save_numbered(folder, state, self.config.keep_checkpoints)
            else:
                checkpoint.save(folder / name, state)

    # ---- ends

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        losses, patience = self.log.val_losses(), self.config.patience
        if patience is None or not losses or losses.index(min(losses)) >= len(losses) - patience:
            return False
        log_row("patience", f"no better validation loss in {patience} evaluations: stopping")
        return True

    def leave(self, signum, saved):
        """A signal came: save, unless this step was saved already, and go."""
        if not saved:
            self.save(checkpoint.LATEST)
        path = Path(self.config.checkpoint_dir) / checkpoint.LATEST
        name, of = signal.Signals(signum).name, self.config.max_iters
        raise Interrupted(signum, f"{name} after step {self.step} of {of}; saved in {path}")

    def already_finished(self) -> dict:
        of = self.config.max_iters
        longer = f"--max_iters {max(100, 2 * of)}" if self.step >= of else "--patience none"
        more = f"{longer} trains it for longer, --fresh starts a new one"
        log_row("finished", f"this run is over, at step {self.step:,} of {of:,}\n{more}", "green")
        self.say_where()
        return self.log.records[-1] if self.log.records else {"step": self.step}

    def finish(self) -> dict:
        last = self.log.records[-1]
        log_row("done", f"{self.step:,} steps in {human_time(last['seconds'])}", "green")
        self.say_where()
        return last

    def say_where(self):
        """Where the results are, and the commands to look at them."""
        config, loss = self.config, self.best_val_loss
        name = checkpoint.LATEST if loss is None else checkpoint.BEST
        path = Path(config.checkpoint_dir) / name
        if loss is not None:
            log_row("best", f"validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
        log_row("checkpoint", str(path))
        log_row("curves", str(self.log.folder))
        is_default = Path(config.checkpoint_dir) == Path(GPT2Config().checkpoint_dir)
        which = [] if is_default else ["--checkpoint", path]
        log_next(
            command_for("generate.py", *which, "--interactive"),
            quoted(program("tensorboard"), "--logdir", Path(config.log_dir)),
        )

    def describe(self, why):
        """Say what is about to happen."""
        config, train_tokens = self.config, len(self.dataset.train)
        compiled = ", compiled" if self.model is not self.raw_model else ""
        shared = f", {world_size()} processes ({config.parallel})" if world_size() > 1 else ""
        sequences = self.tokens_per_step // config.block_size
        epochs = config.max_iters * self.tokens_per_step / train_tokens
        log_row("device", f"{self.device} ({why}), {config.dtype}{compiled}{shared}")
        size = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels"
        log_row("model", f"{self.raw_model.num_params():,} parameters: {size}")
        kind = f"{self.tokenizer.kind}, a vocabulary of {config.vocab_size:,}"
        splits = f"{train_tokens:,} tokens to train on, {len(self.dataset.val):,} to validate with"
        log_row("data", f"{config.data_dir} ({kind})\n{splits}")
        step = f"{sequences:,} x {config.block_size:,} = {self.tokens_per_step:,} tokens"
        log_row("training", f"{config.max_iters:,} steps of {step} ({epochs:.1f} epochs)")
        rates = f"{config.learning_rate:g} to {config.min_lr:g} ({config.lr_schedule})"
        log_row("optimizer", f"{config.optimizer}, learning rate {rates}")


def compile_model(trainer):
    """The compiled model, tried on one batch; the plain one where a process cannot compile."""

    def try_on_a_number():
        torch.compile(torch.exp)(torch.ones((), device=trainer.device))

    model = torch.compile(trainer.raw_model)
    log_row("compiling", "the model (about a minute)")
    # one that fails inside a sharded model leaves the others waiting for it there
    reason = why_not_in_all(try_on_a_number) if trainer.sharded else None
    reason = reason or why_not_in_all(lambda: trainer.loss_of(model).backward())
    trainer.raw_model.zero_grad(set_to_none=True)
    if reason is not None:
        warn(f"torch.compile does not work here ({reason}); training goes on without it")
    return trainer.raw_model if reason else model


def why_not_in_all(function) -> str | None:
    """Call function in every process; None, or in all of them why it failed in the first that did.

    Compilers fail in many ways, none of which needs to end a run; lacking memory does.
    """
    reason = None
    try:
        function()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    return next((reason for reason in gather_from_processes([reason]) if reason is not None), None)


# ---------------------------------------------------------------- several processes


def is_sharded(config) -> bool:
    return world_size() > 1 and config.parallel == "fsdp"


def shard(model, device, dtype):
    """Spread the model's weights, and with them gradients and optimizer, over all processes; each
    block is put together only while it computes (fsdp: Zhao et al. 2023).

    With bfloat16 the weights stay float32 and are cast when they are put together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    half = torch.bfloat16 if dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32)
    for part in (*model.transformer.h, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def recompute_activations(model):
    """Keep only what enters each block, and compute the block again when going backward: a third
    more work for much less memory (Chen et al. 2016).
    """
    for block in model.transformer.h:
        block.forward = recomputing(block.forward)


def recomputing(forward):
    """forward under recomputation, as a function because torch.compile does not look into a partial
    one that fsdp calls.
    """

    def call(*arguments):
        return recomputed(forward, *arguments, use_reentrant=False)

    return call


def check_alike(config, dataset):
    """ValueError where the processes were started with unlike settings or see unlike data."""
    mine = settings.to_dict(replace(config, device=None)) | {"data set": dataset.hash}
    for other, theirs in enumerate(gather_from_processes([mine])):
        unlike = [name for name in mine if theirs[name] != mine[name]]
        if unlike:
            raise ValueError(
                f"process {other} has another {unlike[0]} than process {rank()}; start all of them "
                "with the same flags and the same data"
            )


@contextlib.contextmanager
def share_lock(folder):
    """The checkpoint folder's lock, held by the first process for all, and the folder cleaned."""

    def take():
        held.enter_context(lock(folder))
        checkpoint.clean(folder)

    with contextlib.ExitStack() as held:
        from_first(take)
        yield


# ---------------------------------------------------------------- where to start from


def find_checkpoint(config, dataset, insist):
    """The state to go on from, None to start from scratch; says which file and why."""
    found = checkpoint.latest(config.checkpoint_dir)
    if found is None:
        if insist:
            message = f"--resume: no checkpoint in {config.checkpoint_dir}; leave the flag out"
            raise checkpoint.CheckpointError(message)
        return None
    path, state, damaged = found
    for line in damaged:
        warn(f"passed over and kept as *.damaged: {line}")
    unlike = settings.differences(state["config"], config, (*settings.MODEL_FIELDS, "optimizer"))
    mine, theirs = dataset.meta["tokenizer"], state["tokenizer"]
    if not theirs or load_tokenizer(theirs).hash() != mine["sha256"]:
        kinds = f"checkpoint {theirs.get('kind', 'none')}, config {mine['kind']}"
        unlike.append(f"tokenizer: {kinds} (another vocabulary)")
    if state["data_hash"] != dataset.hash:
        unlike.append(
            f"data set: checkpoint {_short(state['data_hash'])}, config {_short(dataset.hash)}"
        )
    if unlike:
        unlike.append(
            f"{path} is of another run: --fresh sets it aside, --checkpoint_dir leaves it"
        )
        raise ValueError("\n".join(unlike))
    log_row("resuming", f"{path} (the newest intact checkpoint), step {state['step']:,}")
    if changed := settings.differences(state["config"], config, settings.STEP_FIELDS):
        log_row("changed", "\n".join(changed), "yellow")
    return state


def _short(digest):
    return (digest or "none")[:12]


def set_aside(folder):
    target = checkpoint.set_aside(folder)
    if target is not None:
        log_row("set aside", f"the earlier run's checkpoints, in {target}")


def start_from(spec, config, chosen=()) -> tuple[GPT2Config, dict]:
    """config with the shape of a trained model, and its checkpoint's dict for train(start=...).

    spec: what convert.load_state takes. chosen: fields that the user has set; block_size may be
    shorter than the model's, dropout anything. Raises ValueError where another is not the model's.
    """
    state, name = load_state(spec)
    model = checkpoint.model_config(state)
    unlike = [
        f"--{field} {getattr(config, field)}: the model of --init_from {name} has "
        f"{getattr(model, field)}"
        for field in settings.MODEL_FIELDS
        if field in chosen and getattr(config, field) != getattr(model, field)
        if field != "block_size" or config.block_size > model.block_size
    ]
    if unlike:
        raise ValueError("\n".join(unlike))
    shape = {field: getattr(model, field) for field in settings.MODEL_FIELDS}
    if "block_size" in chosen:
        shape["block_size"] = config.block_size
    log_row("weights", f"{name}: {model.n_layer} layers, {model.n_embd} channels")
    return replace(config, **shape), state


def check_vocabulary(start, dataset):
    """ValueError unless the data set's ids mean to the model of start what they always have."""
    vocab_size = checkpoint.model_config(start).vocab_size
    theirs = load_tokenizer(start["tokenizer"]) if start["tokenizer"] else None
    mine = dataset.meta["tokenizer"]
    same = theirs is None or theirs.hash() == mine["sha256"]
    if not same or vocab_size != dataset.vocab_size:
        kind = "an unknown tokenizer" if theirs is None else theirs.kind
        raise ValueError(
            f"--init_from: its model knows {vocab_size:,} tokens ({kind}), {dataset.data_dir} has "
            f"another vocabulary of {dataset.vocab_size:,} ({mine['kind']}); --data FILE prepares "
            "a text with the model's own"
        )


def cropped(start, block_size) -> dict:
    """start with a table of positions of block_size rows."""
    tensors = dict(start["model"])
    if "transformer.wpe.weight" in tensors:
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:block_size]
    return {"model": tensors}


class StopSignals:
    """Remembers SIGINT or SIGTERM for the end of the step; a second one leaves at once.

    After Ctrl-C torchrun passes on what its processes have had from the terminal: within two
    seconds that is no second one.
    """

    def __init__(self, group=None):
        self.group, self.signum, self.before = group, None, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.before[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        if self.signum is None:
            self.signum, self.when = signum, time.monotonic()
            if rank() == 0:
                os.write(2, b"\nfinishing this step and saving; once more leaves at once\n")
        elif world_size() == 1 or time.monotonic() - self.when > 2:
            os._exit(128 + signum)

    def asked(self) -> int | None:
        """The signal that any of the processes has had."""
        if world_size() == 1:
            return self.signum
        signum = torch.tensor(self.signum or 0)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX, group=self.group)
        return signum.item() or None


# ---------------------------------------------------------------- the command line


def main(argv=None) -> int:
    options, config, chosen = parse(argv)
    start = None
    if options.init_from != "scratch":
        config, start = start_from(options.init_from, config, chosen)
    if options.data is not None:
        config.data_dir = prepare_for(
            options, config.data_dir if "data_dir" in chosen else None, start
        )
        chosen.add("data_dir")
    config = with_preset(config, chosen, start)
    if options.prompt is not None:  # a run is too long to find out at its end
        tokenizer = load_tokenizer(TokenDataset(config.data_dir).tokenizer_path)
        check_prompts(tokenizer, [options.prompt])
    given = [start]
    del start  # train alone has it now, and lets it go
    try:
        last = train(config, options.resume, options.fresh, given.pop(), options.eval_only)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OwnError(OUT_OF_MEMORY.format(config)) from error
    except Interrupted as stopped:
        say_how_to_go_on(stopped, sys.argv[1:] if argv is None else argv)
        return stopped.exit_code
    if options.eval_only and rank() == 0:
        loss = last["val_loss"]
        print(f"step {last['step']}: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
    elif options.prompt is not None and rank() == 0:
        folder = Path(config.checkpoint_dir)
        name = checkpoint.BEST if (folder / checkpoint.BEST).exists() else checkpoint.LATEST
        model, tokenizer = load_model(str(folder / name), config.device)
        print(sample_text(model, tokenizer, options.prompt, options.max_new_tokens))
    return 0


def say_how_to_go_on(stopped, argv):
    """The state of an interrupted run is saved: say so, and the command that goes on from it."""
    log_row("stopped", str(stopped), "yellow")
    if world_size() > 1:
        log_row("next", "the same torchrun command, without --fresh, goes on from there")
    else:
        log_next(command_for("train.py", *(word for word in argv if word != "--fresh")))


def prepare_for(options, data_dir, start) -> str:
    """Prepare --data in data_dir, or in a folder named after it, and give the folder's name.

    With --tokenizer, else with that of the model to start from, else with gpt2's.
    """
    if world_size() > 1:
        raise ValueError(
            f"--data {options.data}: not under torchrun; first `python prepare_data.py --input "
            f"{options.data}`, then torchrun with --data_dir"
        )
    kind = tokenizer = options.tokenizer or "gpt2"
    with tempfile.TemporaryDirectory() as aside:
        if start is not None and start["tokenizer"] and options.tokenizer is None:
            kind, tokenizer = start["tokenizer"]["kind"], Path(aside) / "tokenizer.json"
            load_tokenizer(start["tokenizer"]).save(tokenizer)
            kind = kind if kind == "gpt2" else f"{kind}-as-given"
        data_dir = data_dir or f"./data/{Path(options.data).stem}-{kind}"
        prepare_file(options.data, tokenizer, data_dir)
    return data_dir


def is_out_of_memory(error) -> bool:
    """CUDA and numpy have an exception for it; a CPU's allocator and Apple's only say so."""
    said = "out of memory" in str(error) or "DefaultCPUAllocator" in str(error)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


OUT_OF_MEMORY = (
    "out of memory: lower --batch_size (now {0.batch_size}) and raise "
    "--gradient_accumulation_steps (now {0.gradient_accumulation_steps}) as much, which gives the "
    "same result; or a shorter --block_size, or a smaller --preset"
)


def parse(argv):
    """The script's own options, the config, and the names of the fields that the user has set.

    Raises ValueError with a line for every problem at once.
    """
    parser = ArgumentParser(__doc__, prog="train.py", usage=USAGE)
    parser.description = f"{parser.description}{DEFAULTS}"
    what = parser.add_argument_group("what to train")
    what.add_argument("--data", metavar="FILE", help="prepare this text and train on it")
    what.add_argument("--tokenizer", choices=["char", "bpe", "gpt2"], help=TOKENIZER)
    what.add_argument("--init_from", default="scratch", metavar="MODEL", help=INIT_FROM)
    what.add_argument("--config", metavar="FILE", help="settings as JSON, as a run writes them")
    run_of = parser.add_argument_group("which run (an earlier one that fits is continued)")
    how = run_of.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="insist on going on from a checkpoint")
    how.add_argument("--fresh", action="store_true", help="set an earlier run aside, start anew")
    run_of.add_argument(
        "--eval_only", action="store_true", help="print the validation loss, no more"
    )
    after = parser.add_argument_group("when training ends")
    after.add_argument("--prompt", metavar="TEXT", help="print a continuation of this")
    after.add_argument(
        "--max_new_tokens", type=int, default=200, metavar="N", help="its length (default: 200)"
    )
    settings.add_flags(parser)
    options, unknown = parser.parse_known_args(argv)

    found = parser.unknown_flags(unknown) if unknown else []
    texts = {
        name: text for name in settings.FIELD_TYPES if (text := getattr(options, name)) is not None
    }
    values, wrong = settings.parse_values(texts)
    from_file, unknown_names = {}, []
    if options.config is not None:
        from_file, unknown_names = settings.read_config_file(options.config)
    config = replace(GPT2Config(), **(from_file | values))
    chosen = settings.edited_fields() | set(from_file) | set(values)
    found += wrong + unknown_names + problems_so_far(config, chosen)
    found += sampling_problems({"max_new_tokens": options.max_new_tokens})
    if options.init_from == "resume":  # as in nanoGPT
        found.append(
            "--init_from resume: a run goes on by itself; --resume insists that there is one"
        )
    if options.tokenizer and not options.data:
        found.append("--tokenizer: only with --data FILE; a prepared data set has its own")
    if found:
        raise ValueError("\n".join(found))
    return options, config, chosen


def problems_so_far(config, chosen) -> list[str]:
    """What is wrong with config whatever its preset and its start will set. What else is wrong,
    once they have, train says.
    """
    found = settings.problems(config)
    if config.preset == "none":
        return found
    return [line for line in found if set(re.findall(r"--(\w+)", line)) <= chosen]


INIT_FROM = (
    "begin with the weights of a checkpoint, of a Hugging Face folder, or of gpt2, gpt2-medium, "
    "gpt2-large, gpt2-xl or org/name from the hub (default: scratch, with random ones)"
)
TOKENIZER = "for --data (default: that of the model to start from, else gpt2)"
USAGE = "train.py [--preset NAME] [--data_dir DIR | --data FILE] [any flag below]"
DEFAULTS = """

The defaults below are GPT-2 124M's. What you do not set, the preset (auto)
sets anew where it has a value for it, to fit the device and the text."""


def with_preset(config, chosen, start=None) -> GPT2Config:
    """config with its preset's values wherever the user has set nothing (chosen).

    auto is for fine-tuning where there are weights to start from, and leaves their shape alone.
    """
    if config.preset == "none":
        return config
    shape = set(settings.MODEL_FIELDS) if start is not None else set()
    if config.preset != "auto":
        return settings.apply_preset(config, GPT2_CONFIGS[config.preset], chosen | shape)
    dataset = TokenDataset(config.data_dir)
    kind = pick_device(config.device)[0].type
    text = kind, len(dataset.train), len(dataset.val), dataset.vocab_size
    if start is None:
        name, values = settings.auto_preset(*text, world_size())
    else:
        name, shape = "finetune", shape - {"block_size"}
        values = settings.finetune_preset(*text, config.block_size, world_size())
    if set(values) - chosen:
        log_row("preset", f"{name}, for {kind} and {text[1]:,} tokens (--preset overrides)")
    return settings.apply_preset(config, values, chosen | shape)


if __name__ == "__main__":
    sys.exit(run(main))
