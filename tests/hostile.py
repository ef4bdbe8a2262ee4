"""Hostile checkpoints: archives and pickles as torch.save never writes them, each a function of the
path; one for each thing that reading checks. A new one is marked `@hostile("what load says")`.
"""

import os
import pickle
import struct
import zipfile

import torch
from test_checkpoint import make_state

FILES = {}  # name -> (function, what load says)
TORCH = b"ctorch._utils\n_rebuild_tensor_v2\n"


def hostile(says):
    def add(function):
        FILES[function.__name__.replace("_", " ")] = function, says
        return function

    return add


def archive(path, pickled, record=b""):
    """A file as torch.save writes it, with one storage."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", record)


def saved(path, **changes):
    """A checkpoint that is right but for these keys."""
    torch.save(make_state() | changes, path)


def one_value(path, value: bytes, record=b""):
    """A dict with a key whose value is what these operations make."""
    archive(path, b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s.", record)


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


# ---------------------------------------------------------------- containers


def doubled(make):
    value = make(None, None)
    for _ in range(100):
        value = make(value, value)
    return value


@hostile("in several places")
def lists_within_lists(path):
    saved(path, config=doubled(lambda a, b: [a, b]))


@hostile("in several places")
def tuples_within_tuples(path):
    saved(path, rng=doubled(lambda a, b: (a, b)))


@hostile("in several places")
def a_dict_in_itself(path):
    value = {}
    value["a"] = value
    saved(path, scaler=value)


@hostile("not usable")
def a_hundred_thousand_brackets(path):
    deep = b"]" * 100_000 + b"a" * 99_999
    archive(path, b"\x80\x02}" + string(b"config") + b"}" + string(b"a") + deep + b"ss.")


@hostile("equal hashes")
def keys_of_equal_hashes(path):
    numbers = (n * (2**61 - 1) for n in range(1, 60_000))
    one_value(path, b"}(" + b"".join(integer(n) + b"K\x00" for n in numbers) + b"u")


@hostile("too long")
def millions_of_values(path):
    one_value(path, b"](" + b"N" * 5_000_000 + b"e")


@hostile("too large")
def a_string_of_100_mb(path):
    one_value(path, string(b"x" * 10**8))


@hostile("larger than the file")
def a_string_in_a_hundred_thousand_places(path):
    one_value(path, b"](" + string(b"x" * 10**7) + b"q\x00" + b"h\x00" * 100_000 + b"e")


@hostile("n_layer 1000.*: must be")
def a_number_of_600_digits(path):
    saved(path, config={"n_layer": 10**600})


# ---------------------------------------------------------------- functions and tensors


@hostile("might run code")
def a_command(path):
    one_value(path, b"cos\nsystem\n" + string(b"touch /x.x") + b"\x85R")


@hostile("might run code")
def bytearray_of_8_gb(path):
    one_value(path, b"cbuiltins\nbytearray\n" + integer(8 << 30) + b"\x85R")


@hostile("might run code")
def tensor_of_40_gb(path):
    one_value(path, b"ctorch\nTensor\n" + integer(10**5) + integer(10**5) + b"\x86R")


@hostile("might run code")
def storage_of_40_gb(path):
    one_value(path, b"ctorch\nFloatStorage\n" + integer(10**10) + b"\x85R")


@hostile("might run code")
def the_elements_of_a_tensor(path):
    one_value(path, tensor(10**8, 0) + b"Q", bytes(400))


@hostile("might run code")
def a_name_from_the_stack(path):
    archive(path, pickle.dumps(os.getcwd, protocol=4))


@hostile("not usable")
def a_record_outside(path):
    one_value(path, tensor(10, 10, key=b"../../../../etc/passwd"), bytes(400))


@hostile("out of bounds")
def a_size_beyond_its_storage(path):
    one_value(path, tensor(10**5, 10**5, (10**5, 1)), bytes(400))


@hostile("larger than the file")
def strides_of_nothing(path):
    one_value(path, tensor(10**5, 10**5, (0, 0)), bytes(400))


@hostile("not usable")
def sizes_that_overflow(path):
    one_value(path, tensor(2**31, 2**30, (0, 0)), bytes(400))


@hostile("not usable")
def operations_without_their_values(path):
    archive(path, b"\x80\x02RRR.")


@hostile("not usable")
def a_pickle_that_ends_early(path):
    archive(path, b"\x80\x02}(X\xff\xff\xff\xffa")


# ---------------------------------------------------------------- archives


@hostile("table of contents")
def half_a_million_records(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    raw = path.read_bytes()
    start = raw.index(b"PK\1\2")
    entry = raw[start : raw.index(b"PK\5\6")] * 500_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entry), start, 0)
    path.write_bytes(raw[:start] + entry + end)


@hostile("not a regular file")
def a_fifo(path):
    os.mkfifo(path)


@hostile("not a regular file")
def a_link_to_zeros(path):
    path.symlink_to("/dev/zero")


# ---------------------------------------------------------------- states


def optimizer(change):
    state = make_state()
    for kept in state["optimizer"].values():
        change(kept)
    return {"optimizer": state["optimizer"]}


@hostile("that muon keeps")
def adamw_for_muon(path):
    saved(path, config=make_state()["config"] | {"optimizer": "muon"})


@hostile("that adamw keeps")
def muon_for_adamw(path):
    def change(kept):
        kept["momentum_buffer"] = kept.pop("exp_avg")
        del kept["exp_avg_sq"]

    saved(path, **optimizer(change))


@hostile("has shape")
def a_step_of_many(path):
    saved(path, **optimizer(lambda kept: kept.update(step=torch.zeros(3))))


SCALE = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


@hostile("scaler.scale")
def a_scale_that_is_not_finite(path):
    saved(path, scaler=SCALE | {"scale": float("inf")})


@hostile("scaler.other")
def a_scaler_of_another_kind(path):
    saved(path, scaler=SCALE | {"other": 1.0})
