"""Where documents come from: text files, parquet files, the Hugging Face hub, tiny Shakespeare.

A source is read in parts, each a stream of (split, text) with END after each document. The end of
a text is for validation; of parquet files a hash of each document decides.
"""

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import deque
from functools import partial
from pathlib import Path

from files import MOST_JSON, download, hub, in_thread, open_file, optional, unix_lines
from logger import command_for, warn

CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
SHAKESPEARE = f"{CHAR_RNN}/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUNDLED = Path(__file__).parent / "data" / "sonnets.txt"


def fineweb_folder(name):
    return f"data/{name}/".replace("/default/", "/").replace("data/sample-", "sample/")


HUB_DATASETS = {  # repository; how its parquet files' paths begin, by --name; the default of that
    "openwebtext": ("Skylion007/openwebtext", lambda _: "plain_text/", None),
    "fineweb": ("HuggingFaceFW/fineweb", fineweb_folder, "sample-10BT"),
}

TEXT = re.compile(r"\.(txt|md|jsonl)(\.gz)?$", re.IGNORECASE)
PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
# what text that is not UTF-8 is likely to be in; Python knows too many that resemble each other
ENCODINGS = "gb18030 big5 cp932 euc_jp cp949 cp1252 cp1251 koi8_r utf_16 utf_16_le utf_16_be utf_32"
CHUNK = 1 << 18  # characters read at once, and about those encoded at once
LONGEST = 1 << 19  # characters without white space; more are cut, and a token with them
DOCUMENT = MOST_JSON  # characters of a .jsonl's line or bytes of a row, held as a whole
REPLACE = "convert it to UTF-8, or `prepare_data.py --errors replace` puts a U+FFFD there"

END = None  # in a stream of text: here a document ends


def find_files(inputs) -> list[tuple[str, Path]]:
    """Names and paths of files, and of those in folders, but hidden ones and behind links."""
    files = []
    for top in map(Path, inputs):
        found, known = [top], []
        for path in found:  # which grows: as deep as folders go
            if path.is_dir() and (path is top or not path.is_symlink()):
                found += [file for file in path.iterdir() if not file.name.startswith(".")]
            elif path.is_dir():
                warn(f"--input {path}: a link to a folder, which is not followed")
            elif TEXT.search(path.name) or PARQUET.search(path.name):
                folder = top if path is not top else top.parent
                known.append((path.relative_to(folder).as_posix(), path))
        if not known:
            raise ValueError(f"--input {top}: no .txt, .md, .jsonl (or .gz of one) or .parquet")
        files += sorted(known)
    of_parquet = [path for name, path in files if PARQUET.search(name)]
    if 0 < len(of_parquet) < len(files):
        raise ValueError("--input: text and parquet in one data set; name the ones or the others")
    for path in of_parquet:
        next(rows(path), None)  # a bad one is noticed before any work is done
    return files


def shakespeare(data_dir) -> tuple[str, Path]:
    """Name and path of tiny Shakespeare; if it cannot be downloaded, of our bundled sonnets."""
    path = data_dir / "input.txt"
    try:
        if not path.exists():
            download(SHAKESPEARE, SHAKESPEARE_SHA256, path)
        return path.name, path
    except ValueError as problem:
        instead = f"using {BUNDLED.name}; to change later, put it at {path} and add --overwrite"
        warn(f"tiny Shakespeare cannot be downloaded ({problem}): {instead}")
        return BUNDLED.name, BUNDLED


def describe_file(name, path) -> dict:
    """What meta.json says of a source."""
    name = str(name).encode("utf-8", "backslashreplace").decode()  # JSON has no other names
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"name": name, "bytes": file.tell(), "sha256": digest.hexdigest()}


class Documents:
    """What text and parquet files share; fetch: number -> path of a file, perhaps downloaded."""

    def __init__(self, files: list[dict], fetch, options):
        self.files, self.fetch, self.options = files, fetch, options
        self.done, self.total = 0, sum(file["bytes"] for file in files)  # read so far, and in all


