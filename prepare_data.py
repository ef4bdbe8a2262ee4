"""Text to a data set for train.py: train.bin, val.bin, tokenizer.json, and meta.json last.

    python prepare_data.py                      # tiny Shakespeare, by characters
    python prepare_data.py --input novel.txt    # your own text, GPT-2's tokens
    python prepare_data.py --input a.txt --tokenizer char --data_dir data/a
    python prepare_data.py --input notes/ chat.jsonl.gz --tokenizer bpe
    python prepare_data.py --dataset fineweb --name sample-10BT    # from the hub
    python prepare_data.py --adopt nanoGPT/data/openwebtext      # its .bin files

Text is read in chunks, so that it may be larger than the memory: once to count it and to learn its
vocabulary, once to encode it; its end is the validation split. Parquet files are read once, and a
hash of each document says which split it is for; a run that was stopped goes on.
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import (
    UNFINISHED,
    GrowingDataset,
    TokenDataset,
    adopt_dataset,
    dtype_for,
    finish_moving,
    read_meta,
    read_progress,
    save_progress,
    write_dataset,
)
from tokenizer import KINDS, BPETokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from utils import (
    ArgumentParser,
    command_for,
    download,
    human_time,
    labelled,
    live_line,
    lock,
    log,
    log_row,
    next_commands,
    run,
    warn,
)

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUNDLED = Path(__file__).parent / "data" / "sonnets.txt"

ON_HUB = ("openwebtext", "fineweb")
NEEDS_HUB = "the hub and .parquet need more packages: pip install -r requirements-hub.txt"

ENDINGS = re.compile(r"\.(txt|md|jsonl)(\.gz)?$", re.IGNORECASE)
PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
HIDDEN = re.compile(r"(^|/)\.")
FORMS = ".txt, .md, .jsonl (or .gz of one) or .parquet"
TEXT_TYPES = ("string", "large_string", "string_view")  # of Arrow
ROWS = 64  # of a parquet file, read at once
TOKENS_SHARE = 0.8  # bytes of gpt2 tokens for a byte of parquet; for OpenWebText 0.75
SAVE_SECONDS = 10  # of work that a kill may cost
LISTING_SECONDS = 120  # for the hub to name its files
GO_ON = "`prepare_data.py --errors replace` puts a U+FFFD there and goes on"
CHUNK = 1 << 18  # bytes read at once, and about the characters encoded at once
LONGEST = 1 << 19  # characters; a word that is longer is cut, and its tokens with it
BPE_VOCAB_SIZE = 4096
# what a BPE learns from: bytes of distinct words (training takes some 100 times as much memory),
# and characters in all (a minute)
SAMPLE_WORDS, SAMPLE = 5 << 20, 1 << 27
# what makes a data set: the same again, with the same text, is the same data set
SETTINGS = ("dataset", "name", "tokenizer", "vocab_size", "val_fraction", "errors")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")

END = None  # in a stream of text: here a document ends
BORDER = object()  # in a stream of text: here the validation split begins


# ---------------------------------------------------------------- where the text comes from


def find_files(inputs) -> list[tuple[str, Path]]:
    """Names and paths of the files that inputs (files and folders) stand for, in order: all of
    text, or all parquet.
    """
    files, problems = [], []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*"))
            found = [(name, file) for name, file in found if not HIDDEN.search(name)]
            files += (of_data := [(name, file) for name, file in found if _is_data(file)])
            if not of_data:
                problems.append(f"--input {path}: no {FORMS} in it")
            if links := [name for name, file in found if file.is_symlink() and not file.is_file()]:
                warn(f"--input {path}: links to folders or nothing are not followed: {_few(links)}")
        elif not path.exists():
            problems.append(f"--input {path}: no such file")
        elif not _is_data(path):
            problems.append(f"--input {path}: not a {FORMS}")
        else:
            files.append((path.name, path))
    if len({PARQUET.search(name) is None for name, _ in files}) == 2:
        problems.append("--input: text and parquet in one data set; name the ones or the others")
    if problems:
        raise ValueError("\n".join(problems))
    return files


def _is_data(path):
    return bool(ENDINGS.search(path.name) or PARQUET.search(path.name)) and path.is_file()


def shakespeare(data_dir) -> tuple[str, Path]:
    """Name and path of tiny Shakespeare, downloaded where it is not there yet; without a network,
    of the sonnets that come with this project.
    """
    path = data_dir / "input.txt"
    if path.exists():
        return path.name, path
    try:
        download(SHAKESPEARE, SHAKESPEARE_SHA256, path)
    except ValueError as problem:
        warn(
            f"tiny Shakespeare cannot be downloaded ({problem}): using {BUNDLED.name}, which is "
            f"here; to change to it later, put it at {path} and add --overwrite"
        )
        return BUNDLED.name, BUNDLED
    return path.name, path


def describe(name, path) -> dict:
    """What meta.json says of a source."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"name": name, "bytes": file.tell(), "sha256": digest.hexdigest()}


