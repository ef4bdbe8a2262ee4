"""Hugging Face's side: folders as transformers reads and writes them, and the hub.

Nothing is unpickled: config and tokenizer are JSON, weights are safetensors.
"""

import contextlib
import errno
import hashlib
import importlib
import json
import re
import shutil
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import files
from config import GPT2_CONFIGS, MODEL_FIELDS, GPT2Config, dtype_name
from logger import log_row
from options import problems
from tokenizer import END_OF_TEXT, MOST_SPECIAL, BPETokenizer, CharTokenizer, GPT2Tokenizer

# Tensors have the same names on both sides. Weights that end so are transposed there, because
# transformers' Conv1D multiplies from the other side.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # tied
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks in older files, not weights
GPT2_SIZE = 50257  # GPT-2's vocabulary
GPT2_TOKENS = "0ffec638c558c04f8109a85e6f929045ccc4dfd3c19dacd20700b60cef5b5575"  # sha256
SIZES = {"block_size": "n_positions"} | {  # ours: theirs
    name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")
}
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}  # theirs: ours
SAME = {  # what config.json may say, if it says it; reorder_and_upcast_attn only rounds
    "model_type": ("gpt2",),
    "activation_function": tuple(GELU),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
HUB_NAMES = {name: f"openai-community/{name}" for name in GPT2_CONFIGS if "gpt2" in name} | {
    "distilgpt2": "distilbert/distilgpt2"
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
HUB_FILES = ("config.json", "model*.safetensors*", "tokenizer_config.json", *TOKENIZER_FILES)
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"  # org/name


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
    paths = [*folder.glob("model.safetensors")] or [*folder.glob("model-*-of-*.safetensors")]
    if not paths:
        raise ValueError(
            f"{name}: no model.safetensors; a pickle (pytorch_model.bin) may run code and is never "
            "read: transformers' from_pretrained(NAME).save_pretrained(DIR) converts one you trust"
        )
    for path in paths:  # a shard that is missing shows as missing tensors
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
    sizes = {ours: found.get(theirs, shipped[ours]) for ours, theirs in SIZES.items()}
    gelu = GELU.get(str(found.get("activation_function")), "tanh")
    config = GPT2Config(**sizes, bias=True, position="learned", gelu=gelu)
    lines = [problem.message.removeprefix("--") for problem in problems(config)]
    inner = [4 * sizes["n_embd"]] if isinstance(sizes["n_embd"], int) else []
    for key, values in (SAME | {"n_inner": (None, *inner)}).items():
        if found.get(key, values[0]) not in values:
            only = ", ".join(map(str, values))
            lines.append(f"{key} {found[key]!r}, only {only} can be converted")
    if lines:
        raise ValueError("\n".join(f"{name}: config.json: {line}" for line in lines))
    return config


def optional(package: str, requirements: str = "requirements-hub.txt"):
    """A module of a requirements file; ValueError with the pip command if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        command = f"pip install -r {requirements}"
        raise ValueError(f"this needs {package}, which is not installed: {command}") from None


# ---------------------------------------------------------------- the hub


def hub_name(spec: str) -> str | None:
    """The repository that a name stands for; None for what can only be a local path."""
    is_path = spec.endswith(".pt") or Path(spec.partition("/")[0]).is_dir()
    is_repo = not is_path and re.fullmatch(REPOSITORY, spec)
    return HUB_NAMES.get(spec, spec if is_repo else None)


def download_model(repo: str) -> Path:
    """The folder of a repository's newest snapshot in the hub's cache; downloads what it lacks.

    Honours HF_ENDPOINT (a mirror), HF_HOME (the cache) and HF_HUB_OFFLINE. Raises ValueError, one
    line with the remedy.
    """
    with _hub_problems(repo, "the same command") as hub:
        return Path(hub.snapshot_download(repo, allow_patterns=HUB_FILES))


def check_token(repo: str):
    """ValueError if nobody is logged in, before any work is done for `upload`."""
    if not optional("huggingface_hub").get_token():
        raise ValueError(f"--push {repo}: no token; `hf auth login` keeps one, or set HF_TOKEN")


def upload(folder: Path, repo: str) -> str:
    """Put a folder's files into a repository, which is made if there is none, as one commit;
    returns its address. Raises ValueError, one line with the remedy.
    """
    with _hub_problems(repo, f"`hf upload {repo} {folder}`") as hub:
        api = hub.HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model")
    return str(address)


@contextlib.contextmanager
def _hub_problems(repo, again):
    """The huggingface_hub package; what it raises in here becomes a ValueError that ends with the
    command to try again.
    """
    hub = optional("huggingface_hub")
    try:
        yield hub
        return
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
        reason = f"the transfer failed, {again} tries again: {first}"
    raise ValueError(f"{repo}: {reason}")


# ---------------------------------------------------------------- writing a folder


def write_hf(folder: Path, config: GPT2Config, tensors: dict, tokenizer, card: str) -> list[str]:
    """Write a folder for transformers and whatever reads its format, whole or not at all; returns
    the files' names. card: its README.md. Raises ValueError for a model that transformers' GPT-2
    cannot be, files.WriteError.
    """
    safetensors, save_file = optional("safetensors"), optional("safetensors.torch").save_file
    fields = config_to_hf(config, tokenizer, tensors[EMBEDDING].dtype)
    ends = {key: fields[key] for key in ("bos_token_id", "eos_token_id")}
    written = {"config.json": fields, "generation_config.json": ends}
    if tokenizer is not None:
        written["tokenizer.json"] = json.loads(tokenizer_to_hf(tokenizer).to_str())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"clean_up_tokenization_spaces": False, "model_max_length": config.block_size}
        if tokenizer.eot_id is not None:  # <unk> never occurs, but CTranslate2 asks for one
            settings |= {f"{name}_token": tokenizer.eot for name in ("bos", "eos", "unk")}
        written["tokenizer_config.json"] = settings
    texts = {"README.md": card}
    for name, content in written.items():
        texts[name] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with files.atomic_folder(folder) as aside:
        try:
            save_file(tensors_to_hf(tensors), aside / "model.safetensors", {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        for name, text in texts.items():
            (aside / name).write_text(text, "utf-8", newline="\n")
        shutil.copymode(aside / "config.json", aside / "model.safetensors")  # safetensors: 0600
    return ["model.safetensors", *texts]


def config_to_hf(config: GPT2Config, tokenizer, dtype) -> dict:
    """config.json; ValueError for a model that transformers' GPT-2 cannot be."""
    check_is_gpt2(config)
    eot_id = None if tokenizer is None else tokenizer.eot_id
    fields = {key: values[0] for key, values in SAME.items()}
    fields |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    fields["n_ctx"] = config.block_size  # an older name, which llama.cpp's converter reads
    fields["activation_function"] = {"tanh": "gelu_new", "exact": "gelu"}[config.gelu]
    fields |= {"architectures": ["GPT2LMHeadModel"], "dtype": dtype_name(dtype), "n_inner": None}
    fields |= {f"{part}_pdrop": config.dropout for part in ("attn", "embd", "resid")}
    return fields | {"bos_token_id": eot_id, "eos_token_id": eot_id}


def check_is_gpt2(config: GPT2Config):
    """ValueError naming a setting that GPT-2 does not have elsewhere."""
    for name in set(MODEL_FIELDS) - {*SIZES, "bias", "gelu"}:
        if (value := getattr(config, name)) != getattr(GPT2Config, name):
            raise ValueError(f"{name} {value!r}: GPT-2 has no such setting in other programs")


def tensors_to_hf(tensors: dict, transposed=TRANSPOSED) -> dict:
    """Our tensors without the head, which is tied, and transposed where the names end so; missing
    biases are zeros.
    """
    found = {}
    for key, tensor in tensors.items():
        if key != HEAD:
            found[key] = tensor.t().contiguous() if key.endswith(transposed) else tensor
        if key.endswith(".weight") and (".h." in key or ".ln_f." in key):
            bias = key.removesuffix("weight") + "bias"
            found[bias] = tensors.get(bias, torch.zeros(len(tensor), dtype=tensor.dtype))
    return found


# ---------------------------------------------------------------- tokenizers


def tokenizer_to_hf(tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of the tokenizers library that gives the same ids and text."""
    if tokenizer.kind == "char":
        ids = {character: i for i, character in enumerate(tokenizer.characters)}
        # <unk> is not among them, so an unknown character is an error
        made = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        each = tokenizers.Regex(r"[\s\S]")
        made.pre_tokenizer = pre_tokenizers.Split(each, "isolated")
        made.decoder = decoders.Fuse()
    elif isinstance(tokenizer, BPETokenizer):
        ids, merges = tokenizer.id_of | tokenizer.special, map(tuple, tokenizer.merges())
        made = tokenizers.Tokenizer(models.BPE(ids, list(merges)))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special = sorted(tokenizer.special, key=tokenizer.special.get)
        made.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
    else:
        raise ValueError(f"a {tokenizer.kind} tokenizer has no counterpart in transformers")
    return made


def read_hf_tokenizer(folder: Path, vocab_size: int):
    """The folder's tokenizer as one of ours; None, with a line that says why, if none is the same.

    A vocabulary of 50,257 without any tokenizer files is taken for GPT-2's.
    """
    whole, *parts = [folder / name for name in TOKENIZER_FILES]
    if not any(path.is_file() for path in (whole, *parts)):
        return GPT2Tokenizer() if vocab_size == GPT2_SIZE else None
    try:
        if whole.is_file():
            spec = files.read_json(whole)
            if spec.get("normalizer"):  # some make the library panic
                raise ValueError("its normalizer cannot be had here exactly")
            if any(len(str(token)) > 2000 for token in spec.get("added_tokens") or ()):
                raise ValueError("it has a special token of more than 1,000 characters")
            found = tokenizers.Tokenizer.from_file(str(whole))
        else:
            found = tokenizers.ByteLevelBPETokenizer.from_file(*map(str, parts))
            found.add_special_tokens([END_OF_TEXT])
        path = folder / "tokenizer_config.json"
        settings = files.read_json(path) if path.is_file() else {}
        return tokenizer_from_hf(json.loads(found.to_str()), settings, vocab_size)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panic is no Exception, and others are nothing but that
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
    if vocab_size > len(ids) + MOST_SPECIAL:
        raise ValueError(f"it has {len(ids):,} tokens, the model {vocab_size:,}")
    unused = set(range(vocab_size)) - set(ids.values()) - set(special.values())
    special |= {f"<|unused {i}|>": i for i in sorted(unused)}
    is_gpt2 = hashlib.sha256(spelt.encode()).hexdigest() == GPT2_TOKENS
    if model["type"] == "WordLevel":
        made = CharTokenizer.from_dict({"characters": tokens})
    elif is_gpt2 and special == {END_OF_TEXT: GPT2_SIZE - 1}:
        made = GPT2Tokenizer(tokens)
    else:
        eot = settings.get("eos_token", END_OF_TEXT)
        eot = str(eot.get("content") if isinstance(eot, dict) else eot)
        made = BPETokenizer.from_dict({"tokens": spelt, "special": special, "eot": eot})
    theirs, ours = _parts(found), _parts(json.loads(tokenizer_to_hf(made).to_str()))
    if other := [name for name in theirs if theirs[name] != ours[name]]:
        raise ValueError(f"its {', '.join(other)} cannot be had here exactly")
    if made.vocab_size != vocab_size:
        raise ValueError(f"it has {made.vocab_size:,} tokens, the model {vocab_size:,}")
    return made


def _parts(spec):
    """The parts of a tokenizer.json that decide how text becomes ids, and ids text."""
    special = {token["content"] for token in spec["added_tokens"]}
    parts = {name: value or None for name, value in (spec | spec["model"]).items()}
    for name in ("version", "truncation", "padding", "added_tokens", "model", "unk_token"):
        del parts[name]
    parts["vocab"] = {text: i for text, i in parts["vocab"].items() if text not in special}
    parts["pre_tokenizer"] = (parts["pre_tokenizer"] or {}) | {"trim_offsets": None}
    parts["decoder"] = (parts["decoder"] or {}).get("type")
    if (parts["post_processor"] or {}).get("type") == "ByteLevel":
        parts["post_processor"] = None  # it only moves offsets
    return parts
