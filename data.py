"""Token files on disk, and the batches drawn from them.

A data set is a folder: train.bin and val.bin (raw little-endian ids, no header, as nanoGPT has
them), tokenizer.json, and meta.json. meta.json is written last: a folder without it holds none.

    from data import BatchSampler, TokenDataset
    dataset = TokenDataset("data/shakespeare")
    x, y = BatchSampler(dataset.train, block_size=64, batch_size=12, seed=1337).batch(step=0)
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np

FORMAT = 1  # of meta.json; raised when an older reader would misread a newer data set
UNFINISHED = ".unfinished"  # the folder, in that of the data set, where a long preparation grows
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


# ---------------------------------------------------------------- writing


def write_dataset(data_dir, splits, tokenizer, sources=(), settings=None) -> dict:
    """Write a data set whole or not at all, and return its meta.

    splits: {"train": iterable of (ids (N,), bytes of the text behind them), "val": ...}, streamed.
    Every file is first written aside; an earlier data set stays intact until all are on disk.
    Raises OSError with exit_code 4 where the disk refuses.
    """
    dtype = DTYPES[dtype_for(tokenizer)]
    with _written_aside(Path(data_dir)) as aside:
        written = {
            split: _write_tokens(aside(f"{split}.bin"), pieces, dtype)
            for split, pieces in splits.items()
        }
        return _describe(aside, written, tokenizer, sources, settings)


def adopt_dataset(data_dir, tokenizer, settings, live_line) -> dict:
    """Make a data set of the train.bin and val.bin that are in data_dir already, ids of a BPE, and
    return its meta. Each is read once and stays as it is; ValueError where it holds other ids.

    live_line: that of utils, or what shows progress like it.
    """
    data_dir, dtype = Path(data_dir), DTYPES[dtype_for(tokenizer)]
    paths = {split: data_dir / f"{split}.bin" for split in ("train", "val")}
    for path in paths.values():
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise ValueError(
                f"{path}: {size:,} bytes are not tokens of {dtype.itemsize} bytes each"
            )
    splits = {
        split: _read_tokens(path, tokenizer, dtype, live_line) for split, path in paths.items()
    }
    sources = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": splits[split]["sha256"]}
        for split, path in paths.items()
    ]
    with _written_aside(data_dir) as aside:
        return _describe(aside, splits, tokenizer, sources, settings)


def _read_tokens(path, tokenizer, dtype, live_line):
    """What _write_tokens would have returned when writing path."""
    digest, counts = hashlib.sha256(), np.zeros(tokenizer.vocab_size, dtype=np.int64)
    with open(path, "rb") as file, live_line(path.name, path.stat().st_size, "B") as advance:
        while raw := file.read(1 << 22):
            ids = np.frombuffer(raw, dtype)
            if ids.max() >= tokenizer.vocab_size:
                place = np.argmax(ids >= tokenizer.vocab_size)
                position = (file.tell() - len(raw)) // dtype.itemsize + place
                raise ValueError(
                    f"{path}: token id {ids[place]} at position {position} is not below "
                    f"{tokenizer.vocab_size}, the size of {tokenizer.kind}'s vocabulary"
                )
            digest.update(raw)
            counts += np.bincount(ids, minlength=len(counts))
            advance(len(raw))
    n_bytes = sum(
        int(counts[i]) * len(tokenizer.decode_bytes([i])) for i in range(tokenizer.eot_id)
    )
    return {"tokens": int(counts.sum()), "bytes": n_bytes, "sha256": digest.hexdigest()}


def dtype_for(tokenizer) -> str:
    """The smallest of DTYPES that holds every id."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _describe(aside, splits, tokenizer, sources, settings):
    tokenizer.save(aside("tokenizer.json"))
    meta = {
        "format": FORMAT,
        "dtype": dtype_for(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.hash()},
        "splits": splits,
        "sources": list(sources),
        "settings": dict(settings or {}),
    }
    # a file name that is not UTF-8 has half surrogates, which JSON spells as backslashreplace does
    text = json.dumps(meta, indent=2, ensure_ascii=False)
    aside("meta.json").write_text(text, "utf-8", "backslashreplace")
    return meta


