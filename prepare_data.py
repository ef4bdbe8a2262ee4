"""Text to a data set for train.py: train.bin, val.bin, tokenizer.json, and meta.json last.

    python prepare_data.py                      # tiny Shakespeare, by characters
    python prepare_data.py --input novel.txt    # your own text, GPT-2's tokens
    python prepare_data.py --input a.txt --tokenizer char --data_dir data/a
    python prepare_data.py --input notes/ chat.jsonl.gz --tokenizer bpe
    python prepare_data.py --dataset fineweb --name sample-10BT    # from the hub
    python prepare_data.py --adopt nanoGPT/data/openwebtext      # its .bin files

A source (sources.py) gives documents, which are cut into pieces, encoded in threads and appended in
order to data_dir/.unfinished. After a kill the same command goes on after the last parquet file.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

import files
import sources
from data import META_FORMAT, TOKEN_DTYPES, Count, Meta, TokenDataset
from logger import command_for, log_row, progress, run, stdout, warn
from options import integer, number, parse_args, validate
from tokenizer import KINDS, MOST_TOKENS, GPT2Tokenizer, load_tokenizer

# what makes a data set: with the same text and these, it is the same
SETTINGS = ("dataset", "name", "tokenizer", "vocab_size", "val_fraction", "encoding", "errors")
# what a BPE learns from: bytes of distinct words (its memory is 100 times that), and characters
SAMPLE_WORDS, SAMPLE = 5 << 20, 1 << 27

Dataset = Literal["shakespeare", "custom", *sources.HUB_DATASETS]
Name = Annotated[str, Field(min_length=1)]


@dataclass
class Options:
    # where the text comes from
    dataset: Dataset | None = None  # which text; unset: custom with --input, else shakespeare
    input: list[Name] | None = None  # .txt, .md, .jsonl (or .gz of one), .parquet, or folders
    name: str | None = None  # part of a data set on the hub; unset: of fineweb sample-10BT
    adopt: Name | None = None  # the folder of nanoGPT's train.bin and val.bin, gpt2's tokens
    encoding: Name | None = None  # of text files: gb18030, big5, utf_16 ...; unset: utf-8
    errors: Literal["strict", "replace"] = "strict"  # what is not in it: stop, or put U+FFFD
    # what becomes of it
    tokenizer: Literal[*KINDS] | str | None = None  # or a file; unset: gpt2; for shakespeare char
    vocab_size: integer(257, MOST_TOKENS) | None = None  # of bpe; unset: 4096
    val_fraction: number(above=0, below=1) | None = None  # held out; unset: 0.1; of the hub 0.0005
    # output
    data_dir: str | None = None  # where to write; unset: ./data/<dataset>
    overwrite: bool = False  # replace a data set that is there
    workers: integer(1, 1024) | None = None  # threads; unset: as many as cores

    def __post_init__(self):
        row = sources.HUB_DATASETS.get(self.dataset)
        self.dataset = self.dataset or ("custom" if self.input else "shakespeare")
        self.tokenizer = self.tokenizer or ("char" if self.dataset == "shakespeare" else "gpt2")
        self.name = self.name or (row and row[-1])
        self.val_fraction = self.val_fraction or (0.0005 if row else 0.1)
        self.vocab_size = self.vocab_size or (4096 if self.tokenizer == "bpe" else None)
        self.data_dir = self.data_dir or self.adopt or f"./data/{self.dataset}"
        self.workers = self.workers or os.cpu_count() or 1

    def conflicts(self):
        dataset, kind = self.dataset, self.tokenizer
        known = kind in KINDS or Path(kind).is_file()
        has_parts = sources.HUB_DATASETS.get(dataset, (None,))[-1]
        others = self.input or self.data_dir != self.adopt or dataset != "shakespeare"
        wrong = {
            "--adopt DIR takes the data set in DIR, and no other flags": self.adopt and others,
            "--input FILE goes with --dataset custom": (dataset == "custom") != bool(self.input),
            f"--name {self.name}: not for {dataset}": self.name and not has_parts,
            f"--tokenizer {kind}: neither {', '.join(KINDS)} nor a file": not known,
            f"--vocab_size {self.vocab_size}: only for bpe": self.vocab_size and kind != "bpe",
        }
        return [message for message, is_so in wrong.items() if is_so]


def make_tokenizer(kind, given, source, vocab_size):
    """The given tokenizer, GPT-2's, or one of this kind that is trained on the text."""
    if kind == "gpt2":
        given = given or GPT2Tokenizer()  # before all other work: it may not be had
    characters = {} if kind == "char" else None
    source.survey(characters)
    if given is None and kind == "bpe":
        log_row("vocabulary", f"learning {vocab_size:,} tokens from the text")
        sample = training_sample(filter(None, source.texts()))
        return files.in_thread(KINDS[kind].train, sample, vocab_size).result()
    given = given or KINDS[kind].train(characters)
    if characters and (new := min(characters.keys() - set(given.characters), default="")):
        where = f"{characters[new]}: U+{ord(new):04X} {new!r}"
        raise ValueError(f"{where} is not in the vocabulary of --tokenizer")
    return given


