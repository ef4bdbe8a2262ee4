"""Every setting of a run, in one typed dataclass, and the presets."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator

from options import integer, number


def dtype_name(dtype) -> str | None:
    """'float16' from a torch dtype or from its name."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


DTYPES = ("float32", "bfloat16", "float16", "float64")
Dtype = Annotated[Literal[DTYPES], BeforeValidator(dtype_name)]

# share of learning_rate - min_lr; progress is 0 at the end of warmup, 1 at lr_decay_iters
LR_SCHEDULES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}


@dataclass
class GPT2Config:
    # model
    vocab_size: integer(1, 2**24) = 50257  # size of the vocabulary; set from the data set
    block_size: integer(1, 2**20) = 1024  # tokens in a window; learned positions end there
    n_layer: integer(1, 1000) = 12  # transformer blocks
    n_head: integer(1, 1000) = 12  # attention heads in a block
    n_embd: integer(1, 2**16) = 768  # channels
    dropout: number(least=0, below=1) = 0.0  # share of activations dropped while training
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them
    position: Literal["learned", "rope", "alibi"] = "learned"  # encoding; alibi: no flash attention
    gelu: Literal["tanh", "exact"] = "tanh"  # GELU variant: tanh (GPT-2) or exact (nanoGPT)
    # data
    data_dir: str = "./data/shakespeare"  # the data set's own folder
    # batch
    batch_size: integer(1) = 12  # sequences in a micro-batch
    gradient_accumulation_steps: integer(1) = 40  # micro-batches in a step, over all processes
    max_iters: integer(0) = 100000  # optimizer steps
    # optimizer and schedule
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon on block matrices, AdamW on the rest
    learning_rate: number(above=0) = 6e-4  # peak learning rate
    min_lr: number(0) | None = None  # learning rate at the end; unset: learning_rate / 10
    lr_schedule: Literal[*LR_SCHEDULES] = "cosine"  # decay after the warmup
    warmup_iters: integer(0) | None = None  # linear warmup; unset: 2000, at most max_iters / 10
    lr_decay_iters: integer(0) | None = None  # step at which min_lr is reached; unset: max_iters
    weight_decay: number(0) = 0.1  # decoupled, on matrices only
    beta1: number(least=0, below=1) = 0.9  # AdamW's beta1; Muon's momentum
    beta2: number(least=0, below=1) = 0.95  # AdamW's beta2
    grad_clip: number(above=0) | None = 1.0  # largest gradient norm; none: no clipping
    # precision and hardware
    device: str | None = None  # cuda, cuda:1, mps or cpu; unset: the best available
    dtype: Dtype | None = None  # precision of the matrix products; unset: the best available
    compile: bool | None = None  # torch.compile; unset: on CUDA only
    deterministic: bool = True  # the same run, the same numbers; on CUDA and with --compile
    parallel: Literal["ddp", "fsdp"] = "ddp"  # several processes: replicated or sharded weights
    activation_checkpointing: bool = False  # recompute activations in the backward pass
    peer_timeout: number(above=0, most=1e9) = 600  # seconds to wait for another process
    seed: integer(0, 2**63 - 1) = 1337  # seeds initial weights, data order, dropout and samples
    # evaluation
    eval_interval: integer(1) = 1000  # steps between evaluations
    eval_iters: integer(1) = 200  # validation batches per evaluation; at most the whole split
    patience: integer(1) | None = None  # stop after this many evaluations without improvement
    # checkpoints and logging
    checkpoint_dir: str = "./checkpoints"  # where checkpoints go
    checkpoint_interval: integer(1) = 5000  # steps between the numbered checkpoints
    keep_checkpoints: integer(0) = 3  # how many of the numbered checkpoints to keep
    log_dir: str = "./runs"  # where each run's folder of curves goes
    log_interval: integer(1) = 10  # steps between logged lines
    # preset
    preset: str = "auto"  # sets what you did not: auto (fits device and data), none or a name

    def conflicts(self):
        """A line per conflict between valid values; the --flags before its "; " are at fault."""
        if self.preset not in (names := ("auto", "none", *GPT2_CONFIGS)):
            yield f"--preset {self.preset}: must be one of {', '.join(names)}"
        if self.dtype == "float64" and str(self.device).startswith("mps"):
            yield f"--dtype float64: not on --device {self.device}; use float32, or --device cpu"
        if self.dtype == "float16" and self.parallel == "fsdp":
            yield "--dtype float16: --parallel fsdp has no loss scaling; use bfloat16"
        if self.n_embd % self.n_head:
            yield f"--n_embd {self.n_embd}: not divisible by --n_head {self.n_head}"
        elif self.position == "rope" and self.n_embd // self.n_head % 2:
            yield f"--position rope: --n_embd {self.n_embd} / --n_head {self.n_head} is odd"
        whole = derived(self)
        if whole.min_lr > self.learning_rate:
            yield f"--min_lr {self.min_lr}: more than --learning_rate {self.learning_rate}"
        if (steps := whole.lr_decay_iters) < whole.warmup_iters:
            yield f"--lr_decay_iters {steps}: less than --warmup_iters {whole.warmup_iters}"


