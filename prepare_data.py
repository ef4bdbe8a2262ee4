"""Text to a data set for train.py: train.bin, val.bin, tokenizer.json, and meta.json last.

    python prepare_data.py                      # tiny Shakespeare, by characters
    python prepare_data.py --input novel.txt    # your own text, GPT-2's tokens
    python prepare_data.py --input a.txt --tokenizer char --data_dir data/a
    python prepare_data.py --input notes/ chat.jsonl.gz --tokenizer bpe
    python prepare_data.py --dataset fineweb --name sample-10BT    # from the hub
    python prepare_data.py --adopt nanoGPT/data/openwebtext      # its .bin files

A source (sources.py) gives documents, each for a split. They are cut into pieces, encoded in
threads and appended in order to data_dir/.unfinished, where the same command resumes after a kill.
"""

import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data import META_FORMAT, TOKEN_DTYPES, Meta, TokenDataset, read_meta
from files import atomic_write, clean, fsync_folder, lock, read_json, writing
from logger import command_for, log_row, print_rows, progress, run, warn
from options import Problem, integer, number, parse_args, validate
from sources import (
    END,
    HUB_DATASETS,
    PARQUET,
    describe_file,
    few,
    find_files,
    in_order,
    list_hub_files,
    open_source,
    pieces,
    shakespeare,
)
from tokenizer import KINDS, GPT2Tokenizer, load_tokenizer

UNFINISHED = ".unfinished"  # the folder, in that of the data set, where a new one grows
SAVE_SECONDS = 10  # of work that a kill may cost
BPE_VOCAB_SIZE = 4096
# what makes a data set: with the same text and these, it is the same
SETTINGS = ("dataset", "name", "tokenizer", "vocab_size", "val_fraction", "errors")
# what a BPE learns from: bytes of distinct words (training takes some 100 times as much memory),
# and characters in all (a minute)
SAMPLE_WORDS, SAMPLE = 5 << 20, 1 << 27

Dataset = Literal["shakespeare", "custom", *HUB_DATASETS]
Kind = Literal[*KINDS] | str
Share = number(above=0, below=1)


@dataclass
class Options:
    # where the text comes from
    dataset: Dataset | None = None  # which text; unset: custom with --input, else shakespeare
    input: list[str] | None = None  # .txt, .md, .jsonl (or .gz of one), .parquet, or folders
    name: str | None = None  # part of fineweb: sample-100BT, default ...; unset: sample-10BT
    adopt: str | None = None  # the folder of nanoGPT's train.bin and val.bin, gpt2's tokens
    # what becomes of it
    tokenizer: Kind | None = None  # or a tokenizer.json; unset: gpt2; for shakespeare char
    vocab_size: integer(257) | None = None  # of bpe; unset: 4096
    val_fraction: Share | None = None  # for validation; unset: 0.1; of the hub's data sets 0.0005
    errors: Literal["strict", "replace"] = "strict"  # what is not UTF-8: stop, or put U+FFFD
    # output
    data_dir: str | None = None  # where to write; unset: ./data/<dataset>
    overwrite: bool = False  # replace a data set that is there
    workers: integer(1) | None = None  # threads; unset: as many as cores

    def __post_init__(self):
        on_hub = HUB_DATASETS.get(self.dataset)
        self.dataset = self.dataset or ("custom" if self.input else "shakespeare")
        self.tokenizer = self.tokenizer or ("char" if self.dataset == "shakespeare" else "gpt2")
        self.name = self.name or (on_hub and on_hub.name)
        self.val_fraction = self.val_fraction or (0.0005 if on_hub else 0.1)
        if self.learns_from == "sample":
            self.vocab_size = self.vocab_size or BPE_VOCAB_SIZE
        self.data_dir = self.data_dir or self.adopt or f"./data/{self.dataset}"
        self.workers = self.workers or os.cpu_count() or 1

    @property
    def learns_from(self):
        return KINDS[self.tokenizer].learns_from if self.tokenizer in KINDS else None

    def problems(self):
        dataset, kind, name, size = self.dataset, self.tokenizer, self.name, self.vocab_size
        named = [name for name, on_hub in HUB_DATASETS.items() if on_hub.name]
        learning = [name for name in KINDS if KINDS[name].learns_from == "sample"]
        custom, known = dataset == "custom", kind in KINDS or Path(kind).is_file()
        others = self.input or self.data_dir != self.adopt or dataset != "shakespeare"
        wrong = [
            (self.adopt and others, "--adopt DIR takes the data set in DIR, and no other flags"),
            (custom and not self.input, "--dataset custom needs --input FILE"),
            (self.input and not custom, f"--input is not for {dataset}; use --dataset custom"),
            (name and dataset not in named, f"--name {name}: only for {', '.join(named)}"),
            (not known, f"--tokenizer {kind}: neither {', '.join(KINDS)} nor a file"),
            (size and kind not in learning, f"--vocab_size {size}: only for {', '.join(learning)}"),
        ]
        return [Problem((), message) for is_so, message in wrong if is_so]