# ---------------------------------------------------------------- the hub


def hub_folder(dataset, name) -> tuple[str, str]:
    """The repository of a data set, and where in it the parquet files of --name are."""
    if dataset == "openwebtext":
        return "Skylion007/openwebtext", "plain_text"
    if name.startswith("sample-"):
        return "HuggingFaceFW/fineweb", name.replace("-", "/", 1)
    return "HuggingFaceFW/fineweb", "data" if name == "default" else f"data/{name}"


def list_hub_files(repository, folder) -> tuple[str, list[dict]]:
    """The repository's newest revision, and what describe says of each parquet file in folder;
    sha256 is None where the hub does not tell.
    """

    def ask(api):
        revision = api.dataset_info(repository).sha
        at = {"repo_type": "dataset", "revision": revision, "recursive": True}
        return revision, [
            {"name": file.path, "bytes": file.size, "sha256": file.lfs and file.lfs.sha256}
            for file in api.list_repo_tree(repository, folder, **at)
            if PARQUET.search(file.path)
        ]

    with hub_problems(repository) as hub:  # which would wait for a silent server without end
        revision, sources = in_thread(ask, hub.HfApi()).result(LISTING_SECONDS)
    if not sources:
        raise ValueError(
            f"{repository}: no .parquet file in {folder}; its page on the hub lists what it has, "
            "and --name sample-10BT is there"
        )
    return revision, sorted(sources, key=lambda source: source["name"])


def download_from_hub(repository, revision, folder, source) -> Path:
    """Where the file of source is, in folder; ValueError where something else came."""
    name = source["name"]
    with hub_problems(repository) as hub:
        at = {"repo_type": "dataset", "revision": revision, "local_dir": folder}
        path = Path(hub.hf_hub_download(repository, name, **at))
    found = describe(name, path)
    if found != {**source, "sha256": source["sha256"] or found["sha256"]}:
        path.unlink()
        raise ValueError(
            f"{repository}: {name} came damaged, {found['bytes']:,} of {source['bytes']:,} bytes "
            f"with sha256 {found['sha256'][:12]}...; the same command tries again"
        )
    source["sha256"] = found["sha256"]
    return path


