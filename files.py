"""Files that are whole or absent: atomic writes, checked JSON, locks, downloads."""

import contextlib
import errno
import functools
import hashlib
import importlib
import os
import shutil
import stat
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import filelock
from pydantic import TypeAdapter, ValidationError

from options import reason

MOST_JSON = 64 << 20  # bytes; nothing of ours comes near


class WriteError(OSError):
    """Something could not be written; what was there before is intact."""

    exit_code = 4


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_write(path, keep=None):
    """Yield a temporary file of bytes that replaces path once it is on disk: fsync, rename, fsync
    of the folder. keep: a name for the old file. WriteError.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(aside)  # what a killed run left; "x" follows no link that somebody puts there
            with open(aside, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(aside, path)
            fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            remove(aside)


def write_file(path, content: str | bytes):
    """Write a whole file atomically, a text in UTF-8."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with atomic_write(path) as file:
        file.write(content)


def fsync_folder(folder):
    """Make a rename survive a power cut, if the operating system can (Windows cannot)."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)


def remove(*paths):
    """Delete files and whole folders, if they are there, and through no link."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path):
    """Turn an OSError in here into a WriteError that names path and the free space."""
    try:
        yield
    except OSError as error:
        line = f"could not write {path}: {error.strerror or error}"
        with contextlib.suppress(OSError):
            line += f"; {shutil.disk_usage(Path(path).parent).free / 1e6:,.1f} MB are free"
        raise WriteError(f"{line}; what was there is intact") from error


def open_to_append(path):
    """Open a file of ours to append bytes; OSError for a link or FIFO in its place."""
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return open(path, "ab", opener=lambda path, flags: os.open(path, flags | careful, 0o666))


def own_folder(path, link: bool = False) -> Path:
    """Create a folder unless it exists; ValueError for anything else, a link unless allowed."""
    path = Path(path)
    if (path.exists() and not path.is_dir()) or (path.is_symlink() and not link):
        raise ValueError(f"{path} is not a folder of its own; move it away, or name another")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def free_name(path) -> Path:
    """path, with underscores appended until nothing has that name."""
    while os.path.lexists(path):
        path = f"{path}_"
    return Path(path)


# ---------------------------------------------------------------- reading


def open_file(path, most: float = float("inf")):
    """Open an untrusted file to read bytes; ValueError for a FIFO, a device, over `most` bytes."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{path}: not a regular file")
    if info.st_size > most:
        raise ValueError(f"{path}: {info.st_size:,} bytes, at most {most:,} are read")
    return open(path, "rb")


def read_bytes(path, most: int = MOST_JSON) -> bytes:
    """An untrusted file's bytes, as many as its size says: one in /proc may never end."""
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
    """A file's JSON, validated against a type; ValueError naming file and field."""
    return check_json(read_text(path), schema, path)


def check_json(content, schema, name=""):
    """JSON text or a parsed value, validated against a type; ValueError: name, field, reason."""
    adapter, is_text = _adapter(schema), isinstance(content, (str, bytes))
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
    """Lock folder for this process, and tidy it; ValueError naming the holder if it is taken."""
    folder = own_folder(folder, link=True)
    note, held = folder / ".lock_holder", filelock.FileLock(folder / ".lock")  # follows no link
    with writing(folder):
        try:
            held.acquire(timeout=0)
        except filelock.Timeout:
            holder = read_text(note) if note.is_file() else "another process"
            line = f"{folder} is in use by {holder}; wait for it to end, or choose another folder"
            raise ValueError(line) from None
        remove(*folder.glob(".*.tmp"))
    try:
        write_file(note, f"process {os.getpid()} ({' '.join(sys.argv)[:200]})")
        yield
    finally:
        note.unlink(missing_ok=True)
        held.release()


# ---------------------------------------------------------------- downloads


def in_thread(function, *arguments) -> Future:
    """A Future of function, in a daemon thread: neither Ctrl-C nor an error waits for it."""
    future = Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def download(address: str, sha256: str, path):
    """Download address to path atomically. Raises ValueError with the reason, WriteError."""
    import requests  # takes a tenth of a second

    session = requests.Session()
    session.mount(address, requests.adapters.HTTPAdapter(max_retries=2))
    try:
        response = session.get(address, timeout=10)  # seconds that it may stand still
        response.raise_for_status()
    except requests.RequestException as error:
        cause = str(error).rpartition("): ")[2].removesuffix('"))')  # not the connection's name
        raise ValueError(cause) from None
    if hashlib.sha256(content := response.content).hexdigest() != sha256:
        raise ValueError(f"another file came, {len(content):,} bytes with a wrong sha256")
    write_file(path, content)


def optional(package: str, requirements: str = "requirements-hub.txt"):
    """Import a package of a requirements file; ValueError with the pip command without it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{package} is missing: `pip install -r {requirements}`") from None


@contextlib.contextmanager
def hub(repository: str, again: str):
    """Yield huggingface_hub; its errors become one-line ValueErrors. again: what to run then."""
    library, errors = map(optional, ("huggingface_hub", "huggingface_hub.errors"))
    try:
        yield library
    except errors.RepositoryNotFoundError as error:  # a private or gated one, too
        remedy = "if it is private or access is by request, ask for that and `hf auth login`"
        raise ValueError(f"{repository}: not found on the hub, nor as a path; {remedy}") from error
    except Exception as error:  # networks fail in many ways
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise  # the disk is full
        first = str(error).partition("\n")[0] or type(error).__name__
        remedy = f"{again} tries again; HF_ENDPOINT sets a mirror, HF_HUB_OFFLINE=1 reads the cache"
        raise ValueError(f"{repository}: the transfer failed, {remedy}: {first}") from error
