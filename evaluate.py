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
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from checkpoint import ModelOptions, load_model, log_next_generate
from data import TokenDataset
from files import check_json, download, read_text, unix_lines
from logger import log_row, perplexity, print_rows, progress, rank, run, warn, world_size
from options import Problem, integer, parse_args
from parallel import all_gather, broadcast_from_rank0, process_group
from utils import autocast, is_out_of_memory, pick_device, pick_dtype, set_up_device, to_device

MOST_TEXT = 2 << 30  # bytes of a --file

# ---------------------------------------------------------------- scoring


class Score(NamedTuple):
    nats: float  # minus the log-probability of the scored tokens together
    greedy: bool  # whether each of them is the most likely one at its position
    tokens: int  # how many were scored


@torch.no_grad()
def score(model, rows, batch_size: int, total: int | None = None) -> list[Score]:
    """A score for each row, in their order, on every rank. The model is in eval mode.

    rows yields (ids, first): the tokens ids[first:] are scored, each given all that precede it in
    ids; first is at least 1. Ranks take batches in turn; the batches, and so the scores, are the
    same for any number of ranks. total: the number of rows, for the progress line.
    """
    rows, found, counts = iter(rows), [], []
    batches = iter(lambda: list(islice(rows, batch_size)), [])
    with progress("scoring", total, "rows") as advance:
        for number, batch in enumerate(batches):
            counts += [len(ids) - first for ids, first in batch]
            if number % world_size() == rank():
                found.append((number, score_batch(model, batch)))
            advance(len(batch))
    found = sorted(all_gather([(number, scores.tolist()) for number, scores in found]))
    scores = [score for _, scores in found for score in scores]
    return [Score(nats, greedy == 1, n) for (nats, greedy), n in zip(scores, counts, strict=True)]


def score_batch(model, rows) -> torch.Tensor:
    """Nats of each row, and 1 if it is greedy: (B, 2), on the model's device, not waited for."""
    padded = np.zeros((len(rows), max(len(ids) for ids, _ in rows)), np.int64)
    for row, (ids, _) in enumerate(rows):
        padded[row, : len(ids)] = ids  # padded on the right, where no scored token attends
    idx = to_device(torch.from_numpy(padded), next(model.parameters()).device)  # (B, T + 1)
    hidden = model.hidden(idx[:, :-1])  # (B, T, C)
    scores = []
    for row, (ids, first) in enumerate(rows):  # one by one: the logits of all would be large
        targets = idx[row, first : len(ids)]  # (scored,)
        logits = model.lm_head(hidden[row, first - 1 : len(ids) - 1])  # (scored, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(logits, targets, reduction="sum")
        scores.append(torch.stack([nats, (logits.argmax(-1) == targets).all().to(nats)]))
    return torch.stack(scores)


def score_windows(model, ids, context: int, stride: int, batch_size: int) -> tuple[float, int]:
    """Nats and number of the scored tokens of ids (N,): each but the very first, once, in windows
    of `context` tokens that are `stride` apart.
    """
    starts = range(0, max(1, len(ids) - 1 - context + stride), stride)
    rows = ((ids[s : s + context + 1], context + 1 - stride if s else 1) for s in starts)
    scores = score(model, rows, batch_size, len(starts))
    return math.fsum(row.nats for row in scores), sum(row.tokens for row in scores)


def window_length(flag: str, wanted: int | None, config) -> int:
    """How many tokens the model sees at once: block_size, or what the flag says."""
    if wanted is not None and wanted > config.block_size and config.position == "learned":
        raise ValueError(f"--{flag} {wanted}: the model has learned {config.block_size} positions")
    return wanted or config.block_size


# ---------------------------------------------------------------- a data set, a text


def evaluate_split(model, tokenizer, options) -> dict:
    """Loss, perplexity and bits per byte of one split of a data set, over all whole windows.

    Bits per byte compare across tokenizers; None if the length of the text is unknown.
    """
    block_size = window_length("block_size", options.block_size, model.config)
    dataset = find_dataset(options.data_dir, options.checkpoint, model, tokenizer)
    split = options.split or "val"
    dataset.require(block_size, [split])
    tokens, text_bytes = getattr(dataset, split), dataset.meta["splits"][split].get("bytes")
    at = tokens.argmax()
    if tokens[at] >= dataset.vocab_size:
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


def find_dataset(data_dir, spec, model, tokenizer) -> TokenDataset:
    """The data set to evaluate on; ValueError if its tokenizer is not the model's.

    A checkpoint may come from anywhere: a folder that it names is opened only below this one.
    """
    if data_dir is None:
        if spec is not None and not Path(spec).is_file():
            raise ValueError(f"{spec} comes without a data set: name one with --data_dir DIR")
        data_dir = model.config.data_dir
        if not Path(data_dir).resolve().is_relative_to(Path.cwd()):
            raise ValueError(f"trained on {data_dir}, outside this folder; allow it by --data_dir")
    dataset = TokenDataset(data_dir)
    theirs = dataset.meta["tokenizer"]
    if theirs["sha256"] != tokenizer.hash():
        theirs = f"{theirs['kind']}, {dataset.vocab_size:,} tokens"
        ours = f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"
        raise ValueError(f"{data_dir}: its tokenizer ({theirs}) is not the model's ({ours})")
    return dataset


def evaluate_text(model, tokenizer, options) -> dict:
    """Loss and perplexities of a text under a window that slides by `stride` tokens."""
    context = window_length("context", options.context, model.config)
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
    endings: list[str]
    label: int  # of the right ending


