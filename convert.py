"""Weights in and out: our checkpoints, Hugging Face's folders and repositories, nanoGPT's files.

    python convert.py from_hf gpt2 gpt2.pt        # or a folder, or any org/name
    python convert.py to_hf checkpoints/best_checkpoint.pt my-model
    python convert.py from_nanogpt out/ckpt.pt adopted.pt

From Python, all of them by name:

    from convert import load_model
    model, tokenizer = load_model("gpt2")

Without a name it is checkpoints/best_checkpoint.pt, else checkpoints/checkpoint.pt.
"""

import errno
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
from checkpoint import CheckpointError
from config import DTYPES, GPT2_CONFIGS, GPT2Config, dtype_name, problems, to_dict
from model import GPT2
from tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from utils import ArgumentParser, command_for, log_next, log_row, pick_device, pick_dtype, run, warn

# A tensor has the same name here and in Hugging Face's files. Where it ends so, theirs is the
# transpose of ours, because their Conv1D multiplies from the other side.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # tied
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that older files hold: no weights
SIZES = {  # ours: theirs
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
ALIASES = {  # transformers' names for the sizes of any model: GPT-2's
    "max_position_embeddings": "n_positions",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
}
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}  # theirs: ours
ALIKE = {  # what else config.json must say, or leave out. (reorder_and_upcast_attn only rounds.)
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
HUB_NAMES = {name: f"openai-community/{name}" for name in GPT2_CONFIGS if "gpt2" in name} | {
    "distilgpt2": "distilbert/distilgpt2"
}
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt"]
OTHER_TOKENIZERS = ["vocab.txt", "spiece.model", "tokenizer.model"]  # of other kinds than BPE
HUB_FILES = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "added_tokens.json",
    *TOKENIZER_FILES,
    *OTHER_TOKENIZERS,
]
GPT2_SIZE = 50257  # of its vocabulary
NANOGPT_PADDED = 50304  # the same in nanoGPT, with 47 rows that no text uses
GPT2_TOKENS = "0ffec638c558c04f8109a85e6f929045ccc4dfd3c19dacd20700b60cef5b5575"  # their sha256

# Plain English, so that a model of English which was read rightly does far better than guessing.
SANE_TEXT = (
    "The river was high after a week of rain, and the old bridge at the end of the village had "
    "been closed to carts. People crossed it on foot, one after the other, holding on to the rail. "
    "On the far side a boy sold apples from a basket, and when the sun came out in the afternoon "
    "he had none left and went home across the fields with his hands in his pockets."
)


# ---------------------------------------------------------------- a model by its name


def load_model(spec=None, device=None, dtype=None, need_tokenizer=True):
    """A model in eval mode, and its tokenizer; says on stderr which.

    spec: a checkpoint's path, a Hugging Face folder, or a name on the hub (gpt2-xl, org/name);
    without one, the best of ./checkpoints, else the latest. device and dtype (names or torch's
    own): what fits this machine where not given. need_tokenizer: False allows a model without a
    tokenizer, and None comes in its place. Raises CheckpointError where there is no usable
    checkpoint, ValueError for the rest.
    """
    device, _ = pick_device(None if device is None else str(device))
    dtype = _checked_dtype(dtype, device)
    try:
        state, name = load_state(spec)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --checkpoint PATH names another") from error
    model, tokenizer = build(state, name)
    if tokenizer is None and need_tokenizer:
        raise ValueError(
            f"{name} has no tokenizer, so that it can neither read nor write text; "
            "`convert.py from_nanogpt --tokenizer FILE` gives a model of nanoGPT one"
        )
    model = model.to(device, getattr(torch, dtype)).eval()
    facts = f"{_facts(model, tokenizer)}, {dtype} on {device}"
    log_row("model", f"{name}{_history(state)}\n{facts}")
    if not Path(name).is_file():
        check_loss(model, tokenizer)
    return model, tokenizer