class TextFiles(Documents):
    """Text files as one text, in a single part, whose last val_fraction is for validation."""

    unit, as_encoded = "char", staticmethod(unix_lines)

    def survey(self, characters: dict | None = None):
        """Count the characters, and note where each is first; ValueError for a blank text."""
        self.total = 0
        for number in range(len(self.files)):
            path, start = self.fetch(number), self.total
            for chunk in filter(None, self._read(path)):
                if characters is not None:
                    text, at = chunk.replace("\r", "\n"), self.total - start  # as unix_lines
                    new = set(text) - characters.keys()
                    characters |= {c: f"{path}, position {at + text.index(c)}" for c in new}
                self.total += len(chunk)
        if not any(chunk and chunk.strip() for chunk in self.texts()):
            raise ValueError(f"{self.files[0]['name']}: no text, {self.total:,} characters")

    def parts(self, first: int):
        """Streams of (split, text or END), one a part, from the first that is not done."""
        return [self._shares()][first:]

    def _shares(self):
        n_train = int((1 - self.options.val_fraction) * self.total)
        for chunk in self.texts():
            if chunk is END:
                yield "train" if self.done <= n_train else "val", END
                continue
            left = max(0, n_train - self.done)
            if left and chunk[left - 1 : left + 1] == "\r\n":  # one line end
                n_train, left = n_train + 1, left + 1
            self.done += len(chunk)
            yield from (("train", chunk[:left]), ("val", chunk[left:]))

    def texts(self):
        """Texts of at most CHUNK characters, and END after each document."""
        for path in map(self.fetch, range(len(self.files))):
            yield from self._read(path)

    def _read(self, path):
        return read_text_file(path, self.options.encoding or "utf-8", self.options.errors)


def read_text_file(path, encoding, errors):
    """Chunks of text, and END after each document; ValueError for bytes that are no text."""
    form, is_gz = TEXT.search(path.name).groups()
    with open_file(path) as opened, gzip.open(opened) if is_gz else opened as file:
        try:
            if is_gz and not opened.peek(1):  # no text to Python's gzip
                raise EOFError("it is empty")
            start, lines = file.peek(CHUNK), io.TextIOWrapper(file, encoding, errors, newline="\n")
            if start.startswith(codecs.BOM_UTF8):  # some editors write it
                file.read(3)
            if encoding == "utf-8" and start.count(0) > len(start) // 10:  # it is UTF-16
                raw = file.read(len(start))
                raise UnicodeDecodeError("utf-8", raw, raw.find(0), len(raw), "NUL")
            if form.lower() == "jsonl":
                yield from json_lines(path, lines, errors)
            else:
                yield from codecs.iterdecode(iter(partial(file.read, CHUNK), b""), encoding, errors)
                yield END
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error}); get it again") from None
        except UnicodeDecodeError as error:
            raise ValueError(wrong_byte(error, file.tell(), encoding, path)) from None
        except (LookupError, UnicodeError) as error:  # base64 and others are not for text
            raise ValueError(f"--encoding {encoding}: {error}") from None


def json_lines(path, file, errors):
    for number, line in enumerate(iter(partial(file.readline, DOCUMENT), ""), start=1):
        if not line.strip():
            continue
        try:  # refuses half a surrogate pair, too
            if len(line) == DOCUMENT:
                raise ValueError(f"it has {DOCUMENT:,} characters or more")
            document = json.loads(line)["text"].encode("utf-16", "surrogatepass")
            yield from in_chunks(document.decode("utf-16", errors))
        except Exception as error:  # JSON may be anything
            raise ValueError(f'{path}, line {number}: not {{"text": "..."}} ({error})') from None


def wrong_byte(error: UnicodeDecodeError, end, encoding, path) -> str:
    """What is wrong with bytes that end at offset `end`, and the command that helps."""
    raw, text, remedy = error.object, error.object.decode("utf-8", "replace"), REPLACE
    lost, foreign = text.count("\ufffd") + text.count("\0"), sum(map("\x7f".__lt__, text))
    if lost > foreign // 2:
        import charset_normalizer

        whole = raw if 0 in raw else raw[: raw.rfind(b"\n") + 1] or raw  # of UTF-16, or lines
        if found := charset_normalizer.from_bytes(whole, cp_isolation=ENCODINGS.split()).best():
            command = command_for("prepare_data.py", "--input", path, "--encoding", found.encoding)
            remedy = f"it looks like {found.encoding}, which `{command}` reads"
    at = f"byte 0x{raw[error.start]:02X} at offset {end - len(raw) + error.start}"
    return f"{path}: {at} is not {encoding.upper()}; {remedy}"