# ---------------------------------------------------------------- tokens


def encode(tokenizer, source, numbered):
    """A piece's position, and for each split its ids as on disk and the bytes of its text."""
    position, piece = numbered
    dtype, eot = TOKEN_DTYPES[dtype_for(tokenizer)], tokenizer.eot_id
    end = np.array([] if eot is None else [eot], dtype)
    raw, sizes = {"train": bytearray(), "val": bytearray()}, {"train": 0, "val": 0}
    for split, text in source.by_split(piece, tokenizer.safe_cut):
        ids = end if text is END else tokenizer.encode_to_numpy(text)
        raw[split] += ids.astype(dtype).tobytes()
        sizes[split] += len((text or "").encode())
    return position, raw, sizes


def make_tokenizer(options, given, source):
    """The tokenizer that is asked for, trained on the text if it learns."""
    kind, learns_from = KINDS.get(options.tokenizer), options.learns_from
    tokenizer = kind() if kind and learns_from is None else given  # first: it may not be had
    characters = set() if learns_from == "characters" else None
    source.survey(characters)
    if learns_from == "characters":
        return kind.train(characters)
    if learns_from == "sample":
        return kind.train(training_sample(source.texts()), options.vocab_size)
    return tokenizer


def training_sample(text):
    """The text from its start until it has SAMPLE_WORDS of distinct words, or SAMPLE characters."""
    words, size, total = set(), 0, 0
    for chunk in filter(None, text):
        yield chunk
        new = set(chunk.split()) - words
        words |= new
        size += sum(len(word.encode()) for word in new)
        total += len(chunk)
        if size > SAMPLE_WORDS or total > SAMPLE:
            return


# ---------------------------------------------------------------- writing


class Progress(Meta):
    """What progress.json holds: the meta.json to be, and how far it is."""

    revision: str | None  # of the hub
    position: tuple[int, int]  # as `pieces` counts


class Writer(NamedTuple):
    """The data set that grows in `folder`, and how far it is."""

    folder: Path
    progress: Progress

    def append(self, raw: dict[str, bytes], sizes: dict[str, int]):
        """Add ids, as on disk, to each split, and the bytes of text that they stand for. What a
        killed run has written after its last save is cut off.
        """
        itemsize = TOKEN_DTYPES[self.progress["dtype"]].itemsize
        for split, counts in self.progress["splits"].items():
            path, size = self.folder / f"{split}.bin", counts["tokens"] * itemsize
            with writing(path), open(path, "ab") as file:
                if file.tell() < size:
                    raise ValueError(f"{path} has lost what was written; delete {self.folder}")
                file.truncate(size)
                file.write(raw[split])
            counts["tokens"] += len(raw[split]) // itemsize
            counts["bytes"] += sizes[split]

    def save(self, position):
        """Record that all up to position is on disk."""
        for split in self.progress["splits"]:
            path = self.folder / f"{split}.bin"
            with writing(path), open(path, "ab") as file:
                os.fsync(file.fileno())
        self.progress["position"] = position
        write_json(self.folder / "progress.json", self.progress)

    def finish(self) -> Meta:
        """Put it in place of an earlier data set, and return its meta."""
        for split, counts in self.progress["splits"].items():
            counts["sha256"] = describe_file(split, self.folder / f"{split}.bin")["sha256"]
        meta = {name: self.progress[name] for name in Meta.__annotations__}
        write_json(self.folder / "meta.json", meta)
        finish_moving(self.folder)
        return meta