def load_state(spec=None) -> tuple[dict, str]:
    """A checkpoint's dict (see checkpoint.KEYS) and its name, from any spec of load_model.

    What is not from a checkpoint is at step 0, with no optimizer and no data; its weights have the
    type that they were stored in, its tokenizer is {} where there is none that fits.
    """
    path = find_default() if spec is None else Path(spec)
    if path.is_dir():
        return read_hf(path, str(path)), str(path)
    if path.is_file():
        return checkpoint.load(path), str(path)
    repo = hub_name(str(spec))
    if repo is None:
        raise CheckpointError(
            f"{spec}: no such file or folder, nor a name on the hub (gpt2, org/name)"
        )
    return read_hf(download(repo), repo), repo


def find_default() -> Path:
    """The checkpoint for whoever names none."""
    folder = Path(GPT2Config().checkpoint_dir)
    for name in (checkpoint.BEST, checkpoint.LATEST):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"no checkpoint in {folder}: `python train.py` makes one")


def build(state: dict, name: str):
    """The model of a state, on whose weights it stands: none are drawn, none are copied. And its
    tokenizer, None without one. `name` is what messages call it.
    """
    with torch.device("meta"):
        model = GPT2(checkpoint.model_config(state))
    checkpoint.load_weights(model, state, assign=True)
    model.lm_head.weight = model.transformer.wte.weight  # assigning has untied them
    return model, _tokenizer(state, model.config.vocab_size, name)


def _checked_dtype(dtype, device):
    """The name of a floating type that the device can compute in."""
    name = pick_dtype(device) if dtype is None else dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: must be one of {', '.join(DTYPES)}")
    if name == "float64" and device.type == "mps":
        raise ValueError("--dtype float64: Apple GPUs have none; use float32, or --device cpu")
    return name


def _tokenizer(state, vocab_size, name):
    """The state's tokenizer, None without one; one that does not fit makes the file unusable."""
    if state["tokenizer"] == {}:
        return None
    try:
        tokenizer = load_tokenizer(state["tokenizer"])
    except ValueError as error:
        raise CheckpointError(f"{name}: its tokenizer cannot be used ({error})") from error
    if tokenizer.vocab_size != vocab_size:
        raise CheckpointError(
            f"{name}: its tokenizer has {tokenizer.vocab_size:,} tokens, its model {vocab_size:,}"
        )
    return tokenizer


def _history(state):
    """What training here has made of a state; nothing for one from elsewhere."""
    if state["run"] is None and state["step"] == 0:
        return ""
    best = state["best_val_loss"]
    loss = "unknown" if best is None else format(best, ".4f")
    return f" (step {state['step']:,}, validation loss {loss})"


def _facts(model, tokenizer):
    kind = "no tokenizer" if tokenizer is None else f"{tokenizer.kind} tokenizer"
    return f"{model.num_params():,} parameters, {kind} ({model.config.vocab_size:,} tokens)"


@torch.no_grad()
def check_loss(model, tokenizer) -> float | None:
    """Say the loss on a short English text, and warn where it is worse than guessing would be, as
    that of misread weights is. None where the model cannot read the text.
    """
    if tokenizer is None:
        return None
    text = SANE_TEXT
    if tokenizer.kind == "char":
        text = "".join(filter(set(tokenizer.characters).__contains__, text))
    ids = tokenizer.encode(text)[: model.config.block_size + 1]
    if len(ids) < 2:
        return None
    idx = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T + 1)
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    guessing = math.log(model.config.vocab_size)
    log_row("check", f"loss {loss:.4f} on a built-in English text, {guessing:.4f} by guessing")
    if not loss < guessing + 0.5:
        warn("that is worse than guessing; are the weights what they should be?")
    return loss


