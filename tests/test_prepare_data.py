"""A text becomes a data set, whole or not at all, whatever the text and the network are like."""

import gzip
import hashlib
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer

STORY = "It was a dark night; the rain fell in torrents.\nThey'd say it's \"late\".\n\n" * 40
CHINESE = "红楼梦：满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？😀\n" * 60
BPE = ("--tokenizer", "bpe", "--vocab_size", 400)


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


def nasty_text(seed, length, ends="\r\n"):
    """Spaces, contractions, Chinese, long words: where pieces might be cut wrongly."""
    signs = " '\n\tstmd.,!?aé0中文，。😀\u3000\x1c\u0301"
    units = [*signs, "'ll", "   ", *([ends] if ends else []), "x" * 30, "中文字" * 9]
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
    assert meta == read_meta(tmp_path / "d") and strays(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "train", "val"),  # sha256 begins so, as the first published version wrote it
    [
        (["--tokenizer", "char"], "a4761e45d165a390", "474045913402e749"),
        (BPE, "545f415ab4a8a073", "0783db44119019a5"),
        (["--tokenizer", "gpt2"], "295f5dde2e07e6f8", "d01432e4d1209ee1"),
    ],
)
def test_bytes_are_always_the_same_whatever_the_number_of_workers(
    flags, train, val, tmp_path, monkeypatch, request
):
    if "gpt2" in flags:
        request.getfixturevalue("gpt2_vocabulary")
    monkeypatch.setattr(sources, "CHUNK", 500)
    documents = "".join(json.dumps({"text": nasty_text(s, 50, "")}) + "\n" for s in range(100))
    inputs = (
        write(tmp_path / "a.txt", nasty_text(7, 9000, "")),
        write(tmp_path / "b.jsonl", documents),
    )
    for workers in (1, 3):
        data_dir = tmp_path / str(workers)
        flags = (*flags, "--data_dir", data_dir, "--workers", workers)
        assert prepare("--input", *inputs, *flags) == 0
        found = hashes(data_dir)
        assert (found["train.bin"][:16], found["val.bin"][:16]) == (train, val)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_every_line_end_is_a_newline_and_bytes_count_those_on_disk(
    kind, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    text = "one\r\ntwo\rthree\n\ufeff\r\n\r\nfour"
    files = [
        write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode()),
        write(tmp_path / "b.jsonl", json.dumps({"text": "x\r\ny"})),
    ]
    flags = ("--tokenizer", kind, "--data_dir", tmp_path / "d")
    assert prepare("--input", *files, *flags, "--val_fraction", 0.78) == 0  # between \r and \n
    end = "" if kind == "char" else "<|endoftext|>"
    expected = "one\ntwo\nthree\n\ufeff\n\nfour" + end + "x\ny" + end
    assert read_back(tmp_path / "d") == expected
    splits = read_meta(tmp_path / "d")["splits"]
    assert sum(split["bytes"] for split in splits.values()) == len(text.encode()) + 4


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


def test_pieces_are_bounded_for_words_without_end_and_empty_documents(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 10)
    monkeypatch.setattr(sources, "LONGEST", 30)
    stream = [("train", chunk) for chunk in sources.in_chunks("x" * 100)]
    parts = sources.cut(stream, BPETokenizer.train("x", 257).safe_cut)
    assert [len(part) for _, part in parts if part] == [30, 30, 30, 10]
    assert [len(piece) for piece in sources.grouped([("train", END)] * 25)] == [10, 10, 5]


def test_every_place_of_the_border_splits_documents_right(tmp_path, monkeypatch):
    """Against encoding each document's share of each split at once."""
    documents, bpe = ["one two", "x", "three, four", "five"], BPETokenizer.train("", 257)
    bpe.save(tmp_path / "bpe.json")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    source = write(tmp_path / "a.jsonl", lines)
    total = sum(map(len, documents))
    for n_train in range(2, total):  # a split has at least two tokens
        data_dir, fraction = tmp_path / str(n_train), 1 - (n_train + 0.5) / total
        flags = ("--tokenizer", tmp_path / "bpe.json", "--data_dir", data_dir)
        assert prepare("--input", source, *flags, "--val_fraction", fraction) == 0
        splits, left = {"train": [], "val": []}, n_train
        for text in documents:
            first, rest = text[:left], text[left:]
            splits["train"] += bpe.encode(first) + ([bpe.eot_id] if left and not rest else [])
            splits["val"] += bpe.encode(rest) + ([bpe.eot_id] if rest else [])
            left = max(0, left - len(text))
        dataset = TokenDataset(data_dir)
        assert {s: getattr(dataset, s).tolist() for s in splits} == splits


# ---------------------------------------------------------------- kinds of input


