"""Where documents come from: text files, parquet files, the Hugging Face hub, tiny Shakespeare.

A source is read in parts, each a stream that is cut into pieces to encode. In a stream of text, END
stands where a document ends. The end of a text is its validation split; of parquet files a hash of
each document decides. A new data set of the hub is a row of HUB_DATASETS.
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import re
import threading
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from files import download
from logger import progress, warn

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUNDLED = Path(__file__).parent / "data" / "sonnets.txt"


class HubDataset(NamedTuple):
    repository: str
    folder: Callable[[str | None], str]  # of its parquet files with a column "text", by --name
    name: str | None = None  # the default of --name; None: it has no parts to name


def _fineweb_folder(name):
    is_sample = name.startswith("sample-")
    return name.replace("-", "/", 1) if is_sample else f"data/{name}".removesuffix("/default")


HUB_DATASETS = {
    "openwebtext": HubDataset("Skylion007/openwebtext", lambda _: "plain_text"),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", _fineweb_folder, "sample-10BT"),
}
LISTING_SECONDS = 120  # for the hub to answer at all

TEXT = re.compile(r"\.(txt|md|jsonl)(\.gz)?$", re.IGNORECASE)
PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
FORMS = ".txt, .md, .jsonl (or .gz of one) or .parquet"
TEXT_TYPES = ("string", "large_string", "string_view")  # of Arrow
ROWS = 64  # of a parquet file, read at once
GO_ON = "`prepare_data.py --errors replace` puts a U+FFFD there and goes on"
CHUNK = 1 << 18  # bytes read at once, and about the characters encoded at once
LONGEST = 1 << 19  # characters; a word that is longer is cut, and its tokens with it

END = None  # in a stream of text: here a document ends


# ---------------------------------------------------------------- files


def find_files(inputs) -> list[tuple[str, Path]]:
    """Names and paths of the files that inputs (files and folders) stand for, in order: all of
    text, or all parquet.
    """
    files, problems = [], []
    for path in map(Path, inputs):
        found = [(path.name, path)]
        if path.is_dir():
            found = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*"))
            found = [(name, file) for name, file in found if not re.search(r"(^|/)\.", name)]
        known = [(name, file) for name, file in found if TEXT.search(name) or PARQUET.search(name)]
        files += (of_data := [(name, file) for name, file in known if file.is_file()])
        if not of_data:
            problem = f"no {FORMS}" if path.exists() else "no such file"
            problems.append(f"--input {path}: {problem}")
        if links := [name for name, file in found if file.is_symlink() and not file.is_file()]:
            warn(f"--input {path}: links to folders or nothing are not followed: {few(links)}")
    if len({bool(PARQUET.search(name)) for name, _ in files}) == 2:
        problems.append("--input: text and parquet in one data set; name the ones or the others")
    if problems:
        raise ValueError("\n".join(problems))
    return files


def few(names) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shakespeare(data_dir) -> tuple[str, Path]:
    """Name and path of tiny Shakespeare, downloaded if it is not there yet; without a network,
    of the sonnets that come with this project.
    """
    path = data_dir / "input.txt"
    try:
        if not path.exists():
            download(SHAKESPEARE, SHAKESPEARE_SHA256, path)
    except ValueError as problem:
        instead = f"using {BUNDLED.name}; to change later, put it at {path} and add --overwrite"
        warn(f"tiny Shakespeare cannot be downloaded ({problem}): {instead}")
        return BUNDLED.name, BUNDLED
    return path.name, path


def describe_file(name, path) -> dict:
    """What meta.json says of a source."""
    name = str(name).encode("utf-8", "backslashreplace").decode()  # JSON has no other names
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"name": name, "bytes": file.tell(), "sha256": digest.hexdigest()}


@dataclass
class Documents:
    """What text and parquet files share. The methods of both:

    survey(characters): set `total`, and for text put its characters in the set
    texts(): the text to learn a vocabulary from
    parts(first, safe_cut): streams of pairs, one a part; `pieces` groups the pairs
    by_split(piece, safe_cut): a piece as (split, text or END), in the thread that encodes it
    """

    files: list[dict]  # as meta.json describes them
    fetch: Callable[[int], Path]  # where the file of this number is
    errors: str
    val_fraction: float
    total: int = 0  # of `done`, in `unit`
    done: int = 0  # how far it has been read
    replaced: list[int] = field(default_factory=list)  # U+FFFDs; threads append to it

    def decode(self, raw: bytes, where, offset=0, final=True) -> tuple[str, int]:
        """Text of raw, which begins at offset, and how many bytes have become text: all, unless
        final is False and the last character is incomplete.
        """
        try:
            text, used = codecs.utf_8_decode(raw, self.errors, final)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02X} at offset {offset + error.start}"
            raise ValueError(f"{where}: {byte} is not UTF-8; convert it, or {GO_ON}") from None
        # a U+FFFD of the file itself is these three bytes, which no damage around them can hide
        if count := text.count("\ufffd") - raw[:used].count(b"\xef\xbf\xbd"):
            self.replaced.append(count)
        return text, used


def open_source(options, files, paths, revision, downloads) -> Documents:
    """The source of files (as meta.json describes them), at paths or at a revision of the hub."""
    fetch = paths.__getitem__
    if revision:
        at = {"revision": revision, "local_dir": downloads}
        fetch = partial(download_from_hub, options.dataset, files, at)
    kind = ParquetFiles if PARQUET.search(files[0]["name"]) else TextFiles
    return kind(files, fetch, options.errors, options.val_fraction)


# ---------------------------------------------------------------- text


class TextFiles(Documents):
    """Text files as one text, in a single part, whose last val_fraction is for validation.

    A .txt or .md is a document, and so is the field "text" of each line of a .jsonl.
    """

    unit = "char"

    def survey(self, characters: set | None = None):
        """Count the characters, and put them in the set; ValueError if all are white space."""
        blank, self.total = True, 0
        with progress("reading", None, self.unit) as advance:
            for chunk in filter(None, self.texts()):
                advance(len(chunk))
                self.total += len(chunk)
                blank = blank and not chunk.strip()
                if characters is not None:
                    characters.update(chunk)
        if blank:
            names = few([file["name"] for file in self.files])
            raise ValueError(f"{names}: no text, {self.total:,} characters of white space")

    def parts(self, first, safe_cut):
        return [cut(self._shares(), safe_cut)][first:]

    def by_split(self, piece, safe_cut):
        return piece  # it is already

    def _shares(self):
        n_train = int((1 - self.val_fraction) * self.total)
        for chunk in self.texts():
            if chunk is END:
                yield "train" if self.done <= n_train else "val", END
                continue
            left = max(0, n_train - self.done)
            self.done += len(chunk)
            shares = ("train", chunk[:left]), ("val", chunk[left:])
            yield from (share for share in shares if share[1])
        if self.done != self.total:
            counts = f"{self.total:,} characters when they were counted, and {self.done:,} later"
            raise ValueError(f"the text had {counts}; do not write to it")

    def texts(self):
        """All files as chunks of at most CHUNK characters, and END after each document."""
        for path in map(self.fetch, range(len(self.files))):
            ending, gz = TEXT.search(path.name).groups()
            read = self._lines if ending.lower() == "jsonl" else self._blocks
            try:
                if gz and path.stat().st_size == 0:
                    raise EOFError("it is empty")  # which Python's gzip takes for no text
                with gzip.open(path) if gz else open(path, "rb") as file:
                    # some editors write a byte order mark
                    has_mark = file.peek(3).startswith(codecs.BOM_UTF8)
                    yield from read(path, file, offset=len(file.read(3 * has_mark)))
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                problem = f"not a whole gzip file ({error}); get it once more"
                raise ValueError(f"{path}: {problem}") from None

    def _blocks(self, path, file, offset):
        held, final = b"", False
        while not final:
            raw = file.read(CHUNK)
            held, final = held + raw, not raw
            text, used = self.decode(held, path, offset, final)
            held, offset = held[used:], offset + used
            yield text
        yield END

    def _lines(self, path, file, offset):
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line, used = self.decode(raw, path, offset)
            offset += used
            if not line.strip():
                continue
            try:
                text, halves = re.subn("[\ud800-\udfff]", "\ufffd", json.loads(line)["text"])
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(f'{where}: not {{"text": "..."}} ({error})') from None
            if halves and self.errors == "strict":
                raise ValueError(f"{where}: half a surrogate pair (\\ud800 to \\udfff); {GO_ON}")
            self.replaced += [halves] if halves else []
            yield from in_chunks(text)


# ---------------------------------------------------------------- parquet and the hub


class ParquetFiles(Documents):
    """Parquet files, each a part; the rows of column "text" are documents."""

    unit = "B"

    def survey(self, characters: set | None = None):
        self.total = sum(file["bytes"] for file in self.files)

    def parts(self, first, safe_cut):
        numbers = range(first, len(self.files))
        paths = in_order(partial(in_thread, self.fetch), numbers, ahead=1)
        return (self._rows(n, path) for n, path in zip(numbers, paths, strict=True))

    def by_split(self, piece, safe_cut):
        documents = (
            (split_of(raw, self.val_fraction), self.decode(raw, where)[0]) for where, raw in piece
        )
        chunks = ((split, chunk) for split, text in documents for chunk in in_chunks(text))
        return cut(chunks, safe_cut)

    def texts(self):
        """The first file's documents, to learn a vocabulary from."""
        return (self.decode(raw, where)[0] for where, raw in self._rows(0, self.fetch(0)))

    def _rows(self, number, path):
        """Where a document is, and its bytes of UTF-8."""
        before, size = self.done, self.files[number]["bytes"]
        with in_one_line(f"{path}: not a whole parquet file", "delete it and get it once more"):
            from pyarrow import parquet

            # without these two a row group would be held as a whole
            file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            types = {column.name: str(column.type) for column in file.schema_arrow}
            if types.get("text") not in TEXT_TYPES:
                raise ValueError(f"{path}: no column 'text' of strings; it has {types}")
            row = 0
            for batch in file.iter_batches(ROWS, columns=["text"]):
                for raw in batch.column(0).cast("large_binary").to_pylist():
                    if raw:
                        yield f"{path}, row {row}", raw
                    row += 1
                self.done = before + size * row // file.metadata.num_rows


