"""Train GPT-2: a data set in, checkpoints and curves out. Killed at any moment, it goes on.

    python train.py                                       # what fits this machine and this text
    python train.py --preset gpt2 --data_dir data/mytext  # GPT-2 124M
    python train.py --data novel.txt --tokenizer char --prompt "It was"
    python train.py --resume --max_iters 4000

Every field of GPT2Config is a flag. From Python: `from train import train; train(GPT2Config())`.
"""

import contextlib
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
import config as settings
from config import GPT2_CONFIGS, GPT2Config
from convert import load_model
from data import BatchSampler, TokenDataset
from evaluate import mean_loss
from generate import sample_text
from model import GPT2
from optim import learning_rate, load_optimizer_state, make_optimizer, optimizer_state
from prepare_data import prepare_file
from tokenizer import load_tokenizer
from utils import (
    ArgumentParser,
    RunLog,
    autocast,
    derived_seed,
    human_time,
    lock,
    log,
    peak_flops,
    pick_device,
    pick_dtype,
    run,
    seed_everything,
    set_up_device,
    world_size,
)

MOST_SKIPPED = 20  # steps in a row that float16 may skip while its loss scale settles


class NonFiniteError(Exception):
    exit_code = 5


class Interrupted(Exception):
    def __init__(self, signum, message):
        super().__init__(message)
        self.exit_code = 128 + signum


# ---------------------------------------------------------------- the training loop


def train(config: GPT2Config, resume: bool = False, fresh: bool = False) -> dict:
    """Train as config says, going on from checkpoint_dir's latest checkpoint where it fits; return
    the last object logged to metrics.jsonl.

    resume insists on a checkpoint, fresh sets an earlier run's aside. Raises ValueError for what
    the user can mend, CheckpointError, OSError (could not write), NonFiniteError, Interrupted.
    """
    settings.validate(config)
    if world_size() > 1:
        raise ValueError("several processes (torchrun) are not supported yet; start one")
    dataset = TokenDataset(config.data_dir)
    dataset.require(config.block_size)
    with lock(config.checkpoint_dir), StopSignals() as stop:
        checkpoint.clean(config.checkpoint_dir)
        state = None if fresh else find_checkpoint(config, dataset, resume)
        trainer = Trainer(config, dataset, state, stop)
        if fresh:
            set_aside(config.checkpoint_dir)
        return trainer.run()