def test_folder_gz_md_and_jsonl_are_read_in_order(tmp_path):
    folder = tmp_path / "in"
    write(folder / "b.jsonl", '{"text": "two"}\n\n{"text": "thr\\u00e9e", "id": 3}\n')
    write(folder / "a.md", "one")
    write(folder / "c" / "d.TXT.gz", gzip.compress(b"four" * 20, mtime=0))
    write(folder / "c" / "e.jsonl.gz", gzip.compress(b'{"text": "five"}', mtime=0))
    write(folder / "picture.png", b"\xff")
    write(folder / ".hidden" / "f.txt", "never")
    six = write(tmp_path / ".z.txt", "six")  # it is named itself
    assert prepare("--input", folder, six, "--tokenizer", "bpe", "--data_dir", tmp_path / "d") == 0
    expected = ["one", "two", "thrée", "four" * 20, "five", "six", ""]
    assert read_back(tmp_path / "d").split("<|endoftext|>") == expected
    names = [source["name"] for source in read_meta(tmp_path / "d")["sources"]]
    assert names == ["a.md", "b.jsonl", "c/d.TXT.gz", "c/e.jsonl.gz", ".z.txt"]


def without_rights(folder):
    """In a child: the exit code of preparing a folder by somebody who owns nothing."""
    os.setgid(65534)
    os.setuid(65534)
    return prepare("--input", folder, "--tokenizer", "char", "--data_dir", "/tmp/never written")


@pytest.mark.skipif(sys.platform == "win32", reason="needs links, FIFOs and permissions")
def test_what_cannot_be_read_below_a_folder_is_an_error_that_names_it(tmp_path, capfd):
    folder, picture = tmp_path / "in", write(tmp_path / "picture.png", b"")
    (tmp_path / "empty").mkdir()
    assert prepare("--input", tmp_path / "none.txt", picture, tmp_path / "empty") == 2
    wrong = re.findall(r"(\S+): no (\S+)", "\n".join(errors(capfd)))
    assert [(Path(path).name, why) for path, why in wrong] == [
        ("none.txt", "such"),
        ("picture.png", ".txt,"),
        ("empty", ".txt,"),
    ]
    link = write(folder / "a.txt", STORY).with_name("b.txt")
    link.symlink_to("a.txt")
    (folder / "more").symlink_to(tmp_path)  # a folder that is a link is named, not followed
    assert [name for name, _ in find_files([folder])] == ["a.txt", "b.txt"]
    assert "more: a link to a folder" in capfd.readouterr().err
    for target in ("nowhere", "/dev/zero", None):
        link.unlink()
        link.symlink_to(target) if target else os.mkfifo(link)
        assert prepare("--input", folder, "--data_dir", tmp_path / "d") == 2
        assert "b.txt: " in capfd.readouterr().err and not (tmp_path / "d").exists()
    if os.getuid() == 0:
        with tempfile.TemporaryDirectory() as other:
            os.chmod(other, 0o755)
            file = write(Path(other, "a.txt"), STORY)
            sub = write(Path(other, "sub", "b.txt"), STORY).parent
            for secret in (file, sub):
                secret.chmod(0)
                assert in_child(without_rights, Path(other)) == 2
                assert f"{secret}: Permission denied" in capfd.readouterr().err
                secret.chmod(0o755)