@contextlib.contextmanager
def hub_problems(repository):
    """huggingface_hub, whose many exceptions become one line."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, utils
    except ImportError:
        raise ValueError(NEEDS_HUB) from None
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield hub
    except Exception as error:  # they have no base in common
        if getattr(error, "errno", None) and not isinstance(error, ConnectionError):
            raise  # the disk's
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{repository} cannot be had from {constants.ENDPOINT} ({problem}); once it can, the "
            "same command goes on from here"
        ) from None


def in_thread(function, item) -> Future:
    """function(item), by a thread of its own that no Ctrl-C and no error has to wait for."""
    future = Future()

    def work():
        try:
            future.set_result(function(item))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def one_ahead(function, items):
    """map, the next result in the making meanwhile."""
    return in_order(partial(in_thread, function), items, ahead=1)


def in_order(start, items, ahead):
    """Results of the futures that start gives for items, so many under way behind the next one."""
    pending = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


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
                if gz and path.stat().st_size == 0:
                    raise EOFError("it is empty")  # which Python's gzip takes for no text
                with gzip.open(path) if gz else open(path, "rb") as file:
                    yield from read(path, file)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(
                    f"{path}: not a whole gzip file ({error}); get it once more"
                ) from None

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
                yield from in_chunks([text, END])

    def _decode(self, decoder, raw, path, offset, final=False):
        """Text of raw, which stands at offset in path; the decoder may hold some bytes before."""
        raw_and_held = decoder.getstate()[0] + raw
        try:
            text = decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            offset += len(raw) - len(raw_and_held) + error.start
            raise ValueError(
                f"{path}: byte 0x{error.object[error.start]:02X} at offset {offset} is not UTF-8; "
                f"save the file as UTF-8, or {GO_ON}"
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
                f"{GO_ON}"
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
        raise ValueError(
            f'{path}, line {number}: no string in a field \'text\'; a line is {{"text": "..."}}'
        )
    return record["text"]


def read_parquet(path, first_row):
    """Rows of column "text" from first_row on, ROWS at a time: how many are read then, which share
    of the file that is, and the documents as bytes of UTF-8, None for a null.

    A row group of any size is read page by page.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(NEEDS_HUB) from None
    try:
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        types = {field.name: str(field.type) for field in file.schema_arrow}
        if types.get("text") not in TEXT_TYPES:
            columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            raise ValueError(
                f"{path}: no column 'text' of strings; it has {columns}; rename the one to be read"
            )
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= first_row:
                row += rows
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=["text"]):
                texts = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                known, row = max(0, first_row - row), row + len(texts)
                yield row, row / file.metadata.num_rows, texts[known:]
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        problem = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not a whole parquet file ({problem}); get it once more"
        ) from None


class Documents(NamedTuple):
    """Documents of a parquet file, and how far everything is read with them."""

    path: Path
    row: int  # of the first
    texts: list  # bytes of UTF-8 each, or None
    position: tuple[int, int]  # files that are done, rows of the next one that are
    done: float  # bytes of the files

    @property
    def ends_file(self):
        return self.position[1] == 0


def documents(sources, paths, position):
    """Documents of about CHUNK bytes from position on; paths are those of the files left."""
    row = position[1]
    for number, path in enumerate(paths, start=position[0]):
        before, file_bytes = bytes_of(sources[:number]), sources[number]["bytes"]
        texts, size = [], 0
        for after, share, more in read_parquet(path, row):
            texts += more
            size += sum(len(text or b"") for text in more) + len(more)
            if size >= CHUNK:
                yield Documents(path, row, texts, (number, after), before + share * file_bytes)
                texts, size, row = [], 0, after
        yield Documents(path, row, texts, (number + 1, 0), before + file_bytes)
        row = 0


def bytes_of(sources) -> int:
    return sum(source["bytes"] for source in sources)


def with_bar(stream, description, total=None):
    """The stream, and how far it has been read."""
    with live_line(description, total, "char") as advance:
        for chunk in stream:
            if chunk is not END:
                advance(len(chunk))
            yield chunk


# ---------------------------------------------------------------- the vocabulary


def count(text, characters: set | None = None) -> int:
    """How many characters the text has, and in the set which; ValueError if all are white space."""
    total, blank = 0, True
    for chunk in with_bar(text, "reading"):
        if chunk is not END:
            total += len(chunk)
            blank = blank and not chunk.strip()
            if characters is not None:
                characters.update(chunk)
    if blank:
        names = _few([str(path) for path in text.paths])
        raise ValueError(f"{names}: no text, {total:,} characters of white space; name other files")
    return total


