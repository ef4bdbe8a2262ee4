"""A text becomes a data set, whole or not at all, whatever the text and the network are like."""

import gzip
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, in_child, server

import files
import logger
import prepare_data
import sources
from data import TokenDataset, read_meta
from prepare_data import prepare_file
from sources import END, find_files
from tokenizer import BPETokenizer, GPT2Tokenizer, load_tokenizer

STORY = "It was a dark night; the rain fell in torrents.\nThey'd say it's \"late\".\n\n" * 40
CHINESE = "红楼梦：满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？😀\n" * 60


def prepare(*flags):
    """Run the script in this process; its exit code."""
    return logger.run(prepare_data.main, [str(flag) for flag in flags])


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_back(data_dir):
    """The text of a data set, both splits together."""
    dataset = TokenDataset(data_dir)
    ids = np.concatenate([dataset.train, dataset.val])
    return load_tokenizer(dataset.tokenizer_path).decode(ids)


def hashes(folder):
    found = sorted(folder.glob("[!.]*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def errors(capsys):
    """The messages of the `error: ` lines since the last time."""
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def strays(folder):
    return [path.name for path in Path(folder).rglob("*.tmp")]


def nasty_text(seed, length):
    """Spaces, contractions, Chinese, long words: where pieces might be cut wrongly."""
    signs = " '\n\tstmd.,!?aé0中文，。😀\u3000\x1c\u0301"
    units = [*signs, "'ll", "   ", "\r\n", "x" * 30, "中文字" * 9]
    return "".join(random.Random(seed).choices(units, k=length))


# ---------------------------------------------------------------- what is written


def test_tiny_shakespeare_splits_into_1003854_and_111540_tokens(tmp_path, monkeypatch, capsys):
    """By a text of its length that is in data_dir already, as a download would leave it."""
    monkeypatch.chdir(tmp_path)
    text = ("".join(map(chr, range(48, 112))) + "\n") * 17160
    write(tmp_path / "data" / "shakespeare" / "input.txt", text[:1_115_394])
    assert prepare("--dataset", "shakespeare") == 0
    out = capsys.readouterr().out
    assert "1,003,854" in out and "111,540" in out
    assert out.endswith(f" {logger.command_for('train.py')}\n")
    meta = read_meta("data/shakespeare")
    assert [meta["splits"][s]["tokens"] for s in ("train", "val")] == [1_003_854, 111_540]
    assert meta["vocab_size"] == 65 and meta["tokenizer"]["kind"] == "char"


def test_files_are_nanogpts_layout_and_meta_describes_them(tmp_path):
    text = write(tmp_path / "a.txt", "héllo wörld" * 10)
    meta = prepare_file(text, "char", tmp_path / "d")
    raw = (tmp_path / "d" / "train.bin").read_bytes()
    char = load_tokenizer(tmp_path / "d" / "tokenizer.json")
    assert char.decode(np.frombuffer(raw, "<u2")) == ("héllo wörld" * 10)[:99]
    digest = hashlib.sha256(raw).hexdigest()
    assert meta["splits"]["train"] == {"tokens": 99, "bytes": 99 + 18, "sha256": digest}
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert meta["sources"] == [{"name": "a.txt", "bytes": 130, "sha256": digest}]
    assert meta == read_meta(tmp_path / "d")
    assert strays(tmp_path) == []


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_chinese_and_emoji_survive(kind, tmp_path, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    meta = prepare_file(write(tmp_path / "a.txt", CHINESE), kind, tmp_path / "d")
    assert meta["tokenizer"]["kind"] == kind
    assert read_back(tmp_path / "d") == CHINESE + ("" if kind == "char" else "<|endoftext|>")


def test_bytes_are_the_same_whatever_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 500)
    text = write(tmp_path / "a.txt", nasty_text(0, 20_000))
    written = []
    for workers in (1, 2, 3):
        data_dir = tmp_path / str(workers)
        flags = ("--tokenizer", "bpe", "--vocab_size", 400, "--data_dir", data_dir)
        assert prepare("--input", text, *flags, "--workers", workers) == 0
        written.append(hashes(data_dir))
    assert written[0] == written[1] == written[2]


def test_line_ends_are_kept_and_a_byte_order_mark_is_dropped(tmp_path):
    text = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n" + "\ufeff".encode())
    prepare_file(text, "bpe", tmp_path / "d")
    assert read_back(tmp_path / "d") == "one\r\ntwo\rthree\n\ufeff<|endoftext|>"


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_pieces_give_the_tokens_of_the_whole_text(kind, tmp_path, monkeypatch, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
        tokenizer = GPT2Tokenizer()
    else:
        tokenizer = BPETokenizer.train(nasty_text(99, 5000), 500)
    monkeypatch.setattr(sources, "LONGEST", 10_000)
    for seed in range(200):
        size = random.Random(seed).randrange(1, 200)
        monkeypatch.setattr(sources, "CHUNK", size)
        text = nasty_text(seed, 600)
        parts = list(sources.cut((("val", c) for c in sources.in_chunks(text)), tokenizer.safe_cut))
        ids = [tokenizer.encode(part) for _, part in parts if part is not END]
        assert [i for part in ids for i in part] == tokenizer.encode(text)
        assert len(parts) > 3 and sum(part is END for _, part in parts) == 1


def test_a_word_without_end_is_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 10)
    monkeypatch.setattr(sources, "LONGEST", 30)
    stream = [("train", chunk) for chunk in sources.in_chunks("x" * 100)]
    parts = sources.cut(stream, BPETokenizer.train("x", 257).safe_cut)
    assert [len(part) for _, part in parts if part] == [30, 30, 30, 10]


def test_empty_documents_without_end_are_bounded_too(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 100)
    assert [len(piece) for piece in sources.grouped([("train", END)] * 250)] == [100, 100, 50]


def test_a_million_spaces_and_a_million_letters_are_encoded(tmp_path):
    text = "a" + " " * 1_048_000 + "b" * 1_048_576 + "\n" * 1_000_000 + "c"
    prepare_file(write(tmp_path / "a.txt", text), "bpe", tmp_path / "d")
    assert read_back(tmp_path / "d") == text + "<|endoftext|>"


def test_every_place_of_the_border_splits_documents_right(tmp_path):
    """Against encoding each document's share of each split at once."""
    documents = ["one two", "x", "three, four", "five"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    source = write(tmp_path / "a.jsonl", lines)
    total = sum(map(len, documents))
    for n_train in range(1, total):
        data_dir = tmp_path / str(n_train)
        flags = ("--tokenizer", "bpe", "--vocab_size", 257, "--data_dir", data_dir)
        fraction = 1 - (n_train + 0.5) / total
        assert prepare("--input", source, *flags, "--val_fraction", fraction) == 0
        bpe = load_tokenizer(data_dir / "tokenizer.json")
        splits, left = {"train": [], "val": []}, n_train
        for text in documents:
            first, rest = text[:left], text[left:]
            splits["train"] += bpe.encode(first) + ([bpe.eot_id] if left and not rest else [])
            splits["val"] += bpe.encode(rest) + ([bpe.eot_id] if rest else [])
            left = max(0, left - len(text))
        dataset = TokenDataset(data_dir)
        assert dataset.train.tolist() == splits["train"]
        assert dataset.val.tolist() == splits["val"]


# ---------------------------------------------------------------- kinds of input


def test_folder_gz_md_and_jsonl_are_read_in_order(tmp_path):
    folder = tmp_path / "in"
    write(folder / "b.jsonl", '{"text": "two"}\n\n{"text": "thr\\u00e9e", "id": 3}\n')
    write(folder / "a.md", "one")
    write(folder / "c" / "d.TXT.gz", gzip.compress(b"four" * 20))
    write(folder / "c" / "e.jsonl.gz", gzip.compress(b'{"text": "five"}'))
    write(folder / "picture.png", b"\xff")
    write(folder / ".hidden" / "f.txt", "never")
    flags = ("--tokenizer", "bpe", "--data_dir", tmp_path / "d")
    assert prepare("--input", folder, write(tmp_path / "z.txt", "six"), *flags) == 0
    assert read_back(tmp_path / "d").split("<|endoftext|>") == [
        "one",
        "two",
        "thrée",
        "four" * 20,
        "five",
        "six",
        "",
    ]
    names = [source["name"] for source in read_meta(tmp_path / "d")["sources"]]
    assert names == ["a.md", "b.jsonl", "c/d.TXT.gz", "c/e.jsonl.gz", "z.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_to_files_are_read_and_those_to_folders_are_named(tmp_path, capsys):
    write(tmp_path / "elsewhere" / "a.txt", "x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "lost.txt").symlink_to(tmp_path / "nowhere")
    assert [name for name, _ in find_files([tmp_path / "in"])] == ["b.txt"]
    assert "links to folders or nothing are not followed: lost.txt, more" in capsys.readouterr().err
    hidden = write(tmp_path / ".a.txt", "x")
    assert find_files([hidden]) == [(".a.txt", hidden)]  # it is named itself


def test_inputs_that_cannot_be_are_all_named(tmp_path):
    (tmp_path / "empty").mkdir()
    picture = write(tmp_path / "picture.png", b"")
    with pytest.raises(ValueError) as caught:
        find_files([tmp_path / "none.txt", picture, tmp_path / "empty"])
    problems = [line.split(": ") for line in str(caught.value).splitlines()]
    assert [Path(name).name for name, _ in problems] == ["none.txt", "picture.png", "empty"]
    assert problems[0][1] == "no such file" and problems[1][1] == problems[2][1]
    assert problems[1][1].startswith("no .txt, .md")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', 'line 2: not {"text": "..."} (Expecting'),
        ("a.jsonl", b'{"text": "ok"}\n\n{"body": "x"}\n', 'a.jsonl, line 3: not {"text"'),
        ("a.jsonl", b'{"text": 5}\n', 'a.jsonl, line 1: not {"text"'),
        ("a.jsonl", b'["text"]\n', 'a.jsonl, line 1: not {"text"'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: half a surrogate"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "a.jsonl: byte 0xFF at offset 25"),
        ("a.txt", b"caf\xe9 au lait", "a.txt: byte 0xE9 at offset 3"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", "a.txt: byte 0xE9 at offset 6"),
        ("a.txt", "half: 中".encode()[:-1], "a.txt: byte 0xE4 at offset 6"),
        ("a.txt", "utf-16".encode("utf-16"), "offset 0"),
        ("a.txt.gz", gzip.compress(b"hello" * 99)[:-9], "a.txt.gz: not a whole gzip file"),
        ("a.txt.gz", b"hello", "a.txt.gz: not a whole gzip file"),
        ("a.txt.gz", b"", "a.txt.gz: not a whole gzip file (it is empty)"),
        ("a.txt", b"", "no text, 0 characters"),
        ("a.txt", " \n\t\u3000".encode(), "no text, 4 characters"),
        ("a.jsonl", b"\n\n", "no text"),
        ("a.txt", b"x", "no text for train: --val_fraction 0.1"),
    ],
)
def test_bad_text_is_exit_2_and_the_earlier_data_set_stays(
    name, content, message, tmp_path, capsys
):
    good, bad = write(tmp_path / "good.txt", STORY), write(tmp_path / name, content)
    flags = ("--tokenizer", "char", "--data_dir", tmp_path / "d")
    assert prepare("--input", good, *flags) == 0
    before = hashes(tmp_path / "d")
    capsys.readouterr()
    assert prepare("--input", bad, *flags, "--overwrite") == 2
    (error,) = errors(capsys)
    assert message in error
    assert hashes(tmp_path / "d") == before and strays(tmp_path) == []
    assert prepare("--input", bad, "--tokenizer", "char", "--data_dir", tmp_path / "new") == 2
    assert hashes(tmp_path / "new") == {}


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_offset_of_a_bad_byte_is_right_wherever_chunks_end(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    text = write(tmp_path / "a.txt", "中文é😀".encode() + b"\xf0\x9f\x98x")
    with pytest.raises(ValueError, match="byte 0xF0 at offset 12 "):
        prepare_file(text, "char", tmp_path / "d")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_errors_replace_goes_on_and_counts(chunk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    raw = b"a\xffb\xe4\xb8c \xef\xbf\xbd \xf0\xef\xbf\xbd end" + "中".encode()[:2]
    text = write(tmp_path / "a.txt", raw)
    lone = write(tmp_path / "b.jsonl", b'{"text": "\\ud800!\xff"}')
    flags = ("--tokenizer", "char", "--data_dir", tmp_path / "d", "--errors", "replace")
    assert prepare("--input", text, lone, *flags) == 0
    assert "6 replacements" in capsys.readouterr().err  # the file's own two are not counted
    assert read_back(tmp_path / "d") == raw.decode("utf-8", "replace") + "\ufffd!\ufffd"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_names_that_are_not_utf8_or_cannot_be_printed_are_kept(tmp_path):
    for name in ("b\udcff.txt", "红楼.txt"):
        write(tmp_path / "in" / name, STORY)
    flags = ["--input", "in", "--tokenizer", "char", "--data_dir", "d"]
    done = subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert rb"b\udcff.txt" in done.stdout and rb"\u7ea2\u697c.txt" in done.stdout
    names = [source["name"] for source in read_meta(tmp_path / "d")["sources"]]
    assert names == [r"b\udcff.txt", "红楼.txt"]


# ---------------------------------------------------------------- again, and differently


def test_a_second_run_finds_it_there_and_changes_nothing(tmp_path, capsys):
    flags = ("--input", write(tmp_path / "a.txt", STORY), "--tokenizer", "char")

    def run():
        assert prepare(*flags, "--data_dir", tmp_path / "d") == 0
        stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").glob("[!.]*")}
        return stamps, *capsys.readouterr()

    *first, _ = run()
    *second, error = run()
    assert first == second and "already holds this text" in error
    assert prepare_file(tmp_path / "a.txt", "char", tmp_path / "d") == read_meta(tmp_path / "d")


def test_another_text_or_setting_is_refused_and_overwrite_replaces(tmp_path, capsys):
    text, data_dir = write(tmp_path / "a.txt", STORY), tmp_path / "d"
    flags = ("--input", text, "--data_dir", data_dir)
    assert prepare(*flags, "--tokenizer", "char") == 0
    before = hashes(data_dir)
    other = ("--tokenizer", "bpe", "--vocab_size", 300, "--val_fraction", 0.2)
    capsys.readouterr()
    assert prepare(*flags, *other) == 2
    error = capsys.readouterr().err
    assert "tokenizer: char there, bpe asked for" in error and "--overwrite" in error
    assert "vocab_size: None there, 300" in error and "val_fraction: 0.1 there, 0.2" in error
    write(text, STORY + "more")
    assert prepare(*flags, "--tokenizer", "char") == 2
    size = len(STORY.encode())
    (error,) = errors(capsys)
    assert f"text: a.txt ({size:,} bytes) there, a.txt ({size + 4:,} bytes) now" in error
    with pytest.raises(ValueError, match="another --data_dir"):
        prepare_file(text, "char", data_dir)
    assert hashes(data_dir) == before
    assert prepare(*flags, *other, "--overwrite") == 0
    assert read_meta(data_dir)["tokenizer"]["kind"] == "bpe"


def test_a_damaged_data_set_is_not_taken_for_the_one_asked_for(tmp_path, capsys):
    text, data_dir = write(tmp_path / "a.txt", STORY), tmp_path / "d"
    prepare_file(text, "char", data_dir)
    write(data_dir / "train.bin", b"12")
    flags = ("--input", text, "--tokenizer", "char", "--data_dir", data_dir)
    assert prepare(*flags) == 2 and "--overwrite" in capsys.readouterr().err
    write(data_dir / "meta.json", b"{")
    assert prepare(*flags) == 2 and "--overwrite" in capsys.readouterr().err
    assert prepare(*flags, "--overwrite") == 0
    TokenDataset(data_dir)


def test_a_second_process_is_told_that_the_folder_is_in_use(tmp_path, capsys):
    text = write(tmp_path / "a.txt", STORY)
    with files.lock(tmp_path / "d"):
        assert prepare("--input", text, "--data_dir", tmp_path / "d", "--tokenizer", "char") == 2
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize("later", [STORY + "more", STORY[:99]], ids=["longer", "shorter"])
def test_a_text_that_changes_meanwhile_is_no_data_set(later, tmp_path, monkeypatch, capsys):
    text, plain = write(tmp_path / "a.txt", STORY), sources.TextFiles.survey

    def survey_and_change(*args):
        plain(*args)
        write(text, later)

    monkeypatch.setattr(sources.TextFiles, "survey", survey_and_change)
    flags = ("--input", text, "--tokenizer", "char", "--data_dir", tmp_path / "d")
    assert prepare(*flags) == 2
    assert f"{len(STORY):,} characters when they were counted" in capsys.readouterr().err
    assert hashes(tmp_path / "d") == {}
    monkeypatch.setattr(sources.TextFiles, "survey", plain)
    assert prepare(*flags) == 0


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_a_full_disk_is_exit_4_and_named_and_the_earlier_data_set_stays(
    name, tmp_path, monkeypatch, capsys
):
    data_dir = tmp_path / "d"
    flags = ("--tokenizer", "bpe", "--vocab_size", 300, "--data_dir", data_dir, "--overwrite")
    assert prepare("--input", write(tmp_path / "b.txt", STORY), *flags) == 0
    before = hashes(data_dir)
    content = STORY * 2 if name == "a.txt" else parquet(documents(0, 50))
    source, plain = write(tmp_path / name, content), os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert prepare("--input", source, *flags) == 4
    error = capsys.readouterr().err
    assert f"error: could not write {data_dir}" in error and "No space left" in error
    assert hashes(data_dir) == before and strays(data_dir) == []
    monkeypatch.setattr(os, "fsync", plain)
    assert prepare("--input", source, *flags) == 0 and hashes(data_dir) != before


class Countdown:
    """Counts Python's calls, and kills the process at the n-th."""

    def __init__(self, n=None):
        self.n, self.calls = n, 0

    def __call__(self, frame, event, argument):
        self.calls += 1
        if self.calls == self.n:
            os.kill(os.getpid(), signal.SIGKILL)


def prepare_anew(text, data_dir, countdown):
    of = {"input": [str(text)], "tokenizer": "char", "data_dir": str(data_dir)}
    options = prepare_data.Options(**of, overwrite=True)
    sys.setprofile(countdown)
    try:
        prepare_data.prepare(options)
    finally:
        sys.setprofile(None)


def write_number_of_calls(text, data_dir, path):
    whole = Countdown()
    prepare_anew(text, data_dir, whole)
    path.write_text(str(whole.calls))
    return 0


def assert_whole_or_absent(data_dir):
    meta = read_meta(data_dir)
    if meta is not None:
        TokenDataset(data_dir)
        for split, said in meta["splits"].items():
            raw = (data_dir / f"{split}.bin").read_bytes()
            assert hashlib.sha256(raw).hexdigest() == said["sha256"]
        loaded = load_tokenizer(data_dir / "tokenizer.json")
        assert loaded.hash() == meta["tokenizer"]["sha256"]


MOMENTS = [*range(5), *(pytest.param(i, marks=pytest.mark.slow) for i in range(5, 20))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_a_data_set_is_whole_or_absent(tmp_path, moment):
    old, new = (write(tmp_path / f"{name}.txt", name + STORY * 3 + name) for name in "ab")
    data_dir, elsewhere = tmp_path / "d", tmp_path / "elsewhere"
    prepare_anew(old, elsewhere, Countdown())
    prepare_anew(old, data_dir, Countdown())
    assert in_child(write_number_of_calls, new, elsewhere, tmp_path / "calls") == 0
    calls = int((tmp_path / "calls").read_text())
    # most of the kills fall into the last quarter, where files are synced and renamed
    first = 1 if moment % 4 == 3 else calls * 3 // 4
    n = random.Random(moment).randrange(first, calls - 20)
    assert in_child(prepare_anew, new, data_dir, Countdown(n)) == -signal.SIGKILL
    assert_whole_or_absent(data_dir)
    flags = ("--input", new, "--tokenizer", "char", "--data_dir", data_dir, "--overwrite")
    assert prepare(*flags) == 0 and strays(data_dir) == []
    assert_whole_or_absent(data_dir)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--dataset", "custom"], ["--dataset custom needs --input"]),
        (["--dataset", "shakespeare", "--input", "a.txt"], ["use --dataset custom"]),
        (["--vocab_size", "500"], ["only for bpe"]),
        (["--tokenizer", "bpe", "--vocab_size", "256"], ["--vocab_size 256: must be at least 257"]),
        (["--val_fraction", "0", "--workers", "0"], ["--val_fraction 0: must", "--workers 0"]),
        (["--val_fraction", "nan"], ["--val_fraction nan: must be a finite number"]),
        (["--val_fraction", "1"], ["--val_fraction 1: must be less than 1"]),
        (["--tokenizer", "none.json"], ["none.json: neither char, bpe, gpt2 nor a file"]),
        (["--tokeniser", "char"], ["did you mean --tokenizer"]),
        (["--dataset", "openwebtext", "--name", "x"], ["only for fineweb"]),
        (["--dataset", "fineweb", "--input", "a.parquet"], ["use --dataset custom"]),
        (["--dataset", "fineweb", "--tokenizer", "char"], ["use gpt2 or bpe"]),
        (["--adopt", "d", "--input", "a.txt"], ["no other flags"]),
        (["--adopt", "nowhere"], ["nowhere/train.bin: No such file"]),
    ],
)
def test_wrong_flags_are_exit_2_all_at_once(flags, messages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare(*flags) == 2
    for error, message in zip(errors(capsys), messages, strict=True):
        assert message in error
    assert os.listdir(tmp_path) == []


def test_bpe_learns_from_a_bounded_sample(monkeypatch):
    chunks = [f"a{i}" for i in range(1000)]
    monkeypatch.setattr(prepare_data, "SAMPLE_WORDS", 100)
    assert 20 < len(list(prepare_data.training_sample(chunks))) < 40
    monkeypatch.setattr(prepare_data, "SAMPLE", 100)
    assert len(list(prepare_data.training_sample(["the same", None] * 1000))) == 13


# ---------------------------------------------------------------- the download

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50


@pytest.fixture
def offline(monkeypatch, tmp_path, only_this_machine):
    """PLAY in place of Shakespeare's, which cannot be had."""
    monkeypatch.setattr(sources, "SHAKESPEARE", "http://127.0.0.1:9/refused")
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    monkeypatch.chdir(tmp_path)
    return Path("data/shakespeare")


def test_download_is_kept_and_not_made_twice(offline, monkeypatch):
    with server("input.txt", PLAY) as (address, asked):
        monkeypatch.setattr(sources, "SHAKESPEARE", address)
        assert prepare() == 0
        assert prepare("--overwrite") == 0
    assert asked == ["/input.txt"]
    assert (offline / "input.txt").read_bytes() == PLAY
    assert read_meta(offline)["sources"][0]["name"] == "input.txt"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"body": PLAY[:1000], "length": len(PLAY)}, "cut short, 1,000 of 3,050 bytes"),
        ({"body": b"<html>please log in</html>"}, "wrong sha256"),
        ({"status": 404, "body": b"no"}, "404"),
        ({"status": 500, "body": b"no"}, "500"),
        (None, "refused"),
    ],
    ids=["cut short", "another text", "404", "500", "refused"],
)
def test_download_that_fails_says_why_and_the_bundled_text_is_used(
    answer, problem, offline, monkeypatch, capsys
):
    with server("input.txt", **{"body": PLAY, **(answer or {})}) as (address, asked):
        if answer:
            monkeypatch.setattr(sources, "SHAKESPEARE", address)
        assert prepare() == 0
    assert len(asked) == (3 if answer else 0)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert problem in line and "sonnets.txt" in line and "--overwrite" in line
    assert not (offline / "input.txt").exists() and strays(offline) == []
    source = read_meta(offline)["sources"][0]
    bundled = sources.BUNDLED.read_bytes()
    assert source["name"] == "sonnets.txt" and source["bytes"] == len(bundled)
    assert source["sha256"] == hashlib.sha256(bundled).hexdigest()


# ---------------------------------------------------------------- parquet and the hub

REVISION = "5a1b" * 10


def documents(seed, n):
    rng = random.Random(seed)
    return [nasty_text(rng.random(), rng.randrange(1, 60)) for _ in range(n)]


def parquet(texts, rows=20, compression="snappy", **columns):
    """A parquet file of texts, in bytes, with small row groups."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"url": ["x"] * len(texts), "text": texts} | columns)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(
        table, sink, row_group_size=rows, compression=compression, use_dictionary=False
    )
    return sink.getvalue().to_pybytes()


class Hub:
    """The hub's answers for one repository. `cut` breaks the connection after so many bytes of a
    file, once; `lost` is a file that cannot be had.
    """

    def __init__(self, files, repository="HuggingFaceFW/fineweb"):
        self.repository, self.files, self.cut, self.asked, self.lost = repository, files, {}, [], ""

    def answer(self, request):
        """Status, headers and content."""
        self.asked.append(f"{request.command} {request.path} {request.headers['Range']}")
        path = urllib.parse.unquote(request.path.split("?")[0]).partition(self.repository)[2]
        name = path.removeprefix(f"/resolve/{REVISION}/")
        if path == "":
            return 200, {}, json.dumps({"id": self.repository, "sha": REVISION}).encode()
        if path.startswith(f"/tree/{REVISION}/"):
            return 200, {}, json.dumps(self.tree(path.removeprefix(f"/tree/{REVISION}/"))).encode()
        if name not in self.files or name == self.lost:
            return 404, {}, b""
        raw, wanted = self.files[name], re.match(r"bytes=(\d+)-$", request.headers["Range"] or "")
        headers = {"ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "X-Repo-Commit": REVISION}
        if not wanted:
            return 200, headers, raw
        first = int(wanted[1])
        headers["Content-Range"] = f"bytes {first}-{len(raw) - 1}/{len(raw)}"
        return 206, headers, raw[first:]

    def tree(self, folder):
        found = [{"type": "directory", "path": folder, "oid": "0"}]
        for name, raw in self.files.items():
            lfs = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 9}
            file = {"type": "file", "path": name, "size": len(raw), "oid": "0", "lfs": lfs}
            found += [file] if name.startswith(folder + "/") else []
        return found


@pytest.fixture
def at_address(monkeypatch, tmp_path, only_this_machine):
    """Tells huggingface_hub where the hub is."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    def change(address):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return change


@pytest.fixture
def serve(at_address):
    """Lets a Hub answer on this machine as long as the test runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, raw = self.server.hub.answer(self)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(
                    raw[: self.server.hub.cut.pop(self.path.split(f"{REVISION}/")[-1], None)]
                )

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        at_address(f"http://127.0.0.1:{httpd.server_port}")
        httpd.handle_error = lambda *a: None  # a client that was killed

        def start(hub):
            httpd.hub = hub
            return hub

        yield start
        httpd.shutdown()


def fineweb(n=60):
    """Four files of fineweb's sample, the documents in them, and two files that are not of it."""
    texts = [documents(seed, n) for seed in range(4)]
    files = {f"sample/10BT/00{i}_00000.parquet": parquet(part) for i, part in enumerate(texts)}
    files |= {"data/CC-MAIN-1/000.parquet": b"no", "sample/10BT/README.md": b"no"}
    return files, [text for part in texts for text in part]


FINEWEB = ("--dataset", "fineweb", "--tokenizer", "bpe", "--vocab_size", 400, "--val_fraction", 0.2)


def test_hub_documents_are_split_by_hash_each_with_its_end_of_text(serve, tmp_path):
    files, texts = fineweb()
    serve(Hub(files))
    assert prepare(*FINEWEB, "--data_dir", tmp_path / "d") == 0
    bpe = load_tokenizer(tmp_path / "d" / "tokenizer.json")
    assert bpe.vocab_size == 400
    expected = {"train": [], "val": []}
    for text in texts:
        first = hashlib.blake2b(text.encode(), digest_size=8).digest()[0]
        expected["val" if first < 0.2 * 256 else "train"] += [*bpe.encode(text), bpe.eot_id]
    dataset = TokenDataset(tmp_path / "d")
    assert dataset.train.tolist() == expected["train"] and dataset.val.tolist() == expected["val"]
    n_bytes = sum(split["bytes"] for split in dataset.meta["splits"].values())
    assert n_bytes == sum(len(text.encode()) for text in texts)
    names = [f"sample/10BT/00{i}_00000.parquet" for i in range(4)]
    assert dataset.meta["sources"] == [
        {"name": name, "bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in names
    ]
    assert not (tmp_path / "d" / ".unfinished").exists()
    serve(Hub({}))  # which nobody asks any more
    assert prepare(*FINEWEB, "--data_dir", tmp_path / "d") == 0


# What a killed run does: it saves after every few pieces, and dies at the n-th save.
DYING = """
import os, signal, sys
import logger, prepare_data, sources

def save(self, position, plain=prepare_data.Writer.save, left=[int(sys.argv.pop())]):
    plain(self, position)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

prepare_data.Writer.save = save
sources.CHUNK = 500
prepare_data.SAVE_SECONDS = 0
sys.exit(logger.run(prepare_data.main))
"""


def run_until_save(n, *flags):
    command = [sys.executable, "-c", DYING, *map(str, flags), str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_hub_download_cut_short_and_killed_half_way_gives_the_undisturbed_data_set(
    serve, tmp_path, monkeypatch
):
    files, _ = fineweb(150)
    name = "sample/10BT/001_00000.parquet"
    hub = serve(Hub(files))
    assert prepare(*FINEWEB, "--data_dir", tmp_path / "whole") == 0
    encoded, plain = [], prepare_data.encode
    monkeypatch.setattr(prepare_data, "encode", lambda *a: encoded.append(a[2][1]) or plain(*a))
    monkeypatch.setattr(sources, "CHUNK", 500)
    for workers in (1, 2):
        hub.cut, hub.asked = {name: len(files[name]) // 2} if workers == 1 else {}, []
        data_dir = tmp_path / str(workers)
        flags = [*FINEWEB, "--data_dir", data_dir, "--workers", workers]
        run_until_save(60, *flags)
        assert read_meta(data_dir) is None and (data_dir / ".unfinished").exists()
        n_asked = sum(asked.startswith("GET") and name in asked for asked in hub.asked)
        assert n_asked == 3 - workers
        encoded.clear()
        assert prepare(*flags) == 0
        n_encoded = sum(map(len, encoded))
        assert hashes(data_dir) == hashes(tmp_path / "whole")
        assert not (data_dir / ".unfinished").exists()
        assert 200 < n_encoded < 450, n_encoded  # of 600 documents


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_text_killed_half_way_goes_on_and_gives_the_same_bytes(
    kind, tmp_path, monkeypatch, capsys
):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(3, 100))
    inputs = [write(tmp_path / "a.txt", nasty_text(7, 9000)), write(tmp_path / "b.jsonl", lines)]
    flags = ("--input", *inputs, "--tokenizer", kind)
    monkeypatch.setattr(sources, "CHUNK", 500)
    assert prepare(*flags, "--data_dir", tmp_path / "whole") == 0
    run_until_save(9, *flags, "--data_dir", tmp_path / "d")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "d", other)
    with open(tmp_path / "d" / ".unfinished" / "train.bin", "ab") as file:
        file.write(b"half a piece")
    encoded, plain = [], prepare_data.encode
    monkeypatch.setattr(prepare_data, "encode", lambda *a: encoded.append(a) or plain(*a))
    capsys.readouterr()
    assert prepare(*flags, "--data_dir", tmp_path / "d") == 0
    assert "resuming" in capsys.readouterr().err
    assert hashes(tmp_path / "d") == hashes(tmp_path / "whole")
    n_left = len(encoded)
    # what is left of a text is minutes of work: another command simply begins anew
    assert prepare(*flags, "--val_fraction", 0.2, "--data_dir", other) == 0
    assert n_left < len(encoded) - n_left - 6


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}', "null", '{"format": 2}'])
def test_bad_input_damaged_progress_is_refused_by_name(text, tmp_path, capsys):
    write(tmp_path / "d" / ".unfinished" / "progress.json", text)
    source = write(tmp_path / "a.txt", STORY)
    assert prepare("--input", source, "--data_dir", tmp_path / "d", "--tokenizer", "char") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "progress.json: " in line and "delete" in line


def test_stopped_at_any_rename_a_preparation_is_finished_by_the_next(tmp_path, monkeypatch):
    flags = ("--input", write(tmp_path / "a.txt", STORY), "--tokenizer", "char", "--data_dir")
    plain, renames = os.replace, []

    def replace(*paths):
        renames.append(paths)
        if len(renames) == stop_at:
            raise KeyboardInterrupt
        plain(*paths)

    monkeypatch.setattr(os, "replace", replace)
    stop_at = 0
    assert prepare(*flags, tmp_path / "whole") == 0
    for moment in range(1, len(renames) + 1):
        data_dir, stop_at = tmp_path / str(moment), moment
        renames.clear()
        assert prepare(*flags, data_dir) == 130
        assert_whole_or_absent(data_dir)
        assert prepare(*flags, data_dir) == 0
        assert hashes(data_dir) == hashes(tmp_path / "whole")
        assert not (data_dir / ".unfinished").exists()
    assert moment >= 8


def gigabyte():
    """Four files of a quarter of a gigabyte of documents, the last of one row group."""
    base = (ROOT / "data" / "sonnets.txt").read_text("utf-8")
    rng = random.Random(0)
    files = {}
    for i in range(4):
        starts = [rng.randrange(len(base) - 5000) for _ in range(100_000)]
        texts = [base[start : start + rng.randrange(5000)] for start in starts]
        name = f"sample/10BT/00{i}_00000.parquet"
        files[name] = parquet(texts, rows=10**9 if i == 3 else 1000, compression="none")
    return files


# prepare_data.py, and at its end the most memory that it had
MEASURED = """
import logger, pathlib, prepare_data
assert logger.run(prepare_data.main) == 0
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def half_way(data_dir):
    path = data_dir / ".unfinished" / "progress.json"
    return path.exists() and json.loads(path.read_text())["position"][0] >= 2


def start(*flags):
    command = [sys.executable, "-c", MEASURED, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_gigabyte_from_the_hub_in_600_mb_cut_short_killed_and_gone_on_with(
    serve, tmp_path, gpt2_vocabulary
):
    files = gigabyte()
    assert sum(map(len, files.values())) > 10**9
    name = "sample/10BT/001_00000.parquet"
    hub = serve(Hub(files))
    expected = None
    for workers in (2, 1):
        hub.cut, hub.asked = {name: len(files[name]) // 2}, []
        flags = ("--dataset", "fineweb", "--data_dir", tmp_path / "d", "--workers", workers)
        process = start(*flags)
        while not half_way(tmp_path / "d"):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert any("bytes=" in asked for asked in hub.asked)  # what was cut went on
        hub.asked.clear()
        process = start(*flags)
        out, error = process.communicate()
        assert process.returncode == 0 and "resuming" in error, error
        assert not any("000_00000" in asked or name in asked for asked in hub.asked)
        megabytes = int(out.split()[-1]) / 1e3
        print(f"{workers} workers: peak memory {megabytes:.0f} MB")
        assert megabytes < 600
        expected = expected or hashes(tmp_path / "d")
        assert hashes(tmp_path / "d") == expected
        shutil.rmtree(tmp_path / "d")
    assert prepare("--dataset", "fineweb", "--data_dir", tmp_path / "d") == 0  # undisturbed
    assert hashes(tmp_path / "d") == expected


NOT_UTF8 = b"caf\xe9"


def test_parquet_input_of_every_string_type_skips_nulls_and_replaces_bad_bytes(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    strings = pyarrow.array(["one", None, "", "two"])
    for number, kind in enumerate((pyarrow.string(), pyarrow.large_string())):
        write(tmp_path / "in" / f"{number}.parquet", parquet(strings.cast(kind).to_pylist()))
    bad = pyarrow.array([b"three", NOT_UTF8]).view(pyarrow.string())
    write(tmp_path / "in" / "more" / "bad.PARQUET", parquet([None] * 2, text=bad))
    flags = ("--input", tmp_path / "in", "--tokenizer", "bpe", "--vocab_size", 257)
    flags = (*flags, "--val_fraction", 0.3, "--data_dir", tmp_path / "d")
    assert prepare(*flags) == 2
    assert "bad.PARQUET, row 1: byte 0xE9 at offset 3 is not UTF-8" in capsys.readouterr().err
    assert read_meta(tmp_path / "d") is None
    assert prepare(*flags, "--errors", "replace") == 2
    assert "unfinished data set" in capsys.readouterr().err
    os.rename(tmp_path / "in" / "more" / "bad.PARQUET", tmp_path / "in" / "-bad.PARQUET")
    assert prepare(*flags, "--errors", "replace", "--overwrite") == 0
    assert "1 replacements" in capsys.readouterr().err
    assert sorted(read_back(tmp_path / "d").split("<|endoftext|>")) == [
        "",
        "caf\ufffd",
        "one",
        "one",
        "three",
        "two",
        "two",
    ]
    names = [source["name"] for source in read_meta(tmp_path / "d")["sources"]]
    assert names == ["-bad.PARQUET", "0.parquet", "1.parquet"]
    write(tmp_path / "in" / "0.parquet", parquet(["another"]))
    assert prepare(*flags, "--errors", "replace") == 2
    assert "text: -bad.PARQUET" in capsys.readouterr().err


WHOLE = lambda: parquet(["some text", "more text"] * 50)  # noqa: E731


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (lambda: WHOLE()[:-100], [], "a.parquet: not a whole parquet file"),
        (lambda: WHOLE()[:20] + bytes(60) + WHOLE()[80:], [], "a.parquet: not a whole parquet"),
        (lambda: b"<html>", [], "a.parquet: not a whole parquet file"),
        (
            lambda: parquet([1, 2]),
            [],
            "no column 'text' of strings; it has {'url': 'string', 'text': 'int64'}",
        ),
        (lambda: parquet([None, None]), [], "no column 'text' of strings"),
        (lambda: parquet(["", None]), [], "no text for train and val"),
        (WHOLE, ["--val_fraction", "1e-9"], "no text for val: --val_fraction 1e-09"),
        (WHOLE, ["b.txt"], "text and parquet in one data set"),
    ],
)
def test_bad_parquet_is_exit_2_and_the_earlier_data_set_stays(
    content, flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    bpe = ("--tokenizer", "bpe", "--vocab_size", 257, "--overwrite")
    write(Path("b.txt"), STORY)
    assert prepare("--data_dir", "data", *bpe, "--input", "b.txt") == 0
    before = hashes(Path("data"))
    write(Path("a.parquet"), content())
    capsys.readouterr()
    assert prepare("--data_dir", "data", *bpe, "--input", "a.parquet", *flags) == 2
    (error,) = errors(capsys)
    assert message in error
    assert hashes(Path("data")) == before


def test_hub_problems_are_one_line_each_and_the_same_command_goes_on(
    serve, tmp_path, monkeypatch, capsys
):
    flags = (*FINEWEB, "--data_dir", tmp_path / "d")

    def attempt(message):
        assert prepare(*flags) == 2
        (error,) = errors(capsys)
        assert message in error and read_meta(tmp_path / "d") is None

    serve(Hub({}, "nobody/nothing"))
    attempt("HuggingFaceFW/fineweb cannot be had from http://127.0.0.1")
    serve(Hub({"data/x.parquet": b""}))
    attempt("HuggingFaceFW/fineweb: no .parquet file in sample/10BT")
    hub = serve(Hub(fineweb()[0]))
    hub.lost = "sample/10BT/002_00000.parquet"
    attempt("cannot be had from")
    hub.lost = ""
    assert prepare(*flags) == 0
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert prepare(*flags) == 0  # there already
    assert prepare(*flags, "--overwrite") == 2
    assert "pip install -r requirements-hub.txt" in capsys.readouterr().err


def test_a_hub_that_never_answers_is_given_up(at_address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "LISTING_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at_address(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert prepare(*FINEWEB, "--data_dir", tmp_path / "d") == 2
    assert "cannot be had from http://127.0.0.1" in capsys.readouterr().err


# ---------------------------------------------------------------- from nanoGPT


@pytest.fixture
def nanogpts(tmp_path, gpt2_vocabulary):
    """A folder as nanoGPT's prepare.py leaves it, by its own words, and the two texts."""
    encoding = tiktoken.get_encoding("gpt2")
    texts = {"train": STORY * 9, "val": CHINESE + "<|endoftext|>"}
    for split, text in texts.items():
        ids = encoding.encode(text, allowed_special="all")
        np.array(ids, dtype=np.uint16).tofile(write(tmp_path / "n" / f"{split}.bin", b""))
    return tmp_path / "n", texts


def test_adopted_tokens_are_a_data_set_and_stay_as_they_are(nanogpts, capsys):
    folder, texts = nanogpts
    before = hashes(folder)
    assert prepare("--adopt", folder) == 0
    out = capsys.readouterr().out
    assert out.endswith(f" {logger.command_for('train.py', '--data_dir', folder)}\n")
    dataset = TokenDataset(folder)
    gpt2 = load_tokenizer(dataset.tokenizer_path)
    for split, text in texts.items():
        assert gpt2.decode(getattr(dataset, split)) == text
        tokens, digest = len(getattr(dataset, split)), before[f"{split}.bin"]
        assert dataset.meta["splits"][split] == {"tokens": tokens, "bytes": None, "sha256": digest}
        assert hashes(folder)[f"{split}.bin"] == digest
    assert dataset.meta["vocab_size"] == 50257 and dataset.meta["tokenizer"]["kind"] == "gpt2"
    before = hashes(folder)
    assert prepare("--adopt", folder) == 0 and hashes(folder) == before
    captured = capsys.readouterr()
    assert captured.out == out and "already" in captured.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("meta.pkl", b"cos\nsystem\n(S'touch canary'\ntR.", "meta.pkl"),
        ("val.bin", None, "val.bin: No such file"),
        ("val.bin", b"", "val.bin: 0 bytes"),
        ("train.bin", b"123", "train.bin: 3 bytes are not tokens of 2 bytes each"),
    ],
)
def test_what_is_not_gpt2s_tokens_is_not_adopted(
    name, content, message, nanogpts, monkeypatch, capsys
):
    folder, _ = nanogpts
    monkeypatch.chdir(folder)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        write(folder / name, content)
    before = sorted(os.listdir(folder)), hashes(folder)
    assert prepare("--adopt", folder) == 2
    (error,) = errors(capsys)
    assert message in error
    assert (sorted({*os.listdir(folder)} - {".lock"}), hashes(folder)) == before