@contextlib.contextmanager
def _written_aside(folder):
    """Give temporary names in folder; at the end move all to their places, meta.json last."""
    names = []

    def aside(name):
        names.append(name)
        return folder / f".{name}.tmp"

    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield aside
        for name in names:
            with open(folder / f".{name}.tmp", "rb+") as file:
                os.fsync(file.fileno())
        (folder / "meta.json").unlink(missing_ok=True)  # a half-replaced data set is none
        for name in names:
            os.replace(folder / f".{name}.tmp", folder / name)
        _fsync_folder(folder)
    except OSError as error:
        error.exit_code = getattr(error, "exit_code", 4)
        raise
    finally:
        for name in names:
            (folder / f".{name}.tmp").unlink(missing_ok=True)


def _fsync_folder(folder):
    """Make renames survive a power cut, where the operating system can (Windows cannot)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_tokens(path, pieces, dtype):
    digest, tokens, text_bytes = hashlib.sha256(), 0, 0
    with open(path, "wb") as file:
        for ids, n_bytes in pieces:
            raw = np.ascontiguousarray(ids, dtype=dtype).tobytes()
            file.write(raw)
            digest.update(raw)
            tokens, text_bytes = tokens + len(ids), text_bytes + n_bytes
    return {"tokens": tokens, "bytes": text_bytes, "sha256": digest.hexdigest()}


class GrowingDataset:
    """A data set that takes hours to write, in data_dir/.unfinished until `finish`.

    progress, of read_progress or save_progress, is what the last `save` knew: `plan`, what is being
    made, and `position`. What was appended after that, before a kill, is cut off.
    """

    def __init__(self, data_dir, dtype: str, progress: dict):
        self.data_dir, self.folder = Path(data_dir), Path(data_dir) / UNFINISHED
        self.dtype, self.files, self.digests = DTYPES[dtype], {}, {}
        self.plan, self.position = progress["plan"], progress["position"]
        self.splits = progress["splits"]
        for split, counts in self.splits.items():
            path, size = self.folder / f"{split}.bin", counts["tokens"] * self.dtype.itemsize
            self.files[split] = open(path, "ab")
            if path.stat().st_size < size:
                raise ValueError(f"{path} has lost what was written; start anew with --overwrite")
            self.files[split].truncate(size)
            with open(path, "rb") as file:
                self.digests[split] = hashlib.file_digest(file, "sha256")

    def append(self, split: str, ids: np.ndarray, n_bytes: int):
        """Add ids (N,), which stand for n_bytes of text."""
        raw = np.ascontiguousarray(ids, dtype=self.dtype).tobytes()
        self.files[split].write(raw)
        self.digests[split].update(raw)
        self.splits[split]["tokens"] += len(ids)
        self.splits[split]["bytes"] += n_bytes

    def save(self, position):
        """Record that all up to position (anything JSON can hold) is on disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.position = position
        save_progress(self.data_dir, self.plan, position, self.splits)

    def finish(self, tokenizer, sources, settings) -> dict:
        """Make it the data set of data_dir, in place of an earlier one, and return its meta."""
        for split, digest in self.digests.items():
            self.splits[split]["sha256"] = digest.hexdigest()
        self.close()
        with _written_aside(self.folder) as aside:
            meta = _describe(aside, self.splits, tokenizer, sources, settings)
        finish_moving(self.data_dir)
        return meta

    def close(self):
        for file in self.files.values():
            file.close()


def read_progress(data_dir) -> dict | None:
    """The plan, the position and the counts of a GrowingDataset, None where there is none."""
    path = Path(data_dir) / UNFINISHED / "progress.json"
    if not path.exists():
        return None
    try:
        progress = json.loads(path.read_text("utf-8"))
        _ = progress["plan"]["settings"], progress["position"][1], progress["splits"]["val"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); delete {path.parent}") from None
    return progress


def save_progress(data_dir, plan, position, splits=None) -> dict:
    """What read_progress will read; without splits, the beginning."""
    splits = splits or {split: {"tokens": 0, "bytes": 0} for split in ("train", "val")}
    progress = {"plan": plan, "position": position, "splits": splits}
    with _written_aside(Path(data_dir) / UNFINISHED) as aside:
        aside("progress.json").write_text(json.dumps(progress), "utf-8")
    return progress


