"""Where documents come from: text files, parquet files, the Hugging Face hub, tiny Shakespeare.

A source is read in parts, each a stream that is cut into pieces to encode. In a stream of text, END
stands where a document ends. The end of a text is its validation split; of parquet files a hash of
each document decides. A new data set of the hub is a row of HUB_DATASETS.
"""

import codecs
import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import deque
from functools import partial
from pathlib import Path

from files import MOST_JSON, download, in_thread, open_file, unix_lines
from logger import command_for, progress, warn

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUNDLED = Path(__file__).parent / "data" / "sonnets.txt"


def fineweb_folder(name):
    is_sample = name.startswith("sample-")
    return name.replace("-", "/", 1) if is_sample else f"data/{name}".removesuffix("/default")


HUB_DATASETS = {  # repository; folder of parquet files with a column "text", by --name; its default
    "openwebtext": ("Skylion007/openwebtext", lambda _: "plain_text", None),
    "fineweb": ("HuggingFaceFW/fineweb", fineweb_folder, "sample-10BT"),
}
LISTING_SECONDS = 120  # for the hub to answer at all

TEXT = re.compile(r"\.(txt|md|jsonl)(\.gz)?$", re.IGNORECASE)
PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
FORMS = ".txt, .md, .jsonl (or .gz of one) or .parquet"
TEXT_TYPES = ("string", "large_string", "string_view")  # of Arrow
ROWS = 64  # of a parquet file, read at once
# what text that is not UTF-8 is likely to be in; among all that Python knows, those for a few
# similar bytes each would be taken for one another
ENCODINGS = "gb18030 big5 cp932 euc_jp cp949 cp1252 cp1251 koi8_r utf_16 utf_16_le utf_16_be utf_32"
CHUNK = 1 << 18  # bytes read at once, and about the characters encoded at once
LONGEST = 1 << 19  # characters; a word that is longer is cut, and its tokens with it
DOCUMENT = MOST_JSON  # characters of a .jsonl's line or bytes of a row, held as a whole

END = None  # in a stream of text: here a document ends


def find_files(inputs) -> list[tuple[str, Path]]:
    """Names and paths of the files that inputs (files and folders) stand for, in order: all of
    text, or all parquet. ValueError or OSError naming what cannot be read.
    """
    files, problems = [], []
    for path in map(Path, inputs):
        found = [(path.name, path)]
        if path.is_dir():
            found = sorted((file.relative_to(path).as_posix(), file) for file in files_below(path))
        known = [(name, file) for name, file in found if TEXT.search(name) or PARQUET.search(name)]
        wrong = [file for _, file in known if not file.is_file()] if known else [path]
        reason = "neither a file nor a link to one" if known else f"no {FORMS}"
        problems += [f"--input {p}: {reason if p.exists() else 'no such file'}" for p in wrong]
        files += known
    of_parquet = [path for name, path in files if PARQUET.search(name)]
    if 0 < len(of_parquet) < len(files):
        problems.append("--input: text and parquet in one data set; name the ones or the others")
    if problems:
        raise ValueError("\n".join(problems))
    for path in of_parquet:
        with readable_parquet(path):  # one without texts is noticed before any work is done
            pass
    return files


def files_below(folder):
    """All files in a folder and its folders, but hidden ones; links to folders are named."""

    def refuse(error):
        raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))
        for link in filter(Path.is_symlink, [Path(root, name) for name in folders]):
            warn(f"--input {link}: a link to a folder, which is not followed")


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
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"name": name, "bytes": file.tell(), "sha256": digest.hexdigest()}


class Documents:
    """What text and parquet files share.

    files: as meta.json describes them; fetch(number): the path of one, which may be downloaded
    """

    def __init__(self, files: list[dict], fetch, options):
        self.files, self.fetch, self.val_fraction = files, fetch, options.val_fraction
        self.encoding, self.errors = options.encoding or "utf-8", options.errors
        self.total = self.done = 0  # in `unit`: all, and how far it has been read