class Lambada(TypedDict):
    text: str


def hellaswag_example(line: HellaSwag):
    """(context, completions, which of them is right)"""
    if not 0 <= line["label"] < len(line["endings"]):
        raise ValueError(f"label {line['label']}: not one of {len(line['endings'])} endings")
    return line["ctx"], [f" {ending}" for ending in line["endings"]], line["label"]


def lambada_example(line: Lambada):
    """The last word is the one completion."""
    if len(words := line["text"].rsplit(maxsplit=1)) < 2:
        raise ValueError("text: fewer than two words")
    return words[0], [f" {words[1]}"], 0


EXAMPLES = {  # of each task: type of a line, address, sha256
    "hellaswag": (
        Annotated[HellaSwag, AfterValidator(hellaswag_example)],
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "lambada": (
        Annotated[Lambada, AfterValidator(lambada_example)],
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
}


def evaluate_hellaswag(model, tokenizer, options) -> dict:
    """How often the right ending is the most likely: in all (acc), per token (acc_norm)."""
    path, examples = read_examples("hellaswag", options.file)
    scores = score_completions(model, tokenizer, examples, options.batch_size)
    labels = [label for _, _, label in examples]
    chosen = [np.argmin([row.nats for row in rows]) for rows in scores]  # the first of equals
    chosen_norm = [np.argmin([row.nats / row.tokens for row in rows]) for rows in scores]
    return {
        "file": str(path),
        "examples": len(examples),
        "acc": float(np.mean(np.equal(chosen, labels))),
        "acc_norm": float(np.mean(np.equal(chosen_norm, labels))),
    }


def evaluate_lambada(model, tokenizer, options) -> dict:
    """How often the last word is guessed, and its perplexity."""
    path, examples = read_examples("lambada", options.file)
    scores = score_completions(model, tokenizer, examples, options.batch_size)
    return {
        "file": str(path),
        "examples": len(examples),
        "acc": sum(word.greedy for (word,) in scores) / len(examples),
        "perplexity": perplexity(math.fsum(word.nats for (word,) in scores) / len(examples)),
    }


def read_examples(task: str, file: str | None) -> tuple[Path, list[tuple]]:
    """The file and its examples, one a line: JSON in a .jsonl, in others a text. Without a file the
    published examples, which rank 0 downloads once. ValueError naming file, line and field.
    """
    schema, address, sha256 = EXAMPLES[task]
    path = Path(file or f"data/{task}/{address.rsplit('/', 1)[1]}")
    if not path.exists():
        log_row("fetching", address)
    try:
        broadcast_from_rank0(lambda: path.exists() or download(address, sha256, path))
    except ValueError as problem:
        raise ValueError(f"{address}: {problem}; name a copy of it with --file") from None
    lines = read_text(path, MOST_TEXT).split("\n")
    lines = [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix not in (".json", ".jsonl"):
        lines = [(name, json.dumps({"text": line})) for name, line in lines]
    if not lines:
        raise ValueError(f"{path}: no examples in it; name another with --file")
    return path, [check_json(line, schema, name) for name, line in lines]


def score_completions(model, tokenizer, examples, batch_size: int) -> list[list[Score]]:
    """For each example the scores of its completions.

    Context and completions are encoded separately. A context that is too long loses its beginning.
    Equal completions are scored once, so that rounding cannot choose between them.
    """
    block_size, asked, cropped = model.config.block_size, [], 0
    for number, (context, completions, _) in enumerate(examples, start=1):
        prompt = tokenizer.encode(context)
        endings = [tokenizer.encode(completion) for completion in completions]
        longest = max(map(len, endings))
        room = block_size + 1 - longest  # the last token is not put in
        if room < 1:
            raise ValueError(f"example {number}: {longest} tokens exceed block_size {block_size}")
        cropped += len(prompt) > room
        kept = prompt[-room:]
        asked.append([(tuple(kept + ending), len(kept)) for ending in endings])
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
        for task, names in OWN_FLAGS.items():
            for name in names:
                if task not in self.task and getattr(self, name) is not None:
                    yield Problem((name,), f"--{name} is for --task {task} only")
        readers = set(self.task) - {"val"}
        if self.file is None and "perplexity" in readers:
            yield Problem(("file",), "--task perplexity: name a text with --file")
        elif self.file is not None and len(readers) != 1:
            yield Problem(("file",), "--file: name the one task that reads it with --task")
        elif self.file is not None and not Path(self.file).is_file():
            yield Problem(("file",), f"--file {self.file}: no such file")


def print_result(result: dict, as_json: bool):
    """A table, or a line of JSON, where null stands for infinity and NaN."""
    if as_json and rank() == 0:
        odd = [name for name, value in result.items() if str(value) in ("inf", "nan")]
        print(json.dumps(result | dict.fromkeys(odd)), flush=True)
    elif not as_json:
        formats = {int: "{:,}", float: "{:.4f}", type(None): "unknown"}
        texts = {name: formats.get(type(v), "{}").format(v) for name, v in result.items()}
        print_rows([(f"{name:<16}", text, "dim") for name, text in texts.items()])


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
            try:
                with autocast(device, dtype):
                    result = {"task": task} | TASKS[task](model, tokenizer, options)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                size = f"--batch_size {options.batch_size}"
                raise ValueError(f"{size}: out of memory on {device}; take less") from error
            print_result(result, options.json)
    log_next_generate(options.checkpoint, options.device, options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
