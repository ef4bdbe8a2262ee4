"""What a run is: every setting as one typed dataclass, the presets, and the flags made from them.

From Python:

    from config import GPT2Config, GPT2_CONFIGS
    config = GPT2Config(n_layer=6)
    for name, value in GPT2_CONFIGS["gpt2-medium"].items():
        setattr(config, name, value)
"""

import difflib
import inspect
import json
import math
import re
import types
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path


@dataclass
class GPT2Config:
    # model
    vocab_size: int = 50257  # size of the vocabulary; set from the data set's tokenizer
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # channels
    dropout: float = 0.0  # share of activations dropped while training
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them
    position: str = "learned"  # how positions are told: learned (GPT-2), rope or alibi
    gelu: str = "tanh"  # form of GELU: tanh (GPT-2) or exact (nanoGPT)
    # data
    data_dir: str = "./data/shakespeare"  # the data set's own folder
    # batch
    batch_size: int = 12  # sequences in a micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all processes
    max_iters: int = 100000  # steps, an update of the weights each
    # optimizer and schedule
    optimizer: str = "adamw"  # adamw or muon (Muon for the blocks' matrices, AdamW for the rest)
    learning_rate: float = 6e-4  # peak learning rate
    min_lr: float | None = None  # learning rate at the end; unset: learning_rate / 10
    lr_schedule: str = "cosine"  # decay after the warmup: cosine or linear
    warmup_iters: int | None = None  # steps of linear warmup; unset: 2000, at most max_iters / 10
    lr_decay_iters: int | None = None  # step at which min_lr is reached; unset: max_iters
    weight_decay: float = 0.1  # decoupled, on matrices only
    beta1: float = 0.9  # decay of the gradient's mean, Muon's momentum
    beta2: float = 0.95  # AdamW: decay of the gradient's square
    grad_clip: float | None = 1.0  # largest gradient norm; none: no clipping
    # precision and hardware
    device: str | None = None  # cuda, cuda:1, mps or cpu; unset: the best that is there
    dtype: str | None = None  # float32, bfloat16, float16, float64; unset: the best that is there
    compile: bool | None = None  # torch.compile; unset: on CUDA only
    parallel: str = "ddp"  # several processes: ddp (whole model each) or fsdp (a part each)
    activation_checkpointing: bool = False  # compute activations twice, keep only blocks' inputs
    peer_timeout: float = 600  # seconds to wait for another process before giving up
    seed: int = 1337  # of the weights, the data order and dropout
    # evaluation
    eval_interval: int = 1000  # steps between evaluations
    eval_iters: int = 200  # batches of an evaluation, at most the whole split
    patience: int | None = None  # stop after so many evaluations without a better one; none: never
    # checkpoints and logging
    checkpoint_dir: str = "./checkpoints"  # where checkpoints go
    checkpoint_interval: int = 5000  # steps between the numbered checkpoints
    keep_checkpoints: int = 3  # how many of the numbered checkpoints to keep
    log_dir: str = "./runs"  # where each run's folder of curves goes
    log_interval: int = 10  # steps between logged lines
    # preset
    preset: str = "auto"  # values for what is not set; auto: what fits device and data


# "gpt2" holds the values that GPT2Config ships with, so that a field edited above is recognised as
# the user's own. Presets leave alone what is derived from other fields or from the machine.
GPT2_CONFIGS = {
    "gpt2": {
        "vocab_size": 50257,
        "block_size": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": True,
        "position": "learned",
        "gelu": "tanh",
        "data_dir": "./data/shakespeare",
        "batch_size": 12,
        "gradient_accumulation_steps": 40,
        "max_iters": 100000,
        "optimizer": "adamw",
        "learning_rate": 6e-4,
        "lr_schedule": "cosine",
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "parallel": "ddp",
        "activation_checkpointing": False,
        "peer_timeout": 600,
        "seed": 1337,
        "eval_interval": 1000,
        "eval_iters": 200,
        "patience": None,
        "checkpoint_dir": "./checkpoints",
        "checkpoint_interval": 5000,
        "keep_checkpoints": 3,
        "log_dir": "./runs",
        "log_interval": 10,
        "preset": "auto",
    },
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "shakespeare-cpu": {
        "block_size": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 128,
        "dropout": 0.0,
        "gelu": "exact",
        "batch_size": 48,
        "gradient_accumulation_steps": 1,
        "max_iters": 1100,
        "optimizer": "muon",
        "learning_rate": 8e-3,
        "lr_schedule": "linear",
        "beta2": 0.99,
        "eval_interval": 250,
        "eval_iters": 37,
        "checkpoint_interval": 1000,
        "log_interval": 10,
    },
    "shakespeare-gpu": {
        "block_size": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "batch_size": 64,
        "gradient_accumulation_steps": 1,
        "max_iters": 3000,
        "optimizer": "muon",
        "learning_rate": 3e-3,
        "lr_schedule": "linear",
        "beta1": 0.95,
        "eval_interval": 250,
        "checkpoint_interval": 1000,
        "log_interval": 10,
    },
    "finetune": {
        "dropout": 0.1,
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_iters": 500,
        "learning_rate": 5e-5,
        "lr_schedule": "linear",
        "eval_interval": 50,
        "eval_iters": 50,
        "checkpoint_interval": 1000,
        "log_interval": 1,
    },
}