class TextFiles(Documents):
    """Text files as one text, in a single part, whose last val_fraction is for validation.

    A .txt or .md is a document, and so is the field "text" of each line of a .jsonl.
    """

    unit = "char"
    as_encoded = staticmethod(unix_lines)

    def survey(self, characters: dict | None = None):
        """Count the characters, and note where each occurs first; ValueError if all are white
        space.
        """
        blank, position = True, 0
        with progress("reading", None, self.unit) as advance:
            for where, chunk in self.texts():
                if chunk is END:
                    position = 0
                    continue
                advance(len(chunk))
                blank = blank and not chunk.strip()
                if characters is not None:
                    text = chunk.replace("\r", "\n")  # as unix_lines, and of the same length
                    for new in sorted(set(text) - characters.keys(), key=text.index):
                        characters[new] = f"{where}, position {position + text.index(new)}"
                self.total, position = self.total + len(chunk), position + len(chunk)
        if blank:
            name = self.files[0]["name"]
            raise ValueError(f"{name}: no text, {self.total:,} characters of white space")

    def parts(self, first, safe_cut):
        """Streams of (split, text or END), one a part, from the first that is not done."""
        return [cut(self._shares(), safe_cut)][first:]

    def by_split(self, piece, safe_cut):
        """(split, text or END) of a piece of such a stream, in the thread that encodes it."""
        return piece

    def _shares(self):
        n_train = int((1 - self.val_fraction) * self.total)
        for _, chunk in self.texts():
            if chunk is END:
                yield "train" if self.done <= n_train else "val", END
                continue
            left = max(0, n_train - self.done)
            if left and chunk[left - 1 : left + 1] == "\r\n":  # one line end
                n_train, left = n_train + 1, left + 1
            self.done += len(chunk)
            shares = ("train", chunk[:left]), ("val", chunk[left:])
            yield from (share for share in shares if share[1])
        if self.done != self.total:
            counts = f"{self.total:,} characters when they were counted, and {self.done:,} later"
            raise ValueError(f"the text had {counts}; do not write to it")

    def texts(self):
        """Pairs of a file's name and text of at most CHUNK characters, or END after a document."""
        for path in map(self.fetch, range(len(self.files))):
            chunks = self._decoded(path)
            if TEXT.search(path.name)[1].lower() == "jsonl":
                yield from self._documents(path, chunks)
            else:
                yield from ((path, chunk) for chunk in chunks if chunk)
                yield path, END

    def _decoded(self, path):
        is_gz, raw, end = TEXT.search(path.name)[2], b"x", 0
        decode = codecs.getincrementaldecoder(self.encoding)(self.errors).decode
        try:
            if is_gz and path.stat().st_size == 0:
                raise EOFError("it is empty")  # which Python's gzip takes for no text
            with open_file(path) as opened, gzip.open(opened) if is_gz else opened as file:
                if file.peek(3).startswith(codecs.BOM_UTF8):  # some editors write it
                    end = len(file.read(3))
                while raw:
                    raw = file.read(CHUNK)
                    end += len(raw)
                    text = decode(raw, not raw)
                    if end <= CHUNK and text.count("\0") > len(text) // 10:  # it is UTF-16
                        raise UnicodeDecodeError("utf-8", raw, raw.find(0), len(raw), "NUL")
                    yield text
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            problem = f"not a whole gzip file ({error}); get it once more"
            raise ValueError(f"{path}: {problem}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {wrong_byte(error, end, self.encoding, path)}") from None

    def _documents(self, path, chunks):
        for number, line in enumerate(lines(chunks), start=1):
            where = f"{path}, line {number}"
            if len(line) > DOCUMENT:
                raise ValueError(f"{where}: a document of more than {DOCUMENT:,} characters")
            if not line.strip():
                continue
            try:  # half a surrogate pair is no text either
                text = json.loads(line)["text"].encode("utf-16", "surrogatepass")
                text = text.decode("utf-16", self.errors)
            except Exception as error:  # JSON may be anything
                raise ValueError(f'{where}: not {{"text": "..."}} ({error})') from None
            yield from ((where, chunk) for chunk in in_chunks(text))


def lines(chunks):
    """The lines of a text in chunks; one that is too long for a document is the last, and cut."""
    held = ""
    for chunk in chunks:
        held += chunk
        if "\n" in chunk:
            *whole, held = held.split("\n")
            yield from whole
        elif len(held) > DOCUMENT:
            break
    yield held


def wrong_byte(error: UnicodeDecodeError, end, encoding, path=None) -> str:
    """What is wrong with bytes that end at the offset `end`, and what to type: with a path, for the
    encoding that they are likely to be in.
    """
    raw, text, remedies = error.object, error.object.decode("utf-8", "replace"), []
    lost, foreign = text.count("\ufffd") + text.count("\0"), sum(map("\x7f".__lt__, text))
    if path and lost > foreign // 2:
        import charset_normalizer

        whole = raw if 0 in raw else raw[: raw.rfind(b"\n") + 1] or raw  # of UTF-16, or lines
        found = charset_normalizer.from_bytes(whole, cp_isolation=ENCODINGS.split()).best()
        if found:
            command = command_for("prepare_data.py", "--input", path, "--encoding", found.encoding)
            remedies = [f"it looks like {found.encoding}, which `{command}` reads"]
    if lost <= len(text) // 10:
        remedies.append("`prepare_data.py --errors replace` puts a U+FFFD there and goes on")
    at = f"byte 0x{raw[error.start]:02X} at offset {end - len(raw) + error.start}"
    return f"{at} is not {encoding.upper()}; {', or '.join(remedies) or 'convert it to UTF-8'}"


