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
from config import GPT2_CONFIGS, MODEL_FIELDS, GPT2Config, dtype_name
from logger import log_row
from options import problems
from tokenizer import END_OF_TEXT, MOST_SPECIAL, GPT2Tokenizer, load_tokenizer

# Weights that end so are transposed there: transformers' Conv1D multiplies from the other side.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # tied
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks in older files, not weights
GPT2_SIZE = 50257  # GPT-2's vocabulary
GPT2_TOKENS = "0ffec638c558c04f8109a85e6f929045ccc4dfd3c19dacd20700b60cef5b5575"  # sha256
SIZES = {"block_size": "n_positions"} | {  # ours: theirs
    name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")
}
SAME = {"gelu_new": "gelu_pytorch_tanh"}  # two names there of one function
HUB_NAMES = {name: f"openai-community/{name}" for name in GPT2_CONFIGS if "gpt2" in name}
HUB_NAMES["distilgpt2"] = "distilbert/distilgpt2"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
HUB_FILES = ("config.json", "model*.safetensors*", "tokenizer_config.json", *TOKENIZER_FILES)
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
        api = hub.HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model")
    return str(address)


def read_hf(folder: Path, name: str):
    """Config, tensors, unchecked, and tokenizer, None if none of ours does the same, of a folder
    that transformers has written. name: what messages call it.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name}: a folder with no config.json; name a checkpoint's .pt file")
    config = config_from_hf(files.read_json(folder / "config.json"), name)
    safetensors, torch_files = map(files.optional, ("safetensors", "safetensors.torch"))
    paths = [*folder.glob("model.safetensors")] or [*folder.glob("model-*-of-*.safetensors")]
    if not paths:
        remedy = "transformers' save_pretrained makes one of a pickle (pytorch_model.bin) you trust"
        raise ValueError(f"{name}: no model.safetensors; {remedy}")
    tensors = {}
    for path in paths:  # a shard that is missing shows as missing tensors
        files.open_file(path).close()  # not a FIFO, which would never end
        try:
            tensors |= torch_files.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name}: {path.name} is damaged or cut short ({error})") from None
    return config, tensors_from_hf(tensors), read_hf_tokenizer(folder, config.vocab_size)


def config_from_hf(found: dict, name: str) -> GPT2Config:
    """Our config from theirs; ValueError with a line for everything that model.py cannot do."""
    shipped = GPT2_CONFIGS["gpt2"] | {"vocab_size": GPT2_SIZE}  # the defaults there too
    sizes = {ours: found.get(theirs, shipped[ours]) for ours, theirs in SIZES.items()}
    gelu = "exact" if found.get("activation_function") == "gelu" else "tanh"
    config = GPT2Config(**sizes, bias=True, position="learned", gelu=gelu)
    lines = [problem.removeprefix("--") for problem in problems(config)]
    for key, value in config_to_hf(config).items():
        if found.get(key, value) not in (value, SAME.get(value, value)):
            lines.append(f"{key} {found[key]!r}, only {value} can be converted")
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
        if key.endswith(transposed):
            tensor = tensor.transpose(0, -1).contiguous()
        if not key.endswith(BUFFERS):
            is_ours = key.startswith(("transformer.", "lm_head."))
            tensors[key if is_ours else f"transformer.{key}"] = tensor
    return {HEAD: tensors[EMBEDDING], **tensors} if EMBEDDING in tensors else tensors


def write_hf(folder: Path, config: GPT2Config, tensors: dict, tokenizer, card: str) -> list[str]:
    """Write a folder for transformers and whatever reads its format; returns the files' names."""
    safetensors, torch_files = map(files.optional, ("safetensors", "safetensors.torch"))
    theirs = tensors_to_hf(config, tensors)
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
    texts = {n: json.dumps(v, indent=2, ensure_ascii=False) + "\n" for n, v in written.items()}
    texts["README.md"] = card
    with files.atomic_write(folder, "folder") as aside:
        try:
            weights = aside / "model.safetensors"
            torch_files.save_file(theirs, weights, {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        for name, text in texts.items():
            (aside / name).write_text(text, "utf-8", newline="\n")
        shutil.copymode(aside / "config.json", weights)  # safetensors: 0600
    return ["model.safetensors", *texts]


def tensors_to_hf(config: GPT2Config, tensors: dict, transposed=TRANSPOSED) -> dict:
    """Our tensors without the head, which is tied, and transposed where the names end so; missing
    biases are zeros. ValueError for what GPT-2 is not in other programs.
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
    special = sorted(tokenizer.special, key=tokenizer.special.get)
    made.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    return made


def read_hf_tokenizer(folder: Path, vocab_size: int):
    """The folder's tokenizer as one of ours; None, with a line that says why, if none is the same.
    Without any tokenizer files a vocabulary of 50,257 is GPT-2's.
    """
    whole, vocab, merges = [folder / name for name in TOKENIZER_FILES]
    if not any(path.is_file() for path in (whole, vocab, merges)):
        return GPT2Tokenizer() if vocab_size == GPT2_SIZE else None
    try:
        if whole.is_file():
            spec = files.read_json(whole)
        else:  # the older form of a byte-level BPE
            lines = files.unix_lines(files.read_text(merges)).split("\n")
            pairs = [line for line in lines if line and not line.startswith("#version")]
            model = {"vocab": files.read_json(vocab), "merges": pairs}
            end = {"content": END_OF_TEXT, "id": len(model["vocab"]), "special": True}
            spec = {"model": model, "added_tokens": [end], "decoder": {"type": "ByteLevel"}}
            spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}
        path = folder / "tokenizer_config.json"
        settings = files.read_json(path) if path.is_file() else {}
        return tokenizer_from_hf(spec, settings, vocab_size)
    except Exception as error:  # nothing is known of what is in there
        log_row("tokenizer", f"left out: {error}")
        return None


def tokenizer_from_hf(spec: dict, settings: dict, vocab_size: int):
    """Our tokenizer for a tokenizer.json and its settings; an error unless ours, written out again,
    is the same part by part. Ids without a token become special ones, which no text is encoded to.
    """
    if flags := [name for name in ("add_prefix_space", "add_bos_token") if settings.get(name)]:
        raise ValueError(f"{' and '.join(flags)} is set")
    theirs, vocab = _parts(spec), spec["model"]["vocab"]
    ids = theirs["vocab"]
    new = iter(range(len(vocab), vocab_size))  # the library's ids, whatever the file says
    added = dict.fromkeys(token["content"] for token in spec["added_tokens"] if token["content"])
    special = {text: vocab[text] if text in vocab else next(new, vocab_size) for text in added}
    special = {text: i for text, i in special.items() if i < vocab_size}
    most = min(vocab_size, len(ids) + len(special) + MOST_SPECIAL + 1)  # size may be any number
    unused = set(range(most)) - set(ids.values()) - set(special.values())
    if not vocab_size - len(ids) - len(special) == len(unused) <= MOST_SPECIAL:
        raise ValueError(f"it has {len(ids):,} tokens, the model {vocab_size:,}")
    special |= {f"<|unused {i}|>": i for i in sorted(unused)}
    tokens, eot = sorted(ids, key=ids.get), settings.get("eos_token", END_OF_TEXT)
    eot = str(eot.get("content") if isinstance(eot, dict) else eot)
    fields = {"kind": "bpe", "tokens": " ".join(tokens), "special": special, "eot": eot}
    is_gpt2 = hashlib.sha256(fields["tokens"].encode()).hexdigest() == GPT2_TOKENS
    if theirs["type"] == "WordLevel":
        fields = {"kind": "char", "characters": tokens}
    elif is_gpt2 and special == {END_OF_TEXT: GPT2_SIZE - 1}:
        fields = {"kind": "gpt2", "tokens": fields["tokens"]}
    made = load_tokenizer({"format": 1} | fields)
    ours = _parts(json.loads(tokenizer_to_hf(made).to_str()))
    if other := [name for name in ours | theirs if theirs.get(name) != ours.get(name)]:
        raise ValueError(f"its {', '.join(other)} cannot be had here exactly")
    return made


def _parts(spec):
    """What in a tokenizer.json makes ids of text, and text of ids; what is off may be missing."""
    parts = {"type": "BPE", "merges": [], "pre_tokenizer": {}, "decoder": {}, "post_processor": {}}
    parts |= {name: value for name, value in (spec | spec["model"]).items() if value}
    if parts["type"] not in ("BPE", "WordLevel"):
        raise ValueError(f"its model is {parts['type']}")
    for name in ("version", "truncation", "padding", "model", "unk_token"):
        parts.pop(name, None)
    special = {token["content"] for token in spec["added_tokens"]}
    parts["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    parts["vocab"] = {text: i for text, i in parts["vocab"].items() if text not in special}
    parts["merges"] = [p.split(" ") if isinstance(p, str) else p for p in parts["merges"]]
    parts["pre_tokenizer"] = {"use_regex": True} | parts["pre_tokenizer"] | {"trim_offsets": None}
    parts["decoder"] = parts["decoder"].get("type")
    if parts["post_processor"].get("type") == "ByteLevel":
        parts["post_processor"] = {}  # it only moves offsets
    return parts
