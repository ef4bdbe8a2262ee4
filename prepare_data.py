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

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

import files
import sources
from data import META_FORMAT, TOKEN_DTYPES, Count, Meta, TokenDataset, read_meta
from files import writing
from logger import command_for, log_row, print_rows, progress, run, warn
from options import Problem, integer, number, parse_args, validate
from sources import END, HUB_DATASETS, PARQUET, describe_file
from tokenizer import KINDS, MOST_TOKENS, GPT2Tokenizer, load_tokenizer

UNFINISHED = ".unfinished"  # the folder, in that of the data set, where a new one grows
SAVE_SECONDS = 10  # of work that a kill may cost
BPE_VOCAB_SIZE = 4096
# what makes a data set: with the same text and these, it is the same
SETTINGS = ("dataset", "name", "tokenizer", "vocab_size", "val_fraction", "encoding", "errors")
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
    encoding: str | None = None  # of text files: gb18030, big5, utf_16 ...; unset: utf-8
    errors: Literal["strict", "replace"] = "strict"  # what is not in it: stop, or put U+FFFD
    # what becomes of it
    tokenizer: Kind | None = None  # or a tokenizer.json; unset: gpt2; for shakespeare char
    vocab_size: integer(257, MOST_TOKENS) | None = None  # of bpe; unset: 4096
    val_fraction: Share | None = None  # for validation; unset: 0.1; of the hub's data sets 0.0005
    # output
    data_dir: str | None = None  # where to write; unset: ./data/<dataset>
    overwrite: bool = False  # replace a data set that is there
    workers: integer(1, 1024) | None = None  # threads; unset: as many as cores

    def __post_init__(self):
        on_hub = self.dataset in HUB_DATASETS
        self.dataset = self.dataset or ("custom" if self.input else "shakespeare")
        self.tokenizer = self.tokenizer or ("char" if self.dataset == "shakespeare" else "gpt2")
        self.name = self.name or (HUB_DATASETS[self.dataset][-1] if on_hub else None)
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
        custom, encoding = dataset == "custom", self.encoding
        others = self.input or self.data_dir != self.adopt or dataset != "shakespeare"
        named = [key for key, (*_, part) in HUB_DATASETS.items() if part]
        known = kind in KINDS or Path(kind).is_file()
        wrong = [
            (self.adopt and others, "--adopt DIR takes the data set in DIR, and no other flags"),
            (custom and not self.input, "--dataset custom needs --input FILE"),
            ("" in [*(self.input or []), self.adopt, encoding], "'': an empty name after a flag"),
            (self.input and not custom, f"--input is not for {dataset}; use --dataset custom"),
            (name and dataset not in named, f"--name {name}: only for {', '.join(named)}"),
            (not known, f"--tokenizer {kind}: neither {', '.join(KINDS)} nor a file"),
            (size and kind != "bpe", f"--vocab_size {size}: only for bpe"),
            (encoding and not custom, "--encoding is for the text files of --input"),
            (encoding and not is_encoding(encoding), f"--encoding {encoding}: Python knows none"),
        ]
        return [Problem((), message) for is_so, message in wrong if is_so]


def is_encoding(name) -> bool:
    with contextlib.suppress(LookupError, ValueError):
        return "".encode(name) is not None and codecs.getincrementaldecoder(name) is not None
    return False


# ---------------------------------------------------------------- tokens


def make_tokenizer(options, given, source):
    """The tokenizer that is asked for, trained on the text if it learns."""
    kind, learns_from = KINDS.get(options.tokenizer), options.learns_from
    tokenizer = kind() if kind and learns_from is None else given  # first: it may not be had
    characters = {} if "char" in (options.tokenizer, given and given.kind) else None
    source.survey(characters)
    if learns_from == "characters":
        return kind.train(characters)
    if learns_from == "sample":
        sample = training_sample(text for _, text in source.texts())
        learned = files.in_thread(kind.train, sample, options.vocab_size)
        with progress("learning the vocabulary", None, "s") as advance:
            while wait([learned], timeout=1).not_done:
                advance(1)
        return learned.result()
    for new in characters or ():
        if new not in tokenizer.characters:
            unknown = f"U+{ord(new):04X} {new!r} is not in the vocabulary"
            raise ValueError(f"{characters[new]}: {unknown} of {options.tokenizer}")
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