# ---------------------------------------------------------------- parquet and the hub


class ParquetFiles(Documents):
    """Parquet files, each a part; the rows of column "text" are documents."""

    unit = "B"
    as_encoded = staticmethod(str)  # as it is

    def survey(self, characters=None):
        self.total = sum(file["bytes"] for file in self.files)

    def parts(self, first, safe_cut):
        numbers = range(first, len(self.files))
        paths = in_order(partial(in_thread, self.fetch), numbers, ahead=1)
        return (self._rows(n, path) for n, path in zip(numbers, paths, strict=True))

    def by_split(self, piece, safe_cut):
        documents = ((self._split(row[1]), self._text(row)) for row in piece)
        chunks = ((split, chunk) for split, text in documents for chunk in in_chunks(text))
        return cut(chunks, safe_cut)

    def _split(self, raw):  # decided by its hash, wherever the document stands and whoever asks
        digest = hashlib.blake2b(raw, digest_size=8).digest()
        return "val" if int.from_bytes(digest, "big") < self.val_fraction * 2**64 else "train"

    def texts(self):
        """Of the first file, to learn a vocabulary from."""
        return ((row[0], self._text(row)) for row in self._rows(0, self.fetch(0)))

    def _text(self, row):
        where, raw = row
        try:
            return raw.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {wrong_byte(error, len(raw), 'utf-8')}") from None

    def _rows(self, number, path):
        """Where a document is, and its bytes of UTF-8."""
        before, size, row = self.done, self.files[number]["bytes"], 0
        with readable_parquet(path) as file:
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            longest = max(
                [group.total_byte_size // (group.num_rows or 1) for group in groups] or [0]
            )
            if longest > DOCUMENT:
                raise ValueError(
                    f"{path}: rows of {longest:,} bytes, at most {DOCUMENT:,} are read"
                )
            for batch in file.iter_batches(min(ROWS, DOCUMENT // (longest or 1)), columns=["text"]):
                for raw in batch.column(0).cast("large_binary").to_pylist():
                    if raw:
                        yield f"{path}, row {row}", raw
                    row += 1
                self.done = before + size * row // file.metadata.num_rows


@contextlib.contextmanager
def readable_parquet(path):
    """An open parquet file with a column "text" of strings; ValueError if it is anything else."""
    with in_one_line(f"{path}: not a whole parquet file", "delete it and get it once more"):
        from pyarrow import parquet

        # without these two a row group would be held as a whole
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            types = {column.name: str(column.type) for column in file.schema_arrow}
            if types.get("text") not in TEXT_TYPES:
                raise ValueError(f"{path}: no column 'text' of strings; it has {str(types)[:200]}")
            yield file


@contextlib.contextmanager
def in_one_line(problem, remedy):
    """What an optional library raises becomes one line; without the library, how to get it."""
    try:
        yield
    except ImportError:
        needed = "the hub and .parquet need more packages: pip install -r requirements-hub.txt"
        raise ValueError(needed) from None
    except Exception as error:  # huggingface_hub's have no base in common
        if type(error) is ValueError or getattr(error, "errno", None) == errno.ENOSPC:
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
    repository, folder_of, _ = HUB_DATASETS[dataset]
    with hub(repository) as library:
        api, folder = library.HfApi(), folder_of(name)
        revision = api.dataset_info(repository, timeout=LISTING_SECONDS).sha
        at = {"repo_type": "dataset", "revision": revision, "recursive": True}
        files = [
            {"name": file.path, "bytes": file.size, "sha256": file.lfs and file.lfs.sha256}
            for file in api.list_repo_tree(repository, folder, **at)
            if PARQUET.search(file.path)
        ]
    if not files:
        raise ValueError(f"{repository}: no .parquet file in {folder}, see its page")
    return revision, sorted(files, key=lambda file: file["name"])


def download_from_hub(dataset, files, at, number) -> Path:
    """Where the file of this number is; it is downloaded unless it is there already."""
    repository = HUB_DATASETS[dataset][0]
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


def in_order(start, items, ahead):
    """Results of the futures that start gives for items, with `ahead` more of them under way."""
    pending = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
