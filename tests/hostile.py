"""Hostile checkpoints: archives and pickles as torch.save never writes them, each a function of the
path. A new one is a new function here that is marked `@hostile("what load says of it")`.
"""

import os
import pickle
import struct
import zipfile

import torch
from test_checkpoint import make_state

FILES = {}  # name -> (function, what load says)
LONG = b"\x8a\x05" + (1 << 33).to_bytes(5, "little")  # a number, as pickle writes it
TORCH = b"ctorch._utils\n_rebuild_tensor_v2\n"


def hostile(says):
    def add(function):
        FILES[function.__name__.replace("_", " ")] = function, says
        return function

    return add


def archive(path, pickled, records=()):
    """A file that torch takes for its own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in {"version": b"3\n", "byteorder": b"little", **dict(records)}.items():
            file.writestr(f"archive/{name}", content)


def saved(path, **changes):
    """A checkpoint that is right but for these keys."""
    torch.save(make_state() | changes, path)


def one_value(path, value: bytes, records=()):
    """A dict with a key whose value is what these operations make."""
    archive(path, b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s.", records)


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def storage(count: int, kind=b"Float", key=b"0") -> bytes:
    text = b"X" + struct.pack("<I", len(key)) + key
    return b"(X\x07\x00\x00\x00storagectorch\n%sStorage\n" % kind + (
        text + b"X\x03\x00\x00\x00cpu" + integer(count) + b"tQ"
    )


def tensor(rows: int, columns: int, count: int, stride=(1, 1)) -> bytes:
    size = integer(rows) + integer(columns) + b"\x86"
    steps = integer(stride[0]) + integer(stride[1]) + b"\x86"
    return TORCH + b"(" + storage(count) + b"K\x00" + size + steps + b"\x89}tR"


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
def dicts_within_dicts(path):
    saved(path, config=doubled(lambda a, b: {"a": a, "b": b}))


@hostile("in several places")
def tuples_within_tuples(path):
    saved(path, rng=doubled(lambda a, b: (a, b)))


@hostile("in several places")
def a_list_in_itself(path):
    value = []
    value.append(value)
    saved(path, scaler=value)


@hostile("not usable")
def a_hundred_thousand_brackets(path):
    one_value(path, b"]" * 100_000 + b"a" * 99_999)


@hostile("equal hashes")
def keys_of_equal_hashes(path):
    numbers = (n * (2**61 - 1) for n in range(1, 60_000))
    one_value(path, b"}(" + b"".join(integer(n) + b"K\x00" for n in numbers) + b"u")


@hostile("not usable")
def keys_that_are_tuples(path):
    pairs = b"".join(b"K\x00K\x01\x86K\x00" for _ in range(50_000))
    one_value(path, b"}(" + pairs + b"u")


@hostile("too long")
def millions_of_values(path):
    one_value(path, b"](" + b"N" * 5_000_000 + b"e")


@hostile("too large")
def a_string_of_100_mb(path):
    one_value(path, b"X" + struct.pack("<I", 10**8) + b"x" * 10**8)


@hostile("larger than the file")
def a_string_in_a_hundred_thousand_places(path):
    long = b"X" + struct.pack("<I", 10**7) + b"x" * 10**7 + b"q\x00"
    one_value(path, b"](" + long + b"h\x00" * 100_000 + b"e")


@hostile("n_layer 1000.*: must be")
def a_number_of_600_digits(path):
    saved(path, config={"n_layer": 10**600})


@hostile("format: ")
def a_format_of_600_digits(path):
    saved(path, format=10**600)


# ---------------------------------------------------------------- functions and tensors


@hostile("might run code")
def bytearray_of_8_gb(path):
    one_value(path, b"cbuiltins\nbytearray\n" + LONG + b"\x85R")


@hostile("might run code")
def tensor_of_40_gb(path):
    one_value(path, b"ctorch\nTensor\n" + integer(10**5) + integer(10**5) + b"\x86R")


@hostile("might run code")
def storage_of_40_gb(path):
    one_value(path, b"ctorch\nFloatStorage\n" + integer(10**10) + b"\x85R")


@hostile("might run code")
def a_list_of_pairs_made_a_dict(path):
    one_value(path, b"ccollections\nOrderedDict\n](K\x00K\x01\x86e\x85R")


@hostile("might run code")
def a_command(path):
    one_value(path, b"cos\nsystem\nX\x0a\x00\x00\x00touch /x.x\x85R")


@hostile("might run code")
def a_name_from_the_stack(path):
    archive(path, pickle.dumps(os.getcwd, protocol=4))


@hostile("might run code")
def an_extension(path):
    one_value(path, b"\x82\x01")


@hostile("might run code")
def a_class_by_inst(path):
    one_value(path, b"(itorch\nTensor\n")


@hostile("might run code")
def a_memo_of_two_billion(path):
    one_value(path, b"Nr\xff\xff\xff\x7f0")


@hostile("larger than its record")
def a_storage_beyond_its_record(path):
    one_value(path, tensor(10, 10, 10**9), {"data/0": bytes(400)})


@hostile("not usable")
def a_record_outside(path):
    one_value(path, storage(100, key=b"../../../../etc/passwd"), {"data/0": bytes(400)})


@hostile("larger than its record")
def a_size_beyond_its_storage(path):
    one_value(path, tensor(10**5, 10**5, 100, (10**5, 1)), {"data/0": bytes(400)})


@hostile("too many dimensions")
def a_hundred_thousand_dimensions(path):
    sizes = b"(" + b"K\x01" * 100_000 + b"t"
    value = TORCH + b"(" + storage(1) + b"K\x00" + sizes + sizes + b"\x89}tR"
    one_value(path, value, {"data/0": bytes(4)})


@hostile("larger than the file")
def strides_of_nothing(path):
    one_value(path, tensor(10**5, 10**5, 100, (0, 0)), {"data/0": bytes(400)})


@hostile("larger than the file")
def a_storage_of_many_tensors(path):
    many = b"](" + tensor(1000, 1000, 10**6, (1000, 1)) * 5_000 + b"e"
    one_value(path, many, {"data/0": bytes(4 * 10**6)})


@hostile("not usable")
def an_offset_before_its_storage(path):
    value = tensor(10, 10, 100).replace(b"K\x00", b"J\xff\xff\xff\xff", 1)
    one_value(path, value, {"data/0": bytes(400)})


@hostile("not usable")
def operations_without_their_values(path):
    archive(path, b"\x80\x02RRR.")


@hostile("not usable")
def a_pickle_that_ends_early(path):
    archive(path, b"\x80\x02}(X\xff\xff\xff\xffa")


# ---------------------------------------------------------------- archives


@hostile("too many|too large|of one name")
def half_a_million_records(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    raw = path.read_bytes()
    start = raw.index(b"PK\1\2")
    entry = raw[start : raw.index(b"PK\5\6")] * 500_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entry), start, 0)
    path.write_bytes(raw[:start] + entry + end)


@hostile("of one name|too many")
def two_pickles_of_one_name(path):
    with zipfile.ZipFile(path, "w") as file:
        for content in (b"\x80\x02}.", b"\x80\x02cos\nsystem\n."):
            file.writestr("archive/data.pkl", content)


@hostile("not usable")
def two_folders_with_a_pickle(path):
    with zipfile.ZipFile(path, "w") as file:
        for folder in "ab":
            file.writestr(f"{folder}/data.pkl", b"\x80\x02}.")


@hostile("of one name")
def two_pickles_in_other_letters(path):
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data", "DATA"):
            file.writestr(f"archive/{name}.pkl", b"\x80\x02}.")


@hostile("no checkpoint")
def an_older_kind_of_file_before_the_archive(path):
    archive(path, b"\x80\x02}.")
    raw = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + path.read_bytes()
    path.write_bytes(raw)


@hostile("no checkpoint")
def two_tables_of_contents(path):
    """zipfile reads the one before the locator, torch the one that the locator names."""
    saved(path)
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\6\7")
    raw[at + 8 : at + 16] = struct.pack("<Q", 4)
    path.write_bytes(raw)


@hostile("not usable")
def no_pickle(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", b"3\n")


@hostile("not usable")
def encrypted_records(path):
    saved(path)
    raw = bytearray(path.read_bytes())
    for at in range(raw.index(b"PK\1\2"), len(raw) - 4):
        if raw[at : at + 4] == b"PK\1\2":
            raw[at + 8] |= 1
    path.write_bytes(raw)


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


@hostile("that adamw keeps")
def one_weight_without_moments(path):
    state = make_state()
    state["optimizer"].popitem()
    torch.save(state, path)


@hostile("has shape")
def a_step_of_many(path):
    saved(path, **optimizer(lambda kept: kept.update(step=torch.zeros(3))))


SCALE = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
SCALE |= {"_growth_tracker": 0}


def scaler(name, value):
    def write(path):
        saved(path, scaler=SCALE | {name: value})

    write.__name__ = f"scaler_with_{name}_of_{str(value)[:9]}"
    hostile("scaler.")(write)


scaler("scale", float("inf"))
scaler("scale", -1.0)
scaler("scale", "many")
scaler("growth_factor", 0.0)
scaler("growth_interval", 10**30)
scaler("_growth_tracker", float("nan"))
scaler("backoff_factor", [0.5])
scaler("other", 1.0)
