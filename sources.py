"""Where documents come from: text files, parquet files, the Hugging Face hub, tiny Shakespeare.

A source is read in parts, each a stream of (split, text), with END where a document ends, cut
into pieces to encode. The end of a text is its validation split; of parquet files a hash of each
document decides. A new data set of the hub is a row of HUB_DATASETS.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import deque
from functools import partial
from pathlib import Path

from files import MOST_JSON, download, hub, in_thread, open_file, optional, unix_lines
from logger import command_for, progress, warn

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUNDLED = Path(__file__).parent / "data" / "sonnets.txt"


def fineweb_folder(name):
    return f"data/{name}".removesuffix("/default").replace("data/sample-", "sample/")


HUB_DATASETS = {  # repository; folder of parquet files with a column "text", by --name; its default
    "openwebtext": ("Skylion007/openwebtext", lambda _: "plain_text", None),
    "fineweb": ("HuggingFaceFW/fineweb", fineweb_folder, "sample-10BT"),
}

TEXT = re.compile(r"\.(txt|md|jsonl)(\.gz)?$", re.IGNORECASE)
PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
ROWS = 64  # of a parquet file, read at once
# what text that is not UTF-8 is likely to be in; among all that Python knows, those for a few
# similar bytes each would be taken for one another
ENCODINGS = "gb18030 big5 cp932 euc_jp cp949 cp1252 cp1251 koi8_r utf_16 utf_16_le utf_16_be utf_32"
CHUNK = 1 << 18  # characters read at once, and about those encoded at once
LONGEST = 1 << 19  # characters; a word that is longer is cut, and its tokens with it
DOCUMENT = MOST_JSON  # characters of a .jsonl's line or bytes of a row, held as a whole

END = None  # in a stream of text: here a document ends


def find_files(inputs) -> list[tuple[str, Path]]:
    """Names and paths of the files that inputs (files and folders) stand for, in order: all of
    text, or all parquet.
    """
    files = []
    for path in map(Path, inputs):
        found = [(path.name, path)]
        if path.is_dir():
            found = sorted((file.relative_to(path).as_posix(), file) for file in files_below(path))
        known = [(name, file) for name, file in found if TEXT.search(name) or PARQUET.search(name)]
        if not known:
            forms = ".txt, .md, .jsonl (or .gz of one) or .parquet"
            raise ValueError(f"--input {path}: neither a file nor a folder of {forms}")
        files += known
    of_parquet = [path for name, path in files if PARQUET.search(name)]
    if 0 < len(of_parquet) < len(files):
        raise ValueError("--input: text and parquet in one data set; name the ones or the others")
    for path in of_parquet:
        with open_file(path), readable_parquet(path):  # noticed before any work is done
            pass
    return files


def files_below(folder):
    """All files in a folder and its folders, but hidden ones and what links to folders lead to."""

    def refuse(error):
        raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))
        for link in filter(Path.is_symlink, [Path(root, name) for name in folders]):
            warn(f"--input {link}: a link to a folder, which is not followed")


def shakespeare(data_dir) -> tuple[str, Path]:
    """Name and path of tiny Shakespeare; if it cannot be downloaded, of our bundled sonnets."""
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
    """What text and parquet files share. fetch: number -> path of a file, perhaps downloaded."""

    def __init__(self, files: list[dict], fetch, options):
        self.files, self.fetch, self.val_fraction = files, fetch, options.val_fraction
        self.encoding, self.errors = options.encoding or "utf-8", options.errors
        self.done, self.total = 0, sum(file["bytes"] for file in files)  # read so far, and in all
        self.replaced = 0  # U+FFFD in what has been read


# ---------------------------------------------------------------- text


class TextFiles(Documents):
    """Text files as one text, in a single part, whose last val_fraction is for validation. A .txt
    or .md is a document, and so is the field "text" of each line of a .jsonl.
    """

    unit = "char"
    as_encoded = staticmethod(unix_lines)

    def survey(self, characters: dict | None = None):
        """Count the characters, and note where each occurs; ValueError for a blank text."""
        blank, self.total, starts = True, 0, {}
        with progress("reading", None, self.unit) as advance:
            for path, chunk in self.texts():
                text = (chunk or "").replace("\r", "\n")  # as unix_lines, and of the same length
                at = self.total - starts.setdefault(path, self.total)
                if characters is not None:
                    new = sorted(set(text) - characters.keys(), key=text.index)
                    characters |= {c: f"{path}, position {at + text.index(c)}" for c in new}
                advance(len(text))
                self.total += len(text)
                blank = blank and not text.strip()
        if blank:
            name = self.files[0]["name"]
            raise ValueError(f"{name}: no text, {self.total:,} characters of white space")

    def parts(self, first: int):
        """Streams of (split, text or END), one a part, from the first that is not done."""
        return [self._shares()][first:]

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
            self.replaced += chunk.count("\ufffd")
            shares = ("train", chunk[:left]), ("val", chunk[left:])
            yield from (share for share in shares if share[1])
        if self.done != self.total:
            raise ValueError("the text has changed since it was counted; do not write to it")

    def texts(self):
        """Pairs of a file's path and text of at most CHUNK characters, or END after a document."""
        for path in map(self.fetch, range(len(self.files))):
            with self._open(path) as file:
                if TEXT.search(path.name)[1].lower() == "jsonl":
                    for text in self._documents(path, file):
                        yield from ((path, chunk) for chunk in in_chunks(text))
                else:
                    raw = iter(partial(file.read, CHUNK), b"")
                    for chunk in codecs.iterdecode(raw, self.encoding, self.errors):
                        yield path, chunk
                    yield path, END

    @contextlib.contextmanager
    def _open(self, path):
        """A file, whose bytes are to be decoded in here; ValueError for those that are no text."""
        is_gz = TEXT.search(path.name)[2]
        with open_file(path) as opened, gzip.open(opened) if is_gz else opened as file:
            try:
                "".encode(self.encoding)  # base64 and others are not for text: LookupError
                if is_gz and not opened.peek(1):  # no text to Python's gzip
                    raise EOFError("it is empty")
                start = file.peek(CHUNK)
                if start.startswith(codecs.BOM_UTF8):  # some editors write it
                    file.read(3)
                if self.encoding == "utf-8" and start.count(0) > len(start) // 10:  # it is UTF-16
                    raw = file.read(len(start))
                    raise UnicodeDecodeError("utf-8", raw, raw.find(0), len(raw), "NUL")
                yield file
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: not a whole gzip file ({error}); get it again") from None
            except LookupError as error:
                raise ValueError(f"--encoding {self.encoding}: {error}") from None
            except UnicodeDecodeError as error:
                wrong = wrong_byte(error, file.tell(), self.encoding, path)
                raise ValueError(f"{path}: {wrong}") from None

    def _documents(self, path, file):
        text = io.TextIOWrapper(file, self.encoding, self.errors, newline="\n")
        for number, line in enumerate(iter(partial(text.readline, DOCUMENT), ""), start=1):
            where = f"{path}, line {number}"
            if len(line) == DOCUMENT:
                raise ValueError(f"{where}: a document of more than {DOCUMENT:,} characters")
            if not line.strip():
                continue
            try:  # half a surrogate pair is no text either
                document = json.loads(line)["text"].encode("utf-16", "surrogatepass")
                yield document.decode("utf-16", self.errors)
            except Exception as error:  # JSON may be anything
                raise ValueError(f'{where}: not {{"text": "..."}} ({error})') from None