def add_model_flags(parser):
    """--checkpoint, --device and --dtype: what load_model and say_next take."""
    add = parser.add_argument_group("which model").add_argument
    add("--checkpoint", metavar="MODEL", help=CHECKPOINT)
    add("--device", metavar="NAME", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    add("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)} (default: the best there is)")


def say_next(spec=None, device=None, dtype=None):
    """Say the command with which to try a model that load_model gets in this way."""
    words = []
    for flag, value in (("--checkpoint", spec), ("--device", device), ("--dtype", dtype)):
        words += [] if value is None else [flag, value]
    log_next(command_for("generate.py", *words, "--interactive"))


def new_state(config, tensors, tokenizer) -> dict:
    """The checkpoint of a model that nothing but its weights is known of."""
    state = {"format": checkpoint.FORMAT, "step": 0, "best_val_loss": None, "model": tensors}
    state |= {"optimizer": {}, "scaler": {}, "rng": {}, "config": to_dict(config)}
    state |= {"tokenizer": {} if tokenizer is None else tokenizer.to_dict()}
    return state | {"data_hash": None, "run": None}


def tensors_of(found: dict, config: GPT2Config, name: str, transposed: bool) -> dict:
    """The model's tensors from those of a file, in the types found there.

    transposed: laid out as Hugging Face does. Raises ValueError with a line for everything that
    does not fit: names, shapes, numbers that are not finite, a head that is not the embedding.
    """
    shapes = shapes_of(config)
    found = {key: t for key, t in found.items() if not key.endswith(BUFFERS)}
    if EMBEDDING in found:
        found.setdefault(HEAD, found[EMBEDDING])  # tied, so that files may leave it out
    lines = [f"no tensor {key}" for key in shapes if key not in found]
    lines += [f"{key} is no part of a GPT-2" for key in found if key not in shapes]
    tensors = {}
    for key in (key for key in shapes if key in found):
        flip = transposed and key.endswith(TRANSPOSED)
        lines += _tensor_problems(key, found[key], shapes[key][:: -1 if flip else 1])
        tensors[key] = found[key].t().contiguous() if flip and not lines else found[key]
    if not lines and not torch.equal(tensors[HEAD].to(tensors[EMBEDDING]), tensors[EMBEDDING]):
        lines.append(f"{HEAD} differs from {EMBEDDING}: the head is not tied")
    if lines:
        raise ValueError("\n".join(f"{name}: {line}" for line in _few(lines)))
    return tensors | {HEAD: tensors[EMBEDDING]}


def shapes_of(config: GPT2Config) -> dict[str, tuple]:
    """The names of a model's tensors, each with its shape."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in GPT2(config).state_dict().items()}


def _tensor_problems(key, tensor, shape):
    try:
        checkpoint.check_tensor(key, tensor)
    except ValueError as error:
        return [str(error)]
    if tensor.shape != shape:
        return [f"{key} is {tuple(tensor.shape)}, the config makes it {shape}"]
    return [] if tensor.is_floating_point() else [f"{key} is {tensor.dtype}"]


def _few(lines, most=12):
    """Not more lines than fit on a screen."""
    return lines if len(lines) <= most else [*lines[:most], f"... {len(lines) - most} more"]


# ---------------------------------------------------------------- from Hugging Face


def read_hf(folder: Path, name: str) -> dict:
    """A folder as transformers writes it, as a checkpoint's dict; `name` is what messages call it.

    ValueError with a line for everything in it that is not GPT-2 as model.py has it.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name}: no config.json, so no Hugging Face folder; a checkpoint is a file"
        )
    config = config_from_hf(_read_json(folder / "config.json"), name)
    tensors = tensors_of(_read_safetensors(folder, name), config, name, transposed=True)
    return new_state(config, tensors, read_hf_tokenizer(folder, config.vocab_size))


def config_from_hf(fields: dict, name: str) -> GPT2Config:
    """Our config from theirs; ValueError with a line for everything that GPT-2 here cannot be."""
    fields = {ALIASES.get(key, key): value for key, value in fields.items()}
    shipped = GPT2_CONFIGS["gpt2"]  # their defaults for the sizes are these too
    sizes = {ours: fields.get(theirs, shipped[ours]) for ours, theirs in SIZES.items()}
    activation, width = fields.get("activation_function", "gelu_new"), sizes["n_embd"]
    inner = fields.get("n_inner")
    lines = [
        f"{key} {fields[key]!r}, only {value!r} can be converted"
        for key, value in ALIKE.items()
        if fields.get(key, value) != value
    ]
    if str(activation) not in GELU:
        lines.append(f"activation_function {activation!r}, only {', '.join(GELU)} can be converted")
    if inner is not None and not (type(width) is int and inner == 4 * width):
        lines.append(f"n_inner {inner!r}, only 4 x n_embd can be converted")
    gelu = GELU.get(str(activation), "tanh")
    config = GPT2Config(**sizes, bias=True, position="learned", gelu=gelu)
    lines += [line.removeprefix("--") for line in problems(config)]
    if lines:
        raise ValueError("\n".join(f"{name}: config.json: {line}" for line in lines))
    return config


