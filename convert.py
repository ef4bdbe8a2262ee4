"""Convert models: from and to Hugging Face, to llama.cpp's GGUF, from nanoGPT.

python convert.py from_hf gpt2 gpt2.pt        # or a folder, or any org/name
python convert.py to_hf checkpoints/best_checkpoint.pt my-model
python convert.py to_gguf checkpoints/best_checkpoint.pt model.gguf
python convert.py from_nanogpt out/ckpt.pt adopted.pt
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import TypedDict

import checkpoint
import files
import huggingface
from checkpoint import load_model as load_model  # README's name for it
from config import GPT2Config
from huggingface import EMBEDDING, GPT2_SIZE, HEAD
from logger import log_row, run, warn
from options import parse_args
from tokenizer import GPT2Tokenizer, load_tokenizer

NANOGPT_PADDED = 50304  # nanoGPT pads GPT-2's vocabulary with 47 tokens that no text has
FLAG_OF = {"push": "to_hf", "type": "to_gguf", "tokenizer": "from_nanogpt", "gelu": "from_nanogpt"}


@dataclass
class Options:
    # what to convert
    command: Literal["from_hf", "to_hf", "to_gguf", "from_nanogpt"]  # from where, or to where
    source: str  # gpt2 ... gpt2-xl, org/name, a folder; a checkpoint; nanoGPT's ckpt.pt
    target: str  # the file to write; to_hf: the folder, new or empty
    # to_hf
    push: str | None = None  # org/name on the hub, where the folder goes too
    # to_gguf
    type: Literal["f32", "f16", "bf16", "q8_0"] = "f32"  # of the matrices; all else is f32
    # from_nanogpt
    tokenizer: str | None = None  # the data set's tokenizer.json; unset: GPT-2's, if its size fits
    gelu: Literal["exact", "tanh"] = "exact"  # tanh: trained before May 2023

    def conflicts(self):
        for name, command in FLAG_OF.items():
            if self.command != command and getattr(self, name) != getattr(Options, name):
                yield f"--{name}: for {command} only"
        if self.push and not re.fullmatch(huggingface.REPOSITORY, self.push):
            yield f"--push {self.push}: must be a name on the hub, org/name"


def main(argv=None) -> int:
    options = parse_args(Options, argv, __doc__, usage="convert.py COMMAND SOURCE TARGET [flags]")
    source, target = options.source, Path(options.target)
    if options.command == "to_hf":
        to_hf(source, target, options.push)
    elif target.exists():
        raise ValueError(f"{target} is there already; choose another name")
    elif options.command == "to_gguf":
        to_gguf(source, target, options.type)
    else:
        if options.command == "from_nanogpt":
            state, name = read_nanogpt(source, options.tokenizer, options.gelu), source
        else:
            state, name = checkpoint.load_state(source)
        model, tokenizer = checkpoint.build(state, name)
        log_row("model", f"{name}\n{checkpoint.describe_model(model, tokenizer)}")
        checkpoint.save(target, state)
        log_row("wrote", str(target), "green")
        if tokenizer is not None:
            checkpoint.log_next_generate(target)
    return 0


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {repo}

A GPT-2: {facts}.

    from transformers import pipeline
    print(pipeline("text-generation", "{repo}")("Once", max_new_tokens=50)[0]["generated_text"])
"""


