"""How good a model is: loss on a data set or on a text, HellaSwag, LAMBADA.

    python evaluate.py                      # on what the model was trained with
    python evaluate.py --data_dir data/mytext --split train
    python evaluate.py --task perplexity --file novel.txt --stride 256
    python evaluate.py --checkpoint gpt2 --task hellaswag lambada --json
    torchrun --nproc_per_node 8 evaluate.py --task hellaswag

docs/evaluation.md says how each score is defined, and what was published for GPT-2.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from typing_extensions import TypedDict

from checkpoint import ModelOptions, load_model, log_next_generate
from data import TokenDataset
from files import check_json, download, read_text, unix_lines
from logger import log_row, perplexity, progress, rank, run, stdout, warn, world_size
from options import integer, parse_args
from parallel import all_gather, broadcast_from_rank0, process_group
from utils import autocast, out_of_memory, pick_device, pick_dtype, set_up_device

MOST_TEXT = 2 << 30  # bytes of a --file

# ---------------------------------------------------------------- scoring


class Score(NamedTuple):
    nats: float  # minus the log-probability of the scored tokens together
    greedy: bool  # whether each of them is the most likely one at its position
    tokens: int  # how many were scored


@torch.no_grad()
def score(model, rows, batch_size: int, total: int) -> list[Score]:
    """The scores of `total` rows, in their order, on every rank. The model is in eval mode.

    rows yields (ids, first): the tokens ids[first:] are scored, each given all that precede it in
    ids; first is at least 1. Ranks take batches in turn, the same ones for any number of ranks.
    """
    rows, found = iter(rows), []
    batches = iter(lambda: list(islice(rows, batch_size)), [])
    with progress("scoring", total, "rows") as advance:
        for number, batch in enumerate(batches):
            if number % world_size() == rank():
                found.append((number, score_batch(model, batch)))
            advance(len(batch))
    return [score for _, scores in sorted(all_gather(found)) for score in scores]


def score_batch(model, rows) -> list[Score]:
    device = next(model.parameters()).device
    tokens = [torch.from_numpy(np.asarray(ids, np.int64)) for ids, _ in rows]
    # padded on the right, where no scored token attends
    idx = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)  # (B, T + 1)
    hidden = model.hidden(idx[:, :-1])  # (B, T, C)
    scores = []
    for row, (ids, first) in enumerate(rows):  # one by one: the logits of all would be large
        targets = idx[row, first : len(ids)]  # (scored,)
        logits = model.lm_head(hidden[row, first - 1 : len(ids) - 1])  # (scored, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(logits, targets, reduction="sum").item()
        scores.append(Score(nats, torch.equal(logits.argmax(-1), targets), len(targets)))
    return scores


def score_windows(model, ids, context: int, stride: int, batch_size: int) -> tuple[float, int]:
    """Nats and number of the scored tokens of ids (N,): each but the very first, once, in windows
    of `context` tokens that are `stride` apart.
    """
    starts = range(0, max(1, len(ids) - 1 - context + stride), stride)
    rows = ((ids[s : s + context + 1], context + 1 - stride if s else 1) for s in starts)
    scores = score(model, rows, batch_size, len(starts))
    return math.fsum(row.nats for row in scores), sum(row.tokens for row in scores)


# ---------------------------------------------------------------- a data set, a text


def evaluate_split(model, tokenizer, options) -> dict:
    """Loss, perplexity and bits per byte of one split of a data set, over all whole windows."""
    block_size = options.block_size or model.config.block_size
    dataset = find_dataset(options.data_dir, model, tokenizer)
    split = options.split or "val"
    dataset.require(block_size, [split])
    tokens, text_bytes = getattr(dataset, split), dataset.meta["splits"][split]["bytes"]
    if tokens[at := tokens.argmax()] >= dataset.vocab_size:
        where = f"{split} of {dataset.data_dir}: token id {tokens[at]} at position {at}"
        raise ValueError(f"{where} is not below {dataset.vocab_size}")
    windows = (len(tokens) - 1) // block_size
    whole = tokens[: windows * block_size + 1]
    nats, scored = score_windows(model, whole, block_size, block_size, options.batch_size)
    loss = nats / scored
    return {
        "data_dir": str(dataset.data_dir),
        "split": split,
        "tokens": len(tokens),
        "windows": windows,
        "block_size": block_size,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss * len(tokens) / math.log(2) / text_bytes if text_bytes else None,
    }


def find_dataset(data_dir, model, tokenizer) -> TokenDataset:
    """The data set to evaluate on; ValueError if its tokenizer is not the model's."""
    if data_dir is None:  # a checkpoint may come from anywhere, and name any folder
        data_dir = model.config.data_dir
        if not Path(data_dir).resolve().is_relative_to(Path.cwd()):
            raise ValueError(f"trained on {data_dir}, outside this folder; allow it by --data_dir")
    dataset = TokenDataset(data_dir)
    if dataset.meta["tokenizer"]["sha256"] != tokenizer.hash():
        raise ValueError(f"{data_dir}: its tokenizer is not the model's; name another --data_dir")
    return dataset