def _read_json(path):
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: must hold one JSON object")
    return fields


def _read_safetensors(folder, name):
    """Every tensor of a folder's safetensors files, under our names."""
    safetensors, found = _optional("safetensors"), {}
    for path in _weight_files(folder, name):
        try:
            with safetensors.safe_open(path, "pt") as file:
                for key in file.keys():
                    is_ours = key.startswith(("transformer.", "lm_head."))
                    ours = key if is_ours else f"transformer.{key}"
                    if ours in found:
                        raise ValueError(f"{name}: {path.name} has {ours} again")
                    found[ours] = file.get_tensor(key)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name}: {path.name} is damaged or cut short ({error})") from None
    return found


def _weight_files(folder, name):
    """The safetensors file, or those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{name}: no model.safetensors; a pickle (pytorch_model.bin) may run code when it is "
            "opened and is never read. Who trusts it can rewrite it with transformers: "
            "GPT2LMHeadModel.from_pretrained(NAME).save_pretrained(DIR)"
        )
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(s)).name != s for s in shards.values()):
        raise ValueError(f"{name}: {index.name} does not name files of the folder")
    shards = sorted(set(shards.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"{name}: {', '.join(missing)} of {index.name} is missing")
    return [folder / shard for shard in shards]


def _optional(package):
    """A package of requirements-hub.txt."""
    try:
        return importlib.import_module(package)
    except ImportError:
        command = "pip install -r requirements-hub.txt"
        raise ValueError(f"this needs {package}, which is not installed: {command}") from None


def hub_name(spec: str) -> str | None:
    """The repository that a name stands for; None for what can only be a path here."""
    owner = spec.partition("/")[0]
    is_path = spec.endswith(".pt") or Path(owner).is_dir()
    is_repo = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec) is not None and not is_path
    return HUB_NAMES.get(spec, spec if is_repo else None)


def download(repo: str) -> Path:
    """The folder of a repository's newest snapshot in the hub's cache, which is filled as needed.

    HF_ENDPOINT (a mirror), HF_HOME (the cache) and HF_HUB_OFFLINE are honoured; what is there is
    not downloaded again. Raises ValueError that says in a line what to do.
    """
    hub = _optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=HUB_FILES))
    except Exception as error:  # networks fail in many ways
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ValueError(f"{repo}: {_download_problem(error)}") from error


def _download_problem(error):
    """In one line what went wrong and what to do."""
    errors = _optional("huggingface_hub.errors")
    if isinstance(error, errors.GatedRepoError):
        return "access is by request: ask for it on its page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "not found on the hub, nor is there such a file or folder (private: `hf auth login`)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = _optional("huggingface_hub").is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return (
            f"{why}, and the cache does not have all of it; HF_ENDPOINT may name a mirror, "
            "HF_HOME a cache that has it"
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"the download failed, the same command tries again: {reason}"


# ---------------------------------------------------------------- to Hugging Face


def to_hf(spec, folder):
    """Write a model and its tokenizer as a folder that transformers and its kin load.

    Raises ValueError for a folder that is not empty and for what GPT-2 there cannot be.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty; choose another name")
    if folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is the current folder; choose another name")
    model, tokenizer = build(*load_state(spec))
    config, weights = model.config, model.state_dict()
    fields = config_to_hf(config, tokenizer, weights[EMBEDDING].dtype)
    ends = {name: fields[name] for name in ("bos_token_id", "eos_token_id")}
    files = {"config.json": fields, "generation_config.json": ends}
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer_to_hf(tokenizer)
        files["tokenizer_config.json"] = _tokenizer_settings(tokenizer, config)
    _write_folder(folder, tensors_to_hf(weights, config), files)
    log_row("wrote", f"{folder}: {', '.join(['model.safetensors', *files])}", "green")
    if tokenizer is not None:
        say_next(folder)