def dtype_for(tokenizer) -> str:
    """The smallest of TOKEN_DTYPES that holds every id."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def new_meta(tokenizer, splits, sources, settings) -> Meta:
    return {
        "format": META_FORMAT,
        "dtype": dtype_for(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.hash()},
        "splits": splits,
        "sources": sources,
        "settings": settings,
    }


def write_json(path, value):
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def finish_moving(folder):
    """Move a complete data set to its place; also if a kill interrupted this before."""
    if not (folder / "meta.json").exists():
        return
    with writing(folder.parent):
        for stale in (folder / "progress.json", folder.parent / "meta.json"):
            stale.unlink(missing_ok=True)  # a half-replaced data set must not look complete
        for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
            if (folder / name).exists():
                os.replace(folder / name, folder.parent / name)
        fsync_folder(folder.parent)
        shutil.rmtree(folder)


# ---------------------------------------------------------------- the whole


def prepare(options) -> dict:
    """Prepare a data set, and return its meta; if it is there already, only that.

    Raises ValueError for text that is empty or not UTF-8, and if data_dir holds a different data
    set, which stays intact.
    """
    data_dir, folder = Path(options.data_dir), Path(options.data_dir) / UNFINISHED
    given = None if options.tokenizer in KINDS else load_tokenizer(options.tokenizer)
    settings = {name: getattr(options, name) for name in SETTINGS}
    if given is not None:  # gpt2 is gpt2, wherever it comes from
        settings["tokenizer"] = "gpt2" if given.kind == "gpt2" else f"{given.kind} {given.hash()}"
    found, on_hub = find_files(options.input or []), options.dataset in HUB_DATASETS
    of_parquet = on_hub or any(PARQUET.search(name) for name, _ in found)
    if of_parquet and options.learns_from == "characters":
        once = "parquet files are read once, too late to know all characters; use gpt2 or bpe"
        raise ValueError(f"--tokenizer {options.tokenizer}: {once}")
    with lock(data_dir):
        clean(data_dir)
        finish_moving(folder)
        if options.dataset == "shakespeare":
            found = [shakespeare(data_dir)]
        files, revision = [describe_file(*file) for file in found], None
        if not options.overwrite and (meta := already_there(data_dir, files, settings)):
            return meta
        progress = unfinished(folder, files, settings, options.overwrite)
        if on_hub:
            listed = progress and (progress["revision"], progress["sources"])
            revision, files = listed or list_hub_files(options.dataset, options.name)
        paths = [path for _, path in found]
        source = open_source(options, files, paths, revision, folder / "download")
        if progress:
            tokenizer = load_tokenizer(folder / "tokenizer.json")
            source.survey()
        else:
            tokenizer = make_tokenizer(options, given, source)
            tokenizer.save(folder / "tokenizer.json")
            splits = {split: {"tokens": 0, "bytes": 0, "sha256": ""} for split in ("train", "val")}
            progress = new_meta(tokenizer, splits, files, settings)
            progress |= {"revision": revision, "position": (0, 0)}
        writer = Writer(folder, progress)
        writer.save(progress["position"])
        append_all(writer, tokenizer, source, options)
        return writer.finish()


def already_there(data_dir, files, settings) -> dict | None:
    """The meta of the data set in data_dir, None if there is none; ValueError if it was made of
    other files or with other settings.
    """
    meta = read_meta(data_dir)
    if meta is not None:
        if found := mismatch(meta, files, settings):
            raise ValueError(f"{data_dir} holds another data set {found}")
        TokenDataset(data_dir)  # its files are as meta.json says
        log_row("unchanged", f"{data_dir} already holds this text, prepared like this")
    return meta


def mismatch(there, files, settings) -> str:
    """How a meta or a progress differs from these settings and files (none: any); the remedy."""
    found = [
        f"{name}: {there['settings'].get(name)} there, {value} asked for"
        for name, value in settings.items()
        if there["settings"].get(name) != value
    ]
    if files and [s["sha256"] for s in there["sources"]] != [s["sha256"] for s in files]:
        found.append(f"text: {_names(there['sources'])} there, {_names(files)} now")
    remedy = "choose another --data_dir, or make it anew with prepare_data.py --overwrite"
    return f"({'; '.join(found)}); {remedy}" if found else ""


def _names(files):
    """'a.txt (1,000 bytes), b.txt (20 bytes), c.txt (3 bytes) and 7 more'"""
    return few([f"{file['name']} ({file['bytes']:,} bytes)" for file in files])


def unfinished(folder, files, settings, overwrite) -> Progress | None:
    """The progress of a run that was stopped, None if there is none. Progress on a different data
    set is dropped; ValueError if that costs hours of work and overwrite is not set.
    """
    clean(folder, "**/*.incomplete")  # of a download that was killed
    if not (folder / "progress.json").exists():
        return None
    try:
        progress = read_json(folder / "progress.json", Progress)
    except ValueError as error:
        raise ValueError(f"{error}; delete {folder}") from None
    found = mismatch(progress, files, settings)
    if not found:
        log_row("resuming", f"with what is in {folder}")
        return progress
    of_hours = any(PARQUET.search(file["name"]) for file in progress["sources"])
    if of_hours and not overwrite:
        raise ValueError(f"{folder} holds an unfinished data set of something else {found}")
    shutil.rmtree(folder)
    return None


def append_all(writer, tokenizer, source, options):
    """Append what is missing, recording every SAVE_SECONDS and after each part how far it is."""
    folder, position, saved = writer.folder, writer.progress["position"], time.monotonic()
    source.done = shown = sum(file["bytes"] for file in source.files[: position[0]])
    source.replaced.clear()  # the survey has counted them too
    with (
        ThreadPoolExecutor(options.workers) as pool,  # tiktoken and numpy let others run
        progress("encoding", source.total, source.unit, shown) as advance,
    ):
        start = partial(pool.submit, encode, tokenizer, source)
        work = pieces(source, tokenizer.safe_cut, position)
        for position, raw, sizes in in_order(start, work, ahead=options.workers + 2):
            writer.append(raw, sizes)
            advance(source.done - shown)
            shown = source.done
            if position[1] == 0 or time.monotonic() - saved > SAVE_SECONDS:
                writer.save(position)
                saved = time.monotonic()
            if position[1] == 0:
                name = source.files[position[0] - 1]["name"]
                (folder / "download" / name).unlink(missing_ok=True)
    if source.replaced:
        warn(f"{sum(source.replaced):,} replacements (U+FFFD) for bytes that are not UTF-8")
    if empty := [
        split for split, counts in writer.progress["splits"].items() if counts["tokens"] == 0
    ]:
        shutil.rmtree(folder)
        share = f"--val_fraction {options.val_fraction}; take another share, or more text"
        raise ValueError(f"no text for {' and '.join(empty)}: {share}")


def adopt(data_dir) -> Meta:
    """Make a data set of nanoGPT's train.bin and val.bin of gpt2 tokens, and return its meta; the
    two stay as they are.
    """
    data_dir, splits = Path(data_dir), {}
    if meta := already_there(data_dir, files=[], settings={}):
        return meta
    if (data_dir / "meta.pkl").exists():  # a pickle can run code
        raise ValueError(f"{data_dir / 'meta.pkl'}: not gpt2's tokens; prepare the text itself")
    files = [describe_file(name, data_dir / name) for name in ("train.bin", "val.bin")]
    for split, file in zip(("train", "val"), files, strict=True):
        tokens, rest = divmod(file["bytes"], 2)
        if rest or not tokens:
            wrong = f"{file['bytes']:,} bytes are not tokens of 2 bytes each"
            raise ValueError(f"{data_dir / file['name']}: {wrong}")
        splits[split] = {"tokens": tokens, "bytes": None, "sha256": file["sha256"]}
    with lock(data_dir):
        gpt2 = GPT2Tokenizer()
        gpt2.save(data_dir / "tokenizer.json")
        settings = {"dataset": "adopted", "tokenizer": "gpt2"}
        meta = new_meta(gpt2, splits, files, settings)
        write_json(data_dir / "meta.json", meta)
        return meta


def prepare_file(path, tokenizer: str, data_dir) -> dict:
    """Prepare one text file unless it is there already, and return the meta.

    tokenizer: a kind, or the path of a tokenizer.json.
    """
    options = Options(input=[str(path)], tokenizer=str(tokenizer), data_dir=str(data_dir))
    validate(options)
    return prepare(options)


# ---------------------------------------------------------------- the command line


def show_summary(meta, data_dir):
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    vocabulary = f"{meta['vocab_size']:>14,} ({meta['tokenizer']['kind']})"
    if train["bytes"] is not None:  # adopted tokens' text is not known
        a_token = (train["bytes"] + val["bytes"]) / (train["tokens"] + val["tokens"])
        vocabulary += f", {a_token:.2f} bytes a token"
    rows = [
        ("done", f"{data_dir}, of {_names(meta['sources'])}", "green"),
        ("train", f"{train['tokens']:>14,} tokens", "dim"),
        ("val", f"{val['tokens']:>14,} tokens", "dim"),
        ("vocabulary", vocabulary, "dim"),
    ]
    default = Path(data_dir) == Path("data/shakespeare")
    print_rows(rows, command_for("train.py", *([] if default else ["--data_dir", data_dir])))


def main(argv=None) -> int:
    options = parse_args(Options, argv, __doc__)
    if not options.adopt:
        text = ", ".join(options.input or filter(None, [options.dataset, options.name]))
        log_row("text", f"{text}; {options.val_fraction:g} of it is for validation")
        log_row("output", f"{options.data_dir}, tokens of {options.tokenizer}")
    meta = adopt(options.adopt) if options.adopt else prepare(options)
    show_summary(meta, options.data_dir)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