def training_sample(chunks):
    """The text from its start until it has SAMPLE_WORDS of distinct words, or SAMPLE characters."""
    words, size, total = set(), 0, 0
    for chunk in chunks:
        yield chunk
        new = set(chunk.split()) - words
        words |= new
        size += sum(len(word.encode()) for word in new)
        total += len(chunk)
        if size > SAMPLE_WORDS or total > SAMPLE:
            return


def encode(tokenizer, dtype, as_encoded, piece):
    """The split of a piece, its ids as on disk, its bytes of text, and the U+FFFD in it."""
    split, documents = piece  # an end of text stands between two
    text, eot = "".join(documents), [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    ids = (tokenizer.encode_to_numpy(as_encoded(document)) for document in documents)
    raw = np.array(eot, dtype).tobytes().join(part.astype(dtype).tobytes() for part in ids)
    return split, raw, len(text.encode()), text.count("\ufffd")


class Progress(Meta):
    """What progress.json holds: the meta.json to be, and how far it is."""

    revision: str | None  # of the hub
    position: Count  # parts of the source that are done


def append(folder, state, split, raw, text_bytes):
    """Add ids, as on disk, to a split; what a killed run has left of its last part is cut."""
    counts, itemsize = state["splits"][split], TOKEN_DTYPES[state["dtype"]].itemsize
    path, size = folder / f"{split}.bin", counts["tokens"] * itemsize
    with files.writing(path), files.open_to_append(path) as file:
        if file.tell() < size:
            raise ValueError(f"{path} has lost what was written; delete {folder}")
        file.truncate(size)
        file.write(raw)
    counts["tokens"] += len(raw) // itemsize
    counts["bytes"] = (counts["bytes"] or 0) + text_bytes


def new_meta(tokenizer, **others) -> dict:
    return {
        "format": META_FORMAT,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.hash()},
        **others,
    }


def write_json(path, value):
    with files.atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def find(path, schema, settings, origins, overwrite=False):
    """A meta.json or progress.json of this text and these settings; ValueError for another's."""
    try:
        there = files.read_json(path, schema)
        others = [
            f"{name}: {there['settings'].get(name)} there, {value} asked for"
            for name, value in settings.items()
            if there["settings"].get(name) != value
        ]
        digests = [file["sha256"] for file in origins]  # none are known of the hub's
        if digests and digests != [file["sha256"] for file in there["sources"]]:
            others.append("another text")
        if others:
            raise ValueError(f"{path} is of something else ({'; '.join(others)})")
        return there
    except FileNotFoundError:
        return None
    except ValueError as error:
        if overwrite:
            return None
        remedy = "choose another --data_dir, or make it anew with prepare_data.py --overwrite"
        raise ValueError(f"{error}; {remedy}") from None


def prepare(options) -> Meta:
    """The meta of a data set, made unless it is there; ValueError for bad text, or another's."""
    data_dir, folder = Path(options.data_dir), Path(options.data_dir, ".unfinished")
    settings = {name: getattr(options, name) for name in SETTINGS}
    kind, given = options.tokenizer, None
    if kind not in KINDS:
        given = load_tokenizer(kind)
        kind = given.kind
        settings["tokenizer"] = kind if kind == "gpt2" else f"{kind} {given.hash()}"
    on_hub, found = options.dataset in sources.HUB_DATASETS, sources.find_files(options.input or [])
    of_parquet = on_hub or (found and sources.PARQUET.search(found[0][0]))
    if of_parquet and (kind == "char" or options.encoding):
        raise ValueError("--encoding and --tokenizer char are for text files; use gpt2 or bpe")
    with files.lock(data_dir):
        if options.dataset == "shakespeare":
            found = [sources.shakespeare(data_dir)]
        origins, revision = [sources.describe_file(*file) for file in found], None
        if not options.overwrite and find(data_dir / "meta.json", Meta, settings, origins):
            log_row("unchanged", f"{data_dir} already holds this text, prepared like this")
            return TokenDataset(data_dir).meta  # its files are as meta.json says
        download = files.own_folder(files.own_folder(folder) / "download")
        for path in filter(Path.is_dir, download.rglob("*")):
            files.own_folder(path)  # no link
        state = find(folder / "progress.json", Progress, settings, origins, options.overwrite)
        fetch = [path for _, path in found].__getitem__
        if on_hub:
            files.remove(*folder.glob("**/*.incomplete"))  # of a download that was killed
            revision, origins, fetch = sources.from_hub(options, state, download)
        form = sources.ParquetFiles if of_parquet else sources.TextFiles
        source = form(origins, fetch, options)
        if state:
            log_row("resuming", f"with what is in {folder}")
            tokenizer = load_tokenizer(folder / "tokenizer.json")
            if state | new_meta(tokenizer) != state:
                raise ValueError(f"{folder}: progress.json is not of its tokenizer.json; delete it")
        else:
            files.remove(folder / "progress.json")  # of another text
            tokenizer = make_tokenizer(kind, given, source, options.vocab_size)
            others = {"sources": origins, "settings": settings, "revision": revision, "position": 0}
            splits = {split: {"tokens": 0, "bytes": 0, "sha256": ""} for split in ("train", "val")}
            state = new_meta(tokenizer, splits=splits, **others)
        tokenizer.save(folder / "tokenizer.json")
        append_all(folder, state, tokenizer, source, options)
        for split, counts in state["splits"].items():
            append(folder, state, split, b"", 0)  # checks the size of what a killed run has left
            counts["sha256"] = sources.describe_file(split, folder / f"{split}.bin")["sha256"]
            if not counts["tokens"]:
                files.remove(folder)
                share = f"--val_fraction {options.val_fraction}"
                raise ValueError(f"no text for {split}: {share}; take another, or more text")
        del state["revision"], state["position"]
        write_json(folder / "meta.json", state)
        # a half-replaced data set must not look complete
        files.remove(folder / "progress.json", data_dir / "meta.json")
        for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
            os.replace(folder / name, data_dir / name)
        files.fsync_folder(data_dir)
        files.remove(folder)
        return state


