"""What torch.save has written, looked at before torch.load reads it: the archive and its pickle.

torch.load(weights_only=True) calls no code of a file's own, but functions of torch that may take
any memory, sizes beyond what a record holds, and containers that are in many places.
"""

import math
import pickle
import pickletools
import struct
import zipfile
from typing import NamedTuple

# What torch.save writes, and all that is followed: operations that put a value on the stack (None:
# their argument), others that take so many from it (None: those since MARK), and functions and
# storages, with the bytes of an element. A TREE is any container.
TREE = object()
PUSHES = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")),
    **{"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()},
    **{"EMPTY_DICT": TREE, "EMPTY_LIST": TREE},
}
TAKES = {
    **dict.fromkeys(("TUPLE", "APPENDS", "SETITEMS")),
    **dict.fromkeys(("TUPLE1", "APPEND", "BUILD", "BINPERSID"), 1),
    **{"TUPLE2": 2, "SETITEM": 2, "REDUCE": 2, "TUPLE3": 3},
}
GLOBALS = {
    **dict.fromkeys(("collections OrderedDict", "torch._utils _rebuild_tensor_v2"), 0),
    **dict.fromkeys(("torch ByteStorage", "torch CharStorage", "torch BoolStorage"), 1),
    **dict.fromkeys(("torch HalfStorage", "torch BFloat16Storage", "torch ShortStorage"), 2),
    **dict.fromkeys(("torch FloatStorage", "torch IntStorage"), 4),
    **dict.fromkeys(("torch DoubleStorage", "torch LongStorage"), 8),
}
MOST_PICKLE, MOST_OPERATIONS, MOST_RECORDS = 1 << 24, 300_000, 100_000


class Storage(NamedTuple):
    """The numbers of a tensor, as far as check_pickle knows them."""

    count: int
    itemsize: int


def check_archive(file, size: int):
    """ValueError unless a file holds undamaged records, as torch.save writes them, and in data.pkl
    nothing but plain data: torch.load takes both on trust.
    """
    check_ends(file.read(4), file, size)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        sizes = {record.filename: record.file_size for record in records}
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("compressed records")
        distinct = {name.lower() for name in sizes}  # torch looks for "DATA.pkl", too
        if not len(records) == len(distinct) <= MOST_RECORDS or sum(sizes.values()) > size:
            raise ValueError("records larger than the file, too many, or two of one name")
        if bad := archive.testzip():
            raise ValueError(f"damaged: the checksum of {bad} does not match")
        (folder,) = (name[:-8] for name in sizes if name.endswith("/data.pkl"))
        if sizes[f"{folder}data.pkl"] > MOST_PICKLE:
            raise ValueError("its pickle is too large")
        check_pickle(archive.read(f"{folder}data.pkl"), folder, sizes, 2 * size)


def check_ends(start: bytes, file, size: int):
    """ValueError unless a file is nothing but an archive, with one table of contents: of what is in
    front or in several places, torch could see something else than zipfile.
    """
    file.seek(max(0, size - 98))
    contents, locator, end = struct.unpack("56s20s22s", file.read().rjust(98, b"\0"))
    at, table = size - 22, struct.unpack("<12xLL2x", end)
    if locator.startswith(b"PK\6\7"):  # of a zip64
        at, table = size - 98, struct.unpack("<40xQQ", contents)
        at = at if struct.unpack("<8xQ4x", locator) == (at,) else -1
    if start != b"PK\3\4" or not end.startswith(b"PK\5\6") or sum(table) != at:
        raise zipfile.BadZipFile
    if table[0] > MOST_PICKLE:
        raise ValueError("its table of contents is too large")


def check_pickle(content: bytes, folder: str, sizes: dict[str, int], room: int):
    """ValueError unless this pickle makes nothing but numbers, strings, lists, dicts, and tensors
    that lie in folder's records of these sizes; each once, or in all no more than `room` bytes.

    Does what each operation does (Python's pickletools describes them) to a stack on which a
    container is only a TREE and a tensor its size, so that checking makes nothing either.
    """
    stack, marks, memo = [], [], {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        name, taken = operation.name, []
        if number > MOST_OPERATIONS:
            raise ValueError("its pickle is too long")
        if name in TAKES:
            first = marks.pop() if TAKES[name] is None else len(stack) - TAKES[name]
            taken = stack[first:]
            del stack[first:]
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            room -= _cost(memo[argument])
        elif name in PUSHES:
            stack.append(PUSHES[name] if argument is None else argument)
        elif name.startswith("TUPLE"):
            stack.append(tuple(taken))
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD") and stack[-1] is TREE:
            keys = taken[::2] if name.startswith("SET") else ()
            if not all(isinstance(key, str) or abs(key) < 2**60 for key in keys):
                raise ValueError("keys of equal hashes")
        elif name == "GLOBAL" and argument in GLOBALS:
            stack.append(argument)
        elif name == "BINPERSID":
            _, kind, key, _, count = taken[0]
            if sizes.get(f"{folder}data/{key}") != count * GLOBALS[kind]:
                raise ValueError("a tensor is larger than its record")
            stack.append(Storage(count, GLOBALS[kind]))
        elif name == "REDUCE" and taken == ["collections OrderedDict", ()]:
            stack.append(TREE)
        elif name == "REDUCE" and taken[0] == "torch._utils _rebuild_tensor_v2":
            stack.append(_tensor(*taken[1]))
            room -= _cost(stack[-1])
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError
        if room < 0:
            raise ValueError("its tensors are larger than the file")


def _tensor(storage, offset, size, stride, requires_grad, hooks) -> Storage:
    """What _rebuild_tensor_v2 makes of a storage."""
    if len(size) > 8:
        raise ValueError("a tensor has too many dimensions")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min([offset, *size, *stride]) < 0 or (0 not in size and last >= storage.count):
        raise ValueError("a tensor is larger than its record")
    return Storage(math.prod(size), storage.itemsize)


def _cost(value) -> int:
    """Bytes of what is in one more place; ValueError for a container."""
    if isinstance(value, Storage):
        return value.count * value.itemsize
    if value is TREE or (isinstance(value, tuple) and not all(type(x) is float for x in value)):
        raise ValueError("one container in several places")
    return len(value) if isinstance(value, (str, tuple)) else 0
