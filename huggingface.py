"""Hugging Face's side: folders as transformers reads and writes them, and the hub.

Nothing is unpickled: config and tokenizer are JSON, weights are safetensors.
"""

import hashlib
import json
import re
from itertools import islice
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import files
from config import GPT2_CONFIGS, MODEL_FIELDS, GPT2Config
from logger import log_row
from options import problems
from tokenizer import END_OF_TEXT, MOST_SPECIAL, GPT2Tokenizer, load_tokenizer

# Weights that end so are transposed there: transformers' Conv1D multiplies from the other side.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # tied
GPT2_SIZE = 50257  # GPT-2's vocabulary
GPT2_TOKENS = "0ffec638c558c04f8109a85e6f929045ccc4dfd3c19dacd20700b60cef5b5575"  # sha256
SIZES = {"block_size": "n_positions"} | {  # ours: theirs
    name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")
}
HUB_NAMES = {"distilgpt2": "distilbert/distilgpt2"} | {
    name: f"openai-community/{name}" for name in GPT2_CONFIGS if "gpt2" in name
}
SAME = {"gelu_new": "gelu_pytorch_tanh"}  # two names there of one function
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
HUB_FILES = ("config.json", "model*.safetensors*", *TOKENIZER_FILES)
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"  # org/name


def hub_name(spec: str) -> str | None:
    """The hub's repository for a name; None for what can only be a local path."""
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
        address = hub.create_repo(repo, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model")
    return str(address)


def read_hf(folder: Path, name: str):
    """Config, unchecked tensors and tokenizer or None of transformers' folder, named in errors."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name}: a folder with no config.json; name a checkpoint's .pt file")
    config = config_from_hf(files.read_json(folder / "config.json"), name)
    safetensors, torch_files = map(files.optional, ("safetensors", "safetensors.torch"))
    tensors = {}
    for path in [*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors")]:
        files.open_file(path).close()  # not a FIFO, which would never end
        try:
            tensors |= torch_files.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name}: {path.name} is damaged or cut short ({error})") from None
    if not tensors:
        remedy = "transformers' save_pretrained makes one of a pickle (pytorch_model.bin) you trust"
        raise ValueError(f"{name}: no model.safetensors; {remedy}")
    return config, tensors_from_hf(tensors), read_hf_tokenizer(folder, config.vocab_size)


def config_from_hf(found: dict, name: str) -> GPT2Config:
    """Our config from theirs; ValueError with a line for everything that model.py cannot do."""
    shipped = GPT2_CONFIGS["gpt2"] | {"vocab_size": GPT2_SIZE}  # the defaults there too
    sizes = {ours: found.get(theirs, shipped[ours]) for ours, theirs in SIZES.items()}
    gelu = "exact" if found.get("activation_function") == "gelu" else "tanh"
    config = GPT2Config(**sizes, bias=True, position="learned", gelu=gelu)
    lines = [problem.removeprefix("--") for problem in problems(config)]
    lines += [
        f"{key} {found[key]!r}, only {value} can be converted"
        for key, value in config_to_hf(config).items()
        if found.get(key, value) not in (value, SAME.get(value))
    ]
    if lines:
        raise ValueError("\n".join(f"{name}: config.json: {line}" for line in lines))
    return config


def config_to_hf(config: GPT2Config) -> dict:
    """The fields that config.json must agree with; reorder_and_upcast_attn only rounds."""
    return {theirs: getattr(config, ours) for ours, theirs in SIZES.items()} | {
        "model_type": "gpt2",
        "activation_function": "gelu" if config.gelu == "exact" else "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }


def tensors_from_hf(found: dict, transposed=TRANSPOSED) -> dict:
    """Tensors by our names, in our layout; files may leave out the head, which is tied."""
    tensors = {}
    for key, tensor in found.items():
        key = key.removeprefix("_orig_mod.")  # torch.compile's
        name = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
        if not key.endswith((".attn.bias", ".attn.masked_bias")):  # older files' causal masks
            is_other = key.endswith(transposed)
            tensors[name] = tensor.transpose(0, -1).contiguous() if is_other else tensor
    return {HEAD: tensors[EMBEDDING], **tensors} if EMBEDDING in tensors else tensors


def write_hf(folder: Path, config: GPT2Config, tensors: dict, tokenizer):
    """Write a folder for transformers and whatever reads its format, config.json last."""
    to_bytes, theirs = files.optional("safetensors.torch").save, tensors_to_hf(config, tensors)
    eot_id = None if tokenizer is None else tokenizer.eot_id
    ends = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    written = {"generation_config.json": ends}
    if tokenizer is not None:
        written["tokenizer.json"] = json.loads(tokenizer_to_hf(tokenizer).to_str())
        # <unk> never occurs, but CTranslate2 asks for one
        names = () if eot_id is None else ("bos_token", "eos_token", "unk_token")
        written["tokenizer_config.json"] = dict.fromkeys(names, tokenizer.eot) | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.block_size,
        }
    written["config.json"] = (
        config_to_hf(config)
        | ends
        | {f"{part}_pdrop": config.dropout for part in ("attn", "embd", "resid")}
        | {"architectures": ["GPT2LMHeadModel"], "n_ctx": config.block_size}  # for llama.cpp
    )
    files.write_file(folder / "model.safetensors", to_bytes(theirs, {"format": "pt"}))
    for name, fields in written.items():
        files.write_file(folder / name, json.dumps(fields, indent=2, ensure_ascii=False))


def tensors_to_hf(config: GPT2Config, tensors: dict, transposed=TRANSPOSED) -> dict:
    """Our tensors in their layout, without the head, which is tied; missing biases are zeros.
    ValueError for what GPT-2 is not in other programs.
    """
    for name in set(MODEL_FIELDS) - {*SIZES, "bias", "gelu"}:  # which they have, too
        if (value := getattr(config, name)) != GPT2_CONFIGS["gpt2"][name]:
            raise ValueError(f"{name} {value}: other programs' GPT-2 has no such setting")
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
    made.add_special_tokens(list(tokenizer.special))
    return made


def read_hf_tokenizer(folder: Path, vocab_size: int):
    """A folder's tokenizer; None, with a line that says why, if none of ours is the same."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:3]):
        return GPT2Tokenizer() if vocab_size == GPT2_SIZE else None  # GPT-2's own
    try:
        return tokenizer_from_hf(folder, vocab_size)
    except Exception as error:  # nothing is known of what is in there
        log_row("tokenizer", f"left out: {error}")
        return None


def tokenizer_from_hf(folder: Path, vocab_size: int):
    """A folder's tokenizer as one of ours; an error unless that is the same, written out again.
    Ids without a token become special ones, which no text is encoded to.
    """
    whole, vocab, merges, path = [folder / name for name in TOKENIZER_FILES]
    settings = files.read_json(path) if path.is_file() else {}
    if whole.is_file():
        spec = files.read_json(whole)
    else:  # the older form of a byte-level BPE
        pairs = files.read_text(merges).splitlines()[1:]  # after the version
        spec = {"model": {"vocab": files.read_json(vocab), "merges": pairs}}
        spec["pre_tokenizer"] = spec["decoder"] = {"type": "ByteLevel", "add_prefix_space": False}
        spec["added_tokens"] = [{"content": END_OF_TEXT, "special": True}]
    theirs, ids = _parts(spec), spec["model"]["vocab"]
    for token in spec["added_tokens"]:  # the library numbers new ones, whatever the file says
        ids.setdefault(token["content"], len(ids))
    names, plain = {i: text for text, i in ids.items()}, set(theirs["vocab"].values())
    others = islice((i for i in range(vocab_size) if i not in plain), MOST_SPECIAL)
    special = {names.get(i, f"<|unused {i}|>"): i for i in others}
    tokens = sorted(theirs["vocab"], key=ids.get)
    fields = {"format": 1, "kind": "char", "characters": tokens}
    if theirs["type"] == "BPE":
        spelt, eot = " ".join(tokens), settings.get("eos_token", END_OF_TEXT)
        is_gpt2 = hashlib.sha256(spelt.encode()).hexdigest() == GPT2_TOKENS
        fields = {"format": 1, "kind": "gpt2" if is_gpt2 else "bpe", "tokens": spelt}
        fields |= {"special": special, "eot": eot["content"] if isinstance(eot, dict) else eot}
    made = load_tokenizer(fields, vocab_size)
    ours = _parts(json.loads(tokenizer_to_hf(made).to_str()))
    theirs |= {n: True for n in ("add_prefix_space", "add_bos_token") if settings.get(n)}
    if other := [name for name in theirs if theirs[name] != ours.get(name)]:
        raise ValueError(f"its {', '.join(other)} cannot be had here exactly")
    return made


def _parts(spec: dict) -> dict:
    """What in a tokenizer.json makes ids of text, and text of ids."""
    model, kind, added = spec["model"], spec["model"].get("type", "BPE"), spec["added_tokens"]
    if kind not in ("BPE", "WordLevel"):
        raise ValueError(f"its model is {kind}")
    special = {token["content"] for token in added if token["special"]}
    before, after = spec.get("pre_tokenizer") or {}, spec.get("post_processor") or {}
    return {name: value for name, value in model.items() if value} | {
        "type": kind,
        "unk_token": None,
        "vocab": {text: i for text, i in model["vocab"].items() if text not in special},
        "merges": [p.split(" ") if isinstance(p, str) else p for p in model.get("merges", [])],
        "added_tokens": [token for token in added if not token["special"]],
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": {"use_regex": True} | before | {"trim_offsets": None},
        "decoder": (spec.get("decoder") or {}).get("type"),
        "post_processor": after if after.get("type") != "ByteLevel" else {},  # it moves offsets
    }