def split_of(document: bytes, val_fraction) -> str:
    """Which split a document is for: its hash decides, wherever it stands and whoever asks."""
    digest = hashlib.blake2b(document, digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


@contextlib.contextmanager
def in_one_line(problem, remedy):
    """What an optional library raises becomes one line; without the library, how to get it."""
    try:
        yield
    except ImportError:
        needed = "the hub and .parquet need more packages: pip install -r requirements-hub.txt"
        raise ValueError(needed) from None
    except Exception as error:  # huggingface_hub's have no base in common
        of_disk = getattr(error, "errno", None) and not isinstance(error, ConnectionError)
        if of_disk or type(error) is ValueError:
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{problem} ({why}); {remedy}") from error


@contextlib.contextmanager
def hub(repository):
    """huggingface_hub, without its progress bars and warnings."""
    problem = f"{repository} cannot be had from {os.environ.get('HF_ENDPOINT', 'the hub')}"
    with in_one_line(problem, "once it can, the same command goes on from here"):
        import huggingface_hub
        from huggingface_hub import utils

        utils.disable_progress_bars()
        utils.logging.set_verbosity_error()
        yield huggingface_hub


def list_hub_files(dataset, name) -> tuple[str, list[dict]]:
    """The newest revision, and its parquet files as meta.json describes them."""
    repository, folder, _ = HUB_DATASETS[dataset]
    with hub(repository) as library:
        api = library.HfApi()
        revision = api.dataset_info(repository, timeout=LISTING_SECONDS).sha
        at = {"repo_type": "dataset", "revision": revision, "recursive": True}
        files = [
            {"name": file.path, "bytes": file.size, "sha256": file.lfs and file.lfs.sha256}
            for file in api.list_repo_tree(repository, folder(name), **at)
            if PARQUET.search(file.path)
        ]
    if not files:
        raise ValueError(f"{repository}: no .parquet file in {folder(name)}, see its page")
    return revision, sorted(files, key=lambda file: file["name"])


def download_from_hub(dataset, files, at, number) -> Path:
    """Where the file of this number is; it is downloaded unless it is there already."""
    repository = HUB_DATASETS[dataset].repository
    with hub(repository) as library:
        name = files[number]["name"]
        return Path(library.hf_hub_download(repository, name, repo_type="dataset", **at))


# ---------------------------------------------------------------- pieces


def pieces(source, safe_cut, position):
    """(position, piece) of each piece after position = (parts done, pieces of the next one done).

    The pieces of a part that are done are cut once more and left out: reading is fast.
    """
    first, done = position
    for part, stream in enumerate(source.parts(first, safe_cut), start=first):
        for n, piece in enumerate(grouped(stream), start=1):
            if n > done:
                yield (part, n), piece
        yield (part + 1, 0), []  # an empty piece, with which the part is done
        done = 0


def grouped(stream):
    """The pairs of a stream, CHUNK bytes or characters together."""
    piece, size = [], 0
    for label, text in stream:
        piece.append((label, text))
        size += len(text or "") + 1  # empty documents are bounded too
        if size >= CHUNK:
            yield piece
            piece, size = [], 0
    yield piece


def in_chunks(text):
    """A document in chunks, and its END."""
    yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
    yield END


def cut(stream, safe_cut):
    """The stream of (split, text) in parts that give the tokens of the whole: cut where it changes
    none. If LONGEST characters have no such place (no space, no punctuation), they are cut after
    the last one.
    """
    held, held_for = "", "train"
    for split, text in stream:
        if text is END or split != held_for:
            yield held_for, held
            held, held_for = "", split
        if text is END:
            yield split, END
            continue
        held += text
        if len(held) >= CHUNK:
            end = safe_cut(held) or (len(held) if len(held) >= LONGEST else 0)
            yield split, held[:end]
            held = held[end:]
    yield held_for, held


# ---------------------------------------------------------------- threads


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


def in_order(start, items, ahead):
    """Results of the futures that start gives for items, with `ahead` more of them under way."""
    pending = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
