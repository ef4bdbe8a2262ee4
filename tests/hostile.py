"""Hostile checkpoints, as torch.save writes none: name -> what load says, what writes the file."""

import os
import pickle
import struct
import zipfile
from functools import partial

import torch
from test_checkpoint import make_state

TORCH = b"ctorch._utils\n_rebuild_tensor_v2\n"
SCALE = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


def archive(path, pickled, record=b""):
    """A file as torch.save writes it, with one storage."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", record)


def write_value(make, path):
    archive(path, b"\x80\x02}" + string(b"a") + make() + b"s.", bytes(400))


def write_pickle(make, path):
    archive(path, make())


def write_state(make, path):
    torch.save(make_state() | make(), path)


def string(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tensor(rows: int, columns: int, stride=(1, 1), key=b"0") -> bytes:
    storage = b"(" + string(b"storage") + b"ctorch\nFloatStorage\n" + string(key) + string(b"cpu")
    size = integer(rows) + integer(columns) + b"\x86"
    steps = integer(stride[0]) + integer(stride[1]) + b"\x86"
    return TORCH + b"(" + storage + integer(100) + b"tQ" + b"K\x00" + size + steps + b"\x89}tR"


def keys_of_equal_hashes() -> bytes:
    numbers = (n * (2**61 - 1) for n in range(1, 60_000))
    return b"}(" + b"".join(integer(n) + b"K\x00" for n in numbers) + b"u"


def doubled(make):
    value = make(None, None)
    for _ in range(100):
        value = make(value, value)
    return value


def in_itself():
    value = {}
    value["a"] = value
    return value


def optimizer(change):
    """The optimizer's state, in which change has altered that of each weight."""
    found = make_state()["optimizer"]
    for kept in found.values():
        change(kept)
    return found


def muon_s(kept):
    kept["momentum_buffer"] = kept.pop("exp_avg")
    del kept["exp_avg_sq"]


# the operations that make one value, and the bytes of the file's only storage
VALUES = {
    "keys of equal hashes": ("equal hashes", keys_of_equal_hashes),
    "millions of values": ("too long", lambda: b"](" + b"N" * 5_000_000 + b"e"),
    "a string of 100 MB": ("too large", lambda: string(b"x" * 10**8)),
    "a string in a hundred thousand places": (
        "larger than the file",
        lambda: b"](" + string(b"x" * 10**7) + b"q\x00" + b"h\x00" * 100_000 + b"e",
    ),
    "brackets": ("not usable", lambda: b"}" + string(b"a") + b"]" * 10**5 + b"a" * 99_999 + b"s"),
    "a command": ("run code", lambda: b"cos\nsystem\n" + string(b"touch /x.x") + b"\x85R"),
    "bytearray": ("run code", lambda: b"cbuiltins\nbytearray\n" + integer(8 << 30) + b"\x85R"),
    "tensor of 40 GB": ("run code", lambda: b"ctorch\nTensor\n" + 2 * integer(10**5) + b"\x86R"),
    "storage": ("run code", lambda: b"ctorch\nFloatStorage\n" + integer(10**10) + b"\x85R"),
    "the elements of a tensor": ("run code", lambda: tensor(10**8, 0) + b"Q"),
    "a record outside": ("not usable", lambda: tensor(10, 10, key=b"../../../../etc/passwd")),
    "a size beyond its storage": ("out of bounds", lambda: tensor(10**5, 10**5, (10**5, 1))),
    "strides of nothing": ("larger than the file", lambda: tensor(10**5, 10**5, (0, 0))),
    "sizes that overflow": ("not usable", lambda: tensor(2**31, 2**30, (0, 0))),
}
PICKLES = {
    "a name from the stack": ("run code", lambda: pickle.dumps(os.getcwd, protocol=4)),
    "operations without their values": ("not usable", lambda: b"\x80\x02RRR."),
    "a pickle that ends early": ("not usable", lambda: b"\x80\x02}(X\xff\xff\xff\xffa"),
}
# what differs from a checkpoint that is right
STATES = {
    "lists": ("in several places", lambda: {"config": doubled(lambda a, b: [a, b])}),
    "tuples": ("in several places", lambda: {"rng": doubled(lambda a, b: (a, b))}),
    "a dict in itself": ("in several places", lambda: {"scaler": in_itself()}),
    "a number of 600 digits": (
        "n_layer 1000.*: must be",
        lambda: {"config": {"n_layer": 10**600}},
    ),
    "adamw for muon": (
        "that muon keeps",
        lambda: {"config": make_state()["config"] | {"optimizer": "muon"}},
    ),
    "muon for adamw": ("that adamw keeps", lambda: {"optimizer": optimizer(muon_s)}),
    "a step of many": (
        "that adamw keeps",
        lambda: {"optimizer": optimizer(lambda kept: kept.update(step=torch.zeros(3)))},
    ),
    "infinite scale": ("scaler.scale", lambda: {"scaler": SCALE | {"scale": float("inf")}}),
    "another scaler": ("scaler.other", lambda: {"scaler": SCALE | {"other": 1.0}}),
}


def half_a_million_records(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    raw = path.read_bytes()
    start = raw.index(b"PK\1\2")
    entry = raw[start : raw.index(b"PK\5\6")] * 500_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entry), start, 0)
    path.write_bytes(raw[:start] + entry + end)


CASES = {
    "half a million records": ("table of contents", half_a_million_records),
    "a FIFO": ("not a regular file", os.mkfifo),
    "a link to zeros": ("not a regular file", lambda path: path.symlink_to("/dev/zero")),
}
for kind, write in ((VALUES, write_value), (PICKLES, write_pickle), (STATES, write_state)):
    CASES |= {name: (says, partial(write, make)) for name, (says, make) in kind.items()}
