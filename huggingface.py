"""Hugging Face's side: folders as transformers reads and writes them, and the hub.

Nothing is unpickled: config and tokenizer are JSON, weights are safetensors.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import files
from config import GPT2_CONFIGS, GPT2Config, dtype_name
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
SAME = {"gelu_new": "gelu_pytorch_tanh"}  # two names there of one function
HUB_NAMES = {name: f"openai-community/{name}" for name in GPT2_CONFIGS if "gpt2" in name} | {
    "distilgpt2": "distilbert/distilgpt2"
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
HUB_FILES = ("config.json", "model*.safetensors*", "tokenizer_config.json", *TOKENIZER_FILES)
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"  # org/name


# ---------------------------------------------------------------- the hub


def hub_name(spec: str) -> str | None:
    """The repository that a name stands for; None for what can only be a local path."""
    is_path = spec.endswith(".pt") or Path(spec.partition("/")[0]).is_dir()
    is_repo = not is_path and re.fullmatch(REPOSITORY, spec)
    return HUB_NAMES.get(spec, spec if is_repo else None)


def download_model(repo: str) -> Path:
    """The folder of a repository's newest snapshot in the hub's cache; downloads what it lacks."""
    with files.hub(repo, "the same command") as hub:
        return Path(hub.snapshot_download(repo, allow_patterns=HUB_FILES))


def upload(folder: Path, repo: str) -> str:
    """Put a folder's files into a repository, made if there is none, as one commit; its address."""
    with files.hub(repo, f"`hf upload {repo} {folder}`") as hub:
        api = hub.HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model")
    return str(address)


# ---------------------------------------------------------------- reading a folder