def train_bpe(text, vocab_size) -> BPETokenizer:
    tokenizer = BPETokenizer.train(training_sample(text), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log_row(
            "vocabulary",
            f"{tokenizer.vocab_size:,}, not {vocab_size:,}: no other pair occurs twice in the text",
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
        log_row(
            "advice",
            "GPT-2's vocabulary is English: with --tokenizer bpe (and --overwrite) this text would "
            f"be about {shorter:.0%} shorter in tokens",
        )


# ---------------------------------------------------------------- encoding


def encoded_splits(text, tokenizer, total, n_train, workers) -> dict:
    """For write_dataset: both splits as (ids, bytes of text), to be consumed in order."""
    stream = with_border(with_bar(text, "encoding", total), total, n_train)
    encode = partial(encode_piece, tokenizer)
    train = pieces(iter(stream.__next__, BORDER), tokenizer.safe_cut)
    val = pieces(stream, tokenizer.safe_cut)
    return {
        "train": ordered_map(encode, train, workers),
        "val": ordered_map(encode, val, workers),
    }


def with_border(stream, total, n_train):
    """The stream of total characters with BORDER before its character number n_train."""
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
    if position != total:
        raise ValueError(
            f"the text had {total:,} characters when they were counted, and {position:,} when they "
            "were encoded; start again when nothing writes to it any more"
        )


def pieces(stream, safe_cut):
    """Lists of texts, about CHUNK characters together; between two texts a document ends.

    Pieces are cut where it changes no token; where a text has no such place in LONGEST characters
    (no space, no punctuation), they are cut there.
    """
    texts, held = [""], 0
    for chunk in stream:
        if chunk is END:
            texts.append("")
            held += 1  # that millions of empty documents are bounded too
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


def encode_documents(tokenizer, options, documents):
    """What GrowingDataset.append takes for each split, eot_id after each document; and how often
    errors="replace" had to.
    """
    texts, replaced = {"train": [], "val": []}, 0
    for row, raw in enumerate(documents.texts, start=documents.row):
        if not raw:
            continue
        try:
            text = raw.decode("utf-8", options.errors)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{documents.path}, row {row}: byte 0x{raw[error.start]:02X} at offset "
                f"{error.start} is not UTF-8; {GO_ON}"
            ) from None
        replaced += text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
        texts[split_of(raw, options.val_fraction)] += [text, END]
    parts = [
        (split, *encode_piece(tokenizer, piece))
        for split in texts
        for piece in pieces(in_chunks(texts[split]), tokenizer.safe_cut)
    ]
    return documents, parts, replaced


def split_of(document: bytes, val_fraction) -> str:
    """Which split a document is for: its hash decides, wherever it stands and whoever asks."""
    digest = hashlib.blake2b(document, digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def in_chunks(stream):
    """The stream with its texts cut after each CHUNK characters."""
    for text in stream:
        if text is END:
            yield END
        else:
            yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))


def ordered_map(function, items, workers):
    """map in threads (tiktoken and numpy let others run), in order, few items ahead."""
    with ThreadPoolExecutor(workers) as pool:
        yield from in_order(partial(pool.submit, function), items, ahead=workers + 2)


# ---------------------------------------------------------------- the whole


def prepare(options) -> dict:
    """Prepare a data set as parse has understood it, and return its meta; where it is already
    there, only that.

    Raises ValueError for text that is empty or not UTF-8, and where data_dir holds another data
    set; that one stays intact.
    """
    data_dir = Path(options.data_dir)
    files = find_files(options.input) if options.dataset == "custom" else []
    of_documents = options.dataset in ON_HUB or any(PARQUET.search(name) for name, _ in files)
    if of_documents and options.tokenizer == "char":
        raise ValueError(
            "--tokenizer char: parquet files are read only once, and it would have to know their "
            "characters before; use gpt2 or bpe"
        )
    with lock(data_dir):
        try:
            return _prepare(options, data_dir, files, of_documents)
        except OSError as error:
            if error.strerror and not error.filename:  # a full disk names no file
                error.filename = str(data_dir)
            raise


