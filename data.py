"""Token files on disk, and the batches drawn from them.

A data set is a folder: train.bin and val.bin (little-endian ids without a header, as nanoGPT's),
tokenizer.json, and meta.json, which is written last: a folder without it holds no data set.

    from data import BatchSampler, TokenDataset
    dataset = TokenDataset("data/shakespeare")
    x, y = BatchSampler(dataset.train, block_size=64, batch_size=12, seed=1337).batch(step=0)
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from files import open_file, read_bytes, read_json
from tokenizer import load_tokenizer

META_FORMAT = 1  # of meta.json; incremented when an older reader would misread a newer data set
TOKEN_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
AGAIN = "prepare the data set again with --overwrite"
Count = Annotated[int, Field(ge=0, lt=2**60)]


def inner_path(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError("leads out of the folder")
    return name


class Source(TypedDict):
    name: Annotated[str, AfterValidator(inner_path)]
    bytes: Count
    sha256: str | None  # None if unknown


class Split(TypedDict):
    tokens: Count
    bytes: Count | None  # of the text behind the tokens, in UTF-8; None if unknown
    sha256: str


class Meta(TypedDict):
    format: Literal[META_FORMAT]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    tokenizer: Annotated[dict[Literal["kind", "sha256"], str], Field(min_length=2)]
    splits: Annotated[dict[Literal["train", "val"], Split], Field(min_length=2)]
    sources: Annotated[list[Source], Field(min_length=1)]
    settings: dict[str, Any]


class TokenDataset:
    """`meta`, and `train` and `val`, memory-mapped ids (N,); FileNotFoundError if there is no data
    set, ValueError if a file is not as meta.json says.
    """

    def __init__(self, data_dir):
        self.data_dir = folder = Path(data_dir)
        try:
            self.meta = read_json(folder / "meta.json", Meta)
        except ValueError as error:
            raise ValueError(f"{error}; {AGAIN}") from None
        except (FileNotFoundError, NotADirectoryError):
            flags = f"--input FILE --data_dir {folder}"
            if folder == Path("data/shakespeare"):
                flags = "--dataset shakespeare"
            elif (folder / "meta.pkl").exists():  # nanoGPT's characters, in a pickle
                flags = f"--tokenizer char --input {folder}/input.txt --data_dir data/{folder.name}"
            elif (folder / "train.bin").exists():
                flags = f"--adopt {folder}"
            raise FileNotFoundError(
                f"no data set in --data_dir {folder}; `python prepare_data.py {flags}` makes one"
            ) from None
        self.vocab_size = self.meta["vocab_size"]
        self.tokenizer_path = folder / "tokenizer.json"
        found = hashlib.sha256(read_bytes(self.tokenizer_path)).hexdigest()
        if found != self.meta["tokenizer"]["sha256"]:
            raise ValueError(f"{self.tokenizer_path} is not the one that meta.json names; {AGAIN}")
        self.train, self.val = self._open("train"), self._open("val")

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.tokenizer_path, self.vocab_size)

    @property
    def hash(self) -> str:
        """sha256 over both splits and the tokenizer; identifies the data in a checkpoint."""
        splits = self.meta["splits"]
        parts = splits["train"], splits["val"], self.meta["tokenizer"]
        return hashlib.sha256(":".join(part["sha256"] for part in parts).encode()).hexdigest()

    def _open(self, split):
        path = self.data_dir / f"{split}.bin"
        dtype, tokens = TOKEN_DTYPES[self.meta["dtype"]], self.meta["splits"][split]["tokens"]
        with open_file(path) as file:
            expected, found = tokens * dtype.itemsize, file.seek(0, 2)
        if expected != found:
            raise ValueError(f"{path}: {found:,} bytes, meta.json says {expected:,}; {AGAIN}")
        return np.memmap(path, dtype, mode="r") if tokens else np.empty(0, dtype)

    def require(self, block_size: int, splits=("train", "val")):
        """ValueError unless each split holds at least one window of block_size + 1 tokens."""
        for split in splits:
            if (count := len(getattr(self, split))) <= block_size:
                needs = f"needs {block_size + 1:,} (--block_size {block_size})"
                raise ValueError(f"{split} has {count:,} tokens, {needs}")


def windows_at(tokens, starts, block_size, vocab_size=None):
    """Inputs and targets, int64 (len(starts), block_size) each; ValueError for an unknown id."""
    import torch  # takes half a second, which prepare_data.py does not need

    window = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    if vocab_size is not None and window.max() >= vocab_size:
        row, column = np.argwhere(window >= vocab_size)[0]
        where = f"token id {window[row, column]} at position {starts[row] + column} of the data"
        error = ValueError(f"{where} is not below vocab_size {vocab_size}; {AGAIN}")
        error.rank_local = True  # ranks read different data: each prints its own
        raise error
    window = torch.from_numpy(window)  # (B, T + 1)
    return window[:, :-1], window[:, 1:]  # (B, T), (B, T)


class Permutation:
    """A seeded permutation of range(n) in O(sqrt(n)) memory. Indices fill a grid row by row;
    each round rotates every column by a random amount, then every row: an unbalanced Feistel
    network (Luby and Rackoff 1988). A result beyond n is permuted again (Black and Rogaway 2002).
    """

    def __init__(self, n: int, generator: np.random.Generator):
        self.n, self.rows = n, math.isqrt(n - 1) + 1
        self.columns = -(-n // self.rows)
        rows, columns, draw = self.rows, self.columns, generator.integers
        self.rotations = [(draw(rows, size=columns), draw(columns, size=rows)) for _ in range(4)]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Map indices (N,) to their shuffled positions (N,)."""
        row, column = np.divmod(index, self.columns)
        for column_shifts, row_shifts in self.rotations:
            row = (row + column_shifts[column]) % self.rows
            column = (column + row_shifts[row]) % self.columns
        index = row * self.columns + column
        if (beyond := index >= self.n).any():
            index[beyond] = self(index[beyond])
        return index