# Presets never set derived fields (min_lr, warmup_iters, dtype ...). "gpt2" repeats the default of
# every field that a preset or a model sets, so that edited_fields finds the defaults edited above.
GPT2_CONFIGS = {
    "gpt2": {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0}
    | {"bias": True, "position": "learned", "gelu": "tanh"}
    | {"batch_size": 12, "gradient_accumulation_steps": 40, "max_iters": 100000}
    | {"optimizer": "adamw", "learning_rate": 6e-4, "lr_schedule": "cosine"}
    | {"beta1": 0.9, "beta2": 0.95}
    | {"eval_interval": 1000, "eval_iters": 200, "checkpoint_interval": 5000, "log_interval": 10},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "shakespeare-cpu": {"block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 128, "gelu": "exact"}
    | {"batch_size": 48, "gradient_accumulation_steps": 1, "max_iters": 1100}
    | {"optimizer": "muon", "learning_rate": 8e-3, "lr_schedule": "linear", "beta2": 0.99}
    | {"eval_interval": 250, "eval_iters": 37, "checkpoint_interval": 1000},
    "shakespeare-gpu": {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2}
    | {"batch_size": 64, "gradient_accumulation_steps": 1, "max_iters": 3000}
    | {"optimizer": "muon", "learning_rate": 3e-3, "lr_schedule": "linear", "beta1": 0.95}
    | {"eval_interval": 250, "checkpoint_interval": 1000},
    "finetune": {"dropout": 0.1}
    | {"batch_size": 4, "gradient_accumulation_steps": 4, "max_iters": 500}
    | {"learning_rate": 5e-5, "lr_schedule": "linear"}
    | {"eval_interval": 50, "eval_iters": 50, "checkpoint_interval": 1000, "log_interval": 1},
}
# auto: epochs until a small text overfits (dropout delays it), and the fewest steps
FITTED = {"shakespeare-cpu": (10, 50), "shakespeare-gpu": (40, 50), "finetune": (3, 20)}
# the architecture: a run only resumes with the same values
MODEL_FIELDS = ("block_size", "n_layer", "n_head", "n_embd", "bias", "position", "gelu")
STEP_FIELDS = (  # training settings that may change on resume (the change is logged)
    "dropout batch_size gradient_accumulation_steps max_iters learning_rate min_lr lr_schedule "
    "warmup_iters lr_decay_iters weight_decay beta1 beta2 grad_clip dtype seed"
).split()


def derived(config: GPT2Config) -> GPT2Config:
    """A copy in which the schedule's unset fields are filled in from those they depend on."""
    values = {
        "min_lr": config.learning_rate / 10,
        "warmup_iters": min(2000, config.max_iters // 10),
        "lr_decay_iters": config.max_iters,
    }
    return replace(config, **{n: v for n, v in values.items() if getattr(config, n) is None})


def differences(old: dict, config: GPT2Config, names=MODEL_FIELDS) -> list[str]:
    """A line for each named field in which config differs from a checkpoint's or its defaults."""
    old, new = asdict(GPT2Config()) | GPT2_CONFIGS["gpt2"] | old, vars(config)
    return [f"{n}: checkpoint {old[n]}, config {new[n]}" for n in names if old[n] != new[n]]


# ---------------------------------------------------------------- presets


def edited_fields() -> set[str]:
    """Fields whose default above was changed by hand: the user's own, which no preset touches."""
    return {n for n, value in GPT2_CONFIGS["gpt2"].items() if getattr(GPT2Config, n) != value}


def apply_preset(config: GPT2Config, values: dict, keep: set[str]) -> GPT2Config:
    """A copy with a preset's values in every field that the user has not set (keep)."""
    return replace(config, **{name: v for name, v in values.items() if name not in keep})


def auto_preset(
    device_type, train_tokens, val_tokens, vocab_size, processes=1, trained_block_size=None
) -> tuple[str, dict]:
    """Name and values of the preset that fits; trained_block_size: of a model to fine-tune."""
    name = "shakespeare-gpu" if device_type == "cuda" else "shakespeare-cpu"
    if device_type == "cuda" and train_tokens >= 20_000_000:
        name = "gpt2"
    if trained_block_size:
        name = "finetune"
    values = dict(GPT2_CONFIGS[name])
    batch_size, micro_batches = values["batch_size"], values["gradient_accumulation_steps"]
    if name in FITTED:
        epochs, least_steps = FITTED[name]
        longest = trained_block_size or values["block_size"]
        values["block_size"] = block_size = max(1, min(longest, train_tokens - 1, val_tokens - 1))
        if device_type != "cuda":  # the logits of a micro-batch have at most 2**25 numbers
            batch_size = max(1, min(batch_size, 2**25 // (block_size * vocab_size)))
        if name == "finetune":  # as many sequences in a step
            micro_batches = values["batch_size"] * micro_batches // batch_size
        steps = epochs * train_tokens // (batch_size * micro_batches * block_size)
        steps = min(values["max_iters"], max(least_steps, steps))
        values |= {"max_iters": steps, "eval_interval": math.ceil(steps / 8)}
    # the micro-batches divide evenly among the processes, about the same sequences in a step
    accumulated = math.lcm(micro_batches, processes)
    batch_size = max(1, batch_size * micro_batches // accumulated)
    if name == "shakespeare-cpu":  # the same number of windows for any batch size
        values["eval_iters"] = math.ceil(values["eval_iters"] * values["batch_size"] / batch_size)
    return name, values | {"gradient_accumulation_steps": accumulated, "batch_size": batch_size}
