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
import shutil
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
from files import writing
from logger import command_for, log_next, log_row, progress, run, stdout, warn
from options import integer, number, parse_args, validate
from sources import END, HUB_DATASETS, PARQUET, describe_file
from tokenizer import KINDS, MOST_TOKENS, GPT2Tokenizer, load_tokenizer

# what makes a data set: with the same text and these, it is the same
SETTINGS = ("dataset", "name", "tokenizer", "vocab_size", "val_fraction", "encoding", "errors")
# what a BPE learns from: bytes of distinct words (its memory is 100 times that), and characters
SAMPLE_WORDS, SAMPLE = 5 << 20, 1 << 27

Dataset = Literal["shakespeare", "custom", *HUB_DATASETS]
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
        on_hub = self.dataset in HUB_DATASETS
        self.dataset = self.dataset or ("custom" if self.input else "shakespeare")
        self.tokenizer = self.tokenizer or ("char" if self.dataset == "shakespeare" else "gpt2")
        self.name = self.name or (HUB_DATASETS[self.dataset][-1] if on_hub else None)
        self.val_fraction = self.val_fraction or (0.0005 if on_hub else 0.1)
        if self.tokenizer == "bpe":
            self.vocab_size = self.vocab_size or 4096
        self.data_dir = self.data_dir or self.adopt or f"./data/{self.dataset}"
        self.workers = self.workers or os.cpu_count() or 1

    def conflicts(self):
        dataset, kind, custom = self.dataset, self.tokenizer, self.dataset == "custom"
        others = self.input or self.data_dir != self.adopt or dataset != "shakespeare"
        known = kind in KINDS or Path(kind).is_file()
        has_parts = dataset in HUB_DATASETS and HUB_DATASETS[dataset][-1]
        wrong = [
            (self.adopt and others, "--adopt DIR takes the data set in DIR, and no other flags"),
            (custom and not self.input, "--dataset custom needs --input FILE"),
            (self.input and not custom, f"--input is not for {dataset}; use --dataset custom"),
            (self.name and not has_parts, f"--name {self.name}: not for {dataset}"),
            (not known, f"--tokenizer {kind}: neither {', '.join(KINDS)} nor a file"),
            (self.vocab_size and kind != "bpe", f"--vocab_size {self.vocab_size}: only for bpe"),
            (self.encoding and not custom, "--encoding is for the text files of --input"),
        ]
        return [message for is_so, message in wrong if is_so]


def make_tokenizer(kind, given, source, vocab_size):
    """The given tokenizer, GPT-2's, or one of this kind that is trained on the text."""
    if kind not in ("char", "bpe"):  # which learn from the text
        given = given or KINDS[kind]()  # before all other work: it may not be had
    characters = {} if kind == "char" else None
    source.survey(characters)
    if given is None and kind == "bpe":
        log_row("vocabulary", f"learning {vocab_size:,} tokens from the text")
        sample = training_sample(text for _, text in source.texts())
        return files.in_thread(KINDS[kind].train, sample, vocab_size).result()
    given = given or KINDS[kind].train(characters)
    if characters and (new := min(characters.keys() - set(given.characters), default="")):
        where = f"{characters[new]}: U+{ord(new):04X} {new!r}"
        raise ValueError(f"{where} is not in the vocabulary of --tokenizer")
    return given


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


def encode(tokenizer, dtype, as_encoded, piece):
    """For each split the ids as on disk and the bytes of text; the number of U+FFFD in both."""
    raw, sizes, replaced = {"train": bytearray(), "val": bytearray()}, {"train": 0, "val": 0}, 0
    for split, text in piece:
        if text is not END:
            raw[split] += tokenizer.encode_to_numpy(as_encoded(text)).astype(dtype).tobytes()
            sizes[split] += len(text.encode())
            replaced += text.count("\ufffd")
        elif tokenizer.eot_id is not None:
            raw[split] += np.array(tokenizer.eot_id, dtype).tobytes()
    return raw, sizes, replaced


class Progress(Meta):
    """What progress.json holds: the meta.json to be, and how far it is."""

    revision: str | None  # of the hub
    position: Count  # parts of the source that are done


