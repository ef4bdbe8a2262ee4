"""How good a model is: loss on a data set or on a text, HellaSwag, LAMBADA (docs/evaluation.md).

python evaluate.py                      # on what the model was trained with
python evaluate.py --task perplexity --file novel.txt --stride 256
python evaluate.py --checkpoint gpt2 --task hellaswag lambada --json
torchrun --nproc_per_node 8 evaluate.py --task hellaswag
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import TypedDict

from checkpoint import ModelOptions, load_model, log_next_generate
from data import TokenDataset
from files import check_json, download, read_text, unix_lines
from logger import log_row, perplexity, progress, rank, run, stdout, warn, world_size
from options import integer, parse_args
from parallel import all_reduce_sum, broadcast_from_rank0, process_group
from utils import autocast, out_of_memory, pick_device, pick_dtype, set_up_device

MOST_TEXT = 2 << 30  # bytes of a --file


@torch.no_grad()
def score(model, rows, batch_size: int) -> np.ndarray:
    """Scores (rows, 2) on every rank: for each row (ids, first) the nats of ids[first:], and 1 if
    each of these is the most likely one, given all before it. first >= 1, the model in eval mode.
    """
    scores, device = torch.zeros(len(rows), 2, dtype=torch.float64), next(model.parameters()).device
    with progress("scoring", len(rows), "rows") as advance:
        for start in range(rank() * batch_size, len(rows), world_size() * batch_size):
            batch = rows[start : start + batch_size]
            tokens = [torch.from_numpy(np.asarray(ids, np.int64)) for ids, _ in batch]
            idx = pad_sequence(tokens, batch_first=True).to(device)  # (B, T + 1)
            hidden = model.hidden(idx[:, :-1])  # (B, T, C)
            for row, (ids, first) in enumerate(batch):  # one by one: all logits would be large
                targets = idx[row, first : len(ids)]  # (scored,)
                logits = model.lm_head(hidden[row, first - 1 : len(ids) - 1])  # (scored, V)
                scores[start + row, 0] = F.cross_entropy(logits, targets, reduction="sum")
                scores[start + row, 1] = torch.equal(logits.argmax(-1), targets)
            advance(len(batch) * world_size())
    return all_reduce_sum(scores).numpy()


def nats_of(model, ids, block_size: int, stride: int, batch_size: int) -> float:
    """Nats of all ids (N,) but the very first, in windows of block_size tokens, `stride` apart."""
    starts = range(0, max(1, len(ids) - 1 - block_size + stride), stride)
    rows = [(ids[s : s + block_size + 1], block_size + 1 - stride if s else 1) for s in starts]
    return score(model, rows, batch_size)[:, 0].sum().item()


def evaluate_split(model, tokenizer, options) -> dict:
    """Loss, perplexity and bits per byte of one split of a data set, over all whole windows."""
    data_dir, split = options.data_dir or model.config.data_dir, options.split or "val"
    if not (options.data_dir or Path(data_dir).resolve().is_relative_to(Path.cwd())):
        raise ValueError(f"the model names {data_dir}, outside this folder; allow it by --data_dir")
    dataset = TokenDataset(data_dir)
    if dataset.tokenizer.hash() != tokenizer.hash():
        raise ValueError(f"{data_dir}: its tokenizer is not the model's; name another --data_dir")
    block_size = options.block_size or model.config.block_size
    dataset.require(block_size, [split])
    tokens, text_bytes = getattr(dataset, split), dataset.meta["splits"][split]["bytes"]
    if tokens[at := tokens.argmax()] >= tokenizer.vocab_size:
        raise ValueError(f"{split} of {data_dir}: unknown token id {tokens[at]} at position {at}")
    whole = tokens[: len(tokens) - (len(tokens) - 1) % block_size]
    loss = nats_of(model, whole, block_size, block_size, options.batch_size) / (len(whole) - 1)
    return {
        "data_dir": str(dataset.data_dir),
        "split": split,
        "tokens": len(tokens),
        "windows": (len(whole) - 1) // block_size,
        "block_size": block_size,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss * len(tokens) / math.log(2) / text_bytes if text_bytes else None,
    }


def evaluate_text(model, tokenizer, options) -> dict:
    """Loss and perplexities of a text under a window that slides by `stride` tokens."""
    block_size = options.block_size or model.config.block_size
    stride = options.stride or max(1, block_size // 2)
    if stride > block_size:
        raise ValueError(f"--stride {stride}: must be at most --block_size {block_size}")
    text = read_text(options.file, MOST_TEXT)
    words, ids = len(text.split()), tokenizer.encode_to_numpy(unix_lines(text))  # (N,)
    if words == 0 or len(ids) < 2:  # nothing precedes the first token
        raise ValueError(f"{options.file}: no text in it, or one token only; take more text")
    nats, tokens = nats_of(model, ids, block_size, stride, options.batch_size), len(ids) - 1
    return {
        "file": str(options.file),
        "tokens": tokens,
        "words": words,
        "block_size": block_size,
        "stride": stride,
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "word_perplexity": perplexity(nats / words),
        "bits_per_byte": nats / math.log(2) / len(text.encode()),
    }


class HellaSwag(TypedDict):
    ctx: Annotated[str, Field(min_length=1)]
    endings: Annotated[list[str], Field(min_length=4, max_length=4)]
    label: Literal[0, 1, 2, 3]  # of the right ending


class Lambada(TypedDict):
    text: Annotated[str, Field(pattern=r"\S\s+\S")]  # two words or more


HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
LAMBADA = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
EXAMPLES = {  # by their schema: address, sha256
    HellaSwag: (HELLASWAG, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    Lambada: (LAMBADA, "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"),
}


def evaluate_hellaswag(model, tokenizer, options) -> dict:
    """How often the right ending is the most likely: in all (acc), per token (acc_norm)."""
    path, lines = read_examples(HellaSwag, options.file)
    examples = [(line["ctx"], line["endings"]) for line in lines]
    labels = [line["label"] for line in lines]
    nats, _, tokens = score_endings(model, tokenizer, examples, options.batch_size)  # (examples, 4)
    return {
        "file": str(path),
        "examples": len(lines),
        "acc": float(np.mean(nats.argmin(1) == labels)),  # the first of equals
        "acc_norm": float(np.mean((nats / tokens).argmin(1) == labels)),
    }


def evaluate_lambada(model, tokenizer, options) -> dict:
    """How often the last word is guessed, and its perplexity."""
    path, lines = read_examples(Lambada, options.file)
    texts = (line["text"].rsplit(maxsplit=1) for line in lines)
    examples = [(context, [word]) for context, word in texts]
    nats, greedy, _ = score_endings(model, tokenizer, examples, options.batch_size)  # (examples, 1)
    return {
        "file": str(path),
        "examples": len(lines),
        "acc": float(greedy.mean()),
        "perplexity": perplexity(nats.mean()),
    }


def read_examples(schema, file: str | None) -> tuple[Path, list[dict]]:
    """A .jsonl and its lines, by default the published ones, which rank 0 downloads once."""
    address, sha256 = EXAMPLES[schema]
    path = Path(file or f"data/{schema.__name__.lower()}/{Path(address).name}")
    try:
        broadcast_from_rank0(lambda: file or path.exists() or download(address, sha256, path))
    except ValueError as problem:
        raise ValueError(f"{address}: {problem}; name a copy of it with --file") from None
    lines = enumerate(read_text(path, MOST_TEXT).split("\n"), start=1)
    examples = [check_json(line, schema, f"{path}, line {n}") for n, line in lines if line.strip()]
    if not examples:
        raise ValueError(f"{path}: no examples in it; name another with --file")
    return path, examples


def score_endings(model, tokenizer, examples, batch_size: int) -> np.ndarray:
    """score's columns and the tokens of each ending: (3, examples, endings), for (context, endings)
    pairs. An ending is encoded apart, after a space; too long a context loses its beginning.
    """
    block_size, asked, cropped = model.config.block_size, [], 0
    for context, endings in examples:
        prompt = tokenizer.encode(context)
        endings = [tokenizer.encode(f" {ending}") for ending in endings]
        room = max(1, block_size + 1 - max(map(len, endings)))  # the last token is not put in
        cropped += len(prompt) > room
        prompt = prompt[-room:]
        asked.append([(tuple(prompt + ending), len(prompt)) for ending in endings])
    if cropped:
        warn(f"{cropped:,} of {len(examples):,} contexts cropped to fit block_size {block_size}")
    # equal ones once, lest rounding decide between them; similar lengths together: less padding
    rows = sorted(dict.fromkeys(chain(*asked)), key=lambda row: -len(row[0]))
    found = dict(zip(rows, score(model, rows, batch_size), strict=True))
    columns = [[(*found[row], len(row[0]) - row[1]) for row in rows] for rows in asked]
    return np.moveaxis(np.array(columns), -1, 0)


# ---------------------------------------------------------------- the command line

TASKS = {
    "val": evaluate_split,
    "perplexity": evaluate_text,
    "hellaswag": evaluate_hellaswag,
    "lambada": evaluate_lambada,
}


@dataclass
class Options(ModelOptions):
    # what to measure
    task: list[Literal[*TASKS]] = ("val",)  # one or more; unset: val
    file: str | None = None  # a text, or examples; unset: they are downloaded
    block_size: integer(1) | None = None  # tokens in a window; unset: the model's
    batch_size: integer(1) = 8  # rows at a time
    json: bool = False  # print one JSON object a line for each task
    # of --task val
    data_dir: str | None = None  # data set; unset: what the model was trained on
    split: Literal["train", "val"] | None = None  # which split; unset: val
    # of --task perplexity
    stride: integer(1) | None = None  # step of the window; unset: half of it

    def conflicts(self):
        of = {"data_dir": {"val"}, "split": {"val"}, "stride": {"perplexity"}}
        for name, tasks in (of | {"block_size": {"val", "perplexity"}}).items():
            if getattr(self, name) is not None and tasks.isdisjoint(self.task):
                yield f"--{name}: not for --task {' '.join(self.task)}"
        if self.file is None and "perplexity" in self.task:
            yield "--task perplexity: name a text with --file"
        if self.file is not None and len({*self.task} - {"val"}) != 1:
            yield "--file: name the one task that reads it with --task"
        elif self.file is not None and not Path(self.file).is_file():  # before any work
            yield f"--file {self.file}: no such file"


def print_result(result: dict, as_json: bool):
    """A table, or a line of JSON, where null stands for infinity and NaN."""
    if not as_json:
        for name, value in result.items():
            form = {int: "{:,}", float: "{:.4f}", type(None): "unknown"}.get(type(value), "{}")
            log_row(f"{name:<16}", form.format(value), console=stdout)
    elif rank() == 0:
        odd = [name for name, value in result.items() if str(value) in ("inf", "nan")]
        print(json.dumps(result | dict.fromkeys(odd)), flush=True)


def main(argv=None) -> int:
    options = parse_args(Options, argv, __doc__, "evaluate.py [--task TASK ...] [flags]")
    device = pick_device(options.device)
    set_up_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is for figures that others compare
    dtype = options.dtype or pick_dtype(device)
    half = dtype in ("bfloat16", "float16")  # as in training: float32 weights under autocast
    with process_group(device):
        model, tokenizer = load_model(options.checkpoint, device, "float32" if half else dtype)
        if half:
            log_row("precision", f"{dtype} for matrix products (autocast), float32 for the rest")
        for task in dict.fromkeys(options.task):
            with out_of_memory("take a lower --batch_size"), autocast(device, dtype):
                result = {"task": task} | TASKS[task](model, tokenizer, options)
            print_result(result, options.json)
    log_next_generate(options.checkpoint, options.device, options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