def wrong_byte(error: UnicodeDecodeError, end, encoding, path=None) -> str:
    """What is wrong with bytes that end at the offset `end`, and what to type instead."""
    raw, text = error.object, error.object.decode("utf-8", "replace")
    lost, foreign = text.count("\ufffd") + text.count("\0"), sum(map("\x7f".__lt__, text))
    replace = "`prepare_data.py --errors replace` puts a U+FFFD there and goes on"
    remedy = replace if lost <= len(text) // 10 else "convert it to UTF-8"
    if path and lost > foreign // 2:
        import charset_normalizer

        whole = raw if 0 in raw else raw[: raw.rfind(b"\n") + 1] or raw  # of UTF-16, or lines
        found = charset_normalizer.from_bytes(whole, cp_isolation=ENCODINGS.split()).best()
        if found:
            command = command_for("prepare_data.py", "--input", path, "--encoding", found.encoding)
            remedy = f"it looks like {found.encoding}, which `{command}` reads"
    at = f"byte 0x{raw[error.start]:02X} at offset {end - len(raw) + error.start}"
    return f"{at} is not {encoding.upper()}; {remedy}"


# ---------------------------------------------------------------- parquet and the hub


class ParquetFiles(Documents):
    """Parquet files, each a part; the rows of column "text" are documents."""

    unit = "B"
    as_encoded = staticmethod(str)  # as it is

    def survey(self, characters=None):
        """Nothing: it would be reading everything twice."""

    def parts(self, first: int):
        numbers = range(first, len(self.files))
        paths = in_order(partial(in_thread, self.fetch), numbers, ahead=1)
        return (self._shares(n, path) for n, path in zip(numbers, paths, strict=True))

    def texts(self):
        """Of the first file, to learn a vocabulary from."""
        return self._shares(0, self.fetch(0))

    def _shares(self, number, path):
        before, size = self.done, self.files[number]["bytes"]
        with readable_parquet(path) as file:
            for row, raw in enumerate(rows(path, file)):
                self.done = before + size * row // file.metadata.num_rows
                if raw:
                    split, text = self._split(raw), self._text(raw, f"{path}, row {row}")
                    self.replaced += text.count("\ufffd")
                    yield from ((split, chunk) for chunk in in_chunks(text))
        self.done = before + size

    def _split(self, raw):  # decided by its hash, wherever the document stands and whoever asks
        digest = hashlib.blake2b(raw, digest_size=8).digest()
        return "val" if int.from_bytes(digest, "big") < self.val_fraction * 2**64 else "train"

    def _text(self, raw, where):
        try:
            return raw.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {wrong_byte(error, len(raw), 'utf-8')}") from None