def read_hf(folder: Path, name: str):
    """Config, tensors and tokenizer of a folder written by transformers. Tensors are not checked
    further; the tokenizer is None if none of ours does the same. `name`: what messages call it.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name}: a folder with no config.json; name a checkpoint's .pt file")
    config = config_from_hf(files.read_json(folder / "config.json"), name)
    safetensors, tensors = files.optional("safetensors"), {}
    paths = [*folder.glob("model.safetensors")] or [*folder.glob("model-*-of-*.safetensors")]
    if not paths:
        raise ValueError(
            f"{name}: no model.safetensors; a pickle (pytorch_model.bin) may run code and is never "
            "read: transformers' from_pretrained(NAME).save_pretrained(DIR) converts one you trust"
        )
    for path in paths:  # a shard that is missing shows as missing tensors
        files.open_file(path).close()  # not a FIFO, which would never end
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name}: {path.name} is damaged or cut short ({error})") from None
    return config, tensors_from_hf(tensors), read_hf_tokenizer(folder, config.vocab_size)


def config_from_hf(found: dict, name: str) -> GPT2Config:
    """Our config from theirs; ValueError with a line for everything that model.py cannot do."""
    shipped = GPT2_CONFIGS["gpt2"] | {"vocab_size": GPT2_SIZE}  # the defaults there too
    sizes = {ours: found.get(theirs, shipped[ours]) for ours, theirs in SIZES.items()}
    gelu = "exact" if found.get("activation_function") == "gelu" else "tanh"
    config = GPT2Config(**sizes, bias=True, position="learned", gelu=gelu)
    lines = [problem.message.removeprefix("--") for problem in problems(config)]
    for key, value in config_to_hf(config).items():
        if found.get(key, value) not in (value, SAME.get(value, value)):
            lines.append(f"{key} {found[key]!r}, only {value} can be converted")
    if lines:
        raise ValueError("\n".join(f"{name}: config.json: {line}" for line in lines))
    return config


def config_to_hf(config: GPT2Config) -> dict:
    """What config.json has to say, if it says it; reorder_and_upcast_attn only rounds."""
    return {theirs: getattr(config, ours) for ours, theirs in SIZES.items()} | {
        "model_type": "gpt2",
        "activation_function": "gelu" if config.gelu == "exact" else "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }


def tensors_from_hf(found: dict) -> dict:
    """Tensors by our names, in our layout; files may leave out the head, which is tied."""
    tensors = {}
    for key, tensor in found.items():
        if key.endswith(TRANSPOSED):
            tensor = tensor.transpose(0, -1).contiguous()
        if not key.endswith(BUFFERS):
            is_ours = key.startswith(("transformer.", "lm_head."))
            tensors[key if is_ours else f"transformer.{key}"] = tensor
    return {HEAD: tensors[EMBEDDING], **tensors} if EMBEDDING in tensors else tensors


# ---------------------------------------------------------------- writing a folder


def write_hf(folder: Path, config: GPT2Config, tensors: dict, tokenizer, card: str) -> list[str]:
    """Write a folder for transformers and whatever reads its format, whole or not at all; returns
    the files' names. card: its README.md.
    """
    safetensors, torch_files = map(files.optional, ("safetensors", "safetensors.torch"))
    check_is_gpt2(config)
    eot_id = None if tokenizer is None else tokenizer.eot_id
    ends = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    fields = config_to_hf(config) | {"dtype": dtype_name(tensors[EMBEDDING].dtype)} | ends
    fields |= {f"{part}_pdrop": config.dropout for part in ("attn", "embd", "resid")}
    fields |= {"architectures": ["GPT2LMHeadModel"], "n_ctx": config.block_size}  # for llama.cpp
    written = {"config.json": fields, "generation_config.json": ends}
    if tokenizer is not None:
        written["tokenizer.json"] = json.loads(tokenizer_to_hf(tokenizer).to_str())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"clean_up_tokenization_spaces": False, "model_max_length": config.block_size}
        if eot_id is not None:  # <unk> never occurs, but CTranslate2 asks for one
            settings |= {f"{name}_token": tokenizer.eot for name in ("bos", "eos", "unk")}
        written["tokenizer_config.json"] = settings
    texts = {"README.md": card}
    for name, content in written.items():
        texts[name] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with files.atomic_write(folder, "folder") as aside:
        try:
            weights = aside / "model.safetensors"
            torch_files.save_file(tensors_to_hf(tensors), weights, {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        for name, text in texts.items():
            (aside / name).write_text(text, "utf-8", newline="\n")
        shutil.copymode(aside / "config.json", weights)  # safetensors: 0600
    return ["model.safetensors", *texts]


def check_is_gpt2(config: GPT2Config):
    """ValueError for what GPT-2 is not in other programs."""
    if config.position != "learned":
        raise ValueError(f"position '{config.position}': other programs' GPT-2 has no such setting")


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
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return made
    ids, merges = tokenizer.id_of | tokenizer.special, map(tuple, tokenizer.merges())
    made = tokenizers.Tokenizer(models.BPE(ids, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = sorted(tokenizer.special, key=tokenizer.special.get)
    made.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    return made


def read_hf_tokenizer(folder: Path, vocab_size: int):
    """The folder's tokenizer as one of ours; None, with a line that says why, if none is the same.
    Without any tokenizer files a vocabulary of 50,257 is GPT-2's.
    """
    whole, *parts = [folder / name for name in TOKENIZER_FILES]
    if not any(path.is_file() for path in (whole, *parts)):
        return GPT2Tokenizer() if vocab_size == GPT2_SIZE else None
    try:
        if whole.is_file():
            spec = files.read_json(whole)
            # some of these make the library panic
            if spec.get("normalizer") or spec["model"].get("continuing_subword_prefix"):
                raise ValueError("its normalizer or prefix cannot be had here exactly")
            if any(len(str(token)) > 2000 for token in spec.get("added_tokens") or ()):
                raise ValueError("it has a special token of more than 1,000 characters")
            found = tokenizers.Tokenizer.from_file(str(whole))
        else:
            for path in parts:  # no FIFO, nothing without an end
                files.open_file(path, files.MOST_JSON).close()
            found = tokenizers.ByteLevelBPETokenizer.from_file(*map(str, parts))
            found.add_special_tokens([END_OF_TEXT])
        path = folder / "tokenizer_config.json"
        settings = files.read_json(path) if path.is_file() else {}
        return tokenizer_from_hf(json.loads(found.to_str()), settings, vocab_size)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Rust's panic is no Exception, and others are nothing but that
        log_row("tokenizer", f"left out: {error}")
        return None


def tokenizer_from_hf(found: dict, settings: dict, vocab_size: int):
    """Our tokenizer for a tokenizer.json (in the full form that `tokenizers` writes) and its
    settings; ValueError unless ours, written out again, is the same part by part. Ids of the model
    without a token become special tokens, which no text is encoded to.
    """
    for flag in ("add_prefix_space", "add_bos_token"):
        if settings.get(flag):
            raise ValueError(f"{flag} is set")
    if (model := found["model"]["type"]) not in ("BPE", "WordLevel"):
        raise ValueError(f"its model is {model}")
    theirs, added = _parts(found), found["added_tokens"]
    ids = theirs["vocab"]
    special = {token["content"]: token["id"] for token in added if token["id"] < vocab_size}
    most = min(vocab_size, len(ids) + len(special) + MOST_SPECIAL + 1)  # size may be any number
    unused = set(range(most)) - set(ids.values()) - set(special.values())
    if not vocab_size - len(ids) - len(special) == len(unused) <= MOST_SPECIAL:
        raise ValueError(f"it has {len(ids):,} tokens, the model {vocab_size:,}")
    special |= {f"<|unused {i}|>": i for i in sorted(unused)}
    tokens = sorted(ids, key=ids.get)
    spelt, eot = " ".join(tokens), settings.get("eos_token", END_OF_TEXT)
    is_gpt2 = hashlib.sha256(spelt.encode()).hexdigest() == GPT2_TOKENS
    if model == "WordLevel" and not special:
        made = CharTokenizer.from_dict({"characters": tokens})
    elif is_gpt2 and special == {END_OF_TEXT: GPT2_SIZE - 1}:
        made = GPT2Tokenizer(tokens)
    else:
        eot = str(eot.get("content") if isinstance(eot, dict) else eot)
        made = BPETokenizer.from_dict({"tokens": spelt, "special": special, "eot": eot})
    ours = _parts(json.loads(tokenizer_to_hf(made).to_str()))
    if other := [name for name in theirs if theirs[name] != ours[name]]:
        raise ValueError(f"its {', '.join(other)} cannot be had here exactly")
    return made


def _parts(spec):
    """The parts of a tokenizer.json that decide how text becomes ids, and ids text."""
    special = {token["content"] for token in spec["added_tokens"]}
    parts = {name: value or None for name, value in (spec | spec["model"]).items()}
    for name in ("version", "truncation", "padding", "model", "unk_token"):
        del parts[name]
    parts["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    vocab = spec["model"]["vocab"]
    parts["vocab"] = {text: i for text, i in vocab.items() if text not in special}
    parts["pre_tokenizer"] = (parts["pre_tokenizer"] or {}) | {"trim_offsets": None}
    parts["decoder"] = (parts["decoder"] or {}).get("type")
    if (parts["post_processor"] or {}).get("type") == "ByteLevel":
        parts["post_processor"] = None  # it only moves offsets
    return parts
