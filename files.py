"""Files that are whole or absent: atomic writes, checked JSON, locks, downloads."""

import contextlib
import functools
import hashlib
import http.client
import math
import os
import shutil
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from pathlib import Path

import filelock
from pydantic import TypeAdapter, ValidationError

from options import reason

MOST_JSON = 64 << 20  # bytes; nothing of ours comes near
TIMEOUT, TRIES, PAUSE = 10, 3, 0.5  # of a download: seconds, number, seconds between two


class WriteError(OSError):
    """Something could not be written; what was there before is intact."""

    exit_code = 4


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_write(path, mode: str = "wb", keep=None):
    """A file to write to, next to path, that replaces path when all of it is on disk: fsync,
    rename, fsync of the folder. Mode "w" is UTF-8 with \\n at line ends.

    keep: a second path, under which the file that is replaced stays. Raises WriteError.
    """
    text = {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}
    mode = mode.replace("w", "x")  # "x" follows no link that somebody has put there
    with _beside(Path(path), keep) as aside:
        with open(aside, mode, **({} if "b" in mode else text)) as file:
            yield file


@contextlib.contextmanager
def atomic_folder(path):
    """A new folder to fill, next to path, that replaces path when all of it is on disk. Only an
    empty folder may be at path before. Raises WriteError.
    """
    with _beside(Path(path)) as aside:
        aside.mkdir()
        yield aside
        if Path(path).exists():
            Path(path).rmdir()  # it is empty; Windows would not replace it


@contextlib.contextmanager
def _beside(path, keep=None):
    """A free name next to path; what is there at the end is synced and renamed to path."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(aside)  # what a killed run left
            yield aside
            for file in [*aside.iterdir()] if aside.is_dir() else [aside]:
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            if keep is not None and path.exists():
                _give_second_name(path, Path(keep))
            os.replace(aside, path)
            fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            _remove(aside)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _give_second_name(path, second):
    """A hard link, so that at no moment there is no path."""
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:  # a file system without hard links
        os.replace(path, second)


@contextlib.contextmanager
def writing(path):
    """Whatever the system refuses in here is a WriteError that names path and the free space."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (WriteError, BrokenPipeError, filelock.Timeout)):
            raise
        line = f"could not write {path}: {error.strerror or error}"
        with contextlib.suppress(OSError):
            line += f"; {shutil.disk_usage(Path(path).parent).free / 1e6:,.1f} MB are free"
        raise WriteError(f"{line}; what was there is intact") from error


def open_to_append(path):
    """A file of ours to add bytes to; OSError for a link or FIFO, which somebody else has made."""
    others = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    flags = sum(others, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return open(os.open(path, flags, 0o666), "ab")


def own_folder(path) -> Path:
    """Make a folder of ours, unless it is there; ValueError for a link, or for anything else."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path}: there is something else than a folder; move it away")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def free_name(path) -> Path:
    """path, with underscores at its end until nothing has that name."""
    path = Path(path)
    while os.path.lexists(path):
        path = path.with_name(f"{path.name}_")
    return path


def fsync_folder(folder):
    """Make a rename survive a power cut, if the operating system can (Windows cannot)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def clean(folder, pattern: str = ".*.tmp"):
    """Remove what killed writes left; for the process that holds the folder's lock."""
    for path in Path(folder).glob(pattern):
        _remove(path)


# ---------------------------------------------------------------- reading


def open_file(path, most: float = math.inf):
    """Open a file that may come from somebody else, to read bytes. ValueError for a FIFO or device
    (which could be endless), for a link to one, and for more than `most` bytes.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{path}: not a regular file")
    if info.st_size > most:
        raise ValueError(f"{path}: {info.st_size:,} bytes, at most {most:,} are read")
    return open(path, "rb")


def read_bytes(path, most: int = MOST_JSON) -> bytes:
    """What open_file opens, as large as it is now."""
    with open_file(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_text(path, most: int = MOST_JSON) -> str:
    """A text in UTF-8, without a byte order mark; ValueError naming file and byte."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None


def unix_lines(text: str) -> str:
    """text with every line end as \\n: universal newlines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path, schema=dict):
    """The JSON of a file, checked against a type; ValueError naming the file and the field."""
    return check_json(read_bytes(path).removeprefix(b"\xef\xbb\xbf"), schema, path)


def check_json(content, schema, name=""):
    """JSON text, or what it has been read into, as a value of the type `schema`; ValueError with
    one line: name, field and reason.
    """
    adapter = _adapter(schema)
    is_text = isinstance(content, (str, bytes))
    try:
        return (adapter.validate_json if is_text else adapter.validate_python)(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise ValueError(": ".join(filter(None, [str(name), place, reason(first)]))) from None


_adapter = functools.cache(TypeAdapter)  # slow to make


# ---------------------------------------------------------------- locks


@contextlib.contextmanager
def lock(folder):
    """Hold folder for this process, and remove what killed writes left in it; ValueError naming the
    holder while another process has it.

    The operating system frees the lock when its holder dies, however it dies.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name one")
    note = folder / ".lock_holder"
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held = filelock.FileLock(folder / ".lock")  # follows no link
            held.acquire(timeout=0)
            clean(folder)
    except filelock.Timeout:
        holder = "another process"
        with contextlib.suppress(OSError, ValueError):  # it may have taken the lock just now
            holder = read_text(note)
        raise ValueError(
            f"{folder} is in use by {holder}; wait for it to end, or choose another folder"
        ) from None
    try:
        words = (word if len(word) <= 60 else f"{word[:57]}..." for word in sys.argv)
        with atomic_write(note, "w") as file:
            file.write(f"process {os.getpid()} ({' '.join(words)})")
        yield
    finally:
        note.unlink(missing_ok=True)
        held.release()


# ---------------------------------------------------------------- downloads


def in_thread(function, *arguments) -> Future:
    """What function returns, from a thread that no Ctrl-C and no error has to wait for."""
    future = Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def download(address: str, sha256: str, path):
    """Put what is at address at path, whole or not at all; for files that fit in memory.

    Raises ValueError with the reason after TRIES attempts, WriteError.
    """
    for attempt in range(TRIES):
        time.sleep(PAUSE if attempt else 0)
        try:
            content = _fetch(address, sha256)
            break
        except (OSError, http.client.HTTPException, ValueError) as error:
            is_status = isinstance(error, urllib.error.HTTPError)
            problem = error if is_status else getattr(error, "reason", error)
    else:
        raise ValueError(problem)
    with atomic_write(path) as file:
        file.write(content)


def _fetch(address, sha256):
    with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
        size = int(response.headers.get("Content-Length") or 0)
        try:
            content = response.read()
        except http.client.IncompleteRead as error:
            content = error.partial
    if len(content) < size:
        raise ValueError(f"cut short, {len(content):,} of {size:,} bytes came")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"another file came, {len(content):,} bytes with a wrong sha256")
    return content