DTYPES = ("float32", "bfloat16", "float16", "float64")
CHOICES = {
    "position": ("learned", "rope", "alibi"),
    "gelu": ("tanh", "exact"),
    "optimizer": ("adamw", "muon"),
    "lr_schedule": ("cosine", "linear"),
    "dtype": DTYPES,
    "parallel": ("ddp", "fsdp"),
    "preset": ("auto", "none", *GPT2_CONFIGS),
}
LARGEST = {  # far beyond any GPT-2; what is above is a slip or a hostile file
    "vocab_size": 2**24,
    "block_size": 2**20,
    "n_layer": 1000,
    "n_head": 1000,
    "n_embd": 2**16,
}
FIELD_TYPES = typing.get_type_hints(GPT2Config)
# the network: what a checkpoint's weights mean depends on these
MODEL_FIELDS = ("block_size", "n_layer", "n_head", "n_embd", "bias", "position", "gelu")
STEP_FIELDS = (  # what a step does; a run may go on with others
    "dropout batch_size gradient_accumulation_steps max_iters learning_rate min_lr lr_schedule "
    "warmup_iters lr_decay_iters weight_decay beta1 beta2 grad_clip dtype seed"
).split()


# ---------------------------------------------------------------- checking and deriving


def validate(config: GPT2Config):
    """ValueError with one line for each problem of config: flag, value and limit."""
    found = problems(config)
    if found:
        raise ValueError("\n".join(found))


def problems(config: GPT2Config) -> list[str]:
    """Everything that is wrong with config, one line each; [] where nothing is."""
    found = _type_problems(config)
    bad = {line.split(" ")[0].removeprefix("--") for line in found}

    def require(name, ok, limit):
        value = getattr(config, name)
        if name not in bad and value is not None and not ok(value):
            found.append(f"--{name} {value}: {limit}")

    for name, choices in CHOICES.items():
        limit = f"must be one of {', '.join(choices)}"
        require(name, lambda v, choices=choices: dtype_name(v) in choices, limit)
    for name, largest in LARGEST.items():
        require(name, lambda v, most=largest: 1 <= v <= most, f"must be from 1 to {largest:,}")
    positive = "batch_size gradient_accumulation_steps eval_interval eval_iters patience"
    for name in f"{positive} checkpoint_interval log_interval".split():
        require(name, lambda v: v >= 1, "must be at least 1")
    for name in "max_iters warmup_iters keep_checkpoints".split():
        require(name, lambda v: v >= 0, "must not be negative")
    require("seed", lambda v: 0 <= v < 2**63, "must be from 0 to 2**63 - 1")
    for name in ("dropout", "beta1", "beta2"):
        require(name, lambda v: 0 <= v < 1, "must be in [0, 1)")
    require("learning_rate", lambda v: 0 < v < math.inf, "must be a positive number")
    require("weight_decay", lambda v: 0 <= v < math.inf, "must not be negative")
    require("peer_timeout", lambda v: 0 < v <= 1e9, "must be positive, at most 1e9 seconds")
    require("grad_clip", lambda v: 0 < v < math.inf, "must be positive; `none` turns clipping off")
    if dtype_name(config.dtype) == "float64" and str(config.device).startswith("mps"):
        found.append("--dtype float64: Apple GPUs have none; float32, or --device cpu")
    if config.parallel == "fsdp" and dtype_name(config.dtype) == "float16":
        found.append(
            "--dtype float16: not with --parallel fsdp, which has no loss scaling; bfloat16"
        )
    if not bad & {"n_embd", "n_head"} and config.n_head > 0:
        limit = f"not divisible by --n_head {config.n_head}"
        require("n_embd", lambda v: v % config.n_head == 0, limit)
        if config.position == "rope" and config.n_embd % config.n_head == 0:
            limit = f"--position rope turns pairs of channels: not even in --n_head {config.n_head}"
            require("n_embd", lambda v: v // config.n_head % 2 == 0, limit)
    if not bad & {"min_lr", "learning_rate"}:
        limit = f"must be from 0 to --learning_rate {config.learning_rate}"
        require("min_lr", lambda v: 0 <= v <= config.learning_rate, limit)
    if not bad & {"learning_rate", "warmup_iters", "lr_decay_iters", "max_iters"}:
        warmup = derived(config).warmup_iters
        limit = f"less than --warmup_iters {warmup}"
        require("lr_decay_iters", lambda v: v >= warmup, limit)
    return found


def _type_problems(config):
    """A line for each field whose value is not of its type; dtype may also be a torch dtype."""
    found = []
    for name, kind in FIELD_TYPES.items():
        value = getattr(config, name)
        if name == "dtype" and value is not None:
            value = dtype_name(value)
        if not _is_a(value, kind):
            found.append(f"--{name} {value!r}: must be {_type_name(kind)}")
    return found


def _is_a(value, kind):
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, part) for part in typing.get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _type_name(kind):
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "none")