def to_hf(spec, folder, push: str | None = None):
    """Write a folder for transformers and others; upload it to the repository `push`, org/name."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another name")
    if push and not files.optional("huggingface_hub").get_token():
        raise ValueError(f"--push {push}: no token; `hf auth login` keeps one, or set HF_TOKEN")
    state, name = checkpoint.load_state(spec)
    model, tokenizer = checkpoint.build(state, name)
    facts, loss = checkpoint.describe_model(model, tokenizer), state["best_val_loss"]
    if loss is not None:
        data = Path(model.config.data_dir).name
        facts += f". {state['step']:,} steps on `{data}`, validation loss {loss:.4f} nats a token"
    huggingface.write_hf(folder, model.config, model.state_dict(), tokenizer)
    card = CARD.format(repo=push or folder.resolve().name, facts=facts)
    files.write_file(folder / "README.md", card)
    log_row("wrote", f"{folder}: {', '.join(sorted(os.listdir(folder)))}", "green")
    if push:
        log_row("pushed", huggingface.upload(folder, push), "green")
    if tokenizer is not None:
        checkpoint.log_next_generate(folder)


def to_gguf(spec, path, kind: str = "f32"):
    """Write a file for llama.cpp, and read it back to compare; kind: the type of its matrices."""
    gguf = files.optional("gguf")
    model, tokenizer = checkpoint.build(*checkpoint.load_state(spec))
    config, types = model.config, gguf.GGMLQuantizationType
    if tokenizer is None or tokenizer.eot_id is None:
        raise ValueError("llama.cpp needs a bpe or gpt2 tokenizer with an end of text; use to_hf")
    if kind == "q8_0" and (size := config.n_embd) % 32:
        raise ValueError(f"n_embd {size}: q8_0 needs a multiple of 32; take --type f16")
    if config.gelu == "exact":
        warn("gelu: exact here, tanh in llama.cpp; an activation differs by 0.0005 at most")
    ids, special = tokenizer.id_of | tokenizer.special, tokenizer.special
    tokens = sorted(ids, key=ids.get)
    fields = (
        {"name": Path(path).stem, "vocab_size": config.vocab_size, "block_count": config.n_layer}
        | {"context_length": config.block_size, "embedding_length": config.n_embd}
        | {"feed_forward_length": 4 * config.n_embd, "head_count": config.n_head}
        | {"layer_norm_eps": float(np.float32(1e-5))}  # as it is stored
        | {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2", "token_list": tokens}
        | {"token_types": [3 if token in special else 1 for token in tokens]}  # control, normal
        | {"token_merges": [" ".join(pair) for pair in tokenizer.merges()], "add_bos_token": False}
        | {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    )
    writer = gguf.GGUFWriter(None, "gpt2")
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    tensors = {}  # by llama.cpp's names, (out, in)
    for key, tensor in huggingface.tensors_to_hf(config, model.state_dict(), ()).items():
        if kind in ("f16", "q8_0") and tensor.abs().max() > np.finfo(np.float16).max:
            raise ValueError(f"{key} has values beyond the range of {kind}; take --type bf16")
        stored = types.F32 if tensor.ndim == 1 or ".wpe." in key else types[kind.upper()]
        name = names.get_name(key, (".weight", ".bias"))
        tensors[name] = gguf.quantize(tensor.float().numpy(), stored)
        writer.add_tensor(name, tensors[name], raw_dtype=stored)
    with files.atomic_write(path) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = gguf.GGUFReader(file.name)
        same = [np.array_equal(tensor.data, tensors[tensor.name]) for tensor in found.tensors]
        same += [found.fields[key].contents() == f.value for key, f in writer.kv_data[0].items()]
        if not all(same) or len(found.tensors) < len(tensors):
            raise OSError("what was read back is not what was written")
    log_row("wrote", f"{path}: {kind}, {len(tensors)} tensors, read back and compared", "green")


class NanoGPT(TypedDict):  # what is read of a ckpt.pt
    model: dict[str, Any]
    model_args: dict[str, Any]


def read_nanogpt(path, tokenizer=None, gelu="exact") -> dict:
    """nanoGPT's ckpt.pt as a checkpoint's dict: its weights, without its optimizer. tokenizer: its
    file; None takes GPT-2's if the vocabulary has its size, padded or not.
    """
    found = checkpoint.load(path, lambda state: files.check_json(state, NanoGPT))
    args = {"bias": True} | found["model_args"]  # older files lack it
    sizes = {name: args.get(name) for name in ("bias", *huggingface.SIZES)}
    config = GPT2Config(**sizes, position="learned", gelu=gelu)
    tensors = huggingface.tensors_from_hf(found["model"], transposed=())
    if tokenizer is not None:
        tokenizer = load_tokenizer(tokenizer)
    elif config.vocab_size in (GPT2_SIZE, NANOGPT_PADDED):
        tokenizer = GPT2Tokenizer()
    state = checkpoint.new_state(config, tensors, tokenizer, str(path))
    if tokenizer is None:
        log_row("tokenizer", "not known: --tokenizer FILE names the tokenizer.json of the data set")
    elif (tokenizer.vocab_size, config.vocab_size) == (GPT2_SIZE, NANOGPT_PADDED):
        log_row("trimmed", f"the vocabulary from {NANOGPT_PADDED:,} to {GPT2_SIZE:,} tokens")
        state["config"]["vocab_size"] = GPT2_SIZE
        state["model"][EMBEDDING] = state["model"][EMBEDDING][:GPT2_SIZE].clone()
        state["model"][HEAD] = state["model"][EMBEDDING]
    return state


if __name__ == "__main__":
    sys.exit(run(main))
