"""Text to a data set for train.py: train.bin, val.bin, tokenizer.json, and meta.json last.

    python prepare_data.py                                  # tiny Shakespeare, by characters
    python prepare_data.py --input novel.txt                # your own text, GPT-2's tokens
    python prepare_data.py --input notes/ chat.jsonl.gz --tokenizer bpe --data_dir data/mine

The text is read in chunks, so that it may be larger than the memory: once to count it and to learn
its vocabulary, once to encode it.
"""

import argparse
import codecs
import gzip
import hashlib
import http.client
import json
import os
import re
import shlex
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import TokenDataset, read_meta, write_dataset
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer
from utils import ArgumentParser, lock, log, run

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUNDLED = Path(__file__).parent / "data" / "sonnets.txt"
TIMEOUT, TRIES, PAUSE = 10, 3, 0.5  # of the download: seconds, number, seconds between two

ENDINGS = re.compile(r"\.(txt|md|jsonl)(\.gz)?$", re.IGNORECASE)
CHUNK = 1 << 18  # bytes read at once, and about the characters encoded at once
# characters; a word that is longer is cut, and its tokens with it
LONGEST = 1 << 19
BPE_VOCAB_SIZE = 4096
# what a BPE learns from: bytes of distinct words (training takes some 100 times as much memory),
# and characters in all (a minute)
SAMPLE_WORDS, SAMPLE = 5 << 20, 1 << 27
# what makes a data set: the same again, with the same text, is the same data set
SETTINGS = ("dataset", "tokenizer", "vocab_size", "val_fraction", "errors")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")

END = None  # in a stream of text: here a document ends
BORDER = object()  # in a stream of text: here the validation split begins


# ---------------------------------------------------------------- where the text comes from


def find_files(inputs) -> list[tuple[str, Path]]:
    """Names and paths of the text files that inputs (files and folders) stand for, in order."""
    files, problems = [], []
    for path in map(Path, inputs):
        if path.is_dir():
            found = {file.relative_to(path).as_posix(): file for file in path.rglob("*")}
            found = [(name, found[name]) for name in sorted(found) if _is_text(name, found[name])]
            files += found
            if not found:
                problems.append(f"--input {path}: no .txt, .md or .jsonl (or .gz of one) in it")
        elif not path.exists():
            problems.append(f"--input {path}: no such file")
        elif not ENDINGS.search(path.name):
            problems.append(f"--input {path}: not a .txt, .md or .jsonl (or .gz of one)")
        else:
            files.append((path.name, path))
    if problems:
        raise ValueError("\n".join(problems))
    return files


def _is_text(name, path):
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and ENDINGS.search(name) is not None and path.is_file()


def shakespeare(data_dir) -> tuple[str, Path]:
    """Name and path of tiny Shakespeare, downloaded where it is not there yet; without a network,
    of the sonnets that come with this project.
    """
    path = data_dir / "input.txt"
    if path.exists():
        return path.name, path
    try:
        content = download(SHAKESPEARE, SHAKESPEARE_SHA256)
    except ValueError as problem:
        log(
            f"tiny Shakespeare cannot be downloaded ({problem}): using {BUNDLED.name}, which is "
            f"here; to change to it later, put it at {path} and add --overwrite"
        )
        return BUNDLED.name, BUNDLED
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return path.name, path


def download(address, sha256) -> bytes:
    """What is at address; ValueError saying why not, after a few tries."""
    for attempt in range(TRIES):
        try:
            return _fetch(address, sha256)
        except (OSError, http.client.HTTPException, ValueError) as error:
            is_status = isinstance(error, urllib.error.HTTPError)
            problem = error if is_status else getattr(error, "reason", error)
        if attempt < TRIES - 1:
            time.sleep(PAUSE)
    raise ValueError(problem)


def _fetch(address, sha256):
    parts = []
    with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            while block := response.read(1 << 16):
                parts.append(block)
                bar.update(len(block))
    content = b"".join(parts)
    if len(content) < size:
        raise ValueError(f"cut short, {len(content):,} of {size:,} bytes came")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"another text came, {len(content):,} bytes with a wrong sha256")
    return content