def dtype_name(dtype) -> str:
    """'float16' from a torch dtype or from its name."""
    return str(dtype).removeprefix("torch.")


def derived(config: GPT2Config) -> GPT2Config:
    """A copy in which the schedule's unset fields are filled in from those it depends on."""
    values = {
        "min_lr": config.learning_rate / 10,
        "warmup_iters": min(2000, config.max_iters // 10),
        "lr_decay_iters": config.max_iters,
    }
    return replace(config, **{n: v for n, v in values.items() if getattr(config, n) is None})


def differences(old: dict, config: GPT2Config, names=MODEL_FIELDS) -> list[str]:
    """A line for each named field in which a checkpoint's config differs from this one.

    A field that the checkpoint's version did not have yet counts as what ships.
    """
    old = asdict(GPT2Config()) | GPT2_CONFIGS["gpt2"] | old
    return [
        f"{name}: checkpoint {old.get(name)}, config {getattr(config, name)}"
        for name in names
        if old.get(name) != getattr(config, name)
    ]


# ---------------------------------------------------------------- presets


def edited_fields() -> set[str]:
    """Fields whose default above was changed by hand: the user's own, which no preset touches."""
    shipped = GPT2_CONFIGS["gpt2"]
    return {f.name for f in fields(GPT2Config) if f.default != shipped.get(f.name)}


def apply_preset(config: GPT2Config, values: dict, keep: set[str]) -> GPT2Config:
    """A copy with a preset's values in every field that the user has not set (keep)."""
    return replace(config, **{name: v for name, v in values.items() if name not in keep})


def auto_preset(device_type, train_tokens, val_tokens, vocab_size, processes=1) -> tuple[str, dict]:
    """The preset for a device and a size of text: its name, and its values fitted to the text and
    to the number of processes that share a step.

    The shorter split bounds block_size, a large vocabulary batch_size (for a CPU the logits are
    most of the work), and the size of the text how many steps are made: read more than some ten
    times (some forty with dropout), a small text is learnt by heart and validation gets worse.
    """
    large = train_tokens >= 20_000_000
    if device_type == "cuda" and large:
        return "gpt2", _shared(dict(GPT2_CONFIGS["gpt2"]), processes)
    name, epochs = ("shakespeare-gpu", 40) if device_type == "cuda" else ("shakespeare-cpu", 10)
    values = dict(GPT2_CONFIGS[name])
    block_size = max(1, min(values["block_size"], train_tokens - 1, val_tokens - 1))
    batch_size = values["batch_size"]
    if device_type != "cuda":
        batch_size = max(4, min(batch_size, 2**25 // (block_size * vocab_size)))
    steps = max(50, epochs * train_tokens // (batch_size * block_size))
    values |= {"block_size": block_size, "batch_size": batch_size}
    values["max_iters"] = min(values["max_iters"], steps)
    values["eval_interval"] = math.ceil(values["max_iters"] / 8)
    values = _shared(values, processes)
    if "eval_iters" in values:  # as many windows, whatever the batch
        windows = values["eval_iters"] * GPT2_CONFIGS[name]["batch_size"]
        values["eval_iters"] = math.ceil(windows / values["batch_size"])
    return name, values


def _shared(values, processes):
    """values with as many micro-batches as the processes can share, of about the same step."""
    before = values["gradient_accumulation_steps"]
    after = math.lcm(before, processes)
    batch_size = max(1, values["batch_size"] * before // after)
    return values | {"gradient_accumulation_steps": after, "batch_size": batch_size}


def finetune_preset(
    device_type, train_tokens, val_tokens, vocab_size, block_size, processes=1
) -> dict:
    """The values of "finetune" fitted to a text and to a trained model's block_size: three times
    through the text, sixteen sequences a step, few at once where there is no GPU.
    """
    values = dict(GPT2_CONFIGS["finetune"])
    block_size = max(1, min(block_size, train_tokens - 1, val_tokens - 1))
    sequences = values["batch_size"] * values["gradient_accumulation_steps"]
    if device_type != "cuda":
        values["batch_size"] = max(1, min(values["batch_size"], 2**25 // (block_size * vocab_size)))
    values["gradient_accumulation_steps"] = sequences // values["batch_size"]
    steps = max(20, 3 * train_tokens // (sequences * block_size))
    values |= {"block_size": block_size, "max_iters": min(values["max_iters"], steps)}
    values["eval_interval"] = math.ceil(values["max_iters"] / 8)
    return _shared(values, processes)


# ---------------------------------------------------------------- flags and files


def add_flags(parser):
    """Give parser a flag for every field, in the groups of GPT2Config; what the user leaves out is
    left out of the result.
    """
    notes, groups = _notes(), {}
    for field in fields(GPT2Config):
        title, comment = notes.get(field.name, ("settings", ""))
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        may_stand_alone = _is_a(True, FIELD_TYPES[field.name])
        groups[title].add_argument(
            f"--{field.name}",
            nargs="?" if may_stand_alone else None,
            const="true" if may_stand_alone else None,
            metavar=_metavar(field.name),
            help=_help(field, comment),
        )


def _notes():
    """(group, comment) of each field, as GPT2Config's source has them: written once, read in the
    code and in --help.
    """
    try:
        source = inspect.getsource(GPT2Config)
    except OSError:
        return {}
    notes, group = {}, "settings"
    for title, name, comment in re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", source, re.M):
        group = title or group
        if name:
            notes[name] = group, comment
    return notes


def _metavar(name):
    """What kind of value a field takes, or which values, where --help has room for them."""
    kinds = {int: "N", float: "X", bool: "{true,false}", str: "NAME"}
    if name.endswith("_dir"):
        return "DIR"
    if name in CHOICES and name != "preset":
        return f"{{{','.join(CHOICES[name])}}}"
    return next(shown for kind, shown in kinds.items() if kind in _kinds(FIELD_TYPES[name]))


def _kinds(kind):
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _help(field, comment):
    """The comment, with the default; "unset: ..." in it says what that is where there is none."""
    comment, _, derived = comment.partition("; unset: ")
    if field.name == "preset":
        comment += f"; or {', '.join(CHOICES['preset'][1:])}"
    default = derived or ("none" if field.default is None else str(field.default).lower())
    return f"{comment} (default: {default})".replace("%", "%%")


def parse_values(texts: dict[str, str]) -> tuple[dict, list[str]]:
    """Typed values from flags' texts, and a line for each text that is not of its field's type."""
    values, found = {}, []
    for name, text in texts.items():
        try:
            values[name] = _parse(text, FIELD_TYPES[name])
        except ValueError:
            found.append(f"--{name} {text}: must be {_type_name(FIELD_TYPES[name])}")
    return values, found


def _parse(text, kind):
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if kind is int and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", text):  # 1e5
        value = float(text)
        if not value.is_integer():
            raise ValueError(text)
        return int(value)
    return kind(text)


def read_config_file(path) -> tuple[dict, list[str]]:
    """The values of a JSON config, and a line for each field it does not know."""
    try:
        values = json.loads(Path(path).read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: must hold one JSON object of settings")
    found = []
    for name in sorted(set(values) - set(FIELD_TYPES)):
        near = difflib.get_close_matches(name, FIELD_TYPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        found.append(f"--config {path}: unknown setting {name}{hint}")
    return {name: v for name, v in values.items() if name in FIELD_TYPES}, found


def to_dict(config: GPT2Config) -> dict:
    """Every field as JSON holds it; a valid --config."""
    return asdict(config) | {"dtype": None if config.dtype is None else dtype_name(config.dtype)}