@contextlib.contextmanager
def readable_parquet(path):
    """An open parquet file with a column "text" of strings; ValueError if it is anything else."""
    pyarrow, parquet = map(optional, ("pyarrow", "pyarrow.parquet"))
    try:  # without these two a row group would be held as a whole
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            types = {column.name: str(column.type) for column in file.schema_arrow}
            if types.get("text") not in ("string", "large_string", "string_view"):
                raise ValueError(f"{path}: no column 'text' of strings; it has {str(types)[:200]}")
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a whole parquet file ({why}); get it once more") from error


def rows(path, file):
    """The bytes of UTF-8 in each row of an open parquet file, None where there are none."""
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
    if longest > DOCUMENT:
        raise ValueError(f"{path}: rows of {longest:,} bytes, at most {DOCUMENT:,} are read")
    for batch in file.iter_batches(min(ROWS, DOCUMENT // max(1, longest)), columns=["text"]):
        yield from batch.column(0).cast("large_binary").to_pylist()


def list_hub_files(dataset, name) -> tuple[str, list[dict]]:
    """The newest revision, and its parquet files as meta.json describes them."""
    repository, folder_of, _ = HUB_DATASETS[dataset]
    with hub(repository, "the same command") as library:
        api, folder = library.HfApi(), folder_of(name)
        revision = api.dataset_info(repository, timeout=120).sha
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
    repository, name = HUB_DATASETS[dataset][0], files[number]["name"]
    with hub(repository, "the same command") as library:
        library.utils.disable_progress_bars()  # ours is one for all files
        return Path(library.hf_hub_download(repository, name, repo_type="dataset", **at))


# ---------------------------------------------------------------- pieces


def in_chunks(text):
    """A document in chunks, and its END."""
    yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
    yield END


def pieces(stream, safe_cut):
    """Lists of (split, text or END), of about CHUNK characters each, cut where it changes no token.
    If LONGEST characters have no such place (no space, no punctuation), after the last one.
    """
    piece, size, held, held_for = [], 0, "", "train"
    for split, text in stream:
        if held and (text is END or split != held_for):
            piece.append((held_for, held))
            held = ""
        if text is END:
            piece.append((split, END))
        else:
            held, held_for = held + text, split
        if len(held) >= CHUNK:
            end = safe_cut(held) or (len(held) if len(held) >= LONGEST else 0)
            piece.append((split, held[:end]))
            held = held[end:]
        size += len(text or "") + 1  # empty documents are bounded too
        if size >= CHUNK:
            yield piece
            piece, size = [], 0
    yield [*piece, (held_for, held)]


def in_order(start, items, ahead):
    """Results of the futures that start gives for items, with `ahead` more of them under way."""
    pending = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