def _prepare(options, data_dir, files, of_documents):
    settings = {name: getattr(options, name) for name in SETTINGS}
    finish_moving(data_dir)
    if options.dataset == "shakespeare":
        files = [shakespeare(data_dir)]
    sources = [describe(name, path) for name, path in files]
    if not options.overwrite and (meta := already_there(data_dir, sources, settings)):
        log_row("unchanged", f"{data_dir} already holds this text, prepared like this")
        return meta
    go = prepare_documents if of_documents else prepare_text
    return go(options, data_dir, [path for _, path in files], sources, settings)


def prepare_text(options, data_dir, paths, sources, settings) -> dict:
    """The last val_fraction of the characters is the validation split."""
    text = Text(paths, options.errors)
    splits, tokenizer = tokenize(text, options)
    meta = write_dataset(data_dir, splits, tokenizer, sources, settings)
    if tokenizer.kind == "gpt2":
        advise(text, tokenizer)
    return meta


def prepare_documents(options, data_dir, paths, sources, settings) -> dict:
    """Documents of parquet files, those of paths or of the hub, from where a run was stopped on."""
    folder = data_dir / UNFINISHED
    progress = unfinished(data_dir, sources, settings, options.overwrite)
    hub = None if paths else hub_folder(options.dataset, options.name)
    if progress is None:
        revision, sources = list_hub_files(*hub) if hub else (None, sources)
        plan = {"settings": settings, "revision": revision, "sources": sources}
        progress = save_progress(data_dir, plan, position=(0, 0))
    plan = progress["plan"]

    def fetch(number):
        if paths:
            return paths[number]
        source = plan["sources"][number]
        return download_from_hub(hub[0], plan["revision"], folder / "download", source)

    require_space(folder, plan["sources"][progress["position"][0] :], options)
    try:
        tokenizer = unfinished_tokenizer(folder / "tokenizer.json", options, fetch)
        growing = GrowingDataset(data_dir, dtype_for(tokenizer), progress)
        with contextlib.closing(growing):
            grow(growing, tokenizer, options, fetch)
            return growing.finish(tokenizer, plan["sources"], settings)
    except KeyboardInterrupt:
        log_row("stopped", "the same command goes on from here", "yellow")
        raise


def unfinished(data_dir, sources, settings, overwrite) -> dict | None:
    """What a run that was stopped has left, None where there is none; ValueError where it was to
    make something else, unless that may be overwritten.
    """
    progress = read_progress(data_dir)
    found = progress and differences(progress["plan"], sources, settings)
    if found and not overwrite:
        raise ValueError(
            f"{data_dir} holds an unfinished data set of something else ({'; '.join(found)}); "
            "finish it first, choose another --data_dir, or drop it with --overwrite"
        )
    if found or progress is None:
        shutil.rmtree(data_dir / UNFINISHED, ignore_errors=True)
        return None
    log_row("resuming", f"with what is in {data_dir / UNFINISHED}")
    for stray in (data_dir / UNFINISHED).rglob("*.incomplete"):  # of a download that was killed
        stray.unlink(missing_ok=True)  # or that ends just now: one_ahead's threads outlive an error
    return progress


def ready_tokenizer(options):
    """The tokenizer, where none has to be made of the text; else None."""
    if options.given is None and options.tokenizer == "gpt2":
        return GPT2Tokenizer()
    return options.given


def unfinished_tokenizer(path, options, fetch):
    """The tokenizer at path; it is put there first, a bpe trained on the first file."""
    if not path.exists():
        tokenizer = ready_tokenizer(options)
        if tokenizer is None:
            batches = (texts for _, _, texts in read_parquet(fetch(0), 0))
            text = (raw.decode("utf-8", "replace") for texts in batches for raw in texts if raw)
            tokenizer = train_bpe(text, options.vocab_size)
        tokenizer.save(path)
    return load_tokenizer(path)