class ParquetFiles(Documents):
    """Parquet files, each a part; the rows of column "text" are documents."""

    unit, as_encoded = "B", staticmethod(str)  # as it is

    def survey(self, characters=None):
        """Nothing: it would be reading everything twice."""

    def parts(self, first: int):
        numbers = range(first, len(self.files))
        paths = in_order(partial(in_thread, self.fetch), numbers, ahead=1)
        return map(self._shares, numbers, paths)

    def texts(self):
        """Of the first file, to learn a vocabulary from."""
        return (text for _, text in self._shares(0, self.fetch(0)))

    def _shares(self, number, path):
        before, size = self.done, self.files[number]["bytes"]
        for row, (raw, count) in enumerate(rows(path)):
            self.done = before + size * (row + 1) // count
            if not raw:
                continue
            # decided by its hash, wherever the document stands and whoever asks
            digest = hashlib.blake2b(raw, digest_size=8).digest()
            is_val = int.from_bytes(digest, "big") < self.options.val_fraction * 2**64
            try:
                text = raw.decode("utf-8", self.options.errors)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, row {row}: {error}; {REPLACE}") from None
            yield from (("val" if is_val else "train", chunk) for chunk in in_chunks(text))


def rows(path):
    """For each row of a parquet file its text as bytes, or None, and how many rows there are."""
    pyarrow, parquet = map(optional, ("pyarrow", "pyarrow.parquet"))
    open_file(path).close()
    try:  # without these two a row group would be held as a whole
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            types = {column.name: str(column.type) for column in file.schema_arrow}
            if types.get("text") not in ("string", "large_string", "string_view"):
                raise ValueError(f"{path}: no column 'text' of strings; it has {str(types)[:200]}")
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            sizes = [group.total_byte_size // max(1, group.num_rows) for group in groups]
            longest = max([1, *sizes])
            if longest > DOCUMENT:
                raise ValueError(f"{path}: rows of {longest:,} bytes, at most {DOCUMENT:,}")
            for batch in file.iter_batches(min(64, DOCUMENT // longest), columns=["text"]):
                texts = batch.column(0).cast("large_binary").to_pylist()
                yield from ((text, file.metadata.num_rows) for text in texts)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a whole parquet file ({why}); get it once more") from error


def from_hub(options, state, folder):
    """Revision and files, the newest but for a state's, and what downloads the file of a number."""
    repository, begin, _ = HUB_DATASETS[options.dataset]
    prefix, again = begin(options.name), "the same command"
    if state:
        revision, files = state["revision"], state["sources"]
    else:
        with hub(repository, again) as library:
            api = library.HfApi()
            revision = api.dataset_info(repository, timeout=120).sha
            at = {"repo_type": "dataset", "revision": revision, "recursive": True}
            files = [
                {"name": file.path, "bytes": file.size, "sha256": file.lfs and file.lfs.sha256}
                for file in api.list_repo_tree(repository, prefix.rpartition("/")[0], **at)
                if file.path.startswith(prefix) and PARQUET.search(file.path)
            ]
        if not files:
            raise ValueError(f"{repository}: no .parquet file in {prefix}, see its page")
        files.sort(key=lambda file: file["name"])

    def fetch(number) -> Path:
        with hub(repository, again) as library:
            library.utils.disable_progress_bars()  # ours is one for all files
            at = {"repo_type": "dataset", "revision": revision, "local_dir": folder}
            return Path(library.hf_hub_download(repository, files[number]["name"], **at))

    return revision, files, fetch


def in_chunks(text):
    """A document in chunks, and its END."""
    yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
    yield END


def pieces(stream, safe_cut):
    """Pairs of a split and about CHUNK characters of its documents, the last of which may go on in
    the split's next piece: it is cut where that changes no token.
    """
    texts, sizes = {"train": [""], "val": [""]}, {"train": 0, "val": 0}
    for split, text in stream:
        documents = texts[split]
        if text is END:
            documents.append("")
        else:
            documents[-1] += text
        sizes[split] += len(text or "") + 1  # empty documents are bounded too
        if sizes[split] >= CHUNK:
            last = documents.pop()
            end = safe_cut(last) or (len(last) if len(last) >= LONGEST else 0)
            yield split, [*documents, last[:end]]
            texts[split], sizes[split] = [last[end:]], len(last) - end
    yield from texts.items()


def in_order(start, items, ahead):
    """Results of the futures that start gives for items, with `ahead` more of them under way."""
    pending = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