def append(folder, state, raw, sizes):
    """Add ids, as on disk, to each split; what a killed run has left of its last part is cut."""
    itemsize = TOKEN_DTYPES[state["dtype"]].itemsize
    for split, counts in state["splits"].items():
        path, size = folder / f"{split}.bin", counts["tokens"] * itemsize
        with writing(path), files.open_to_append(path) as file:
            if file.tell() < size:
                raise ValueError(f"{path} has lost what was written; delete {folder}")
            file.truncate(size)
            file.write(raw[split])
        counts["tokens"] += len(raw[split]) // itemsize
        counts["bytes"] += sizes[split]


def new_meta(tokenizer, origins, settings, splits) -> Meta:
    return {
        "format": META_FORMAT,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.hash()},
        "splits": splits,
        "sources": origins,
        "settings": settings,
    }


def write_json(path, value):
    with files.atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def find(path, schema, settings, origins):
    """A meta.json or progress.json, if there is one; ValueError if of another text or settings."""
    try:
        there = files.read_json(path, schema)
        found = [
            f"{name}: {there['settings'].get(name)} there, {value} asked for"
            for name, value in settings.items()
            if there["settings"].get(name) != value
        ]
        digests = [file["sha256"] for file in origins]  # none are known of the hub's
        if digests and digests != [file["sha256"] for file in there["sources"]]:
            found.append("another text")
        if found:
            raise ValueError(f"{path} is of something else ({'; '.join(found)})")
        return there
    except FileNotFoundError:
        return None
    except ValueError as error:
        remedy = "choose another --data_dir, or make it anew with prepare_data.py --overwrite"
        raise ValueError(f"{error}; {remedy}") from None


def finish_moving(folder):
    """Move a complete data set to its place, unless there is none."""
    if os.path.lexists(folder) and (files.own_folder(folder) / "meta.json").exists():
        with writing(folder.parent):
            for stale in (folder / "progress.json", folder.parent / "meta.json"):
                stale.unlink(missing_ok=True)  # a half-replaced data set must not look complete
            for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
                if (folder / name).exists():
                    os.replace(folder / name, folder.parent / name)
            files.fsync_folder(folder.parent)
            shutil.rmtree(folder)


def prepare(options) -> Meta:
    """The meta of a data set, made unless it is there; ValueError for bad text, or another's."""
    data_dir, folder = Path(options.data_dir), Path(options.data_dir, ".unfinished")
    settings = {name: getattr(options, name) for name in SETTINGS}
    kind, given = options.tokenizer, None
    if kind not in KINDS:
        given = load_tokenizer(kind)
        kind = given.kind
        settings["tokenizer"] = kind if kind == "gpt2" else f"{kind} {given.hash()}"
    found, on_hub = sources.find_files(options.input or []), options.dataset in HUB_DATASETS
    of_parquet = on_hub or (found and PARQUET.search(found[0][0]))
    if of_parquet and (kind == "char" or options.encoding):
        raise ValueError("--encoding and --tokenizer char are for text files; use gpt2 or bpe")
    with files.lock(data_dir):
        finish_moving(folder)
        if options.dataset == "shakespeare":
            found = [sources.shakespeare(data_dir)]
        origins, revision = [describe_file(*file) for file in found], None
        if not options.overwrite and find(data_dir / "meta.json", Meta, settings, origins):
            log_row("unchanged", f"{data_dir} already holds this text, prepared like this")
            return TokenDataset(data_dir).meta  # its files are as meta.json says
        try:
            state = find(folder / "progress.json", Progress, settings, origins)
        except ValueError:
            if not options.overwrite:
                raise
            shutil.rmtree(folder)
            state = None
        fetch = [path for _, path in found].__getitem__
        if on_hub:
            files.clean(folder, "**/*.incomplete")  # of a download that was killed
            known = state and (state["revision"], state["sources"])
            revision, origins, fetch = sources.from_hub(options, known, folder / "download")
        form = sources.ParquetFiles if of_parquet else sources.TextFiles
        source = form(origins, fetch, options)
        if state:
            log_row("resuming", f"with what is in {folder}")
            tokenizer = load_tokenizer(folder / "tokenizer.json")
            made = new_meta(tokenizer, state["sources"], state["settings"], state["splits"])
            if state | made != state:
                raise ValueError(f"its tokenizer.json is not progress.json's; delete {folder}")
        else:
            tokenizer = make_tokenizer(kind, given, source, options.vocab_size)
            tokenizer.save(folder / "tokenizer.json")
            splits = {split: {"tokens": 0, "bytes": 0, "sha256": ""} for split in ("train", "val")}
            state = new_meta(tokenizer, origins, settings, splits)
            state |= {"revision": revision, "position": 0}
        append_all(folder, state, tokenizer, source, options.workers)
        for split, counts in state["splits"].items():
            counts["sha256"] = describe_file(split, folder / f"{split}.bin")["sha256"]
            if not counts["tokens"]:
                shutil.rmtree(folder)
                share = f"--val_fraction {options.val_fraction}; take another share, or more text"
                raise ValueError(f"no text for {split}: {share}")
        del state["revision"], state["position"]
        write_json(folder / "meta.json", state)
        finish_moving(folder)
        return state