class Trainer:
    """Everything that a run changes as it goes, and the steps that change it."""

    def __init__(self, config, dataset, state=None, stop=None):
        device, why = pick_device(config.device)
        dtype = settings.dtype_name(config.dtype or pick_dtype(device))
        compiled = device.type == "cuda" if config.compile is None else config.compile
        self.given = config = replace(config, vocab_size=dataset.vocab_size)  # what is saved
        self.config = config = settings.derived(
            replace(config, device=str(device), dtype=dtype, compile=compiled)
        )
        set_up_device(device)
        seed_everything(config.seed)
        self.device, self.dataset, self.stop = device, dataset, stop or StopSignals()
        self.sampler = BatchSampler(
            dataset.train,
            config.block_size,
            config.batch_size,
            config.gradient_accumulation_steps,
            config.seed,
            vocab_size=config.vocab_size,
        )
        self.tokenizer = load_tokenizer(dataset.tokenizer_path)
        wide = torch.float64 if dtype == "float64" else torch.float32
        self.raw_model = GPT2(config).to(device, wide)
        self.optimizer = make_optimizer(self.raw_model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
        self.step, self.best_val_loss, self.run_name = 0, None, None
        if state is not None:
            self.load_state(state)
        self.model = compile_model(self) if compiled else self.raw_model
        self.skipped, self.finite = 0, None
        batch = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = batch * config.block_size
        self.describe(why)

    def run(self) -> dict:
        """Train to max_iters, evaluating, saving and logging when due."""
        config, step_limit = self.config, self.config.max_iters
        self.log = RunLog(config.log_dir, self.run_name, settings.to_dict(self.given), self.step)
        self.run_name = self.log.name
        if self.step >= step_limit or self.out_of_patience():
            return self.already_finished()
        if self.step == 0:
            checkpoint.save_latest(config.checkpoint_dir, self.state())
        self.log.start(self.step, step_limit, self.tokens_per_step)
        while self.step < step_limit:
            loss, grad_norm = self.update()
            self.step += 1
            if self.step == 1:
                self.check_initial_loss(loss.item())
            last = self.step == step_limit
            evaluating = last or self.step % config.eval_interval == 0
            if evaluating or self.step % config.log_interval == 0:
                record = self.measure(loss, grad_norm)
                if evaluating:
                    record["val_loss"] = self.evaluate()
                self.log.write(record, self.sample() if evaluating else None)
            if evaluating:
                last = last or self.out_of_patience()
            self.save(record["val_loss"] if evaluating else None, last)
            if last:
                break
            if self.stop.signum is not None:
                self.leave(saved=evaluating)
        return self.finish()

    def update(self):
        """One optimizer step; its loss (mean over the micro-batches) and gradient norm, on device.

        The weights stay as they are if either is not finite. On CUDA that is found out one step
        late, when the answer has long arrived, so that nothing waits for the device.
        """
        config = self.config
        rate = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=self.device)
        for micro_step in range(config.gradient_accumulation_steps):
            loss += self.forward_backward(micro_step)
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if config.grad_clip is None else config.grad_clip
        grad_norm = torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), limit)
        self.read_finite()
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self.ask_finite(finite)
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = (~finite).float()  # the kernel itself then changes nothing
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def forward_backward(self, micro_step):
        """Add a micro-batch's gradients; its share of the step's loss.

        Dropout draws from a seed made of (seed, step, micro-step), never from what ran before.
        """
        config, accumulation = self.config, self.config.gradient_accumulation_steps
        x, y = self.to_device(self.sampler.batch(self.step, micro_step))
        number = self.sampler.global_micro_step(micro_step)
        torch.manual_seed(derived_seed(config.seed, self.step, number))
        with autocast(self.device, config.dtype):
            _, loss = self.model(x, y)
        loss = loss / accumulation
        self.scaler.scale(loss).backward()
        return loss.detach()

    def to_device(self, batch):
        if self.device.type != "cuda":
            return [tensor.to(self.device) for tensor in batch]
        return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in batch]

    def ask_finite(self, finite):
        """Send for the answer without waiting for it; on a CPU it is there at once."""
        self.finite = finite.to("cpu", non_blocking=True)
        self.arrival = None
        if self.device.type == "cuda":
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
        mfu = None if peak is None else speed * self.raw_model.flops_per_token() / peak
        rate = self.optimizer.param_groups[0]["lr"]
        record = {"step": self.step, "loss": loss, "lr": rate, "grad_norm": grad_norm}
        return record | {"tokens_per_second": speed, "mfu": mfu}

    def check_initial_loss(self, loss):
        expected = math.log(self.config.vocab_size)
        if abs(loss - expected) > 0.5:
            log(
                f"warning: the first loss is {loss:.3f}, an untrained model's is near "
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
        """All that resuming needs; see checkpoint.KEYS."""
        generators = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "best_val_loss": self.best_val_loss,
            "model": self.raw_model.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.raw_model),
            "scaler": self.scaler.state_dict(),
            "rng": generators,
            "config": settings.to_dict(self.given),
            "tokenizer": self.tokenizer.to_dict(),
            "data_hash": self.dataset.hash,
            "run": self.run_name,
        }

    def load_state(self, state):
        checkpoint.load_weights(self.raw_model, state)
        load_optimizer_state(self.optimizer, self.raw_model, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["torch"])
        self.step, self.best_val_loss = state["step"], state["best_val_loss"]
        self.run_name = state["run"]

    def save(self, val_loss, last):
        """The checkpoints that are due after a step; val_loss is None where none was measured.

        checkpoint.pt comes last: after a kill between two of them the step is made again, and with
        it the files that were missing.
        """
        folder, keep = Path(self.config.checkpoint_dir), self.config.keep_checkpoints
        if val_loss is not None and (self.best_val_loss is None or val_loss < self.best_val_loss):
            self.best_val_loss = val_loss
            checkpoint.save(folder / checkpoint.BEST, self.state())
        if self.step % self.config.checkpoint_interval == 0:
            checkpoint.save_numbered(folder, self.state(), keep)
        if last:
            checkpoint.save(folder / checkpoint.FINAL, self.state())
        if val_loss is not None:
            checkpoint.save_latest(folder, self.state())

    # ---- ends

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        losses = [record["val_loss"] for record in self.log.records if "val_loss" in record]
        patience = self.config.patience
        if patience is None or not losses or losses.index(min(losses)) >= len(losses) - patience:
            return False
        self.log.say(f"no better validation loss in {patience} evaluations: stopping (--patience)")
        return True

    def leave(self, saved):
        """A signal came: save, unless this step was saved already, and go."""
        if not saved:
            checkpoint.save_latest(self.config.checkpoint_dir, self.state())
        self.log.close()
        name = signal.Signals(self.stop.signum).name
        message = f"{name} at step {self.step}: state saved, the same command goes on from there"
        raise Interrupted(self.stop.signum, message)

    def already_finished(self) -> dict:
        self.log.close()
        log(
            f"this run is finished: step {self.step} of {self.config.max_iters}. Go on with a "
            "larger --max_iters (or --patience), or start anew with --fresh"
        )
        return self.log.records[-1] if self.log.records else {"step": self.step}

    def finish(self) -> dict:
        self.log.close()
        folder, last = self.config.checkpoint_dir, self.log.records[-1]
        where = (
            ""
            if Path(folder) == Path("checkpoints")
            else f" --checkpoint {folder}/{checkpoint.BEST}"
        )
        best = self.best_val_loss
        log(
            f"done: {self.step} steps in {human_time(last['seconds'])}, best validation loss "
            f"{best:.4f} (perplexity {math.exp(best):.2f}), {folder}/{checkpoint.BEST}\n"
            f"next: python generate.py{where} --interactive\n"
            f"      tensorboard --logdir {self.config.log_dir}"
        )
        return last

    def describe(self, why):
        """Say what is about to happen."""
        config, model = self.config, self.raw_model
        tokens = self.tokens_per_step
        epochs = config.max_iters * tokens / len(self.dataset.train)
        log(
            f"device     {self.device} ({why}), {config.dtype}"
            f"{', compiled' if self.model is not model else ''}\n"
            f"model      {model.num_params():,} parameters: {config.n_layer} layers, "
            f"{config.n_head} heads, {config.n_embd} channels, context {config.block_size}\n"
            f"data       {config.data_dir}: {len(self.dataset.train):,} training and "
            f"{len(self.dataset.val):,} validation tokens, vocabulary {config.vocab_size:,}\n"
            f"training   {config.max_iters:,} steps of {tokens:,} tokens ({epochs:.1f} epochs), "
            f"{config.optimizer}, learning rate {config.learning_rate:g} to {config.min_lr:g}"
        )


