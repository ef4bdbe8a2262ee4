"""Reads what torch.save has written, by interpreting the few operations of its pickle.

torch.load(weights_only=True) runs no code of a file's own, but calls functions of torch that may
take any memory, and follows sizes beyond a record and containers that hold themselves. Here nothing
is made but numbers, strings, lists, tuples, dicts, and tensors that lie in the file's own records.
"""

import pickletools
import zipfile

import torch

ORDERED, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
STORAGES = (
    {"torch ByteStorage": torch.uint8, "torch BoolStorage": torch.bool}
    | {"torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16}
    | {"torch FloatStorage": torch.float32, "torch DoubleStorage": torch.float64}
    | {"torch LongStorage": torch.int64}
)
MOST_PICKLE, MOST_OPERATIONS, MOST_CONTENTS = 1 << 24, 300_000, 1 << 20


def read_archive(file, size: int):
    """The value in an open file of `size` bytes, each byte's checksum compared; raises ValueError,
    zipfile.BadZipFile, and what torch and Python raise for wrong values.
    """
    content = {}  # data.pkl, and each storage under its number, whatever folder they are in
    end = zipfile._EndRecData(file)  # where ZipFile reads how large the table of contents is
    if end and end[zipfile._ECD_SIZE] > MOST_CONTENTS:
        raise ValueError("its table of contents is too large")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        is_compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if is_compressed or sum(record.file_size for record in records) > size:
            raise ValueError("its records are compressed, or larger than the file")
        for record in records:
            read = torch.empty(record.file_size, dtype=torch.uint8)
            with archive.open(record) as opened:
                for part in read.split(1 << 20):  # zipfile copies what it reads at once
                    if opened.readinto(part.numpy()) != len(part):
                        raise zipfile.BadZipFile
            content[record.filename.rpartition("/")[2]] = read
    if len(content["data.pkl"]) > MOST_PICKLE:
        raise ValueError("its pickle is too large")
    return read_pickle(content["data.pkl"].numpy().tobytes(), content, 2 * size)


def read_pickle(pickled: bytes, storages: dict, room: int):
    """The value of a pickle whose storages are these tensors of bytes. A container but Adam's betas
    may be in one place only; strings and tensors in more, but in all of no more than `room` bytes.
    """
    stack, marks, memo = [], [], {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        name, takes = operation.name, operation.stack_before
        if number > MOST_OPERATIONS:
            raise ValueError("its pickle is too long")
        first = len(stack) - len(takes)
        if pickletools.markobject in takes:
            first = marks.pop() - takes.index(pickletools.markobject)
        taken = stack[first:]
        del stack[first:]
        match name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "NONE":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if name == "EMPTY_LIST" else {})
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                value = memo[argument]
                is_betas = type(value) is tuple and [type(x) for x in value[:3]] == [float, float]
                if isinstance(value, (list, dict, tuple)) and not is_betas:
                    raise ValueError("one container in several places")
                stack.append(value)
                room -= value.nbytes if isinstance(value, torch.Tensor) else len(value)
            case "APPEND" | "APPENDS":
                taken[0].extend(taken[1:])
                stack += taken[:1]
            case "SETITEM" | "SETITEMS":
                keys = taken[1::2]
                if not all(isinstance(key, str) or abs(key) < 2**60 for key in keys):
                    raise ValueError("keys of equal hashes")
                taken[0].update(zip(keys, taken[2::2], strict=True))
                stack += taken[:1]
            case "GLOBAL" if argument in (ORDERED, REBUILD, *STORAGES):
                stack.append(argument)
            case "BINPERSID" if type(taken[0]) is tuple:  # a tensor would fall into its elements
                _, kind, key, *_ = taken[0]
                stack.append([storages[key].view(STORAGES[kind])])  # in a list: no tensor yet
            case "REDUCE" if taken == [ORDERED, ()]:
                stack.append({})
            case "REDUCE" if taken[0] == REBUILD and type(taken[1][0]) is list:
                (storage,), offset, shape, stride, *_ = taken[1]
                stack.append(storage.as_strided(shape, stride, offset))
                room -= stack[-1].nbytes
            case "PROTO" | "STOP" | "BUILD":  # BUILD: the versions of modules in nanoGPT's
                stack += taken[:1]
            case _:
                raise ValueError("more than plain data, which might run code when opened")
        if room < 0:
            raise ValueError("its tensors are larger than the file")
    return stack.pop()