def append_all(folder, state, tokenizer, source, workers):
    """Append the parts that are missing, and record each when it is done."""
    source.done = shown = sum(file["bytes"] for file in source.files[: state["position"]])
    replaced, dtype = 0, TOKEN_DTYPES[state["dtype"]]
    with (
        ThreadPoolExecutor(workers) as pool,  # tiktoken and numpy let others run
        progress("encoding", source.total, source.unit, shown) as advance,
    ):
        start = partial(pool.submit, encode, tokenizer, dtype, source.as_encoded)
        for part in source.parts(state["position"]):
            work = sources.pieces(part, tokenizer.safe_cut)
            for raw, sizes, lost in sources.in_order(start, work, ahead=workers + 2):
                append(folder, state, raw, sizes)
                replaced += lost
                advance(source.done - shown)
                shown = source.done
            for path in (folder / "train.bin", folder / "val.bin"):
                with writing(path), files.open_to_append(path) as file:
                    os.fsync(file.fileno())
            name = source.files[state["position"]]["name"]
            state["position"] += 1
            write_json(folder / "progress.json", state)
            (folder / "download" / name).unlink(missing_ok=True)
    if replaced and source.errors == "replace":
        warn(f"{replaced:,} U+FFFD are in the text, in place of what cannot be read")


def adopt(data_dir) -> Meta:
    """Add tokenizer.json and meta.json to nanoGPT's train.bin and val.bin of gpt2 tokens."""
    data_dir, splits = Path(data_dir), {}
    if (data_dir / "meta.json").exists():
        return TokenDataset(data_dir).meta
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
    """`prepare` for one text file; tokenizer: a kind, or the path of a tokenizer.json."""
    options = Options(input=[str(path)], tokenizer=str(tokenizer), data_dir=str(data_dir))
    validate(options)
    return prepare(options)


def show_summary(meta, data_dir):
    splits, (first, *others) = meta["splits"].values(), meta["sources"]
    more = f" and {len(others)} more" if others else ""
    source = f"{first['name']} ({first['bytes']:,} bytes){more}"
    log_row("done", f"{data_dir}, of {source}", "green", stdout)
    for name, split in meta["splits"].items():
        log_row(name, f"{split['tokens']:>14,} tokens", console=stdout)
    vocabulary = f"{meta['vocab_size']:>14,} ({meta['tokenizer']['kind']})"
    if meta["splits"]["train"]["bytes"] is not None:  # adopted tokens' text is not known
        a_token = sum(split["bytes"] for split in splits) / sum(split["tokens"] for split in splits)
        vocabulary += f", {a_token:.2f} bytes a token"
    log_row("vocabulary", vocabulary, console=stdout)
    flags = [] if Path(data_dir) == Path("data/shakespeare") else ["--data_dir", data_dir]
    log_next(command_for("train.py", *flags), console=stdout)


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