def compile_model(trainer):
    """The compiled model, tried on one batch; the plain one where this machine cannot compile."""
    model = torch.compile(trainer.raw_model)
    log("compiling the model (about a minute)")
    try:
        x, y = trainer.to_device(trainer.sampler.batch(0))
        with autocast(trainer.device, trainer.config.dtype):
            model(x, y)[1].backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways, none of which needs to end a run
        reason = str(error).strip().splitlines()[0][:120]
        log(f"torch.compile does not work here ({reason}); training goes on without it")
        model = trainer.raw_model
    finally:
        trainer.raw_model.zero_grad(set_to_none=True)
    return model


# ---------------------------------------------------------------- finding the checkpoint


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
        log(f"passed over and kept as *.damaged: {line}")
    unlike = settings.differences(state["config"], config, (*settings.MODEL_FIELDS, "optimizer"))
    tokenizer = load_tokenizer(state["tokenizer"])
    if tokenizer.hash() != dataset.meta["tokenizer"]["sha256"]:
        mine = dataset.meta["tokenizer"]["kind"]
        unlike.append(f"tokenizer: checkpoint {tokenizer.kind}, config {mine} (another vocabulary)")
    if state["data_hash"] != dataset.hash:
        unlike.append(
            f"data set: checkpoint {_short(state['data_hash'])}, config {_short(dataset.hash)}"
        )
    if unlike:
        unlike.append(
            f"{path} is of another run: --fresh sets it aside, --checkpoint_dir leaves it"
        )
        raise ValueError("\n".join(unlike))
    log(f"resuming   {path} (the newest intact checkpoint), step {state['step']}")
    return state


