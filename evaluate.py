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
from contextlib import nullcontext
from itertools import islice
from operator import eq, length_hint
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import dtype_name
from convert import add_model_flags, load_model, say_next
from data import TokenDataset, validation_starts, windows_at
from utils import (
    ArgumentParser,
    autocast,
    download,
    from_first,
    gather_from_processes,
    laid_out,
    live_line,
    log_row,
    perplexity,
    pick_device,
    pick_dtype,
    process_group,
    rank,
    run,
    sum_over_processes,
    warn,
    world_size,
    writing,
)

DOWNLOADS = {  # address and sha256
    "hellaswag": (
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "lambada": (
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
}
CHUNK = 1 << 18  # characters read at once; a word that is longer is cut, and its tokens with it


# ---------------------------------------------------------------- the loss of a split


@torch.no_grad()
def mean_loss(
    model,
    tokens,
    block_size: int,
    batch_size: int,
    device,
    max_windows: int | None = None,
    vocab_size: int | None = None,
    autocast=nullcontext(),  # noqa: B008  (it has no state)
    show_progress: bool = False,
) -> float:
    """Mean cross-entropy in nats a token over fixed windows that cover a split evenly.

    Every token counts alike, whatever the batches; all windows unless max_windows says fewer.
    Processes share the batches, and each gets the mean over all of them. The model's mode is put
    back, no random numbers are drawn, and the device is waited for only once.
    """
    device = torch.device(device)
    starts = validation_starts(tokens, block_size, max_windows)
    if len(starts) == 0:
        raise ValueError(
            f"{len(tokens)} tokens to evaluate on, needs {block_size + 1} (block_size)"
        )
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=device)
    was_training = model.training
    model.eval()
    try:
        with autocast:
            firsts = range(0, len(starts), batch_size * world_size())
            for first in with_bar(firsts, len(firsts), "batch") if show_progress else firsts:
                mine = my_batch(starts[first:], batch_size)
                some = mine if len(mine) else starts[:1]
                x, y = full_batch(windows_at(tokens, some, block_size, vocab_size), batch_size)
                _, loss = model(to(x, device), to(y, device))
                total += loss.to(wide) * len(mine)
    finally:
        model.train(was_training)
    return sum_over_processes(total).item() / len(starts)


def my_batch(items, batch_size):
    """This process's batch among the next ones of all processes; it may be short or empty.

    A batch holds the same items however many processes there are, so that its loss is the same.
    Who has none calls the model with something else: a sharded model needs all at each call.
    """
    return items[rank() * batch_size : (rank() + 1) * batch_size]


def full_batch(batch, batch_size):
    """Fill up the last batch with targets that do not count: a compiled model wants one shape."""
    x, y = batch  # (B, T) each
    missing = batch_size - len(x)
    return (
        torch.cat([x, x[:1].expand(missing, -1)]),
        torch.cat([y, torch.full_like(y[:1], -1).expand(missing, -1)]),
    )


def to(tensor, device):
    """tensor on the device, without waiting for what a GPU still has to do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def with_bar(items, total, unit):
    """items, and how many of them are done."""
    with live_line("scoring", total, unit) as advance:
        for item in items:
            yield item
            advance(1)


def evaluate_split(model, tokenizer, options) -> dict:
    """Loss, perplexity and bits per byte of one split of a data set.

    Bits per byte measure the text itself, so that they compare across tokenizers; None where the
    data set does not know how long its text was.
    """
    block_size = window_length("block_size", options.block_size, model.config)
    dataset = find_dataset(options.data_dir, options.checkpoint, model, tokenizer)
    split = options.split or "val"
    tokens, text_bytes = getattr(dataset, split), dataset.meta["splits"][split].get("bytes")
    batch_size, device, mixed = options.batch_size, options.device, options.autocast
    vocab_size = dataset.vocab_size
    loss = mean_loss(
        model, tokens, block_size, batch_size, device, None, vocab_size, mixed, show_progress=True
    )
    bits = loss * len(tokens) / math.log(2)
    return {
        "task": "val",
        "data_dir": str(dataset.data_dir),
        "split": split,
        "tokens": len(tokens),
        "windows": len(validation_starts(tokens, block_size)),
        "block_size": block_size,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits / text_bytes if text_bytes else None,
    }


def window_length(flag, wanted, config) -> int:
    """How many tokens the model sees at once: block_size, or what the flag says."""
    if wanted is not None and wanted > config.block_size and config.position == "learned":
        raise ValueError(
            f"--{flag} {wanted}: the model has learned {config.block_size} positions, and no more"
        )
    return wanted or config.block_size


def find_dataset(data_dir, spec, model, tokenizer) -> TokenDataset:
    """The data set to evaluate on; ValueError if its ids are not those that the model knows.

    A checkpoint may come from anywhere: the folder that it names is opened only below this one.
    """
    if data_dir is None:
        if spec is not None and not Path(spec).is_file():
            raise ValueError(f"{spec} comes without a data set: name one with --data_dir DIR")
        data_dir = model.config.data_dir
        if not Path(data_dir).resolve().is_relative_to(Path.cwd()):
            raise ValueError(
                f"trained on {data_dir}, outside this folder; --data_dir DIR allows it"
            )
    dataset = TokenDataset(data_dir)
    made_with = dataset.meta["tokenizer"]
    if made_with["sha256"] != tokenizer.hash():
        raise ValueError(
            f"{data_dir} was made with another tokenizer ({made_with['kind']}, "
            f"{dataset.vocab_size:,} tokens) than the checkpoint's ({tokenizer.kind}, "
            f"{tokenizer.vocab_size:,} tokens); name a fitting data set with --data_dir"
        )
    return dataset


# ---------------------------------------------------------------- scoring


class Score(NamedTuple):
    nats: float  # minus the log-probability of the scored tokens together
    tokens: int  # how many were scored
    greedy: bool  # whether each of them is the likeliest where it stands


@torch.no_grad()
def score(model, rows, batch_size: int, device, autocast) -> list[Score]:
    """A score for each row, in their order; every process gets all of them.

    rows yields (ids, first): the tokens ids[first:] are scored, each given all that precede it in
    ids; first is at least 1. The model is in eval mode.
    """
    rows, scored = enumerate(with_bar(rows, length_hint(rows) or None, "row")), []
    with autocast:
        while some := list(islice(rows, batch_size * world_size())):
            mine = my_batch(some, batch_size)
            found = score_batch(model, [row for _, row in mine or some[:1]], torch.device(device))
            scored += zip((number for number, _ in mine), found, strict=False)  # mine may be empty
    return [found for _, found in sorted(gather_from_processes(scored))]


def score_batch(model, rows, device) -> list[Score]:
    """The scores of rows (ids, first), padded on the right, where no token that counts looks."""
    longest = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in rows])
    padded = to(padded, device)  # (B, T + 1)
    logits, _ = model(padded[:, :-1])  # (B, T, V)
    losses, greedy = [], []
    for row, (ids, first) in enumerate(rows):  # one by one: a batch's log-probabilities are large
        part = logits[row, first - 1 : len(ids) - 1]  # (scored, V)
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        targets = padded[row, first : len(ids)]  # (scored,)
        losses.append(F.cross_entropy(part, targets, reduction="none"))
        greedy.append((part.argmax(-1) == targets).all())
    counts = [len(loss) for loss in losses]
    nats = [loss.sum().item() for loss in torch.cat(losses).cpu().double().split(counts)]
    return list(map(Score, nats, counts, torch.stack(greedy).tolist()))


# ---------------------------------------------------------------- a text


def evaluate_text(model, tokenizer, options) -> dict:
    """Loss and perplexities of a text under a window that slides by `stride` tokens."""
    context = window_length("context", options.context, model.config)
    stride = options.stride or max(1, context // 2)
    if stride > context:
        raise ValueError(f"--stride {stride}: must be at most the context of {context} tokens")
    text_bytes, words = measure_text(options.file)
    rows = text_windows(encoded_pieces(options.file, tokenizer), context, stride)
    scores = score(model, rows, options.batch_size, options.device, options.autocast)
    if not scores:
        raise ValueError(f"{options.file}: one token only, which nothing precedes; take more text")
    nats, tokens = math.fsum(found.nats for found in scores), sum(found.tokens for found in scores)
    return {
        "task": "perplexity",
        "file": str(options.file),
        "tokens": tokens,
        "words": words,
        "context": context,
        "stride": stride,
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "word_perplexity": perplexity(nats / words),
        "bits_per_byte": nats / math.log(2) / text_bytes,
    }


def measure_text(path) -> tuple[int, int]:
    """Bytes and words (what white space separates) of a text; ValueError where it has none."""
    text_bytes, words = 0, 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line in file:
                text_bytes += len(line.encode())
                words += len(line.split())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save it as UTF-8") from None
    if words == 0:
        raise ValueError(f"{path}: no text in it; name another with --file")
    return text_bytes, words


def encoded_pieces(path, tokenizer):
    """The ids of a text file, piece by piece; the same as those of the whole text at once."""
    done = 0
    for piece in text_pieces(path, tokenizer):
        try:
            ids = tokenizer.encode(piece)
        except ValueError as error:
            raise ValueError(f"{path}, from character {done:,} on: {error}") from None
        yield ids
        done += len(piece)


def text_pieces(path, tokenizer):
    """A text file in pieces that can be encoded apart."""
    held = ""
    with open(path, encoding="utf-8-sig", newline="") as file:
        while chunk := file.read(CHUNK):
            held += chunk
            cut = tokenizer.safe_cut(held) or len(held)
            yield held[:cut]
            held = held[cut:]
    yield held


def text_windows(pieces, context, stride):
    """Rows of context + 1 ids, stride apart, that score every id but the very first once."""
    held, first = [], 1
    for ids in pieces:
        held += ids
        while len(held) > context:
            yield held[: context + 1], first
            held, first = held[stride:], context + 1 - stride
    if len(held) > first:
        yield held, first


# ---------------------------------------------------------------- examples: HellaSwag and LAMBADA


def evaluate_hellaswag(model, tokenizer, options) -> dict:
    """How often the right ending is the likeliest: in all (acc), and a token (acc_norm)."""
    path = options.file or downloaded("hellaswag")
    examples = read_examples(path, parse_hellaswag)
    labels = [label for _, _, label in examples]
    scored = score_completions(model, tokenizer, examples, options)
    likeliest, on_average = zip(*map(choices, scored), strict=True)
    return {
        "task": "hellaswag",
        "file": str(path),
        "examples": len(examples),
        "acc": sum(map(eq, likeliest, labels)) / len(labels),
        "acc_norm": sum(map(eq, on_average, labels)) / len(labels),
    }


def choices(scores: list[Score]) -> tuple[int, int]:
    """The ending that is likeliest as a whole, and the one whose tokens are on average."""
    sums, means = [found.nats for found in scores], [found.nats / found.tokens for found in scores]
    return sums.index(min(sums)), means.index(min(means))


def evaluate_lambada(model, tokenizer, options) -> dict:
    """How often the last word is guessed, and its perplexity."""
    path = options.file or downloaded("lambada")
    parse = parse_lambada if str(path).endswith((".jsonl", ".json")) else split_passage
    examples = read_examples(path, parse)
    scores = [found for (found,) in score_completions(model, tokenizer, examples, options)]
    return {
        "task": "lambada",
        "file": str(path),
        "examples": len(examples),
        "acc": sum(found.greedy for found in scores) / len(scores),
        "perplexity": perplexity(math.fsum(found.nats for found in scores) / len(scores)),
    }


def score_completions(model, tokenizer, examples, options) -> list[list[Score]]:
    """For each example (context, completions, ...) the scores of its completions.

    Context and completions are encoded apart. A context that is too long loses its beginning.
    Completions that are equal are scored once: no rounding shall choose between them.
    """
    block_size, asked, cropped = model.config.block_size, [], 0
    for number, (context, completions, *_) in enumerate(examples, start=1):
        prompt = tokenizer.encode(context)
        endings = [tokenizer.encode(completion) for completion in completions]
        room = block_size + 1 - max(map(len, endings))  # the last token is not put in
        if room < 1:
            raise ValueError(
                f"example {number}: {block_size + 1 - room} tokens after the context, "
                f"more than block_size {block_size}; take a model with a longer one"
            )
        cropped += len(prompt) > room
        kept = prompt[-room:]
        asked.append([(tuple(kept + ending), len(kept)) for ending in endings])
    if cropped:
        warn(f"{cropped:,} of {len(examples):,} contexts cropped to fit block_size {block_size}")
    rows = dict.fromkeys(row for rows in asked for row in rows)
    rows = sorted(rows, key=lambda row: -len(row[0]))  # alike in length: less padding
    scores = score(model, rows, options.batch_size, options.device, options.autocast)
    score_of = dict(zip(rows, scores, strict=True))
    return [[score_of[row] for row in rows] for rows in asked]


def read_examples(path, parse) -> list[tuple]:
    """What parse makes of each line of a file; ValueError naming the line that it refuses."""
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save it as UTF-8") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                examples.append(parse(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: no examples in it; name another with --file")
    return examples


def parse_hellaswag(line) -> tuple[str, list[str], int]:
    """Context, endings (each with the space before it) and which of them is right."""
    context, endings, label = json_fields(line, "ctx", "endings", "label")
    if not isinstance(context, str) or not context:
        raise ValueError("'ctx' is not a text")
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        raise ValueError("'endings' is not a list of texts")
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(f"'label' is {label!r}, not one of {len(endings)} endings, from 0 on")
    return context, [f" {ending}" for ending in endings], label


def parse_lambada(line) -> tuple[str, list[str]]:
    (text,) = json_fields(line, "text")
    if not isinstance(text, str):
        raise ValueError("'text' is not a text")
    return split_passage(text)


def split_passage(text) -> tuple[str, list[str]]:
    """What precedes the last word, and the last word with a space before it."""
    parts = text.rsplit(maxsplit=1)
    if len(parts) < 2:
        raise ValueError("fewer than two words")
    return parts[0], [f" {parts[1]}"]


def json_fields(line, *names):
    """The named fields of a line of JSON."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    missing = [name for name in names if not isinstance(record, dict) or name not in record]
    if missing:
        raise ValueError(f"no field {missing[0]!r}")
    return [record[name] for name in names]


# ---------------------------------------------------------------- downloading


def downloaded(task) -> Path:
    """The published examples of a task; the first process fetches them where they are not here."""
    address, sha256 = DOWNLOADS[task]
    path = Path("data") / task / address.rsplit("/", 1)[1]

    def fetch():
        log_row("fetching", address)
        try:
            with writing():
                download(address, sha256, path)
        except ValueError as problem:
            raise ValueError(
                f"{address}: {problem}; get the file some other way and name it with --file"
            ) from None

    from_first(lambda: path.exists() or fetch())
    return path


# ---------------------------------------------------------------- the command line

TASKS = {
    "val": evaluate_split,
    "perplexity": evaluate_text,
    "hellaswag": evaluate_hellaswag,
    "lambada": evaluate_lambada,
}
OWN_FLAGS = {"val": ("data_dir", "split", "block_size"), "perplexity": ("context", "stride")}


def table(result: dict) -> str:
    """A line for each entry of a result."""
    lines = []
    for name, value in result.items():
        style = {int: ",", float: ".4f"}.get(type(value), "")
        value = "unknown" if value is None else format(value, style)
        lines.append(laid_out(value, f"{name:<17}", "dim", sys.stdout))
    return "\n".join(lines)


def one_line(result: dict) -> str:
    """A result as JSON, which has neither infinity nor NaN: null stands for them."""
    odd = [name for name, value in result.items() if str(value) in ("inf", "nan")]
    return json.dumps(result | dict.fromkeys(odd))


def parse(argv):
    parser = ArgumentParser(__doc__, prog="evaluate.py", usage=USAGE)
    add_model_flags(parser)
    add = parser.add_argument_group("what to measure").add_argument
    add("--task", nargs="+", choices=TASKS, default=["val"], metavar="TASK", help=TASK)
    add("--file", metavar="FILE", help="a text, or examples (default: they are downloaded)")
    add = parser.add_argument_group("of --task val").add_argument
    add("--data_dir", metavar="DIR", help="data set (default: what the model was trained on)")
    add("--split", choices=["train", "val"], help="which split (default: val)")
    add("--block_size", type=int, metavar="N", help="tokens in a window (default: the model's)")
    add = parser.add_argument_group("of --task perplexity").add_argument
    add("--context", type=int, metavar="N", help="tokens in a window (default: block_size)")
    add("--stride", type=int, metavar="N", help="its step (default: half a window)")
    add = parser.add_argument_group("speed and output").add_argument
    add("--batch_size", type=int, default=8, metavar="N", help="rows at a time (default: 8)")
    add("--json", action="store_true", help="print one JSON object a line for each task")
    options = parser.parse_args(argv)
    options.task = list(dict.fromkeys(options.task))
    check(options)
    return options


USAGE = "evaluate.py [--task TASK ...] [--checkpoint MODEL] [flags below]"
TASK = f"one or more of {', '.join(TASKS)} (default: val)"


def check(options):
    """ValueError with a line for each flag that makes no sense."""
    problems = [
        f"--{name} {value}: must be at least 1"
        for name in ("batch_size", "block_size", "context", "stride")
        if (value := getattr(options, name)) is not None and value < 1
    ]
    problems += [
        f"--{name} is for --task {task} only"
        for task, names in OWN_FLAGS.items()
        for name in names
        if getattr(options, name) is not None and task not in options.task
    ]
    readers = [task for task in options.task if task != "val"]
    if options.file is not None and len(readers) != 1:
        problems.append("--file: name the one task that reads it (--task perplexity, for example)")
    elif options.file is not None and not Path(options.file).is_file():
        problems.append(f"--file {options.file}: no such file")
    elif options.file is None and "perplexity" in readers:
        problems.append("--task perplexity: name a text with --file")
    if problems:
        raise ValueError("\n".join(problems))


def measure(task, model, tokenizer, options) -> dict:
    """The result of a task."""
    try:
        return TASKS[task](model, tokenizer, options)
    except torch.OutOfMemoryError as error:
        size = f"--batch_size {options.batch_size}"
        raise ValueError(f"{size}: out of GPU memory; take less, or --device cpu") from error


def main(argv=None) -> int:
    options = parse(argv)
    asked = options.device
    device, _ = pick_device(options.device)
    dtype = dtype_name(options.dtype or pick_dtype(device))
    half = dtype in ("bfloat16", "float16")  # as in training: float32 weights under autocast
    options.device, options.autocast = device, autocast(device, dtype)
    with process_group(device):
        model, tokenizer = load_model(options.checkpoint, device, "float32" if half else dtype)
        if half:
            log_row("precision", f"{dtype} for matrix products (autocast), float32 for the rest")
        for task in options.task:
            result = measure(task, model, tokenizer, options)
            if rank() == 0:
                print(one_line(result) if options.json else table(result), flush=True)
    say_next(options.checkpoint, asked, options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