def describe(name, path) -> dict:
    """What meta.json says of a source."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"name": name, "bytes": file.tell(), "sha256": digest.hexdigest()}


# ---------------------------------------------------------------- reading


class Text:
    """The text of files as a stream that can be read again: chunks, and END after each document.

    A .txt or .md is a document, and so is the field "text" of each line of a .jsonl. `replaced`
    counts the U+FFFD that errors="replace" has put for bytes that are not UTF-8.
    """

    def __init__(self, paths, errors="strict"):
        self.paths, self.errors, self.replaced = paths, errors, 0

    def __iter__(self):
        self.replaced = 0
        for path in self.paths:
            ending, gz = ENDINGS.search(path.name).groups()
            read = self._read_lines if ending.lower() == "jsonl" else self._read_whole
            try:
                with gzip.open(path) if gz else open(path, "rb") as file:
                    yield from read(path, file)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: not a whole gzip file ({error})") from None

    def _read_whole(self, path, file):
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        offset = _skip_bom(file)
        while raw := file.read(CHUNK):
            yield self._decode(decoder, raw, path, offset)
            offset += len(raw)
        yield self._decode(decoder, b"", path, offset, final=True)
        yield END

    def _read_lines(self, path, file):
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        offset = _skip_bom(file)
        for number, raw in enumerate(file, start=1):
            line = self._decode(decoder, raw, path, offset, final=True)
            offset += len(raw)
            if line.strip():
                text = self._without_surrogates(_text_field(line, path, number), path, number)
                yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
                yield END

    def _decode(self, decoder, raw, path, offset, final=False):
        """Text of raw, which stands at offset in path; the decoder may hold some bytes before."""
        raw_and_held = decoder.getstate()[0] + raw
        try:
            text = decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            offset += len(raw) - len(raw_and_held) + error.start
            raise ValueError(
                f"{path}: byte 0x{error.object[error.start]:02X} at offset {offset} is not UTF-8; "
                "save the file as UTF-8, or go on with --errors replace"
            ) from None
        # a U+FFFD of the file itself is these three bytes, which no damage around them can hide
        self.replaced += text.count("\ufffd") - raw_and_held.count(b"\xef\xbf\xbd")
        return text

    def _without_surrogates(self, text, path, number):
        """JSON can spell half a surrogate pair (\\ud800), which is not text."""
        text, count = re.subn("[\ud800-\udfff]", "\ufffd", text)
        if count and self.errors == "strict":
            raise ValueError(
                f"{path}, line {number}: half a surrogate pair (\\ud800 to \\udfff) is not text; "
                "go on with --errors replace"
            )
        self.replaced += count
        return text


def _skip_bom(file):
    """Skip the byte order mark that some editors write, and return its length in bytes."""
    if file.read(3) == codecs.BOM_UTF8:
        return 3
    file.seek(0)
    return 0


def _text_field(line, path, number):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"{path}, line {number}: no string in a field 'text'")
    return record["text"]


def with_bar(stream, description, total=None):
    """The stream, and a progress bar where stderr is a terminal."""
    bar = tqdm(desc=description, total=total, unit="char", unit_scale=True, disable=None)
    with bar:
        for chunk in stream:
            if chunk is not END:
                bar.update(len(chunk))
            yield chunk


# ---------------------------------------------------------------- the vocabulary


def count(text) -> tuple[int, set[str]]:
    """How many characters the text has, and which; ValueError if they are all white space."""
    total, characters = 0, set()
    for chunk in with_bar(text, "reading"):
        if chunk is not END:
            total += len(chunk)
            characters.update(chunk)
    if not "".join(characters).strip():
        names = ", ".join(str(path) for path in text.paths[:3])
        raise ValueError(f"{names}: no text, {total:,} characters of white space")
    return total, characters


def train_bpe(text, vocab_size) -> BPETokenizer:
    tokenizer = BPETokenizer.train(training_sample(text), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log(
            f"the vocabulary is {tokenizer.vocab_size:,}, not {vocab_size:,}: "
            "no other pair occurs twice in the text"
        )
    return tokenizer


def training_sample(text):
    """The text from its start until it has SAMPLE_WORDS of distinct words, or SAMPLE characters."""
    words, size, total = set(), 0, 0
    for chunk in text:
        if chunk is not END:
            yield chunk
            new = set(chunk.split()) - words
            words |= new
            size += sum(len(word.encode()) for word in new)
            total += len(chunk)
        if size > SAMPLE_WORDS or total > SAMPLE:
            return


def advise(text, tokenizer):
    """Say how much shorter a Chinese, Japanese or Korean text gets with a vocabulary of its own."""
    sample = "".join(islice((chunk for chunk in text if chunk is not END), 100))[:CHUNK]
    if 2 * len(CJK.findall(sample)) <= sum(map(str.isalpha, sample)):
        return
    own = BPETokenizer.train(sample, BPE_VOCAB_SIZE)
    shorter = 1 - len(own.encode_to_numpy(sample)) / len(tokenizer.encode_to_numpy(sample))
    if shorter > 0:
        log(
            "GPT-2's vocabulary is English: with --tokenizer bpe (and --overwrite) this text would "
            f"be about {shorter:.0%} shorter in tokens"
        )


# ---------------------------------------------------------------- encoding


def encoded_splits(text, tokenizer, total, n_train, workers) -> dict:
    """For write_dataset: both splits as (ids, bytes of text), to be consumed in order."""
    stream = with_border(with_bar(text, "encoding", total), n_train)
    encode = partial(encode_piece, tokenizer)
    train = pieces(iter(stream.__next__, BORDER), tokenizer.safe_cut)
    val = pieces(stream, tokenizer.safe_cut)
    return {
        "train": ordered_map(encode, train, workers),
        "val": ordered_map(encode, val, workers),
    }


def with_border(stream, n_train):
    """The stream with BORDER before its character number n_train."""
    position = 0
    for chunk in stream:
        if chunk is not END:
            cut = n_train - position
            position += len(chunk)
            if 0 <= cut < len(chunk):
                yield chunk[:cut]
                yield BORDER
                chunk = chunk[cut:]
        yield chunk


def pieces(stream, safe_cut):
    """Lists of texts, about CHUNK characters together; between two texts a document ends.

    Pieces are cut where it changes no token; where a text has no such place in LONGEST characters
    (no space, no punctuation), they are cut there.
    """
    texts, held = [""], 0
    for chunk in stream:
        if chunk is END:
            texts.append("")
        else:
            texts[-1] += chunk
            held += len(chunk)
        if held < CHUNK:
            continue
        cut = safe_cut(texts[-1])
        if cut == 0 and len(texts) == 1:
            if held < LONGEST:
                continue
            cut = held
        yield [*texts[:-1], texts[-1][:cut]]
        texts = [texts[-1][cut:]]
        held = len(texts[0])
    yield texts


def encode_piece(tokenizer, texts) -> tuple[np.ndarray, int]:
    """Ids of texts, eot_id between two of them; and their length in bytes of UTF-8."""
    end = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype=np.uint32)
    ids = [tokenizer.encode_to_numpy(texts[0])]
    for text in texts[1:]:
        ids += [end, tokenizer.encode_to_numpy(text)]
    return np.concatenate(ids), sum(len(text.encode()) for text in texts)


def ordered_map(function, items, workers):
    """map in threads (tiktoken and numpy let others run), in order, few items ahead."""
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---------------------------------------------------------------- the whole


def prepare(options) -> dict:
    """Prepare a data set as parse has understood it, and return its meta; where it is already
    there, only that.

    The last val_fraction of the characters is the validation split. Raises ValueError for text
    that is empty or not UTF-8, and where data_dir holds another data set; that one stays intact.
    """
    data_dir = Path(options.data_dir)
    settings = {name: getattr(options, name) for name in SETTINGS}
    files = find_files(options.input) if options.dataset == "custom" else []
    with lock(data_dir):
        files = files or [shakespeare(data_dir)]
        sources = [describe(name, path) for name, path in files]
        if not options.overwrite and (meta := already_there(data_dir, sources, settings)):
            log(f"{data_dir} already holds this text, prepared like this")
            return meta
        text = Text([path for _, path in files], options.errors)
        splits, tokenizer = tokenize(text, options)
        meta = write_dataset(data_dir, splits, tokenizer, sources, settings)
        if tokenizer.kind == "gpt2":
            advise(text, tokenizer)
    return meta


def prepare_file(path, tokenizer_kind: str, data_dir) -> dict:
    """For `train.py --data FILE`: prepare it unless it is there already, and return the meta."""
    return prepare(
        parse([f"--input={path}", f"--tokenizer={tokenizer_kind}", f"--data_dir={data_dir}"])
    )


def tokenize(text, options):
    """Both splits for write_dataset, and the tokenizer."""
    tokenizer = GPT2Tokenizer() if options.tokenizer == "gpt2" else None  # first: it may not be had
    total, characters = count(text)
    if text.replaced:
        log(f"{text.replaced:,} replacements (U+FFFD) for bytes that are not UTF-8")
    n_train = int((1 - options.val_fraction) * total)
    if not 0 < n_train < total:
        raise ValueError(
            f"{total} characters cannot be split by --val_fraction {options.val_fraction}: "
            f"{n_train} to train on, {total - n_train} to validate with"
        )
    if options.tokenizer == "char":
        tokenizer = CharTokenizer.train(characters)
    elif options.tokenizer == "bpe":
        tokenizer = train_bpe(text, options.vocab_size)
    return encoded_splits(text, tokenizer, total, n_train, options.workers), tokenizer


def already_there(data_dir, sources, settings) -> dict | None:
    """The meta of the data set in data_dir, None where there is none.

    Raises ValueError with the differences where it was made from other text or settings.
    """
    meta = read_meta(data_dir)
    if meta is None:
        return None
    there = meta.get("settings", {})
    differences = [
        f"{name}: {there.get(name)} there, {value} asked for"
        for name, value in settings.items()
        if there.get(name) != value
    ]
    if [s["sha256"] for s in meta.get("sources", [])] != [s["sha256"] for s in sources]:
        differences.append(f"text: {_names(meta.get('sources', []))} there, {_names(sources)} now")
    if differences:
        raise ValueError(
            f"{data_dir} holds another data set ({'; '.join(differences)}); choose another "
            "--data_dir, or make it anew with prepare_data.py --overwrite"
        )
    TokenDataset(data_dir)  # its files are as meta.json says
    return meta


def _names(sources):
    """'a.txt (1,000 bytes), b.txt (20 bytes) and 7 more'"""
    names = [f"{source['name']} ({source['bytes']:,} bytes)" for source in sources[:3]]
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return ", ".join(names) + more


def summary(meta, data_dir) -> str:
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    a_token = (train["bytes"] + val["bytes"]) / (train["tokens"] + val["tokens"])
    default = Path(data_dir) == Path("data/shakespeare")
    flag = "" if default else f" --data_dir {shlex.quote(str(data_dir))}"
    return "\n".join(
        [
            f"{data_dir}: {_names(meta['sources'])}",
            f"train      {train['tokens']:>14,} tokens",
            f"val        {val['tokens']:>14,} tokens",
            f"vocabulary {meta['vocab_size']:>14,} ({meta['tokenizer']['kind']}), "
            f"{a_token:.2f} bytes a token",
            f"next: python train.py{flag}",
        ]
    )


def parse(argv):
    """The options, what follows from them filled in; ValueError with a line for each problem."""
    parser = ArgumentParser(
        prog="prepare_data.py",
        description="Make a data set of a text.",
        formatter_class=argparse.HelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=["shakespeare", "custom"], help="custom where --input is given")
    add("--input", nargs="+", metavar="PATH", help=".txt, .md, .jsonl, .gz of these, or folders")
    add("--tokenizer", choices=["char", "bpe", "gpt2"], help="char for shakespeare, else gpt2")
    add("--vocab_size", type=int, metavar="N", help=f"of bpe; {BPE_VOCAB_SIZE} if not given")
    add("--val_fraction", type=float, default=0.1, metavar="F", help="of the text, its end; 0.1")
    add("--data_dir", metavar="DIR", help="where to write; ./data/<dataset> if not given")
    add("--workers", type=int, metavar="N", help="threads; as many as cores if not given")
    add("--overwrite", action="store_true", help="replace a data set that is there")
    add("--errors", choices=["strict", "replace"], default="strict", help="for text not in UTF-8")
    options = parser.parse_args(argv)
    options.dataset = options.dataset or ("custom" if options.input else "shakespeare")
    if options.tokenizer is None:
        options.tokenizer = "char" if options.dataset == "shakespeare" else "gpt2"
    if found := problems(options):
        raise ValueError("\n".join(found))
    if options.vocab_size is None and options.tokenizer == "bpe":
        options.vocab_size = BPE_VOCAB_SIZE
    options.data_dir = options.data_dir or f"./data/{options.dataset}"
    options.workers = options.workers or os.cpu_count() or 1
    return options


def problems(options) -> list[str]:
    """One line for each."""
    found = []
    if options.dataset == "custom" and not options.input:
        found.append("--dataset custom needs --input FILE")
    if options.dataset == "shakespeare" and options.input:
        found.append("--input is not for --dataset shakespeare; use --dataset custom")
    if options.vocab_size is not None and options.tokenizer != "bpe":
        found.append(f"--vocab_size {options.vocab_size}: only for --tokenizer bpe")
    if options.vocab_size is not None and options.vocab_size < 257:
        found.append(f"--vocab_size {options.vocab_size}: must be at least 257, all bytes and one")
    if not 0 < options.val_fraction < 1:
        found.append(f"--val_fraction {options.val_fraction}: must be between 0 and 1")
    if options.workers is not None and options.workers < 1:
        found.append(f"--workers {options.workers}: must be at least 1")
    return found


def main(argv=None) -> int:
    options = parse(argv)
    print(summary(prepare(options), options.data_dir))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
