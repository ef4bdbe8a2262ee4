"""The state of a training run: built in one place, saved, and resumed."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from config import MODEL_FIELDS, STEP_FIELDS, GPT2Config, differences
from logger import log_row, rank, world_size
from model import GPT2
from optim import make_optimizer
from parallel import broadcast_from_rank0, compile_model, full_state, load_full_state, shard
from utils import autocast, set_up_device


class NonFiniteError(Exception):
    """Loss or gradients are not finite; weights are unchanged since the last good step."""

    exit_code = 5


@dataclass
class TrainState:
    """What changes in the course of a run."""

    model: GPT2  # the plain module, which holds the weights
    forward: torch.nn.Module  # the same model, possibly compiled and wrapped in DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # float16's loss scale; does nothing for other dtypes
    found_inf: "FoundInf"
    step: int = 0  # steps made, skipped ones included
    best_val_loss: float | None = None
    run: str | None = None  # the name of its folder in log_dir

    def zero_grad(self):
        """Clear gradients; under DDP they are views of its buckets and must stay allocated."""
        self.optimizer.zero_grad(set_to_none=not isinstance(self.forward, DistributedDataParallel))


def build_state(config: GPT2Config, device, saved=None, initial=None) -> TrainState:
    """Model and optimizer on the device, sharded, compiled and replicated as config says; with the
    state of a checkpoint (saved), or with the weights of a trained model (initial).
    """
    sharded = world_size() > 1 and config.parallel == "fsdp"
    set_up_device(device, thrifty=sharded or config.activation_checkpointing)
    torch.manual_seed(config.seed)  # for initial weights
    model = GPT2(config).to(device, torch.float64 if config.dtype == "float64" else torch.float32)
    if initial is not None:
        weights, table = dict(initial["model"]), "transformer.wpe.weight"
        if table in weights:  # a shorter block_size needs the first rows alone
            weights[table] = weights[table][: config.block_size]
        model.load_state_dict(weights)
    if sharded:
        shard(model, device, config.dtype)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    may_skip = 20 if scaler.is_enabled() else 0  # steps in a row, while its scale settles
    state = TrainState(model, model, optimizer, scaler, FoundInf(device, may_skip))
    if saved is not None:
        load_full_state(model, optimizer, saved["model"], saved["optimizer"])
        scaler.load_state_dict(scaler.state_dict() | saved["scaler"])
        state.step, state.run = saved["step"], saved["run"]
        state.best_val_loss = saved["best_val_loss"]
    if config.compile:
        state.forward = compile_model(model)
    if world_size() > 1 and config.parallel == "ddp":
        state.forward = DistributedDataParallel(state.forward, gradient_as_bucket_view=True)
        # DDP rebuilds its buckets after the first backward, which changes summation order: do one
        # here, so that a resumed run sums in the same order
        ids = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=device)
        with autocast(device, config.dtype):
            loss = state.forward(ids, ids)[1]
        loss.backward()
        state.zero_grad()
    return state


class FoundInf:
    """Skips steps whose loss or gradients are not finite; after more than `may_skip` in a row,
    every step until raise_if_stuck raises. The count stays on the device: no step waits for it.
    """

    def __init__(self, device, may_skip: int):
        self.may_skip = may_skip
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps in a row

    def check(self, loss, grad_norm, optimizer) -> bool:
        """Whether to call optimizer.step(). On CUDA always: found_inf makes its kernel skip."""
        finite = loss.isfinite() & grad_norm.isfinite() & (self.skipped <= self.may_skip)
        self.skipped = torch.where(finite, 0, self.skipped + 1)
        if loss.device.type != "cuda":
            return bool(finite)
        optimizer.found_inf = (~finite).float()
        return True

    def raise_if_stuck(self, step: int):
        """NonFiniteError if more than may_skip steps in a row were skipped, up to number `step`."""
        if (over := int(self.skipped) - self.may_skip) > 0:
            remedy = "try a smaller --learning_rate, a longer --warmup_iters or --dtype float32"
            raise NonFiniteError(f"loss or gradient not finite in step {step - over + 1}; {remedy}")


def save_state(state: TrainState, config: GPT2Config, dataset, names):
    """Rank 0 writes checkpoints with these names (checkpoint.LATEST ...); every rank must call."""
    state.found_inf.raise_if_stuck(state.step)  # save nothing then
    weights, optimizer_state = full_state(state.model, state.optimizer)
    if rank() > 0:
        return
    contents = {
        "format": checkpoint.FORMAT,
        "step": state.step,
        "best_val_loss": state.best_val_loss,
        "model": weights,
        "optimizer": optimizer_state,
        "scaler": state.scaler.state_dict(),
        "rng": {"torch": torch.get_rng_state()},  # unused: every micro-batch reseeds
        "config": asdict(config),
        "tokenizer": dataset.tokenizer.to_dict(),
        "data_hash": dataset.hash,
        "run": state.run,
    }
    folder = Path(config.checkpoint_dir)
    for name in names:
        checkpoint.save(folder / name.format(state.step), contents)
    numbered = folder.glob(checkpoint.NUMBERED.format("*"))
    newest_first = sorted(numbered, key=lambda path: (len(path.name), path.name), reverse=True)
    for path in newest_first[config.keep_checkpoints :]:
        path.unlink(missing_ok=True)


def find_checkpoint(config: GPT2Config, dataset, required: bool, rename=True) -> dict | None:
    """What checkpoint.latest finds, or None; ranks above 0 get no tensors. ValueError, with a line
    for each difference, if it belongs to another run.
    """
    saved = None

    def read():
        nonlocal saved
        path, saved = checkpoint.latest(config.checkpoint_dir, rename) or (None, None)
        if saved is None:
            return None
        unlike = differences(saved["config"], config, ("vocab_size", *MODEL_FIELDS, "optimizer"))
        if saved["tokenizer"] != dataset.tokenizer.to_dict():
            old, new = saved["tokenizer"].get("kind", "none"), dataset.tokenizer.kind
            unlike.append(f"tokenizer: checkpoint {old}, config {new} (another vocabulary)")
        if saved["data_hash"] != dataset.hash:
            old, new = (saved["data_hash"] or "none")[:12], dataset.hash[:12]
            unlike.append(f"data set: checkpoint {old}, config {new}")
        if unlike:
            remedy = f"{path} is of another run: --fresh sets it aside, --checkpoint_dir leaves it"
            raise ValueError("\n".join([*unlike, remedy]))
        log_row("resuming", f"{path} (the newest intact checkpoint), step {saved['step']:,}")
        if changed := differences(saved["config"], config, STEP_FIELDS):
            log_row("changed", "\n".join(changed), "yellow")
        return saved | {"model": {}, "optimizer": bool(saved["optimizer"])}

    outline = broadcast_from_rank0(read)
    if required and outline is None:
        folder = config.checkpoint_dir
        raise checkpoint.CheckpointError(f"--resume: no checkpoint in {folder}; leave the flag out")
    return saved or outline


def load_initial(spec, config, chosen=()) -> tuple[GPT2Config, dict]:
    """config with the shape of a trained model, and its checkpoint's dict (spec: see load_state).
    ValueError if a field that the user has chosen differs; block_size may be shorter.
    """
    state, name = checkpoint.load_state(spec)
    model = checkpoint.model_config(state)
    shape = {field: getattr(model, field) for field in MODEL_FIELDS}
    if "block_size" in chosen:
        shape["block_size"] = min(config.block_size, model.block_size)
    unlike = differences(shape, config, [field for field in MODEL_FIELDS if field in chosen])
    if unlike:
        raise ValueError("\n".join(f"--init_from {name}: {line}" for line in unlike))
    log_row("weights", f"{name}: {model.n_layer} layers, {model.n_embd} channels")
    return replace(config, **shape), state


def check_vocabulary(initial, dataset):
    """ValueError unless initial's tokenizer, if it has one, and vocabulary are the data set's."""
    size, tokenizer = checkpoint.model_config(initial).vocab_size, initial["tokenizer"]
    if size != dataset.vocab_size or tokenizer not in ({}, dataset.tokenizer.to_dict()):
        model = f"its model knows {size:,} tokens ({tokenizer.get('kind', 'unknown')})"
        remedy = f"{dataset.data_dir} has others; --data FILE prepares a text with its own"
        raise ValueError(f"--init_from: {model}, {remedy}")