def require_space(folder, sources, options):
    """OSError unless the disk has room for the tokens of sources and, of the hub, three files."""
    token_bytes = 4 if (options.vocab_size or 0) > 1 << 16 else 2
    needed = bytes_of(sources) * TOKENS_SHARE * token_bytes / 2
    if options.dataset in ON_HUB:
        needed += 3 * max([source["bytes"] for source in sources], default=0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: about {needed / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free; make room "
            "and give the same command, or choose another --data_dir"
        )


def grow(growing, tokenizer, options, fetch):
    """Append what is missing, recording every SAVE_SECONDS and after each file how far it is."""
    paths = one_ahead(fetch, range(growing.position[0], len(growing.plan["sources"])))
    work = documents(growing.plan["sources"], paths, growing.position)
    encode = partial(encode_documents, tokenizer, options)
    saved, replaced = time.monotonic(), 0
    encoded = ordered_map(encode, work, options.workers)
    for read, parts, n_replaced in with_progress(encoded, growing):
        for part in parts:
            growing.append(*part)
        replaced += n_replaced
        if read.ends_file or time.monotonic() - saved > SAVE_SECONDS:
            growing.save(read.position)
            saved = time.monotonic()
        if read.ends_file and growing.folder in read.path.parents:
            read.path.unlink()  # a download
    say_replaced(replaced)
    if empty := [split for split, counts in growing.splits.items() if counts["tokens"] == 0]:
        growing.close()
        shutil.rmtree(growing.folder)
        raise ValueError(
            f"no document for {' and '.join(empty)}: --val_fraction {options.val_fraction} of so "
            "few documents; use another, or more text"
        )


def with_progress(encoded, growing):
    """The stream, and how far it has come; where there is no terminal, also a line a file."""
    sources, start = growing.plan["sources"], time.monotonic()
    total, before = bytes_of(sources), bytes_of(sources[: growing.position[0]])
    done = before
    with live_line("encoding", total, "B", before) as advance:
        for read, *rest in encoded:
            yield read, *rest
            advance(int(read.done) - done)
            done = int(read.done)
            if read.ends_file and not sys.stderr.isatty():
                left = (time.monotonic() - start) / (read.done - before) * (total - read.done)
                tokens = sum(counts["tokens"] for counts in growing.splits.values())
                log(
                    f"{read.position[0]} of {len(sources)} files, {tokens:,} tokens, "
                    f"{human_time(left)} left"
                )


def adopt(data_dir) -> dict:
    """Make a data set of nanoGPT's train.bin and val.bin of gpt2 tokens, and return its meta."""
    data_dir = Path(data_dir)
    if meta := already_there(data_dir, sources=[], settings={}):
        log_row("unchanged", f"{data_dir} already holds a data set")
        return meta
    if (data_dir / "meta.pkl").exists():
        raise ValueError(
            f"{data_dir / 'meta.pkl'}: not gpt2's tokens, and a pickle, which can run code, "
            "is never opened; prepare the text itself: --input TEXT --tokenizer char"
        )
    if not data_dir.is_dir():
        raise ValueError(f"--adopt {data_dir}: no such folder")
    settings = {"dataset": "adopted", "tokenizer": "gpt2"}
    with lock(data_dir):
        return adopt_dataset(data_dir, GPT2Tokenizer(), settings, live_line)


def prepare_file(path, tokenizer: str, data_dir) -> dict:
    """For `train.py --data FILE`: prepare it unless it is there already, and return the meta.

    tokenizer: a kind, or the path of a tokenizer.json.
    """
    return prepare(parse([f"--input={path}", f"--tokenizer={tokenizer}", f"--data_dir={data_dir}"]))


def tokenize(text, options):
    """Both splits for write_dataset, and the tokenizer."""
    tokenizer = ready_tokenizer(options)  # first: it may not be had
    characters = set() if options.tokenizer == "char" else None
    total = count(text, characters)
    say_replaced(text.replaced)
    n_train = int((1 - options.val_fraction) * total)
    if not 0 < n_train < total:
        raise ValueError(
            f"{total} characters cannot be split by --val_fraction {options.val_fraction}: "
            f"{n_train} to train on, {total - n_train} to validate with; take another share, or "
            "more text"
        )
    if options.tokenizer == "char":
        tokenizer = CharTokenizer.train(characters)
    elif options.tokenizer == "bpe":
        tokenizer = train_bpe(text, options.vocab_size)
    return encoded_splits(text, tokenizer, total, n_train, options.workers), tokenizer


def say_replaced(count):
    if count:
        warn(f"{count:,} replacements (U+FFFD) for bytes that are not UTF-8")


def already_there(data_dir, sources, settings) -> dict | None:
    """The meta of the data set in data_dir, None where there is none.

    Raises ValueError with the differences where it was made from other text or settings.
    """
    meta = read_meta(data_dir)
    if meta is None:
        return None
    if found := differences(meta, sources, settings):
        raise ValueError(
            f"{data_dir} holds another data set ({'; '.join(found)}); choose another "
            "--data_dir, or make it anew with prepare_data.py --overwrite"
        )
    TokenDataset(data_dir)  # its files are as meta.json says
    return meta


def differences(there, sources, settings) -> list[str]:
    """Where there, a meta or a plan, is not of these settings and sources ([]: whichever)."""
    settings_there, sources_there = there.get("settings", {}), there.get("sources", [])
    found = [
        f"{name}: {settings_there.get(name)} there, {value} asked for"
        for name, value in settings.items()
        if settings_there.get(name) != value
    ]
    if sources and [s["sha256"] for s in sources_there] != [s["sha256"] for s in sources]:
        found.append(f"text: {_names(sources_there)} there, {_names(sources)} now")
    return found


def _names(sources):
    """'a.txt (1,000 bytes), b.txt (20 bytes), c.txt (3 bytes) and 7 more'"""
    return _few([f"{source['name']} ({source['bytes']:,} bytes)" for source in sources])


def _few(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def summary(meta, data_dir) -> str:
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    a_token = (train["bytes"] + val["bytes"]) / (train["tokens"] + val["tokens"])
    vocabulary = f"{meta['vocab_size']:>14,} ({meta['tokenizer']['kind']})"
    default = Path(data_dir) == Path("data/shakespeare")
    rows = [
        ("done", f"{data_dir}, of {_names(meta['sources'])}", "green"),
        ("train", f"{train['tokens']:>14,} tokens"),
        ("val", f"{val['tokens']:>14,} tokens"),
        ("vocabulary", f"{vocabulary}, {a_token:.2f} bytes a token"),
    ]
    lines = [labelled(*row, stream=sys.stdout) for row in rows]
    train_it = command_for("train.py", *([] if default else ["--data_dir", data_dir]))
    return "\n".join([*lines, next_commands(train_it, stream=sys.stdout)])


def parse(argv):
    """The options, what follows from them filled in; ValueError with a line for each problem."""
    parser = ArgumentParser(__doc__, prog="prepare_data.py", usage=USAGE)
    add = parser.add_argument_group("where the text comes from").add_argument
    add("--dataset", choices=["shakespeare", "custom", *ON_HUB], help=DATASET)
    add("--input", nargs="+", metavar="PATH", help=f"{FORMS}, or folders of them")
    add("--name", help="part of fineweb: sample-100BT, default ... (default: sample-10BT)")
    add("--adopt", metavar="DIR", help="nanoGPT's train.bin and val.bin in DIR, gpt2's tokens")
    add = parser.add_argument_group("what becomes of it").add_argument
    add("--tokenizer", metavar="KIND", help=TOKENIZER)
    add("--vocab_size", type=int, metavar="N", help=f"of bpe (default: {BPE_VOCAB_SIZE})")
    add("--val_fraction", type=float, metavar="X", help=VAL_FRACTION)
    add("--errors", choices=["strict", "replace"], default="strict", help=ERRORS)
    add = parser.add_argument_group("output").add_argument
    add("--data_dir", metavar="DIR", help="where to write (default: ./data/<dataset>)")
    add("--overwrite", action="store_true", help="replace a data set that is there")
    add("--workers", type=int, metavar="N", help="threads (default: as many as cores)")
    options = parser.parse_args(argv)
    options.dataset = options.dataset or ("custom" if options.input else "shakespeare")
    on_hub = options.dataset in ON_HUB
    if options.tokenizer is None:
        options.tokenizer = "char" if options.dataset == "shakespeare" else "gpt2"
    options.given = None
    if options.tokenizer not in KINDS and Path(options.tokenizer).is_file():
        options.given = load_tokenizer(options.tokenizer)
        kind = options.given.kind  # gpt2 is gpt2, wherever it comes from
        options.tokenizer = kind if kind == "gpt2" else f"{kind} {options.given.hash()}"
    if options.val_fraction is None:
        options.val_fraction = 0.0005 if on_hub else 0.1
    if found := problems(options):
        raise ValueError("\n".join(found))
    if options.dataset == "fineweb":
        options.name = options.name or "sample-10BT"
    if options.vocab_size is None and options.tokenizer == "bpe":
        options.vocab_size = BPE_VOCAB_SIZE
    options.data_dir = options.adopt or options.data_dir or f"./data/{options.dataset}"
    options.workers = options.workers or os.cpu_count() or 1
    return options


USAGE = "prepare_data.py [--dataset NAME | --input PATH ... | --adopt DIR] ..."
DATASET = "which text (default: custom where there is an --input, else shakespeare)"
TOKENIZER = "char, gpt2, bpe or a tokenizer.json (default: gpt2; for shakespeare char)"
VAL_FRACTION = "share for validation (default: 0.1; of openwebtext and fineweb 0.0005)"
ERRORS = "what to do about bytes that are not UTF-8: stop, or put U+FFFD (default: strict)"


def problems(options) -> list[str]:
    """One line for each."""
    found = []
    if options.adopt and (options.input or options.data_dir or options.dataset != "shakespeare"):
        found.append("--adopt DIR takes the data set that is in DIR, and no other flags")
    if options.dataset == "custom" and not options.input:
        found.append("--dataset custom needs --input FILE")
    if options.dataset != "custom" and options.input:
        found.append(f"--input is not for --dataset {options.dataset}; use --dataset custom")
    if options.name is not None and options.dataset != "fineweb":
        found.append(f"--name {options.name}: only for --dataset fineweb")
    if options.tokenizer not in KINDS and options.given is None:
        found.append(f"--tokenizer {options.tokenizer}: neither {', '.join(KINDS)} nor a file")
    if options.vocab_size is not None and options.tokenizer != "bpe":
        found.append(f"--vocab_size {options.vocab_size}: only for --tokenizer bpe")
    if options.vocab_size is not None and options.vocab_size < 257:
        found.append(f"--vocab_size {options.vocab_size}: must be at least 257, all bytes and one")
    if not 0 < options.val_fraction < 1:
        found.append(f"--val_fraction {options.val_fraction}: must be between 0 and 1")
    if options.workers is not None and options.workers < 1:
        found.append(f"--workers {options.workers}: must be at least 1")
    return found


def announce(options):
    """Say what is about to be made."""
    text = ", ".join(options.input or [options.dataset, *([options.name] if options.name else [])])
    log_row("text", text)
    kind = (options.given or KINDS[options.tokenizer]).kind
    log_row("tokenizer", f"{kind}; {options.val_fraction:g} of the text is for validation")
    log_row("output", f"{options.data_dir} ({options.workers} threads)")


def main(argv=None) -> int:
    options = parse(argv)
    if options.adopt:
        meta = adopt(options.adopt)
    else:
        announce(options)
        meta = prepare(options)
    if hasattr(sys.stdout, "reconfigure"):  # names that the terminal cannot show are no error
        sys.stdout.reconfigure(errors="backslashreplace")
    print(summary(meta, options.data_dir))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