def append_all(folder, state, tokenizer, source, options):
    """Append the parts that are missing, and record each when it is done."""
    source.done = shown = sum(file["bytes"] for file in source.files[: state["position"]])
    replaced, dtype = 0, TOKEN_DTYPES[state["dtype"]]
    with (
        ThreadPoolExecutor(options.workers) as pool,  # tiktoken and numpy let others run
        progress("encoding", source.total, source.unit, shown) as advance,
    ):
        start = partial(pool.submit, encode, tokenizer, dtype, source.as_encoded)
        for part in source.parts(state["position"]):
            work = sources.pieces(part, tokenizer.safe_cut)
            for split, raw, size, lost in sources.in_order(start, work, options.workers + 2):
                append(folder, state, split, raw, size)
                replaced += lost
                advance(source.done - shown)
                shown = source.done
            for path in (folder / "train.bin", folder / "val.bin"):
                with files.writing(path), files.open_to_append(path) as file:
                    os.fsync(file.fileno())
            state["position"] += 1
            write_json(folder / "progress.json", state)
            files.remove(folder / "download" / source.files[state["position"] - 1]["name"])
    if replaced and options.errors == "replace":
        warn(f"{replaced:,} U+FFFD are in the text, in place of what cannot be read")


def adopt(data_dir) -> Meta:
    """Add tokenizer.json and meta.json to nanoGPT's train.bin and val.bin of gpt2 tokens."""
    data_dir, splits, origins = Path(data_dir), {}, []
    if (data_dir / "meta.json").exists():
        return TokenDataset(data_dir).meta
    if (data_dir / "meta.pkl").exists():  # a pickle can run code
        raise ValueError(f"{data_dir / 'meta.pkl'}: not gpt2's tokens; prepare the text itself")
    for split in ("train", "val"):
        path = data_dir / f"{split}.bin"
        origins.append(file := sources.describe_file(path.name, path))
        if file["bytes"] % 2 or not file["bytes"]:
            raise ValueError(f"{path}: {file['bytes']:,} bytes are not tokens of 2 bytes each")
        splits[split] = {"tokens": file["bytes"] // 2, "bytes": None, "sha256": file["sha256"]}
    tokenizer, settings = GPT2Tokenizer(), {"dataset": "adopted", "tokenizer": "gpt2"}
    tokenizer.save(data_dir / "tokenizer.json")
    meta = new_meta(tokenizer, splits=splits, sources=origins, settings=settings)
    write_json(data_dir / "meta.json", meta)
    return meta


def prepare_file(path, tokenizer: str, data_dir) -> Meta:
    """`prepare` for one text file; tokenizer: a kind, or the path of a tokenizer.json."""
    options = Options(input=[str(path)], tokenizer=str(tokenizer), data_dir=str(data_dir))
    return prepare(validate(options))


def show_summary(meta, data_dir):
    splits, (first, *others) = meta["splits"], meta["sources"]
    more = f" and {len(others)} more" if others else ""
    source = f"{first['name']} ({first['bytes']:,} bytes){more}"
    log_row("done", f"{data_dir}, of {source}", "green", stdout)
    for name, split in splits.items():
        log_row(name, f"{split['tokens']:>14,} tokens", console=stdout)
    vocabulary = f"{meta['vocab_size']:>14,} ({meta['tokenizer']['kind']})"
    if size := sum(split["bytes"] or 0 for split in splits.values()):  # of adopted it is unknown
        tokens = sum(split["tokens"] for split in splits.values())
        vocabulary += f", {size / tokens:.2f} bytes a token"
    log_row("vocabulary", vocabulary, console=stdout)
    flags = [] if Path(data_dir) == Path("data/shakespeare") else ["--data_dir", data_dir]
    log_row("next", command_for("train.py", *flags), console=stdout, fold=False)


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
