"""Data sets are whole or absent, and batches are a pure function of the step."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import BatchSampler, Permutation, TokenDataset, validation_starts, windows_at
from tokenizer import CharTokenizer


def write(folder, train, val=(1, 2, 3), vocab_size=300) -> dict:
    """The meta of a data set, written as prepare_data.py does."""
    tokenizer = CharTokenizer([chr(0x10000 + i) for i in range(vocab_size)])
    dtype, splits = "uint16" if vocab_size <= 1 << 16 else "uint32", {}
    for name, ids in (("train", train), ("val", val)):
        raw = np.array(ids, dtype).tobytes()
        (folder / f"{name}.bin").write_bytes(raw)
        digest = hashlib.sha256(raw).hexdigest()
        splits[name] = {"tokens": len(ids), "bytes": 9, "sha256": digest}
    tokenizer.save(folder / "tokenizer.json")
    meta = {"format": 1, "dtype": dtype, "vocab_size": vocab_size, "splits": splits}
    meta |= {"tokenizer": {"kind": "char", "sha256": tokenizer.hash()}}
    meta |= {"sources": [{"name": "a.txt", "bytes": 9, "sha256": None}], "settings": {"name": None}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


@pytest.mark.parametrize("ids, vocab_size", [(range(100), 300), ([0, 69_999, 65_536], 70_000)])
def test_a_data_set_of_the_first_release_opens(tmp_path, ids, vocab_size):
    meta = write(tmp_path, ids, vocab_size=vocab_size)
    dataset = TokenDataset(tmp_path)
    assert dataset.train.tolist() == list(ids) and dataset.val.tolist() == [1, 2, 3]
    assert meta == dataset.meta and dataset.vocab_size == vocab_size


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("meta.json", None, r"no data set in .*prepare_data\.py --adopt"),
        ("train.bin", b"x" * 201, r"201 bytes.*200"),
        ("tokenizer.json", b"{}", r"tokenizer\.json is not the one.*--overwrite"),
        ("tokenizer.json", None, r"tokenizer\.json"),
    ],
)
def test_bad_input_a_file_that_is_lost_or_another_is_refused(tmp_path, name, content, says):
    write(tmp_path, range(100))
    (tmp_path / name).write_bytes(content) if content else (tmp_path / name).unlink()
    with pytest.raises(ValueError if content else FileNotFoundError, match=says):
        TokenDataset(tmp_path)


def test_bad_input_too_few_tokens_or_an_id_beyond_the_vocabulary_is_named(tmp_path):
    write(tmp_path, range(100), val=range(20))
    with pytest.raises(ValueError, match=r"val has 20 tokens, needs 65.*--block_size"):
        TokenDataset(tmp_path).require(64)
    TokenDataset(tmp_path).require(19)
    tokens = np.arange(100)
    with pytest.raises(ValueError, match="id 50 at position 50"):
        windows_at(tokens, [30], 30, vocab_size=50)
    windows_at(tokens, [19], 30, vocab_size=50)


@pytest.mark.parametrize("tokens, block_size", [(1000, 16), (997, 16), (33, 16), (17, 16), (50, 1)])
def test_every_window_of_an_epoch_exactly_once(tokens, block_size):
    sampler = BatchSampler(np.arange(tokens), block_size, batch_size=1, seed=3)
    windows = sampler.windows_per_epoch
    for epoch in range(3):
        starts = sorted(sampler.starts(epoch * windows + i)[0] for i in range(windows))
        assert np.all(np.diff(starts) == block_size)
        assert starts[0] >= 0 and starts[-1] + block_size + 1 <= tokens
    assert windows >= tokens // block_size - 2


def test_epochs_differ_and_a_batch_depends_on_seed_and_step_alone():
    def draw(seed):
        sampler = BatchSampler(np.arange(1000), 16, 4, seed=seed)
        return sampler, [sampler.starts(step) for step in range(60)]

    (used, starts), (_, again), (_, other) = draw(1), draw(1), draw(2)
    flat = [start for step in starts for start in step]
    assert starts == again != other and flat[:61] != flat[61:122]
    x, y = used.batch(7)
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
    assert y.equal(x + 1) and x[:, 0].tolist() == starts[7]


def test_permutations_visit_each_number_once_and_are_like_random_ones():
    """Chi-square over its degrees of freedom is near 1, within 7 standard deviations."""
    for n in (*range(1, 40), 1023, 1024, 1025, 3_000_017):
        order = Permutation(n, np.random.default_rng(n))(np.arange(n))
        assert np.all(np.bincount(order, minlength=n) == 1) and len(order) == n
    n = 24
    places, pairs = np.zeros((n, n)), np.zeros((n, n))
    for seed in range(4000):
        order = Permutation(n, np.random.default_rng(seed))(np.arange(n))
        places[np.arange(n), order] += 1
        pairs[order[:-1], order[1:]] += 1
    pairs = pairs[~np.eye(n, dtype=bool)]
    for counts, freedom in ((places, (n - 1) ** 2), (pairs, pairs.size - 1)):
        expected = counts.sum() / counts.size
        assert ((counts - expected) ** 2 / expected).sum() / freedom == pytest.approx(1, abs=0.45)


SPARSE = """
import resource, sys, time
import torch
from data import BatchSampler, TokenDataset

before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
sampler = BatchSampler(TokenDataset(sys.argv[1]).train, 1024, batch_size=16)
x, y = sampler.batch(0)
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KB
assert time.process_time() - start < 1 and more < 200_000, (before, more)
assert sampler.windows_per_epoch == 9_765_624
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource, and sparse files")
def test_ten_billion_tokens_start_at_once(tmp_path):
    meta = write(tmp_path, range(10))
    meta["splits"]["train"]["tokens"] = 10**10
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    os.truncate(tmp_path / "train.bin", 2 * 10**10)
    subprocess.run([sys.executable, "-c", SPARSE, str(tmp_path)], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_number_of_processes_never_changes_the_data(world_size):
    tokens, accumulation = np.arange(5000), 4

    def step_windows(world_size, step):
        starts = []
        for rank in range(world_size):
            sampler = BatchSampler(tokens, 16, 3, accumulation, 1, rank, world_size)
            for micro_step in range(accumulation // world_size):
                starts += sampler.starts(step, micro_step)
        return sorted(starts)

    for step in (0, 1, 26, 40):
        assert step_windows(world_size, step) == step_windows(1, step)


def test_validation_windows_are_fixed_and_spread_over_the_split():
    for tokens, end in ((101, 100), (100, 90)):
        assert validation_starts(np.arange(tokens), 10).tolist() == list(range(0, end, 10))
    some = validation_starts(np.arange(1001), 10, max_windows=7)
    assert len(set(some)) == 7 and some[0] == 0 and some[-1] >= 800 and all(some % 10 == 0)