@dataclass
class BatchSampler:
    """Training batches as a pure function of (seed, step, micro-step). An epoch cuts the split,
    from a seeded offset, into windows, and visits each once in a seeded order; ranks take turns.
    """

    tokens: np.ndarray
    block_size: int
    batch_size: int
    gradient_accumulation_steps: int = 1  # micro-batches of a step, over all processes
    seed: int = 1337
    rank: int = 0
    world_size: int = 1
    vocab_size: int | None = None

    def __post_init__(self):
        # as many as fit at the largest offset: the same for every epoch
        self.windows_per_epoch = max(1, len(self.tokens) // self.block_size - 1)
        used = self.windows_per_epoch * self.block_size
        self.max_offset = min(len(self.tokens) - 1 - used, self.block_size - 1)

    def global_micro_step(self, micro_step: int) -> int:
        """This process's micro_step as an index over all processes."""
        return micro_step * self.world_size + self.rank

    def starts(self, step: int, micro_step: int = 0) -> list[int]:
        """Positions in the split where the windows of this process's micro-batch begin."""
        batch = step * self.gradient_accumulation_steps + self.global_micro_step(micro_step)
        indices = batch * self.batch_size + np.arange(self.batch_size)
        epochs, windows = np.divmod(indices, self.windows_per_epoch)
        starts = []
        for epoch in range(epochs[0], epochs[-1] + 1):
            offset, order = epoch_order(self.seed, epoch, self.windows_per_epoch, self.max_offset)
            starts += (offset + order(windows[epochs == epoch]) * self.block_size).tolist()
        return starts

    def batch(self, step: int, micro_step: int = 0):
        """Inputs and targets of one micro-batch, int64 (batch_size, block_size) each."""
        starts = self.starts(step, micro_step)
        return windows_at(self.tokens, starts, self.block_size, self.vocab_size)


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def epoch_order(seed: int, epoch: int, windows: int, max_offset: int) -> tuple[int, Permutation]:
    """The epoch's offset into the split, and the order of its windows."""
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(max_offset + 1)), Permutation(windows, generator)


def validation_starts(tokens, block_size: int, max_windows: int | None = None) -> np.ndarray:
    """Starts (W,) of fixed windows that do not overlap, spread evenly over the whole split."""
    windows = (len(tokens) - 1) // block_size
    count = min(windows, max_windows or windows)
    return np.arange(count) * windows // max(1, count) * block_size