def evaluate_text(model, tokenizer, options) -> dict:
    """Loss and perplexities of a text under a window that slides by `stride` tokens."""
    context = options.context or model.config.block_size
    stride = options.stride or max(1, context // 2)
    if stride > context:
        raise ValueError(f"--stride {stride}: must be at most the context of {context} tokens")
    text = read_text(options.file, MOST_TEXT)
    words, ids = len(text.split()), tokenizer.encode_to_numpy(unix_lines(text))  # (N,)
    if words == 0 or len(ids) < 2:  # nothing precedes the first token
        raise ValueError(f"{options.file}: no text in it, or one token only; take more text")
    nats, tokens = score_windows(model, ids, context, stride, options.batch_size)
    return {
        "file": str(options.file),
        "tokens": tokens,
        "words": words,
        "context": context,
        "stride": stride,
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "word_perplexity": perplexity(nats / words),
        "bits_per_byte": nats / math.log(2) / len(text.encode()),
    }


# ---------------------------------------------------------------- examples: HellaSwag and LAMBADA


class HellaSwag(TypedDict):
    ctx: Annotated[str, Field(min_length=1)]
    endings: Annotated[list[str], Field(min_length=4, max_length=4)]
    label: Literal[0, 1, 2, 3]  # of the right ending


class Lambada(TypedDict):
    text: Annotated[str, Field(pattern=r"\S\s+\S")]  # two words or more


EXAMPLES = {  # of each task: type of a line, address, sha256
    "hellaswag": (
        HellaSwag,
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "lambada": (
        Lambada,
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
}


def evaluate_hellaswag(model, tokenizer, options) -> dict:
    """How often the right ending is the most likely: in all (acc), per token (acc_norm)."""
    path, lines = read_examples("hellaswag", options.file)
    examples = [(line["ctx"], line["endings"]) for line in lines]
    scores = score_endings(model, tokenizer, examples, options.batch_size)
    nats = np.array([[row.nats for row in rows] for rows in scores])  # (examples, 4)
    tokens = np.array([[row.tokens for row in rows] for rows in scores])
    labels = [line["label"] for line in lines]
    return {
        "file": str(path),
        "examples": len(lines),
        "acc": float(np.mean(nats.argmin(1) == labels)),  # the first of equals
        "acc_norm": float(np.mean((nats / tokens).argmin(1) == labels)),
    }


def evaluate_lambada(model, tokenizer, options) -> dict:
    """How often the last word is guessed, and its perplexity."""
    path, lines = read_examples("lambada", options.file)
    words = [line["text"].rsplit(maxsplit=1) for line in lines]
    examples = [(context, [word]) for context, word in words]
    scores = score_endings(model, tokenizer, examples, options.batch_size)
    return {
        "file": str(path),
        "examples": len(lines),
        "acc": sum(word.greedy for (word,) in scores) / len(lines),
        "perplexity": perplexity(math.fsum(word.nats for (word,) in scores) / len(lines)),
    }


def read_examples(task: str, file: str | None) -> tuple[Path, list[dict]]:
    """A .jsonl and its lines, by default the published ones, which rank 0 downloads once."""
    schema, address, sha256 = EXAMPLES[task]
    path = Path(file or f"data/{task}/{address.rsplit('/', 1)[1]}")
    if not path.exists():
        log_row("fetching", address)
    try:
        broadcast_from_rank0(lambda: path.exists() or download(address, sha256, path))
    except ValueError as problem:
        raise ValueError(f"{address}: {problem}; name a copy of it with --file") from None
    lines = enumerate(read_text(path, MOST_TEXT).split("\n"), start=1)
    examples = [check_json(line, schema, f"{path}, line {n}") for n, line in lines if line.strip()]
    if not examples:
        raise ValueError(f"{path}: no examples in it; name another with --file")
    return path, examples


def score_endings(model, tokenizer, examples, batch_size: int) -> list[list[Score]]:
    """For each (context, endings) the scores of its endings, encoded apart, each after a space. A
    context that is too long loses its beginning. Rounding cannot decide between equal endings.
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
    rows = dict.fromkeys(row for rows in asked for row in rows)
    rows = sorted(rows, key=lambda row: -len(row[0]))  # similar lengths together: less padding
    score_of = dict(zip(rows, score(model, rows, batch_size, len(rows)), strict=True))
    return [[score_of[row] for row in rows] for rows in asked]


# ---------------------------------------------------------------- the command line

TASKS = {
    "val": evaluate_split,
    "perplexity": evaluate_text,
    "hellaswag": evaluate_hellaswag,
    "lambada": evaluate_lambada,
}
OWN_FLAGS = {"val": ("data_dir", "split", "block_size"), "perplexity": ("context", "stride")}
USAGE = "evaluate.py [--task TASK ...] [--checkpoint MODEL] [flags below]"


@dataclass
class Options(ModelOptions):
    # what to measure
    task: list[Literal[*TASKS]] = field(default_factory=lambda: ["val"])  # (default: val)
    file: str | None = None  # a text, or examples; unset: they are downloaded
    # of --task val
    data_dir: str | None = None  # data set; unset: what the model was trained on
    split: Literal["train", "val"] | None = None  # which split; unset: val
    block_size: integer(1) | None = None  # tokens in a window; unset: the model's
    # of --task perplexity
    context: integer(1) | None = None  # tokens in a window; unset: block_size
    stride: integer(1) | None = None  # its step; unset: half a window
    # speed and output
    batch_size: integer(1) = 8  # rows at a time
    json: bool = False  # print one JSON object a line for each task

    def problems(self):
        for task in sorted(OWN_FLAGS.keys() - set(self.task)):
            for name in OWN_FLAGS[task]:
                if getattr(self, name) is not None:
                    yield f"--{name} is for --task {task} only"
        readers = set(self.task) - {"val"}
        if self.file is None and "perplexity" in readers:
            yield "--task perplexity: name a text with --file"
        if self.file is not None and len(readers) != 1:
            yield "--file: name the one task that reads it with --task"
        elif self.file is not None and not Path(self.file).is_file():
            yield f"--file {self.file}: no such file"


def print_result(result: dict, as_json: bool):
    """A table, or a line of JSON, where null stands for infinity and NaN."""
    if not as_json:
        formats = {int: "{:,}", float: "{:.4f}", type(None): "unknown"}
        for name, value in result.items():
            text = formats.get(type(value), "{}").format(value)
            log_row(f"{name:<16}", text, console=stdout)
    elif rank() == 0:
        odd = [name for name, value in result.items() if str(value) in ("inf", "nan")]
        print(json.dumps(result | dict.fromkeys(odd)), flush=True)


def main(argv=None) -> int:
    options = parse_args(Options, argv, __doc__, USAGE)
    device, _ = pick_device(options.device)
    set_up_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is for figures that others compare
    dtype = options.dtype or pick_dtype(device)
    half = dtype in ("bfloat16", "float16")  # as in training: float32 weights under autocast
    with process_group(device):
        model, tokenizer = load_model(options.checkpoint, device, "float32" if half else dtype)
        if half:
            log_row("precision", f"{dtype} for matrix products (autocast), float32 for the rest")
        for task in dict.fromkeys(options.task):
            remedy = f"take less than --batch_size {options.batch_size}"
            with out_of_memory(remedy), autocast(device, dtype):
                result = {"task": task} | TASKS[task](model, tokenizer, options)
            print_result(result, options.json)
    log_next_generate(options.checkpoint, options.device, options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