HALF = "half: 中".encode()[:-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', 'line 2: not {"text": "..."} (Expecting'),
        ("a.jsonl", b'{"text": "ok"}\n\n{"body": "x"}\n', 'a.jsonl, line 3: not {"text"'),
        ("a.jsonl", b'{"text": 5}\n', 'a.jsonl, line 1: not {"text"'),
        ("a.jsonl", b'["text"]\n', 'a.jsonl, line 1: not {"text"'),
        ("a.jsonl", b"[" * 10**5, 'a.jsonl, line 1: not {"text"'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', 'a.jsonl, line 1: not {"text"'),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "a.jsonl: byte 0xFF at offset 25"),
        ("a.txt", b"caf\xe9 au lait", "a.txt: byte 0xE9 at offset 3"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", "a.txt: byte 0xE9 at offset 6"),
        ("a.txt", HALF, "a.txt: byte 0xE4 at offset 6"),
        ("a.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], "a.txt.gz: not a whole gzip file"),
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
    assert message in error and hashes(tmp_path / "d") == before and strays(tmp_path) == []
    assert prepare("--input", bad, "--tokenizer", "char", "--data_dir", tmp_path / "new") == 2
    assert os.listdir(tmp_path / "new") == [".lock"]


JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 9
TAIWAN = "臺灣的天氣很熱，我們去海邊游泳吧。這個學校的學生說中文。\n" * 9
FRENCH = "Je suis allé au café, mais il y avait trop de monde, ce qui me rend triste.\n" * 9


@pytest.mark.parametrize(
    ("text", "encoding", "likely"),
    [
        (CHINESE, "gb18030", "gb18030"),
        (TAIWAN, "big5", "big5"),
        (JAPANESE, "shift_jis", "cp932"),
        (JAPANESE, "euc_jp", "euc_jp"),
        (CHINESE, "utf_16", "utf_16"),
        (FRENCH, "utf_16_le", "utf_16_le"),
        (FRENCH, "latin_1", "cp1252"),
    ],
)
def test_an_encoding_is_named_with_the_command_that_reads_it(
    text, encoding, likely, tmp_path, capsys
):
    path = write(tmp_path / "my text.txt", (text * 5).encode(encoding))
    data_dir = ("--tokenizer", "char", "--data_dir", tmp_path / "d")
    assert prepare("--input", path, *data_dir) == 2
    (error,) = errors(capsys)
    assert f"--input '{path}' --encoding {likely}`" in error
    assert ("--errors replace" in error) == (encoding == "latin_1")  # elsewhere too much would go
    assert prepare("--input", path, "--encoding", likely, *data_dir) == 0
    assert read_back(tmp_path / "d") == text * 5
    write(path, text.encode() + b"\xff" + text.encode())  # damaged, but UTF-8
    assert prepare("--input", path, *data_dir, "--overwrite") == 2
    (error,) = errors(capsys)
    assert "--encoding" not in error and "--errors replace" in error


def test_a_character_that_a_given_vocabulary_lacks_is_found_in_its_file(tmp_path, capsys):
    CharTokenizer.train(STORY + "\n").save(tmp_path / "char.json")
    good, bad = (
        write(tmp_path / "a.txt", STORY * 99),
        write(tmp_path / "b.txt", STORY * 99 + "\r\n中"),
    )
    flags = ("--tokenizer", tmp_path / "char.json", "--data_dir", tmp_path / "d")
    assert prepare("--input", good, bad, *flags) == 2
    (error,) = errors(capsys)
    assert f"{bad}, position {99 * len(STORY) + 2}: U+4E2D '中' is not in the vocabulary" in error
    assert prepare("--input", good, *flags) == 0


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
    assert "8 U+FFFD are in the text" in capsys.readouterr().err
    assert read_back(tmp_path / "d") == raw.decode("utf-8", "replace") + "\ufffd!\ufffd"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_names_that_are_not_utf8_or_cannot_be_printed_are_kept(tmp_path):
    for name in ("b\udcff.txt", "红楼.txt"):
        write(tmp_path / "in" / name, STORY)
    flags = ["--input", "in", "--tokenizer", "char", "--data_dir", "d"]
    command, latin = (
        [sys.executable, ROOT / "prepare_data.py", *flags],
        {"PYTHONIOENCODING": "latin-1"},
    )
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | latin, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb"b\udcff.txt" in done.stdout
    names = [source["name"] for source in read_meta(tmp_path / "d")["sources"]]
    assert names == [r"b\udcff.txt", "红楼.txt"]


BOUNDED = """
import os, resource, sys
sys.path.insert(0, {root!r})
import logger, prepare_data
base = int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_AS, (base + (900 << 20),) * 2)
sys.exit(logger.run(prepare_data.main))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
@pytest.mark.parametrize(
    ("name", "unit", "code", "message"),
    [
        ("a.jsonl.gz", b" ", 2, "line 1: a document of more than 67,108,864 characters"),
        ("a.txt.gz", b"\n", 2, "no text, 83,886,080 characters of white space"),
    ],
)
def test_a_small_gz_of_endless_text_takes_no_memory(name, unit, code, message, tmp_path):
    block = gzip.compress(unit * (1 << 20), 1)
    path = write(tmp_path / name, block * 80)
    flags = ["--input", path, "--tokenizer", "char", "--data_dir", tmp_path / "d", "--workers", "1"]
    child = [sys.executable, "-c", BOUNDED.format(root=str(ROOT)), *map(str, flags)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and message in done.stderr, done.stderr[-2000:]


# ---------------------------------------------------------------- again, and differently


def test_a_second_run_finds_it_there_and_changes_nothing(tmp_path, capsys):
    flags = ("--input", write(tmp_path / "a.txt", STORY), "--tokenizer", "char")
    seen = []
    for _ in range(2):
        assert prepare(*flags, "--data_dir", tmp_path / "d") == 0
        stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").glob("[!.]*")}
        out, err = capsys.readouterr()
        seen.append((stamps, out))
    assert seen[0] == seen[1] and "already holds this text" in err
    assert prepare_file(tmp_path / "a.txt", "char", tmp_path / "d") == read_meta(tmp_path / "d")


def test_another_text_or_setting_is_refused_and_overwrite_replaces(tmp_path, capsys):
    text, data_dir = write(tmp_path / "a.txt", STORY), tmp_path / "d"
    flags, other = ("--input", text, "--data_dir", data_dir), (*BPE, "--val_fraction", 0.2)
    assert prepare(*flags, "--tokenizer", "char") == 0
    before = hashes(data_dir)
    capsys.readouterr()
    assert prepare(*flags, *other) == 2
    (error,) = errors(capsys)
    assert "tokenizer: char there, bpe asked for" in error and "--overwrite" in error
    assert "vocab_size: None there, 400" in error and "val_fraction: 0.1 there, 0.2" in error
    write(text, STORY + "more")
    assert prepare(*flags, "--tokenizer", "char") == 2
    (error,) = errors(capsys)
    size = len(STORY.encode())
    assert re.search(rf"text: {size:,} bytes \(sha.*\) there, {size + 4:,} bytes \(", error)
    with pytest.raises(ValueError, match="another --data_dir"):
        prepare_file(text, "char", data_dir)
    with files.lock(data_dir):
        assert prepare(*flags, "--tokenizer", "char", "--overwrite") == 2
    assert "in use" in capsys.readouterr().err and hashes(data_dir) == before
    assert prepare(*flags, *other, "--overwrite") == 0
    assert read_meta(data_dir)["tokenizer"]["kind"] == "bpe"
    for name, content in (("train.bin", b"12"), ("meta.json", b"{")):  # a damaged one
        write(data_dir / name, content)
        assert prepare(*flags, *other) == 2 and "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("later", [STORY + "more", STORY[:99]], ids=["longer", "shorter"])
def test_a_text_that_changes_meanwhile_is_no_data_set(later, tmp_path, monkeypatch, capsys):
    text, plain = write(tmp_path / "a.txt", STORY), sources.TextFiles.survey

    def survey_and_change(*args):
        plain(*args)
        write(text, later)

    flags = ("--input", text, "--tokenizer", "char", "--data_dir", tmp_path / "d")
    with monkeypatch.context() as patch:
        patch.setattr(sources.TextFiles, "survey", survey_and_change)
        assert prepare(*flags) == 2
    assert f"{len(STORY):,} characters when they were counted" in capsys.readouterr().err
    assert hashes(tmp_path / "d") == {} and prepare(*flags) == 0


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_a_full_disk_is_exit_4_and_named_and_the_earlier_data_set_stays(
    name, tmp_path, monkeypatch, capsys
):
    data_dir = tmp_path / "d"
    flags = (*BPE, "--data_dir", data_dir, "--overwrite")
    assert prepare("--input", write(tmp_path / "b.txt", STORY), *flags) == 0
    before = hashes(data_dir)
    source = write(tmp_path / name, STORY * 2 if name == "a.txt" else parquet(documents(0, 50)))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert prepare("--input", source, *flags) == 4
    (error,) = errors(capsys)
    assert error.startswith(f"could not write {data_dir}") and "No space left" in error
    assert hashes(data_dir) == before and strays(data_dir) == []
    assert prepare("--input", source, *flags) == 0 and hashes(data_dir) != before


def assert_whole_or_absent(data_dir):
    meta = read_meta(data_dir)
    if meta is not None:
        TokenDataset(data_dir)
        said = {f"{split}.bin": counts["sha256"] for split, counts in meta["splits"].items()}
        assert said.items() <= hashes(data_dir).items()


def killed_at(n, *flags):
    """Prepare, and die when the disk is touched for the n-th time."""
    left = iter(range(n))
    touching = "open os.truncate os.rename os.remove os.rmdir os.mkdir shutil.rmtree".split()

    def audit(event, arguments):
        if event in touching and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    return prepare(*flags)


MOMENTS = [1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 8))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("first", MOMENTS)
def test_killed_at_any_moment_a_data_set_is_whole_or_absent(tmp_path, first):
    old, new = (write(tmp_path / f"{name}.txt", name + STORY * 3 + name) for name in "ab")
    flags = ("--tokenizer", "char", "--overwrite", "--input")
    assert prepare(*flags, new, "--data_dir", tmp_path / "whole") == 0
    for n in itertools.count(first, 7):
        data_dir = tmp_path / str(n)
        prepare_file(old, "char", data_dir)
        code = in_child(killed_at, n, *flags, new, "--data_dir", data_dir)
        assert_whole_or_absent(data_dir)
        assert code in (0, -signal.SIGKILL)
        assert prepare(*flags, new, "--data_dir", data_dir) == 0 and strays(data_dir) == []
        assert hashes(data_dir) == hashes(tmp_path / "whole")
        assert not (data_dir / ".unfinished").exists()
        if code == 0:  # it touches the disk less often
            break
    assert n > 30


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--dataset", "custom"], ["--dataset custom needs --input"]),
        (["--input", ""], ["'': an empty name"]),
        (["--dataset", "shakespeare", "--input", "a.txt"], ["use --dataset custom"]),
        (["--vocab_size", "500"], ["only for bpe"]),
        (["--tokenizer", "bpe", "--vocab_size", "256"], ["--vocab_size 256: must be at least 257"]),
        (["--tokenizer", "bpe", "--vocab_size", "2e9"], ["must be at most 1048576"]),
        (["--val_fraction", "0", "--workers", "0"], ["--val_fraction 0: must", "--workers 0"]),
        (["--val_fraction", "nan"], ["--val_fraction nan: must be a finite number"]),
        (["--val_fraction", "1"], ["--val_fraction 1: must be less than 1"]),
        (["--tokenizer", "none.json"], ["none.json: neither char, bpe, gpt2 nor a file"]),
        (["--tokeniser", "char"], ["did you mean --tokenizer"]),
        (["--input", "a.txt", "--encoding", "klingon"], ["--encoding klingon"]),
        (["--input", "a.txt", "--encoding", "base64"], ["--encoding base64"]),
        (["--encoding", "big5"], ["--encoding is for the text files of --input"]),
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


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_learning_a_vocabulary_obeys_ctrl_c_at_once(tmp_path):
    rng = random.Random(0)
    words = " ".join("".join(rng.choices("abcdefghij", k=12)) for _ in range(300_000))
    flags = ["--input", str(write(tmp_path / "a.txt", words)), "--tokenizer", "bpe"]
    flags += ["--vocab_size", "1000000", "--data_dir", str(tmp_path / "d")]
    code = "import sys, logger, prepare_data, sources\n"
    code += "texts = sources.TextFiles.texts\n"
    code += "def last(self):\n    yield from texts(self)\n    print('learns', flush=True)\n"
    code += "sources.TextFiles.texts = last\nsys.exit(logger.run(prepare_data.main))"
    child = subprocess.Popen([sys.executable, "-c", code, *flags], cwd=ROOT, stdout=subprocess.PIPE)
    child.stdout.readline(), child.stdout.readline()  # counted, then read to learn from
    child.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    assert child.wait(60) == 130 and time.monotonic() - stopped < 10


# ---------------------------------------------------------------- the download

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({}, None),
        ({"body": PLAY[:1000], "length": len(PLAY)}, "cut short, 1,000 of 3,050 bytes"),
        ({"body": b"<html>please log in</html>"}, "wrong sha256"),
        ({"status": 404, "body": b"no"}, "404"),
        (None, "refused"),
    ],
    ids=["whole", "cut short", "another text", "404", "refused"],
)
def test_a_download_is_whole_and_made_once_or_says_why_and_the_bundled_text_is_used(
    answer, problem, tmp_path, monkeypatch, capsys, only_this_machine
):
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    monkeypatch.chdir(tmp_path)
    with server("input.txt", **{"body": PLAY, **(answer or {})}) as (address, asked):
        address = "http://127.0.0.1:9/refused" if answer is None else address
        monkeypatch.setattr(sources, "SHAKESPEARE", address)
        assert prepare() == 0
        err = capsys.readouterr().err
        assert len(asked) == (0 if answer is None else 1 if problem is None else 3)
        assert prepare(*([] if problem else ["--overwrite"])) == 0
    folder, used = (
        Path("data/shakespeare"),
        PLAY if problem is None else sources.BUNDLED.read_bytes(),
    )
    (source,) = read_meta(folder)["sources"]
    assert source["sha256"] == hashlib.sha256(used).hexdigest() and strays(folder) == []
    if problem is None:
        assert len(asked) == 1 and (folder / "input.txt").read_bytes() == PLAY
        return
    (line,) = [line for line in err.splitlines() if "warning: " in line]
    assert problem in line and "sonnets.txt" in line and "--overwrite" in line
    assert not (folder / "input.txt").exists() and source["name"] == "sonnets.txt"


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
    sink, how = pyarrow.BufferOutputStream(), {"compression": compression, "use_dictionary": False}
    parquet.write_table(table, sink, row_group_size=rows, **how)
    return sink.getvalue().to_pybytes()


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers for one repository. `cut` breaks the connection after so many bytes of a
    file, once; `lost` is a file that cannot be had.
    """

    repository, files, cut, asked, lost = "HuggingFaceFW/fineweb", {}, {}, [], ""

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path} {self.headers['Range']}")
        path = urllib.parse.unquote(self.path.split("?")[0]).partition(self.repository)[2]
        name = path.removeprefix(f"/resolve/{REVISION}/")
        if path == "":
            self.answer(json.dumps({"id": self.repository, "sha": REVISION}).encode())
        elif path.startswith(f"/tree/{REVISION}/"):
            self.answer(json.dumps(self.tree(path.removeprefix(f"/tree/{REVISION}/"))).encode())
        elif name not in self.files or name == self.lost:
            self.answer(b"", 404)
        else:
            raw, wanted = self.files[name], re.match(r"bytes=(\d+)-$", self.headers["Range"] or "")
            first = int(wanted[1]) if wanted else 0
            headers = {"ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "X-Repo-Commit": REVISION}
            headers["Content-Range"] = f"bytes {first}-{len(raw) - 1}/{len(raw)}"
            self.answer(
                raw[first:], 206 if wanted else 200, headers, self.command == "GET" and name
            )

    do_HEAD = do_GET

    def answer(self, raw, status=200, headers=(), name=None):
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": str(len(raw))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw[: self.cut.pop(name, None)])

    def tree(self, folder):
        found = [{"type": "directory", "path": folder, "oid": "0"}]
        for name, raw in self.files.items():
            lfs = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 9}
            file = {"type": "file", "path": name, "size": len(raw), "oid": "0", "lfs": lfs}
            found += [file] if name.startswith(folder + "/") else []
        return found

    def log_message(self, *args):
        pass


@pytest.fixture
def at_address(monkeypatch, tmp_path, only_this_machine):
    """Tells huggingface_hub where the hub is."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    def change(port):
        address = f"http://127.0.0.1:{port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return change


@pytest.fixture
def serve(at_address):
    """Lets a hub of these files answer on this machine as long as the test runs."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        httpd.handle_error = lambda *a: None  # a client that was killed
        at_address(httpd.server_port)

        def start(files, **settings):
            httpd.RequestHandlerClass = hub = type("Hub", (Hub,), {"files": files, "asked": []})
            for name, value in settings.items():
                setattr(hub, name, value)
            return hub

        yield start
        httpd.shutdown()


def fineweb(n=60):
    """Four files of fineweb's sample, the documents in them, and two files that are not of it."""
    texts = [documents(seed, n) for seed in range(4)]
    files = {f"sample/10BT/00{i}_00000.parquet": parquet(part) for i, part in enumerate(texts)}
    files |= {"data/CC-MAIN-1/000.parquet": b"no", "sample/10BT/README.md": b"no"}
    return files, [text for part in texts for text in part]


FINEWEB = ("--dataset", "fineweb", *BPE, "--val_fraction", 0.2)


def test_hub_documents_are_split_by_hash_each_with_its_end_of_text(serve, tmp_path):
    files, texts = fineweb()
    serve(files)
    assert prepare(*FINEWEB, "--data_dir", tmp_path / "d") == 0
    bpe, expected = load_tokenizer(tmp_path / "d" / "tokenizer.json"), {"train": [], "val": []}
    for text in texts:
        first = hashlib.blake2b(text.encode(), digest_size=8).digest()[0]
        expected["val" if first < 0.2 * 256 else "train"] += [*bpe.encode(text), bpe.eot_id]
    dataset = TokenDataset(tmp_path / "d")
    assert dataset.train.tolist() == expected["train"] and dataset.val.tolist() == expected["val"]
    n_bytes = sum(split["bytes"] for split in dataset.meta["splits"].values())
    assert n_bytes == sum(len(text.encode()) for text in texts) and bpe.vocab_size == 400
    assert dataset.meta["sources"] == [
        {"name": name, "bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in (f"sample/10BT/00{i}_00000.parquet" for i in range(4))
    ]
    assert not (tmp_path / "d" / ".unfinished").exists()
    serve({})  # which nobody asks any more
    assert prepare(*FINEWEB, "--data_dir", tmp_path / "d") == 0


# What a killed run does: it saves after every few pieces, and dies at the n-th save.
DYING = """
import os, signal, sys
import logger, prepare_data, sources

def write_json(path, value, plain=prepare_data.write_json, left=[int(sys.argv.pop())]):
    plain(path, value)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

prepare_data.write_json = write_json
sources.CHUNK = 500
prepare_data.SAVE_SECONDS = 0
sys.exit(logger.run(prepare_data.main))
"""


def run_until_save(n, *flags):
    command = [sys.executable, "-c", DYING, *map(str, flags), str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def encoded(monkeypatch):
    """The pieces that this process has encoded."""
    pieces, plain = [], prepare_data.encode
    monkeypatch.setattr(sources, "CHUNK", 500)
    monkeypatch.setattr(prepare_data, "encode", lambda *a: pieces.append(a[2][1]) or plain(*a))
    return pieces


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_hub_download_cut_short_and_killed_half_way_gives_the_undisturbed_data_set(
    serve, tmp_path, encoded
):
    files, name = fineweb(150)[0], "sample/10BT/001_00000.parquet"
    serve(files)
    assert prepare(*FINEWEB, "--data_dir", tmp_path / "whole") == 0
    for workers in (1, 2):
        hub = serve(files, cut={name: len(files[name]) // 2} if workers == 1 else {})
        data_dir = tmp_path / str(workers)
        flags = [*FINEWEB, "--data_dir", data_dir, "--workers", workers]
        run_until_save(60, *flags)
        assert read_meta(data_dir) is None and (data_dir / ".unfinished").exists()
        assert sum(asked.startswith("GET") and name in asked for asked in hub.asked) == 3 - workers
        encoded.clear()
        assert prepare(*flags) == 0
        assert hashes(data_dir) == hashes(tmp_path / "whole")
        assert not (data_dir / ".unfinished").exists()
        assert 200 < sum(map(len, encoded)) < 450  # of 600 documents


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_text_killed_half_way_goes_on_and_gives_the_same_bytes(kind, tmp_path, encoded, capsys):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(3, 100))
    inputs = [write(tmp_path / "a.txt", nasty_text(7, 9000)), write(tmp_path / "b.jsonl", lines)]
    flags, other = ("--input", *inputs, "--tokenizer", kind), tmp_path / "other"
    assert prepare(*flags, "--data_dir", tmp_path / "whole") == 0
    run_until_save(9, *flags, "--data_dir", tmp_path / "d")
    shutil.copytree(tmp_path / "d", other)
    with open(tmp_path / "d" / ".unfinished" / "train.bin", "ab") as file:
        file.write(b"half a piece")
    encoded.clear()
    assert prepare(*flags, "--data_dir", tmp_path / "d") == 0
    assert "resuming" in capsys.readouterr().err
    assert hashes(tmp_path / "d") == hashes(tmp_path / "whole")
    n_left = len(encoded)
    CharTokenizer.train("another").save(
        shutil.copytree(other, tmp_path / "e") / ".unfinished/tokenizer.json"
    )
    assert prepare(*flags, "--data_dir", tmp_path / "e") == 2
    assert "its tokenizer.json is another one" in capsys.readouterr().err
    # what is left of a text is minutes of work: another command simply begins anew
    assert prepare(*flags, "--val_fraction", 0.2, "--data_dir", other) == 0
    assert n_left < len(encoded) - n_left - 6


SPLIT = '{"tokens": 0, "bytes": 0, "sha256": ""}'


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "[" * 10**5, "null", f'{{"splits": {{"train": {SPLIT}, "../../x": {SPLIT}}}}}'],
)
def test_bad_input_damaged_progress_is_refused_by_name(text, tmp_path, capsys):
    write(tmp_path / "d" / ".unfinished" / "progress.json", text)
    source = write(tmp_path / "a.txt", STORY)
    assert prepare("--input", source, "--data_dir", tmp_path / "d", "--tokenizer", "char") == 2
    (line,) = errors(capsys)
    assert "progress.json: " in line and "delete" in line


# prepare_data.py, and at its end the most memory that it had
MEASURED = """
import logger, pathlib, prepare_data
assert logger.run(prepare_data.main) == 0
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_gigabyte_from_the_hub_in_600_mb_cut_short_killed_and_gone_on_with(
    serve, tmp_path, gpt2_vocabulary
):
    """Four files of a quarter of a gigabyte of documents, the last of one row group."""
    base, rng, files = (ROOT / "data" / "sonnets.txt").read_text("utf-8"), random.Random(0), {}
    for i in range(4):
        starts = [rng.randrange(len(base) - 5000) for _ in range(100_000)]
        texts = [base[start : start + rng.randrange(5000)] for start in starts]
        raw = parquet(texts, rows=10**9 if i == 3 else 1000, compression="none")
        files[f"sample/10BT/00{i}_00000.parquet"] = raw
    assert sum(map(len, files.values())) > 10**9
    name, expected = "sample/10BT/001_00000.parquet", None
    flags = ["--dataset", "fineweb", "--data_dir", str(tmp_path / "d"), "--workers"]
    for workers in "21":
        hub = serve(files, cut={name: len(files[name]) // 2})
        command = [sys.executable, "-c", MEASURED, *flags, workers]
        how = {"cwd": ROOT, "text": True, "stdout": -1, "stderr": -1}
        process, path = subprocess.Popen(command, **how), tmp_path / "d/.unfinished/progress.json"
        while not path.exists() or json.loads(path.read_text())["position"][0] < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert any("bytes=" in asked for asked in hub.asked)  # what was cut went on
        hub.asked.clear()
        done = subprocess.run(command, **how)
        assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
        assert not any("000_00000" in asked or name in asked for asked in hub.asked)
        megabytes = int(done.stdout.split()[-1]) / 1e3
        print(f"{workers} workers: peak memory {megabytes:.0f} MB")
        assert megabytes < 600
        expected = expected or hashes(tmp_path / "d")
        assert hashes(tmp_path / "d") == expected
        shutil.rmtree(tmp_path / "d")
    assert prepare(*flags, "1") == 0 and hashes(tmp_path / "d") == expected  # undisturbed


def test_parquet_input_of_every_string_type_skips_nulls_and_replaces_bad_bytes(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    strings = pyarrow.array(["one", None, "", "two"])
    for number, kind in enumerate((pyarrow.string(), pyarrow.large_string())):
        write(tmp_path / "in" / f"{number}.parquet", parquet(strings.cast(kind).to_pylist()))
    bad = pyarrow.array([b"three", b"caf\xe9"]).view(pyarrow.string())
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
    assert "1 U+FFFD" in capsys.readouterr().err
    expected = ["", "caf\ufffd", "one", "one", "three", "two", "two"]
    assert sorted(read_back(tmp_path / "d").split("<|endoftext|>")) == expected
    names = [source["name"] for source in read_meta(tmp_path / "d")["sources"]]
    assert names == ["-bad.PARQUET", "0.parquet", "1.parquet"]


WHOLE = lambda: parquet(["some text", "more text"] * 50)  # noqa: E731


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (lambda: WHOLE()[:-100], [], "a.parquet: not a whole parquet file"),
        (lambda: WHOLE()[:20] + bytes(60) + WHOLE()[80:], [], "a.parquet: not a whole parquet"),
        (lambda: b"<html>", [], "a.parquet: not a whole parquet file"),
        (lambda: parquet([1, 2]), [], "it has {'url': 'string', 'text': 'int64'}"),
        (lambda: parquet([None, None]), [], "no column 'text' of strings"),
        (lambda: parquet(["", None]), [], "no text for train"),
        (lambda: parquet(["z" * 70_000_000], compression="zstd"), [], "rows of 70,000,"),
        (WHOLE, ["--val_fraction", "1e-9"], "no text for val: --val_fraction 1e-09"),
        (WHOLE, ["b.txt"], "text and parquet in one data set"),
        (WHOLE, ["--encoding", "big5"], "--encoding big5: is for text files"),
    ],
)
def test_bad_parquet_is_exit_2_and_the_earlier_data_set_stays(
    content, flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    bpe = (*BPE, "--overwrite", "--data_dir")
    write(Path("b.txt"), STORY)
    assert prepare(*bpe, "data", "--input", "b.txt") == 0
    before = hashes(Path("data"))
    write(Path("a.parquet"), content())
    capsys.readouterr()
    assert prepare(*bpe, "data", "--input", "a.parquet", *flags) == 2
    (error,) = errors(capsys)
    assert message in error and hashes(Path("data")) == before
    if "column" in message:  # noticed before any work is done, so nothing is left behind
        assert prepare(*bpe, "new", "--input", "a.parquet") == 2 and not Path("new").exists()


def test_hub_problems_are_one_line_each_and_the_same_command_goes_on(
    serve, at_address, tmp_path, monkeypatch, capsys
):
    flags = (*FINEWEB, "--data_dir", tmp_path / "d")

    def attempt(message):
        assert prepare(*flags) == 2
        (error,) = errors(capsys)
        assert message in error and read_meta(tmp_path / "d") is None

    serve({}, repository="nobody/nothing")
    attempt("HuggingFaceFW/fineweb cannot be had from http://127.0.0.1")
    serve({"data/x.parquet": b""})
    attempt("HuggingFaceFW/fineweb: no .parquet file in sample/10BT")
    hub = serve(fineweb()[0], lost="sample/10BT/002_00000.parquet")
    attempt("cannot be had from")
    hub.lost = ""
    assert prepare(*flags) == 0
    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patch:
        patch.setattr(sources, "LISTING_SECONDS", 0.05)
        at_address(silent.getsockname()[1])
        assert prepare(*flags, "--overwrite") == 2  # it never answers
        assert "cannot be had from http://127.0.0.1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert prepare(*flags) == 0  # there already
    assert prepare(*flags, "--overwrite") == 2
    assert "pip install -r requirements-hub.txt" in capsys.readouterr().err


# ---------------------------------------------------------------- from nanoGPT


def test_adopted_tokens_are_a_data_set_and_stay_as_they_are(tmp_path, gpt2_vocabulary, capsys):
    """A folder as nanoGPT's prepare.py leaves it."""
    encoding, folder = tiktoken.get_encoding("gpt2"), tmp_path / "n"
    texts = {"train": STORY * 9, "val": CHINESE + "<|endoftext|>"}
    for split, text in texts.items():
        ids = np.array(encoding.encode(text, allowed_special="all"), dtype=np.uint16)
        write(folder / f"{split}.bin", ids.tobytes())
    before = hashes(folder)
    for name, content, message in [
        ("meta.pkl", b"cos\nsystem\n(S'touch canary'\ntR.", "meta.pkl"),
        ("val.bin", b"", "val.bin: 0 bytes"),
        ("train.bin", b"123", "train.bin: 3 bytes are not tokens of 2 bytes each"),
    ]:
        shutil.copytree(folder, other := tmp_path / message[:5])
        write(other / name, content)
        assert prepare("--adopt", other) == 2 and message in errors(capsys)[0]
        assert not (other / "meta.json").exists()
    assert prepare("--adopt", folder) == 0
    out = capsys.readouterr().out
    assert out.endswith(f" {logger.command_for('train.py', '--data_dir', folder)}\n")
    dataset = TokenDataset(folder)
    gpt2 = load_tokenizer(dataset.tokenizer_path)
    for split, text in texts.items():
        assert gpt2.decode(getattr(dataset, split)) == text
        tokens, digest = len(getattr(dataset, split)), before[f"{split}.bin"]
        assert dataset.meta["splits"][split] == {"tokens": tokens, "bytes": None, "sha256": digest}
    assert dataset.meta["vocab_size"] == 50257 and before.items() <= hashes(folder).items()
    before = hashes(folder)
    assert prepare("--adopt", folder) == 0 and hashes(folder) == before
    assert capsys.readouterr().out == out