def _short(digest):
    return (digest or "none")[:12]


def set_aside(folder):
    target = checkpoint.set_aside(folder)
    if target is not None:
        log(f"--fresh: the earlier run's checkpoints are now in {target}")


class StopSignals:
    """Remembers SIGINT or SIGTERM for the end of the step; a second one leaves at once."""

    def __init__(self):
        self.signum, self.before = None, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.before[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        os.write(2, b"\nfinishing this step and saving; once more leaves at once\n")


# ---------------------------------------------------------------- the command line


def main(argv=None) -> int:
    options, config, chosen = parse(argv)
    if options.data is not None:
        kind = options.tokenizer or "gpt2"
        if "data_dir" not in chosen:
            config.data_dir = f"./data/{Path(options.data).stem}-{kind}"
            chosen.add("data_dir")
        prepare_file(options.data, kind, config.data_dir)
    config = with_preset(config, chosen)
    try:
        train(config, options.resume, options.fresh)
    except torch.OutOfMemoryError as error:
        raise ValueError(OUT_OF_MEMORY.format(config)) from error
    if options.prompt is not None:
        best = Path(config.checkpoint_dir) / checkpoint.BEST
        model, tokenizer = load_model(str(best), config.device)
        print(sample_text(model, tokenizer, options.prompt, options.max_new_tokens))
    return 0


OUT_OF_MEMORY = (
    "out of memory on the device: lower --batch_size (now {0.batch_size}) and raise "
    "--gradient_accumulation_steps (now {0.gradient_accumulation_steps}) as much, which gives the "
    "same result; or a shorter --block_size, or a smaller --preset"
)


def parse(argv):
    """The script's own options, the config, and the names of the fields that the user has set.

    Raises ValueError with a line for every problem at once.
    """
    parser = ArgumentParser(prog="train.py", description="Train GPT-2.", epilog=EXAMPLES)
    parser.add_argument("--config", metavar="FILE", help="settings as JSON, as a run writes them")
    parser.add_argument("--data", metavar="FILE", help="prepare this text and train on it")
    parser.add_argument("--tokenizer", choices=["char", "bpe", "gpt2"], help="for --data: gpt2")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="insist on going on from a checkpoint")
    how.add_argument("--fresh", action="store_true", help="set an earlier run aside, start anew")
    parser.add_argument("--prompt", metavar="TEXT", help="print a continuation when training ends")
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="its length")
    settings.add_flags(parser.add_argument_group("settings (fields of GPT2Config)"))
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
    found += wrong + unknown_names + settings.problems(config)
    if options.tokenizer and not options.data:
        found.append("--tokenizer: only with --data FILE; a prepared data set has its own")
    if found:
        raise ValueError("\n".join(found))
    return options, config, settings.edited_fields() | set(from_file) | set(values)


EXAMPLES = "example: train.py --data novel.txt --tokenizer char --n_layer 6 --compile false"


def with_preset(config, chosen) -> GPT2Config:
    """config with its preset's values wherever the user has set nothing (chosen)."""
    if config.preset == "none":
        return config
    if config.preset != "auto":
        return settings.apply_preset(config, GPT2_CONFIGS[config.preset], chosen)
    dataset = TokenDataset(config.data_dir)
    kind = pick_device(config.device)[0].type
    sizes = len(dataset.train), len(dataset.val), dataset.vocab_size
    name, values = settings.auto_preset(kind, *sizes)
    if set(values) - chosen:
        log(f"preset     {name}: fits {kind} and {sizes[0]:,} tokens; --preset and flags override")
    return settings.apply_preset(config, values, chosen)


if __name__ == "__main__":
    sys.exit(run(main))
