"""Hugging Face's side: folders as transformers reads and writes them, and the hub.

Nothing is unpickled: config and tokenizer are JSON, weights are safetensors.
"""

import errno
import hashlib
import importlib
import json
import re
import shutil
from pathlib import Path

import torch

import files
from config import GPT2_CONFIGS, MODEL_FIELDS, GPT2Config, dtype_name
from logger import log_row
from options import problems
from tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, GPT2Tokenizer

# Tensors have the same names on both sides. Weights that end so are transposed there, because
# transformers' Conv1D multiplies from the other side.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # tied
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks in older files, not weights
GPT2_SIZE = 50257  # GPT-2's vocabulary
GPT2_TOKENS = "0ffec638c558c04f8109a85e6f929045ccc4dfd3c19dacd20700b60cef5b5575"  # sha256
SIZES = {  # ours: theirs in GPT-2, theirs in other models
    "vocab_size": ("vocab_size",),
    "block_size": ("n_positions", "max_position_embeddings"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
}
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}  # theirs: ours
ALIKE = {  # what else config.json has to say, if it says it; reorder_and_upcast_attn only rounds
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
TOKENIZER_FILES = "tokenizer.json vocab.json merges.txt vocab.txt spiece.model tokenizer.model"
HUB_FILES = f"config.json model*.safetensors* tokenizer_config.json {TOKENIZER_FILES}"


# ---------------------------------------------------------------- reading a folder


def read_hf(folder: Path, name: str):
    """Config, tensors and tokenizer of a folder written by transformers. Tensors have our names and
    layout and are not checked further; the tokenizer is None if none of ours does exactly the
    same. `name` is what messages call the folder.

    Raises ValueError, for config.json with a line for everything that differs from model.py.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name}: no config.json, so no Hugging Face folder (a checkpoint is a file)"
        )
    config = config_from_hf(files.read_json(folder / "config.json"), name)
    safetensors, tensors = optional("safetensors"), {}
    for path in _weight_files(folder, name):
        try:
            with safetensors.safe_open(path, "pt") as file:
                for key in file.keys():
                    if not key.endswith(BUFFERS):
                        is_ours = key.startswith(("transformer.", "lm_head."))
                        tensor = file.get_tensor(key)
                        if key.endswith(TRANSPOSED):
                            tensor = tensor.transpose(0, -1).contiguous()
                        tensors[key if is_ours else f"transformer.{key}"] = tensor
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name}: {path.name} is damaged or cut short ({error})") from None
    if EMBEDDING in tensors:
        tensors.setdefault(HEAD, tensors[EMBEDDING])  # tied, so files may leave it out
    return config, tensors, read_hf_tokenizer(folder, config.vocab_size)


def config_from_hf(found: dict, name: str) -> GPT2Config:
    """Our config from theirs; ValueError with a line for everything that model.py cannot do."""
    shipped = GPT2_CONFIGS["gpt2"] | {"vocab_size": GPT2_SIZE}  # the defaults there too
    sizes = {
        ours: next((found[key] for key in theirs if key in found), shipped[ours])
        for ours, theirs in SIZES.items()
    }
    activation, inner = str(found.get("activation_function", "gelu_new")), found.get("n_inner")
    gelu = GELU.get(activation, "tanh")
    config = GPT2Config(**sizes, bias=True, position="learned", gelu=gelu)
    lines = [problem.message.removeprefix("--") for problem in problems(config)]
    for key, only in ALIKE.items():
        if found.get(key, only) != only:
            lines.append(f"{key} {found[key]!r}, only {only!r} can be converted")
    if activation not in GELU:
        lines.append(f"activation_function {activation!r}, only {', '.join(GELU)} can be converted")
    if inner is not None and (type(config.n_embd) is not int or inner != 4 * config.n_embd):
        lines.append(f"n_inner {inner!r}, only 4 x n_embd can be converted")
    if lines:
        raise ValueError("\n".join(f"{name}: config.json: {line}" for line in lines))
    return config


def _weight_files(folder, name):
    """The safetensors file, or those that the index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise ValueError(
            f"{name}: no model.safetensors; a pickle (pytorch_model.bin) may run code and is never "
            "read: transformers' from_pretrained(NAME).save_pretrained(DIR) converts one you trust"
        )
    shards = set(map(str, files.read_json(index, dict[str, dict]).get("weight_map", {}).values()))
    if missing := shards - {path.name for path in folder.glob("*.safetensors")}:
        raise ValueError(f"{name}: {', '.join(sorted(missing))} of {index.name} is missing")
    return [folder / shard for shard in sorted(shards)]


def optional(package: str):
    """A module of requirements-hub.txt; ValueError with the pip command if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        command = "pip install -r requirements-hub.txt"
        raise ValueError(f"this needs {package}, which is not installed: {command}") from None


# ---------------------------------------------------------------- the hub


def hub_name(spec: str) -> str | None:
    """The repository that a name stands for; None for what can only be a local path."""
    is_path = spec.endswith(".pt") or Path(spec.partition("/")[0]).is_dir()
    is_repo = not is_path and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec)
    return HUB_NAMES.get(spec, spec if is_repo else None)


def download_model(repo: str) -> Path:
    """The folder of a repository's newest snapshot in the hub's cache; downloads what it lacks.

    Honours HF_ENDPOINT (a mirror), HF_HOME (the cache) and HF_HUB_OFFLINE. Raises ValueError, one
    line with the remedy.
    """
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=HUB_FILES.split()))
    except hub.errors.GatedRepoError:
        reason = "access is by request: ask for it on its page, then `hf auth login`"
    except hub.errors.RepositoryNotFoundError:
        reason = "not found on the hub, nor is it a file or folder (private: `hf auth login`)"
    except hub.errors.LocalEntryNotFoundError:
        reason = "HF_HUB_OFFLINE is set" if hub.is_offline_mode() else "the hub cannot be reached"
        reason += " and the cache (HF_HOME) lacks a part of it; HF_ENDPOINT may name a mirror"
    except Exception as error:  # networks fail in many ways
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        reason = f"the download failed, the same command tries again: {first}"
    raise ValueError(f"{repo}: {reason}")


# ---------------------------------------------------------------- writing a folder


def write_hf(folder: Path, config: GPT2Config, tensors: dict, tokenizer) -> list[str]:
    """Write a folder for transformers and whatever reads its format, whole or not at all; returns
    the files' names. Raises ValueError for a model that transformers' GPT-2 cannot be,
    files.WriteError.
    """
    safetensors, save_file = optional("safetensors"), optional("safetensors.torch").save_file
    fields = config_to_hf(config, tokenizer, tensors[EMBEDDING].dtype)
    ends = {key: fields[key] for key in ("bos_token_id", "eos_token_id")}
    written = {"config.json": fields, "generation_config.json": ends}
    if tokenizer is not None:
        written["tokenizer.json"] = tokenizer_to_hf(tokenizer)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.block_size,
        }
        if tokenizer.eot_id is not None:
            settings |= {"bos_token": tokenizer.eot, "eos_token": tokenizer.eot}
        written["tokenizer_config.json"] = settings
    with files.atomic_folder(folder) as aside:
        try:
            save_file(tensors_to_hf(tensors), aside / "model.safetensors", {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        for name, content in written.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (aside / name).write_text(text, "utf-8", newline="\n")
        shutil.copymode(aside / "config.json", aside / "model.safetensors")  # safetensors: 0600
    return ["model.safetensors", *written]


def config_to_hf(config: GPT2Config, tokenizer, dtype) -> dict:
    """config.json; ValueError for a model that transformers' GPT-2 cannot be."""
    for name in set(MODEL_FIELDS) - {*SIZES, "bias", "gelu"}:
        if (value := getattr(config, name)) != getattr(GPT2Config, name):
            raise ValueError(f"{name} {value!r}: transformers' GPT-2 has no such setting")
    eot_id = None if tokenizer is None else tokenizer.eot_id
    fields = ALIKE | {theirs[0]: getattr(config, ours) for ours, theirs in SIZES.items()}
    fields["n_ctx"] = config.block_size  # an older name, which llama.cpp's converter reads
    fields["activation_function"] = {"tanh": "gelu_new", "exact": "gelu"}[config.gelu]
    fields |= {"architectures": ["GPT2LMHeadModel"], "dtype": dtype_name(dtype), "n_inner": None}
    fields |= {f"{part}_pdrop": config.dropout for part in ("attn", "embd", "resid")}
    return fields | {"bos_token_id": eot_id, "eos_token_id": eot_id}


def tensors_to_hf(tensors: dict) -> dict:
    """Our tensors under their names and in their layout; missing biases are zeros."""
    found = {key: tensor for key, tensor in tensors.items() if key != HEAD}  # tied
    for key, tensor in tensors.items():
        if key.endswith(TRANSPOSED):
            found[key] = tensor.t().contiguous()
        if key.endswith(".weight") and (".h." in key or ".ln_f." in key):
            bias = key.removesuffix("weight") + "bias"
            found.setdefault(bias, torch.zeros(len(tensor), dtype=tensor.dtype))
    return found


# ---------------------------------------------------------------- tokenizers


def tokenizer_to_hf(tokenizer) -> dict:
    """tokenizer.json for the tokenizers library, which then gives the same ids and text."""
    if tokenizer.kind == "char":
        ids, special = {c: i for i, c in enumerate(tokenizer.characters)}, {}
        model = {"type": "WordLevel", "unk_token": "<unk>"}  # not in vocab: unknown is an error
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
        split["invert"] = False
        decoder = {"type": "Fuse"}
    elif not isinstance(tokenizer, BPETokenizer):
        raise ValueError(f"a {tokenizer.kind} tokenizer has no counterpart in transformers")
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


def read_hf_tokenizer(folder: Path, vocab_size: int):
    """The folder's tokenizer as one of ours; None, with a line that says why, if none is the same.

    A vocabulary of 50,257 without any tokenizer files is taken for GPT-2's.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES.split()):
        return GPT2Tokenizer() if vocab_size == GPT2_SIZE else None
    import tokenizers  # only for this

    try:
        settings = folder / "tokenizer_config.json"
        settings = files.read_json(settings) if settings.is_file() else {}
        try:
            if (folder / "tokenizer.json").is_file():
                found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            else:
                paths = [str(folder / name) for name in ("vocab.json", "merges.txt")]
                found = tokenizers.ByteLevelBPETokenizer.from_file(*paths)
                found.add_special_tokens([END_OF_TEXT])
        except Exception as error:  # the library raises nothing more specific
            parts = "tokenizer.json, nor vocab.json and merges.txt"
            raise ValueError(f"no readable {parts} ({error})") from None
        return tokenizer_from_hf(json.loads(found.to_str()), settings, vocab_size)
    except ValueError as error:
        log_row("tokenizer", f"left out: {error}")
        return None


def tokenizer_from_hf(found: dict, settings: dict, vocab_size: int):
    """Our tokenizer for a tokenizer.json (in the full form that `tokenizers` writes) and its
    settings. Ids of the model without a token become special tokens, which no text is encoded to.

    Raises ValueError unless ours is exactly the same: it is written out again by tokenizer_to_hf,
    and both are compared part by part.
    """
    for flag in ("add_prefix_space", "add_bos_token"):
        if settings.get(flag):
            raise ValueError(f"{flag} is set")
    added, model = found["added_tokens"], found["model"]
    if plain := [token["content"] for token in added if not token["special"]]:
        raise ValueError(f"it looks for {plain[0]!r} in every text")
    if model["type"] not in ("BPE", "WordLevel"):
        raise ValueError(f"its model is {model['type']}")
    special = {token["content"]: token["id"] for token in added}
    ids = {text: i for text, i in model["vocab"].items() if text not in special}
    tokens = sorted(ids, key=ids.get)
    spelt = " ".join(tokens)
    special = {text: i for text, i in special.items() if i < vocab_size}
    unused = set(range(vocab_size)) - set(ids.values()) - set(special.values())
    special |= {f"<|unused {i}|>": i for i in sorted(unused)}
    is_gpt2 = hashlib.sha256(spelt.encode()).hexdigest() == GPT2_TOKENS
    if model["type"] == "WordLevel":
        made = CharTokenizer.from_dict({"characters": tokens})
    elif is_gpt2 and special == {END_OF_TEXT: GPT2_SIZE - 1}:
        made = GPT2Tokenizer(tokens)
    else:
        eot = settings.get("eos_token", END_OF_TEXT)
        eot = eot.get("content") if isinstance(eot, dict) else eot
        eot = eot if isinstance(eot, str) else None
        made = BPETokenizer.from_dict({"tokens": spelt, "special": special, "eot": eot})
    theirs, ours = _parts(found), _parts(tokenizer_to_hf(made))
    if other := [name for name in theirs if theirs[name] != ours[name]]:
        raise ValueError(f"its {', '.join(other)} cannot be had here exactly")
    if made.vocab_size != vocab_size:
        raise ValueError(f"it has {made.vocab_size:,} tokens, the model {vocab_size:,}")
    return made


def _parts(spec):
    """The parts of a tokenizer.json that decide how text becomes ids, and ids text."""
    model, split, after = spec["model"], spec["pre_tokenizer"], spec["post_processor"]
    special = {token["content"] for token in spec["added_tokens"]}
    off = "dropout continuing_subword_prefix end_of_word_suffix byte_fallback ignore_merges".split()
    return {
        "model": (model["type"], [name for name in off if model.get(name)]),
        "vocabulary": {text: i for text, i in model["vocab"].items() if text not in special},
        "merges": model.get("merges"),
        "normalizer": spec["normalizer"],
        "pre_tokenizer": {k: v for k, v in (split or {}).items() if k != "trim_offsets"},
        "post_processor": None if after and after["type"] == "ByteLevel" else after,
        "decoder": (spec["decoder"] or {}).get("type"),
    }