def config_to_hf(config: GPT2Config, tokenizer, dtype) -> dict:
    """config.json; ValueError for a model that transformers' GPT-2 cannot be."""
    if config.position != "learned":
        raise ValueError(
            f"position {config.position!r}: transformers' GPT-2 knows learned positions only"
        )
    eot_id = None if tokenizer is None else tokenizer.eot_id
    fields = ALIKE | {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    fields["n_ctx"] = config.block_size  # an older name, which llama.cpp's converter reads
    fields["activation_function"] = {"tanh": "gelu_new", "exact": "gelu"}[config.gelu]
    fields |= {"architectures": ["GPT2LMHeadModel"], "dtype": dtype_name(dtype), "n_inner": None}
    fields |= {f"{part}_pdrop": config.dropout for part in ("attn", "embd", "resid")}
    return fields | {"bos_token_id": eot_id, "eos_token_id": eot_id}


def tensors_to_hf(tensors: dict, config: GPT2Config) -> dict:
    """Our tensors under transformers' names and in their layout; a missing bias is one of zeros."""
    dtype, found = tensors[EMBEDDING].dtype, {}
    for key, shape in shapes_of(replace(config, bias=True)).items():
        tensor = tensors[key] if key in tensors else torch.zeros(shape, dtype=dtype)
        found[key] = tensor.t().contiguous() if key.endswith(TRANSPOSED) else tensor
    del found[HEAD]  # tied
    return found


def _write_folder(folder, tensors, files):
    """All of it aside, fsynced, renamed: a folder that can be seen is whole."""
    safetensors, save_file = _optional("safetensors"), _optional("safetensors.torch").save_file
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
        aside.mkdir(parents=True)
        save_file(tensors, aside / "model.safetensors", {"format": "pt"})
        for name, fields in files.items():
            text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
            (aside / name).write_text(text, "utf-8", newline="\n")
        shutil.copymode(aside / "config.json", aside / "model.safetensors")  # it comes out private
        for path in aside.iterdir():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()  # it is empty; Windows would not replace it
        os.replace(aside, folder)
        checkpoint.fsync_folder(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        problem = OSError(f"could not write {folder}: {getattr(error, 'strerror', None) or error}")
        raise problem from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------- tokenizers


def tokenizer_to_hf(tokenizer) -> dict:
    """tokenizer.json as the tokenizers library reads it, giving the same ids and the same text."""
    if tokenizer.kind == "char":
        ids, special = {c: i for i, c in enumerate(tokenizer.characters)}, {}
        model = {"type": "WordLevel", "unk_token": "<unk>"}  # not in vocab: strangers are an error
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
        split["invert"] = False
        decoder = {"type": "Fuse"}
    else:
        special = tokenizer.special
        ids = tokenizer.id_of | special
        model = {"type": "BPE", "merges": tokenizer.merges()}
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        split["use_regex"] = True
        decoder = split
    model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": text, "special": True} | plain for text, i in special.items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _tokenizer_settings(tokenizer, config):
    """tokenizer_config.json."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.block_size,
    }
    if tokenizer.eot_id is not None:
        settings |= {"bos_token": tokenizer.eot, "eos_token": tokenizer.eot}
    return settings


def read_hf_tokenizer(folder: Path, vocab_size: int):
    """The folder's tokenizer as one of ours, None where it has none or none that can be one.

    Without any tokenizer files a vocabulary of 50,257 is taken for GPT-2's.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES + OTHER_TOKENIZERS):
        return GPT2Tokenizer() if vocab_size == GPT2_SIZE else None
    try:
        return tokenizer_from_hf(*_tokenizer_files(folder), vocab_size)
    except ValueError as error:
        log_row("tokenizer", f"left out: {error}")
        return None


def _tokenizer_files(folder):
    """What the folder's files make of the tokenizers library, as its JSON; and the settings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    settings, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings = _read_json(settings) if settings.is_file() else {}
    try:
        if (folder / "tokenizer.json").is_file():
            made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            paths = [str(folder / name) for name in ("vocab.json", "merges.txt")]
            made = Tokenizer(models.BPE.from_file(*paths))
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            more = _read_json(added) if added.is_file() else {}
            made.add_special_tokens([END_OF_TEXT, *sorted(more, key=more.get)])
    except Exception as error:  # the library raises nothing more special
        problem = f"no readable tokenizer.json, nor vocab.json and merges.txt ({error})"
        raise ValueError(problem) from None
    return json.loads(made.to_str()), settings


def tokenizer_from_hf(found: dict, settings: dict, vocab_size: int):
    """Our tokenizer for what a tokenizer.json (as `tokenizers` spells it out) and its settings say.

    Ids of the model that have no token become special tokens that no text is encoded to. Raises
    ValueError where ours would not do exactly the same: it is made, written out again as
    tokenizer_to_hf does, and compared part by part.
    """
    made = _guess(found, settings, vocab_size)
    theirs, ours = _parts(found), _parts(tokenizer_to_hf(made))
    other = [name for name in theirs if theirs[name] != ours[name]]
    if other:
        raise ValueError(f"its {', '.join(other)} cannot be had here exactly")
    if made.vocab_size != vocab_size:
        raise ValueError(f"it has {made.vocab_size:,} tokens, the model {vocab_size:,}")
    return made


def _guess(found, settings, vocab_size):
    """The tokenizer of ours that might be the one found."""
    for flag in ("add_prefix_space", "add_bos_token"):
        if settings.get(flag):
            raise ValueError(f"{flag} is set")
    added, model = found["added_tokens"], found["model"]
    for token in added:
        if not token["special"]:
            raise ValueError(f"it looks for {token['content']!r} in every text")
    if model["type"] not in ("BPE", "WordLevel"):
        raise ValueError(f"its model is {model['type']}")
    special = {token["content"]: token["id"] for token in added}
    ids = {text: i for text, i in model["vocab"].items() if text not in special}
    tokens = sorted(ids, key=ids.get)
    if model["type"] == "WordLevel":
        return CharTokenizer.from_dict({"characters": tokens})
    special = {text: i for text, i in special.items() if i < vocab_size}
    unused = set(range(vocab_size)) - set(ids.values()) - set(special.values())
    special |= {f"<|unused {i}|>": i for i in sorted(unused)}
    spelt = " ".join(tokens)
    is_gpt2 = hashlib.sha256(spelt.encode()).hexdigest() == GPT2_TOKENS
    if is_gpt2 and special == {END_OF_TEXT: GPT2_SIZE - 1}:
        return GPT2Tokenizer(tokens)
    eot = settings.get("eos_token", END_OF_TEXT)
    eot = eot.get("content") if isinstance(eot, dict) else eot
    eot = eot if isinstance(eot, str) else None
    return BPETokenizer.from_dict({"tokens": spelt, "special": special, "eot": eot})


def _parts(spec):
    """What in a tokenizer.json decides which ids a text becomes, and which text ids become."""
    model, split, after = spec["model"], spec["pre_tokenizer"], spec["post_processor"]
    special = {token["content"] for token in spec["added_tokens"]}
    off = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    off += ("byte_fallback", "ignore_merges")
    return {
        "model": (model["type"], [name for name in off if model.get(name)]),
        "vocabulary": {text: i for text, i in model["vocab"].items() if text not in special},
        "merges": model.get("merges"),
        "normalizer": spec["normalizer"],
        "pre_tokenizer": {k: v for k, v in (split or {}).items() if k != "trim_offsets"},
        "post_processor": None if after and after["type"] == "ByteLevel" else after,
        "decoder": (spec["decoder"] or {}).get("type"),
    }


# ---------------------------------------------------------------- from nanoGPT


def read_nanogpt(path, tokenizer=None, gelu="exact") -> dict:
    """nanoGPT's ckpt.pt as a checkpoint's dict: its weights, without its optimizer.

    tokenizer: None takes GPT-2's where the vocabulary has its size, padded or not; for all others
    the checkpoint does not say which it was. gelu: nanoGPT had the tanh form until May 2023.
    """
    found = checkpoint.read(path, _check_nanogpt)
    sizes = {name: found["model_args"].get(name) for name in SIZES}
    bias = found["model_args"].get("bias", True)  # older ones have no such setting
    config = GPT2Config(**sizes, bias=bias, position="learned", gelu=gelu)
    if lines := problems(config):
        raise ValueError("\n".join(f"{path}: {line.removeprefix('--')}" for line in lines))
    tensors = {key.removeprefix("_orig_mod."): t for key, t in found["model"].items()}
    tensors = tensors_of(tensors, config, str(path), transposed=False)
    if tokenizer is None and config.vocab_size in (GPT2_SIZE, NANOGPT_PADDED):
        tokenizer = GPT2Tokenizer()
    if tokenizer is None:
        log_row("tokenizer", "not known: --tokenizer FILE names the tokenizer.json of the data set")
        return new_state(config, tensors, None)
    if tokenizer.vocab_size == GPT2_SIZE and config.vocab_size == NANOGPT_PADDED:
        log_row("trimmed", f"the vocabulary from {NANOGPT_PADDED:,} to {GPT2_SIZE:,} tokens")
        config.vocab_size = GPT2_SIZE
        tensors[HEAD] = tensors[EMBEDDING] = tensors[EMBEDDING][:GPT2_SIZE].clone()
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, {path} {config.vocab_size:,}; "
            "--tokenizer FILE: the one that its training data was made with"
        )
    return new_state(config, tensors, tokenizer)


def _check_nanogpt(found):
    parts = [found.get(key) if isinstance(found, dict) else None for key in ("model", "model_args")]
    if not all(isinstance(part, dict) and all(type(key) is str for key in part) for part in parts):
        raise ValueError("no checkpoint of nanoGPT, which has 'model' and 'model_args'")


# ---------------------------------------------------------------- the command line


def main(argv=None) -> int:
    options = parse(argv)
    if options.command == "to_hf":
        to_hf(options.source, options.target)
        return 0
    if Path(options.target).exists():
        raise ValueError(f"{options.target} is there already; choose another name")
    if options.command == "from_nanogpt":
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        state, name = read_nanogpt(options.source, tokenizer, options.gelu), options.source
        log_row("left out", "the optimizer's state: training goes on with a new one")
    elif Path(options.source).is_file():
        raise ValueError(
            f"{options.source} is a file; from_hf takes a folder or a hub's name, from_nanogpt "
            "nanoGPT's ckpt.pt"
        )
    else:
        state, name = load_state(options.source)
    model, tokenizer = build(state, name)
    log_row("model", f"{name}\n{_facts(model, tokenizer)}")
    check_loss(model.float(), tokenizer)
    checkpoint.save(options.target, state)
    log_row("wrote", str(options.target), "green")
    if tokenizer is not None:
        say_next(options.target)
    return 0


def parse(argv):
    parser = ArgumentParser(__doc__, prog="convert.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {"metavar": "OUT.pt", "help": "the checkpoint to write"}
    about = "a Hugging Face model -> a checkpoint"
    sub = commands.add_parser("from_hf", help=about, description=about)
    sub.add_argument("source", metavar="NAME_OR_DIR", help="gpt2 ... gpt2-xl, org/name, a folder")
    sub.add_argument("target", **made)
    about = "a checkpoint -> a Hugging Face folder"
    sub = commands.add_parser("to_hf", help=about, description=about)
    sub.add_argument("source", metavar="CHECKPOINT.pt", help="the model to export")
    sub.add_argument("target", metavar="DIR", help="the folder to write, new or empty")
    about = "nanoGPT's ckpt.pt -> a checkpoint"
    sub = commands.add_parser("from_nanogpt", help=about, description=about)
    sub.add_argument("source", metavar="CKPT.pt", help="what nanoGPT's train.py saved")
    sub.add_argument("target", **made)
    sub.add_argument("--tokenizer", metavar="FILE", help=TOKENIZER)
    sub.add_argument("--gelu", choices=["exact", "tanh"], default="exact", help=GELU_FORM)
    return parser.parse_args(argv)


CHECKPOINT = (
    "a checkpoint, a Hugging Face folder, or a name on the hub: gpt2-xl, org/name (default: "
    "the best of ./checkpoints)"
)
TOKENIZER = "the tokenizer.json of the data set (default: GPT-2's, if the vocabulary has its size)"
GELU_FORM = "tanh: trained before May 2023 (default: exact)"


if __name__ == "__main__":
    sys.exit(run(main))
