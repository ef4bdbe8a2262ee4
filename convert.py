"""Convert models: from and to Hugging Face, from nanoGPT.

    python convert.py from_hf gpt2 gpt2.pt        # or a folder, or any org/name
    python convert.py to_hf checkpoints/best_checkpoint.pt my-model
    python convert.py from_nanogpt out/ckpt.pt adopted.pt

From Python no conversion is needed:

    from convert import load_model
    model, tokenizer = load_model("gpt2")
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

import checkpoint
import huggingface
from checkpoint import load_model as load_model  # README's name for it
from config import GPT2Config
from huggingface import BUFFERS, EMBEDDING, GPT2_SIZE, HEAD
from logger import log_row, run
from options import Problem, parse_args
from tokenizer import GPT2Tokenizer, load_tokenizer

NANOGPT_PADDED = 50304  # nanoGPT pads GPT-2's vocabulary with 47 tokens that no text has


@dataclass
class Options:
    # what to convert
    command: Literal["from_hf", "to_hf", "from_nanogpt"]  # from where, or to where
    source: str  # gpt2 ... gpt2-xl, org/name, a folder; a checkpoint; nanoGPT's ckpt.pt
    target: str  # the checkpoint to write; to_hf: the folder, new or empty
    # from_nanogpt
    tokenizer: str | None = None  # the data set's tokenizer.json; unset: GPT-2's, if its size fits
    gelu: Literal["exact", "tanh"] = "exact"  # tanh: trained before May 2023

    def problems(self):
        for name, default in (("tokenizer", None), ("gelu", "exact")):
            if self.command != "from_nanogpt" and getattr(self, name) != default:
                yield Problem((name, "command"), f"--{name}: for from_nanogpt only")


def main(argv=None) -> int:
    options = parse_args(Options, argv, __doc__, usage="convert.py COMMAND SOURCE TARGET [flags]")
    source, target = options.source, Path(options.target)
    if options.command == "to_hf":
        to_hf(source, target)
        return 0
    if target.exists():
        raise ValueError(f"{target} is there already; choose another name")
    if options.command == "from_nanogpt":
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        state, name = read_nanogpt(source, tokenizer, options.gelu), source
        log_row("left out", "the optimizer's state: training goes on with a new one")
    elif Path(source).is_file():
        raise ValueError(f"{source} is a file; from_hf takes a folder or a name on the hub")
    else:
        state, name = checkpoint.load_state(source)
    model, tokenizer = checkpoint.build(state, name)
    log_row("model", f"{name}\n{checkpoint.describe_model(model, tokenizer)}")
    checkpoint.check_loss(model.float(), tokenizer)
    checkpoint.save(target, state)
    log_row("wrote", str(target), "green")
    if tokenizer is not None:
        checkpoint.log_next_generate(target)
    return 0


def to_hf(spec, folder):
    """Write a model and its tokenizer as a folder for transformers and whatever reads its format.

    Raises ValueError for a folder that is not empty and for what GPT-2 there cannot be.
    """
    folder = Path(folder)
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free or folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is not empty, or the current folder; choose another name")
    model, tokenizer = checkpoint.build(*checkpoint.load_state(spec))
    names = huggingface.write_hf(folder, model.config, model.state_dict(), tokenizer)
    log_row("wrote", f"{folder}: {', '.join(names)}", "green")
    if tokenizer is not None:
        checkpoint.log_next_generate(folder)


class NanoGPT(BaseModel):
    """What is read of a ckpt.pt."""

    model: dict[str, Any]
    model_args: dict[str, Any]


def read_nanogpt(path, tokenizer=None, gelu="exact") -> dict:
    """nanoGPT's ckpt.pt as a checkpoint's dict: its weights, without its optimizer.

    tokenizer: None takes GPT-2's if the vocabulary has its size, padded or not; nanoGPT does not
    save which one it was. gelu: nanoGPT used the tanh form until May 2023.
    """
    found = checkpoint.load(path, NanoGPT.model_validate)
    sizes = {name: found["model_args"].get(name) for name in huggingface.SIZES}
    bias = found["model_args"].get("bias", True)  # older files lack it
    config = GPT2Config(**sizes, bias=bias, position="learned", gelu=gelu)
    tensors = {key.removeprefix("_orig_mod."): tensor for key, tensor in found["model"].items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(BUFFERS)}
    if tokenizer is None and config.vocab_size in (GPT2_SIZE, NANOGPT_PADDED):
        tokenizer = GPT2Tokenizer()
    state = checkpoint.new_state(config, tensors, tokenizer, str(path))
    if tokenizer is None:
        log_row("tokenizer", "not known: --tokenizer FILE names the tokenizer.json of the data set")
    elif (tokenizer.vocab_size, config.vocab_size) == (GPT2_SIZE, NANOGPT_PADDED):
        log_row("trimmed", f"the vocabulary from {NANOGPT_PADDED:,} to {GPT2_SIZE:,} tokens")
        config.vocab_size = GPT2_SIZE
        tensors[HEAD] = tensors[EMBEDDING] = tensors[EMBEDDING][:GPT2_SIZE].clone()
        return checkpoint.new_state(config, tensors, tokenizer, str(path))
    elif tokenizer.vocab_size != config.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} tokens, {path} {config.vocab_size:,}"
        raise ValueError(f"--tokenizer: the tokenizer has {sizes}; give that of its training data")
    return state


if __name__ == "__main__":
    sys.exit(run(main))