def encode(tokenizer, source, numbered):
    """A piece's position, for each split its ids as on disk and the bytes of its text, and how many
    U+FFFD are in it.
    """
    (position, piece), replaced = numbered, 0
    dtype, eot = TOKEN_DTYPES[dtype_for(tokenizer)], tokenizer.eot_id
    end = np.array([] if eot is None else [eot], dtype)
    raw, sizes = {"train": bytearray(), "val": bytearray()}, {"train": 0, "val": 0}
    for split, text in source.by_split(piece, tokenizer.safe_cut):
        ids = end if text is END else tokenizer.encode_to_numpy(source.as_encoded(text))
        raw[split] += ids.astype(dtype).tobytes()
        sizes[split] += len((text or "").encode())
        replaced += (text or "").count("\ufffd")
    return position, raw, sizes, replaced


def dtype_for(tokenizer) -> str:
    """The smallest of TOKEN_DTYPES that holds every id."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


# ---------------------------------------------------------------- on disk


class Progress(Meta):
    """What progress.json holds: the meta.json to be, and how far it is."""

    revision: str | None  # of the hub
    position: tuple[Count, Count]  # as `pieces` counts


def append(folder, state, raw, sizes, position=None):
    """Add ids, as on disk, and the bytes of the text that they stand for, to each split; what a
    killed run has written after its last save is cut off. With a position, save: all up to there
    is on disk.
    """
    itemsize = TOKEN_DTYPES[state["dtype"]].itemsize
    for split, counts in state["splits"].items():
        path, size = folder / f"{split}.bin", counts["tokens"] * itemsize
        with writing(path), files.open_to_append(path) as file:
            if file.tell() < size:
                raise ValueError(f"{path} has lost what was written; delete {folder}")
            file.truncate(size)
            file.write(raw[split])
            file.flush()
            if position:
                os.fsync(file.fileno())
        counts["tokens"] += len(raw[split]) // itemsize
        counts["bytes"] += sizes[split]
    if position:
        state["position"] = position
        write_json(folder / "progress.json", state)


def new_meta(tokenizer, origins, settings, splits) -> Meta:
    return {
        "format": META_FORMAT,
        "dtype": dtype_for(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.hash()},
        "splits": splits,
        "sources": origins,
        "settings": settings,
    }


def write_json(path, value):
    with files.atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def finish_moving(folder):
    """Move a complete data set to its place; also if a kill interrupted this before."""
    if os.path.lexists(folder) and (files.own_folder(folder) / "meta.json").exists():
        with writing(folder.parent):
            for stale in (folder / "progress.json", folder.parent / "meta.json"):
                stale.unlink(missing_ok=True)  # a half-replaced data set must not look complete
            for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
                if (folder / name).exists():
                    os.replace(folder / name, folder.parent / name)
            files.fsync_folder(folder.parent)
            shutil.rmtree(folder)


def already_there(data_dir, wanted) -> Meta | None:
    """The meta of the data set in data_dir, None if there is none; ValueError if it was made of
    another text or with other settings than wanted.
    """
    meta = read_meta(data_dir)
    if meta is not None:
        if found := mismatch(meta, wanted):
            raise ValueError(f"{data_dir} holds another data set {found}")
        TokenDataset(data_dir)  # its files are as meta.json says
        log_row("unchanged", f"{data_dir} already holds this text, prepared like this")
    return meta


def unfinished(folder, wanted, overwrite) -> Progress | None:
    """The progress of a run that was stopped, None if there is none. Progress on a different data
    set is dropped; ValueError if that costs hours of work and overwrite is not set.
    """
    files.clean(folder, "**/*.incomplete")  # of a download that was killed
    if not (folder / "progress.json").exists():
        return None
    try:
        state = files.read_json(folder / "progress.json", Progress)
    except ValueError as error:
        raise ValueError(f"{error}; delete {folder}") from None
    found = mismatch(state, wanted)
    if not found:
        log_row("resuming", f"with what is in {folder}")
        return state
    of_hours = any(PARQUET.search(file["name"]) for file in state["sources"])
    if of_hours and not overwrite:
        raise ValueError(f"{folder} holds an unfinished data set of something else {found}")
    shutil.rmtree(folder)
    return None


def mismatch(there, wanted: dict) -> str:
    """How a meta or a progress differs from what is wanted, and the remedy; "" if it does not."""
    old = there["settings"] | text_of(there["sources"])
    found = [
        f"{name}: {old.get(name)} there, {value} asked for"
        for name, value in wanted.items()
        if old.get(name) != value
    ]
    remedy = "choose another --data_dir, or make it anew with prepare_data.py --overwrite"
    return f"({'; '.join(found)}); {remedy}" if found else ""


def text_of(origins) -> dict:
    """What `mismatch` compares of files, which may have other names."""
    digest = hashlib.sha256("".join(str(file["sha256"]) for file in origins).encode()).hexdigest()
    total = sum(file["bytes"] for file in origins)
    return {"text": f"{total:,} bytes (sha256 {digest[:12]})"} if origins else {}


# ---------------------------------------------------------------- the whole


def prepare(options) -> Meta:
    """Prepare a data set, and return its meta; if it is there already, only that.

    Raises ValueError for text that is empty or not UTF-8, and if data_dir holds a different data
    set, which stays intact.
    """
    data_dir, folder = Path(options.data_dir), Path(options.data_dir, UNFINISHED)
    given = None if options.tokenizer in KINDS else load_tokenizer(options.tokenizer)
    settings = {name: getattr(options, name) for name in SETTINGS}
    if given is not None:  # gpt2 is gpt2, wherever it comes from
        settings["tokenizer"] = "gpt2" if given.kind == "gpt2" else f"{given.kind} {given.hash()}"
    found, on_hub = sources.find_files(options.input or []), options.dataset in HUB_DATASETS
    of_parquet = on_hub or (found and PARQUET.search(found[0][0]))
    if of_parquet and options.encoding:
        raise ValueError(f"--encoding {options.encoding}: is for text files; parquet is in UTF-8")
    if of_parquet and "char" in (options.tokenizer, given and given.kind):
        once = "parquet files are read once, too late to know all characters; use gpt2 or bpe"
        raise ValueError(f"--tokenizer {options.tokenizer}: {once}")
    with files.lock(data_dir):
        finish_moving(folder)
        if options.dataset == "shakespeare":
            found = [sources.shakespeare(data_dir)]
        origins, revision = [describe_file(*file) for file in found], None
        wanted = settings | text_of(origins)
        if not options.overwrite and (meta := already_there(data_dir, wanted)):
            return meta
        state, fetch = unfinished(folder, wanted, options.overwrite), None
        if on_hub:
            listed = state and (state["revision"], state["sources"])
            revision, origins = listed or sources.list_hub_files(options.dataset, options.name)
            at = {"revision": revision, "local_dir": files.own_folder(folder / "download")}
            fetch = partial(sources.download_from_hub, options.dataset, origins, at)
        kind = sources.ParquetFiles if of_parquet else sources.TextFiles
        source = kind(origins, fetch or [path for _, path in found].__getitem__, options)
        if state:
            tokenizer = load_tokenizer(folder / "tokenizer.json")
            said = state["sources"], state["settings"], state["splits"]
            if state | new_meta(tokenizer, *said) != state:
                raise ValueError(f"{folder}: its tokenizer.json is another one; delete {folder}")
            source.survey()
        else:
            tokenizer = make_tokenizer(options, given, source)
            tokenizer.save(folder / "tokenizer.json")
            splits = {split: {"tokens": 0, "bytes": 0, "sha256": ""} for split in ("train", "val")}
            state = new_meta(tokenizer, origins, settings, splits)
            state |= {"revision": revision, "position": (0, 0)}
        append_all(folder, state, tokenizer, source, options.workers)
        for split, counts in state["splits"].items():
            counts["sha256"] = describe_file(split, folder / f"{split}.bin")["sha256"]
            if not counts["tokens"]:
                shutil.rmtree(folder)
                share = f"--val_fraction {options.val_fraction}; take another share, or more text"
                raise ValueError(f"no text for {split}: {share}")
        meta = {name: state[name] for name in Meta.__annotations__}
        write_json(folder / "meta.json", meta)
        finish_moving(folder)
        return meta


def append_all(folder, state, tokenizer, source, workers):
    """Append what is missing, recording every SAVE_SECONDS and after each part how far it is."""
    position, saved = state["position"], -SAVE_SECONDS
    source.done = shown = sum(file["bytes"] for file in source.files[: position[0]])
    all_replaced = 0
    with (
        ThreadPoolExecutor(workers) as pool,  # tiktoken and numpy let others run
        progress("encoding", source.total, source.unit, shown) as advance,
    ):
        start = partial(pool.submit, encode, tokenizer, source)
        work = sources.pieces(source, tokenizer.safe_cut, position)
        for position, raw, sizes, replaced in sources.in_order(start, work, ahead=workers + 2):
            is_due = position[1] == 0 or time.monotonic() - saved > SAVE_SECONDS
            append(folder, state, raw, sizes, position if is_due else None)
            saved = time.monotonic() if is_due else saved
            advance(source.done - shown)
            shown, all_replaced = source.done, all_replaced + replaced
            if position[1] == 0:
                name = source.files[position[0] - 1]["name"]
                (folder / "download" / name).unlink(missing_ok=True)
    if all_replaced and source.errors == "replace":
        warn(f"{all_replaced:,} U+FFFD are in the text, in place of what is not {source.encoding}")


def adopt(data_dir) -> Meta:
    """Make a data set of nanoGPT's train.bin and val.bin of gpt2 tokens, and return its meta; the
    two stay as they are.
    """
    data_dir, splits = Path(data_dir), {}
    if meta := already_there(data_dir, {}):
        return meta
    if (data_dir / "meta.pkl").exists():  # a pickle can run code
        raise ValueError(f"{data_dir / 'meta.pkl'}: not gpt2's tokens; prepare the text itself")
    origins = [describe_file(name, data_dir / name) for name in ("train.bin", "val.bin")]
    for split, file in zip(("train", "val"), origins, strict=True):
        if file["bytes"] % 2 or not file["bytes"]:
            wrong = f"{file['bytes']:,} bytes are not tokens of 2 bytes each"
            raise ValueError(f"{data_dir / file['name']}: {wrong}")
        splits[split] = {"tokens": file["bytes"] // 2, "bytes": None, "sha256": file["sha256"]}
    with files.lock(data_dir):
        gpt2 = GPT2Tokenizer()
        gpt2.save(data_dir / "tokenizer.json")
        meta = new_meta(gpt2, origins, {"dataset": "adopted", "tokenizer": "gpt2"}, splits)
        write_json(data_dir / "meta.json", meta)
        return meta


def prepare_file(path, tokenizer: str, data_dir) -> Meta:
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
    first, *others = meta["sources"]
    more = f" and {len(others)} more" if others else ""
    rows = [
        ("done", f"{data_dir}, of {first['name']} ({first['bytes']:,} bytes){more}", "green"),
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