def finish_moving(data_dir):
    """Move what is whole in .unfinished to its place; also where a kill has stopped this before."""
    data_dir, folder = Path(data_dir), Path(data_dir) / UNFINISHED
    if not (folder / "meta.json").exists():
        return
    for stale in (folder / "progress.json", data_dir / "meta.json"):
        stale.unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        if (folder / name).exists():
            os.replace(folder / name, data_dir / name)
    _fsync_folder(data_dir)
    shutil.rmtree(folder)


# ---------------------------------------------------------------- reading


def read_meta(data_dir) -> dict | None:
    """The meta.json of a data set, None where there is no data set; ValueError if it is damaged."""
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text("utf-8"))
        if meta["format"] > FORMAT:
            raise ValueError(f"{path} has format {meta['format']}, this code reads {FORMAT}")
        for split in ("train", "val"):
            if not isinstance(meta["splits"][split]["tokens"], int):
                raise TypeError(split)
        _ = DTYPES[meta["dtype"]], meta["tokenizer"]["sha256"], int(meta["vocab_size"])
        _ = {**meta["settings"]}, [source["sha256"] for source in meta["sources"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); "
            "prepare the data set again with --overwrite"
        ) from None
    return meta


class TokenDataset:
    """A prepared data set: `meta`, and `train` and `val` as memory-mapped ids (N,).

    Raises FileNotFoundError where there is none, ValueError where a file is not as meta.json says.
    """

    def __init__(self, data_dir):
        self.data_dir = Path(data_dir)
        self.meta = read_meta(self.data_dir)
        if self.meta is None:
            make = "make one with `python prepare_data.py --dataset shakespeare`"
            if (self.data_dir / "train.bin").exists():
                make = f"nanoGPT's files become one by `prepare_data.py --adopt {self.data_dir}`"
            raise FileNotFoundError(
                f"no data set in {self.data_dir}; {make} or name another with --data_dir"
            )
        self.vocab_size = self.meta["vocab_size"]
        self.tokenizer_path = self.data_dir / "tokenizer.json"
        digest = hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()
        if digest != self.meta["tokenizer"]["sha256"]:
            raise ValueError(
                f"{self.tokenizer_path} is not the one that meta.json tells of; "
                "prepare the data set again with --overwrite"
            )
        self.train = self._open("train")
        self.val = self._open("val")

    @property
    def hash(self) -> str:
        """sha256 over both splits and the tokenizer; what a checkpoint remembers of its data."""
        parts = [self.meta["splits"][split]["sha256"] for split in ("train", "val")]
        parts.append(self.meta["tokenizer"]["sha256"])
        return hashlib.sha256(":".join(parts).encode()).hexdigest()

    def _open(self, split):
        path = self.data_dir / f"{split}.bin"
        dtype, tokens = DTYPES[self.meta["dtype"]], self.meta["splits"][split]["tokens"]
        expected, found = tokens * dtype.itemsize, path.stat().st_size
        if expected != found:
            raise ValueError(
                f"{path} has {found:,} bytes, meta.json says {expected:,} ({tokens:,} tokens); "
                "prepare the data set again with --overwrite"
            )
        if tokens == 0:
            return np.empty(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r")

    def require(self, block_size):
        """ValueError unless both splits hold at least one window of block_size + 1 tokens."""
        problems = [
            f"{split} has {len(tokens):,} tokens, needs {block_size + 1:,} "
            f"(--block_size {block_size}); use a smaller --block_size or prepare more text"
            for split, tokens in (("train", self.train), ("val", self.val))
            if len(tokens) < block_size + 1
        ]
        if problems:
            raise ValueError("\n".join(problems))


# ---------------------------------------------------------------- batches


def windows_at(tokens, starts, block_size, vocab_size=None):
    """Inputs and targets, int64 (len(starts), block_size) each, of the windows at `starts`.

    Raises ValueError naming value and position of an id >= vocab_size.
    """
    window = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    if vocab_size is not None and window.max() >= vocab_size:
        row, column = np.argwhere(window >= vocab_size)[0]
        raise ValueError(
            f"token id {window[row, column]} at position {starts[row] + column} of the data is not "
            f"below vocab_size {vocab_size}; prepare the data set again with --overwrite"
        )
    import torch  # takes half a second, which preparing text does not need

    window = torch.from_numpy(window)  # (B, T + 1)
    return window[:, :-1], window[:, 1:]  # (B, T), (B, T)


class Permutation:
    """A seeded permutation of range(n) that keeps some sqrt(n) numbers, not n of them.

    The numbers stand in rows and columns; in turn each column is rotated by a random amount and
    each row is: a Feistel network (Luby and Rackoff 1988) of two sizes. The last row may reach
    beyond n: whatever lands there goes through once more (Black and Rogaway 2002, both).
    """

    def __init__(self, n: int, generator: np.random.Generator, rounds: int = 4):
        self.n = n
        self.rows = math.isqrt(n - 1) + 1
        self.columns = -(-n // self.rows)
        sizes = [(self.rows, self.columns), (self.columns, self.rows)] * rounds
        self.rotations = [generator.integers(below, size=size) for below, size in sizes]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Where the numbers index (N,) go, (N,)."""
        row, column = np.divmod(index, self.columns)
        for of_column, of_row in zip(self.rotations[::2], self.rotations[1::2], strict=True):
            row = (row + of_column[column]) % self.rows
            column = (column + of_row[row]) % self.columns
        index = row * self.columns + column
        beyond = index >= self.n
        if beyond.any():
            index[beyond] = self(index[beyond])
        return index


class BatchSampler:
    """Training batches as a pure function of (seed, step, micro-step), so that resuming needs only
    the step.

    An epoch cuts the split, at a seeded offset, into windows of block_size targets that do not
    overlap, and visits each exactly once in a seeded order. The batch of all processes is drawn
    first and sliced by rank: how many processes share it changes nothing about the data.
    gradient_accumulation_steps counts the micro-batches of a step over all processes.
    """

    def __init__(
        self,
        tokens,
        block_size: int,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        seed: int = 1337,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ):
        if len(tokens) < block_size + 1:
            raise ValueError(f"{len(tokens)} tokens, needs {block_size + 1} (--block_size)")
        assert gradient_accumulation_steps % world_size == 0
        self.tokens, self.block_size, self.vocab_size = tokens, block_size, vocab_size
        self.batch_size, self.seed = batch_size, seed
        self.accumulation = gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        # the same number of windows whatever an epoch's offset turns out to be
        self.windows_per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._epochs = {}  # epoch -> (offset, permutation); the newest few

    def global_micro_step(self, micro_step: int) -> int:
        """This process's micro_step, counted over all processes."""
        return micro_step * self.world_size + self.rank

    def starts(self, step: int, micro_step: int = 0) -> list[int]:
        """Where in the split the windows of one micro-batch of this process begin."""
        position = step * self.accumulation + self.global_micro_step(micro_step)
        first = position * self.batch_size
        indices = np.arange(first, first + self.batch_size)
        epochs, windows = np.divmod(indices, self.windows_per_epoch)
        starts = []
        for epoch in range(epochs[0], epochs[-1] + 1):
            offset, permutation = self._epoch(epoch)
            order = permutation(windows[epochs == epoch])
            starts += (offset + order * self.block_size).tolist()
        return starts

    def batch(self, step: int, micro_step: int = 0):
        """Inputs and targets of one micro-batch, int64 (batch_size, block_size) each."""
        starts = self.starts(step, micro_step)
        return windows_at(self.tokens, starts, self.block_size, self.vocab_size)

    def _epoch(self, epoch):
        if epoch not in self._epochs:
            generator = np.random.default_rng([self.seed, epoch])
            slack = len(self.tokens) - 1 - self.windows_per_epoch * self.block_size
            offset = int(generator.integers(min(slack, self.block_size - 1) + 1))
            if len(self._epochs) >= 2:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = offset, Permutation(self.windows_per_epoch, generator)
        return self._epochs[epoch]


def validation_starts(tokens, block_size: int, max_windows: int | None = None) -> np.ndarray:
    """Starts (W,) of fixed windows that do not overlap, spread evenly over the whole split."""
    windows = (len(tokens) - 1) // block_size
    if max_windows is None or max_windows >= windows:
        return np.arange(windows) * block_size
    return np.arange(max_windows) * windows // max_windows * block_size
