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
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, in_child, server

import files
import logger
import prepare_data
import sources
from data import TokenDataset
from prepare_data import prepare_file
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer

STORY = "It was a dark night; the rain fell in torrents.\nThey'd say it's \"late\".\n\n" * 40
CHINESE = "红楼梦：满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？😀\n" * 60
BPE = ("--tokenizer", "bpe", "--vocab_size", 400)
CHAR = ("--tokenizer", "char")


def prepare(*flags):
    """Run the script in this process; its exit code."""
    return logger.run(prepare_data.main, [str(flag) for flag in flags])


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_meta(data_dir):
    path = Path(data_dir, "meta.json")
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def read_back(data_dir):
    """The text of a data set, both splits together."""
    dataset = TokenDataset(data_dir)
    return dataset.tokenizer.decode(np.concatenate([dataset.train, dataset.val]))


def hashes(folder):
    found = sorted(folder.glob("[!.]*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def errors(capsys):
    """The messages of the `error: ` lines since the last time."""
    return re.findall(r"^error: (.*)$", capsys.readouterr().err, re.MULTILINE)


def strays(folder):
    return [path.name for path in Path(folder).rglob("*.tmp")]


def nasty_text(seed, length, ends="\r\n"):
    """Spaces, contractions, Chinese, long words: where pieces might be cut wrongly."""
    signs = " '\n\tstmd.,!?aé0中文，。😀\u3000\x1c\u0301"
    units = [*signs, *([ends] if ends else []), "'ll", "   ", "x" * 30, "中文字" * 9]
    return "".join(random.Random(seed).choices(units, k=length))


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_tiny_shakespeare_splits_into_1003854_and_111540_tokens(tmp_path, monkeypatch, capsys):
    """By a text of its length that is in data_dir already, as a download would leave it."""
    monkeypatch.chdir(tmp_path)
    text = ("".join(map(chr, range(48, 112))) + "\n") * 17160
    write(tmp_path / "data" / "shakespeare" / "input.txt", text[:1_115_394])
    assert prepare("--dataset", "shakespeare") == 0
    out = capsys.readouterr().out
    assert "1,003,854" in out and "111,540" in out and "65 (char), 1.00 bytes a token" in out
    assert out.endswith(f" {logger.command_for('train.py')}\n")
    char = load_tokenizer("data/shakespeare/tokenizer.json")
    assert char.decode(np.fromfile("data/shakespeare/train.bin", "<u2")) == text[:1_003_854]


@pytest.mark.parametrize(
    ("flags", "train", "val"),  # sha256 begins so, as the first published version wrote it
    [
        (CHAR, "a4761e45d165a390", "474045913402e749"),
        (BPE, "545f415ab4a8a073", "0783db44119019a5"),
        (("--tokenizer", "gpt2"), "295f5dde2e07e6f8", "d01432e4d1209ee1"),
    ],
)
@pytest.mark.usefixtures("gpt2_vocabulary")
def test_bytes_are_the_same_for_any_number_of_workers(flags, train, val, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 500)
    texts = jsonl(*(nasty_text(seed, 50, "") for seed in range(100)))
    inputs = write(tmp_path / "a.txt", nasty_text(7, 9000, "")), write(tmp_path / "b.jsonl", texts)
    for workers in (1, 3):
        places = ("--data_dir", tmp_path / str(workers), "--workers", workers)
        assert prepare("--input", *inputs, *flags, *places) == 0
        found = hashes(tmp_path / str(workers))
        assert (found["train.bin"][:16], found["val.bin"][:16]) == (train, val)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_every_line_end_is_a_newline_and_bytes_are_those_on_disk(
    kind, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    text = "one\r\ntwo\rthree\n\ufeff\r\n\r\nfour"
    write(tmp_path / "in" / "a.txt", "\ufeff" + text)
    write(tmp_path / "in" / "b.jsonl", jsonl("x\r\ny"))
    flags = ("--tokenizer", kind, "--data_dir", tmp_path / "d", "--val_fraction", 0.78)
    assert prepare("--input", tmp_path / "in", *flags) == 0
    end = "" if kind == "char" else "<|endoftext|>"
    expected = "one\ntwo\nthree\n\ufeff\n\nfour" + end + "x\ny" + end
    assert read_back(tmp_path / "d") == expected
    splits = read_meta(tmp_path / "d")["splits"]
    assert sum(split["bytes"] for split in splits.values()) == len(text.encode()) + 4


def cut(text, tokenizer):
    stream = (("val", chunk) for chunk in sources.in_chunks(text))
    found = sources.pieces(stream, tokenizer.safe_cut)
    return [part for _, documents in found for part in documents if part]


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_pieces_are_bounded_and_give_the_tokens_of_the_text(kind, monkeypatch, gpt2_vocabulary):
    tokenizer = GPT2Tokenizer() if kind == "gpt2" else BPETokenizer.train(nasty_text(99, 5000), 500)
    for seed in range(200):
        monkeypatch.setattr(sources, "CHUNK", random.Random(seed).randrange(1, 200))
        text = nasty_text(seed, 600)
        parts = cut(text, tokenizer)
        assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)
        assert len(parts) > 2
    monkeypatch.setattr(sources, "CHUNK", 10)
    monkeypatch.setattr(sources, "LONGEST", 30)
    assert [len(part) for part in cut("x" * 100, tokenizer)] == [30, 30, 30, 10]
    pieces = sources.pieces([("train", sources.END)] * 25, tokenizer.safe_cut)
    assert [len(documents) - 1 for _, documents in pieces] == [10, 10, 5, 0]


def test_folder_gz_md_and_jsonl_are_read_in_order(tmp_path):
    folder = tmp_path / "in"
    write(folder / "b.jsonl", '{"text": "two"}\n\n{"text": "thr\\u00e9e", "id": 3}\n')
    write(folder / "a.md", "one")
    write(folder / "c" / "d.TXT.gz", gzip.compress(b"four" * 20, mtime=0))
    write(folder / "c" / "e.jsonl.gz", gzip.compress(b'{"text": "five"}', mtime=0))
    write(folder / "picture.png", b"\xff")
    write(folder / ".hidden" / "f.txt", "never")
    (folder / "link").symlink_to(folder / "c")  # is not followed
    odd = "红\udcff.txt" if sys.platform == "linux" else "红.txt"  # there a name is any bytes
    more = write(tmp_path / "more" / odd, "six").parent
    assert prepare("--input", folder, more, "--tokenizer", "bpe", "--data_dir", tmp_path / "d") == 0
    expected = ["one", "two", "thrée", "four" * 20, "five", "six", ""]
    assert read_back(tmp_path / "d").split("<|endoftext|>") == expected
    names = [source["name"] for source in read_meta(tmp_path / "d")["sources"]]
    named = odd.replace("\udcff", r"\udcff")
    assert names == ["a.md", "b.jsonl", "c/d.TXT.gz", "c/e.jsonl.gz", named]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and FIFOs")
def test_what_cannot_be_read_below_a_folder_is_an_error_that_names_it(tmp_path, monkeypatch, capfd):
    link = write(tmp_path / "in" / "a.txt", STORY).with_name("b.txt")
    for target in ("nowhere", "/dev/zero", None):
        link.symlink_to(target) if target else os.mkfifo(link)
        assert prepare("--input", link.parent, "--data_dir", tmp_path / "d") == 2
        assert "b.txt: " in capfd.readouterr().err and read_meta(tmp_path / "d") is None
        link.unlink()

    monkeypatch.setattr(os, "listdir", Mock(side_effect=PermissionError(13, "no", "in/it")))
    assert prepare("--input", link.parent, "--data_dir", tmp_path / "d") == 2
    assert "in/it: no" in capfd.readouterr().err


def parquet(texts, rows=20, compression="snappy", **columns):
    """A parquet file of texts, in bytes, with small row groups."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"url": ["x"] * len(texts), "text": texts} | columns)
    sink, how = pyarrow.BufferOutputStream(), {"compression": compression, "use_dictionary": False}
    parquet.write_table(table, sink, row_group_size=rows, **how)
    return sink.getvalue().to_pybytes()


def whole():
    return parquet(["some text", "more text"] * 50)


BAD_TEXT = [  # name, content, flags, what the one line says
    ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', [], 'line 2: not {"text": "..."} (Expecting'),
    ("a.jsonl", b"[" * 10**5, [], 'a.jsonl, line 1: not {"text"'),
    ("a.jsonl", b'{"text": "\\ud800"}\n', [], 'a.jsonl, line 1: not {"text"'),
    ("a.txt", b"\xef\xbb\xbfcaf\xe9", [], "a.txt: byte 0xE9 at offset 6"),
    ("a.txt", b"x" * 400_000 + b"\xff", [], "a.txt: byte 0xFF at offset 400000 is not UTF-8"),
    ("a.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], [], "a.txt.gz: not a whole gzip file"),
    ("b.txt.gz", b"", [], "b.txt.gz: not a whole gzip file (it is empty)"),
    ("a.txt", bytes(range(128, 256)) * 9, [], "at offset 0 is not UTF-8; convert it to UTF-8"),
    ("a.txt", " \n\t\u3000".encode(), [], "no text, 4 characters"),
    ("a.txt", b"x", [], "no text for train: --val_fraction 0.1"),
    ("a.txt", b"x", ["--encoding", "base64"], "--encoding base64: 'base64' is not a text"),
    ("a.txt", STORY + "中", ["--tokenizer", "b.json"], "a.txt, position 2920: U+4E2D '中'"),
    ("a.png", b"x", [], "a.png: no .txt, .md"),
    ("a.parquet", lambda: whole()[:-100], [], "a.parquet: not a whole parquet file"),
    ("a.parquet", lambda: parquet([1, 2]), [], "it has {'url': 'string', 'text': 'int64'}"),
    ("a.parquet", lambda: parquet(["z" * 70_000_000], compression="zstd"), [], "rows of 70,000,"),
    ("a.parquet", whole, ["--input", "a.parquet", "b.txt"], "text and parquet in one data set"),
    ("a.parquet", whole, ["--encoding", "big5"], "--encoding and --tokenizer char are for text"),
]


@pytest.mark.parametrize(("name", "content", "flags", "message"), BAD_TEXT)
def test_bad_input_is_exit_2_and_the_earlier_data_set_stays(
    name, content, flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write(Path("b.txt"), STORY)
    CharTokenizer.train(STORY).save("b.json")
    write(Path(name), content() if callable(content) else content)
    settings = (*(BPE if "parquet" in name else CHAR), "--data_dir", "d", "--input")
    assert prepare(*settings, "b.txt") == 0
    before = hashes(Path("d"))
    capsys.readouterr()
    assert prepare(*settings, name, "--overwrite", *flags) == 2
    (error,) = errors(capsys)
    assert message in error and hashes(Path("d")) == before and strays(tmp_path) == []
    if "it has" in message:  # noticed before any work is done, so nothing is left behind
        assert prepare("--data_dir", "new", "--input", name) == 2 and not Path("new").exists()


TAIWAN = "臺灣的天氣很熱，我們去海邊游泳吧。這個學校的學生說中文。\n" * 9
FRENCH = "Je suis allé au café, mais il y avait trop de monde, ce qui me rend triste.\n" * 9
LIKELY = [(CHINESE, "gb18030"), (TAIWAN, "big5"), (FRENCH, "utf_16_le"), (FRENCH, "cp1252")]


@pytest.mark.parametrize(("text", "likely"), LIKELY)
def test_an_encoding_is_named_with_the_command_that_reads_it(text, likely, tmp_path, capsys):
    path = write(tmp_path / "my text.txt", (text * 5).encode(likely))
    flags = ("--input", path, *CHAR, "--data_dir", tmp_path / "d")
    assert prepare(*flags) == 2
    assert f"--input '{path}' --encoding {likely}`" in errors(capsys)[0]
    assert prepare(*flags, "--encoding", likely) == 0
    assert read_back(tmp_path / "d") == text * 5
    write(path, text.encode() + b"\xff" + text.encode())  # damaged, but UTF-8
    assert prepare(*flags, "--overwrite") == 2
    (error,) = errors(capsys)
    assert "--encoding" not in error and "--errors replace" in error


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_errors_replace_goes_on_and_counts(chunk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    raw = b"a\xffb\xe4\xb8c \xef\xbf\xbd \xf0\xef\xbf\xbd end" + "中".encode()[:2]
    text = write(tmp_path / "a.txt", raw)
    lone = write(tmp_path / "b.jsonl", b'{"text": "\\ud800!\xff"}')
    flags = (*CHAR, "--data_dir", tmp_path / "d", "--errors", "replace")
    assert prepare("--input", text, lone, *flags) == 0
    assert "8 U+FFFD are in the text" in capsys.readouterr().err
    assert read_back(tmp_path / "d") == raw.decode("utf-8", "replace") + "\ufffd!\ufffd"


# prepare_data.py, and at its end the most memory that it had
MEASURED = """
import logger, pathlib, prepare_data, sys
code = logger.run(prepare_data.main)
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def measured(*flags):
    """Exit code, peak memory in MB, and messages of a process."""
    child = [sys.executable, "-c", MEASURED, *map(str, flags)]
    done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, int(done.stdout.split()[-1]) / 1e3, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "letter, form, message", [("x", "jsonl", "it has 67,"), (" ", "txt", "no t")]
)
def test_a_small_gz_of_endless_text_takes_no_memory(letter, form, message, tmp_path):
    path = write(tmp_path / f"a.{form}.gz", gzip.compress(letter.encode() * (1 << 20), 1) * 80)
    flags = ("--input", path, *CHAR, "--data_dir", tmp_path / "d", "--workers", "1")
    code, megabytes, err = measured(*flags)
    assert code == 2 and message in err and megabytes < 300, (megabytes, err[-2000:])


def test_another_text_setting_or_second_process_is_refused_and_overwrite_replaces(tmp_path, capsys):
    text, data_dir = write(tmp_path / "a.txt", STORY), tmp_path / "d"
    flags, other = ("--input", text, "--data_dir", data_dir), (*BPE, "--val_fraction", 0.2)
    seen = set()
    for _ in range(2):  # the second time it is there, and nothing changes
        assert prepare(*flags, *CHAR) == 0
        seen.add(((data_dir / "meta.json").stat().st_mtime_ns, capsys.readouterr().out))
    assert len(seen) == 1 and prepare_file(text, "char", data_dir) == read_meta(data_dir)
    before = hashes(data_dir)
    assert prepare(*flags, *other) == 2
    (error,) = errors(capsys)
    assert "tokenizer: char there, bpe asked for" in error and "--overwrite" in error
    assert "vocab_size: None there, 400" in error and "val_fraction: 0.1 there, 0.2" in error
    write(text, STORY + "more")
    assert prepare(*flags, *CHAR) == 2 and "(another text)" in errors(capsys)[0]
    with files.lock(data_dir):
        assert prepare(*flags, *CHAR, "--overwrite") == 2
    assert "in use" in capsys.readouterr().err and hashes(data_dir) == before
    assert prepare(*flags, *other, "--overwrite") == 0
    assert read_meta(data_dir)["tokenizer"]["kind"] == "bpe"
    for name, content in (("train.bin", b"12"), ("meta.json", b"{")):  # a damaged one
        write(data_dir / name, content)
        assert prepare(*flags, *other) == 2 and "--overwrite" in capsys.readouterr().err


def test_a_full_disk_is_exit_4_and_the_earlier_data_set_stays(tmp_path, monkeypatch, capsys):
    text, data_dir = write(tmp_path / "a.txt", STORY), tmp_path / "d"
    flags = ("--input", text, *BPE, "--data_dir", data_dir, "--overwrite")
    assert prepare(*flags) == 0
    before = hashes(data_dir)
    write(text, STORY * 2)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        assert prepare(*flags) == 4
    (error,) = errors(capsys)
    assert error.startswith(f"could not write {data_dir}") and "No space left" in error
    assert hashes(data_dir) == before and strays(data_dir) == []
    assert prepare(*flags) == 0 and hashes(data_dir) != before


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
@pytest.mark.parametrize("form", ["txt", "parquet"])
def test_killed_at_any_moment_a_data_set_is_whole_or_absent(tmp_path, form, first):
    old, new = write(tmp_path / "a.txt", STORY), tmp_path / "new"
    for n in range(3):
        texts = [nasty_text(seed, 50) for seed in range(n, 40)]
        write(new / f"{n}.{form}", "".join(texts) if form == "txt" else parquet(texts))
    BPETokenizer.train(STORY, 300).save(tmp_path / "bpe.json")
    flags = ("--tokenizer", tmp_path / "bpe.json", "--overwrite", "--input", new, "--data_dir")
    assert prepare(*flags, tmp_path / "whole") == 0
    for n in itertools.count(first, 7):
        data_dir = tmp_path / str(n)
        prepare_file(old, "char", data_dir)
        code = in_child(killed_at, n, *flags, data_dir)
        if meta := read_meta(data_dir):  # whole or absent
            digests = {f"{name}.bin": split["sha256"] for name, split in meta["splits"].items()}
            assert digests.items() <= hashes(data_dir).items()
        assert code in (0, -signal.SIGKILL)
        assert prepare(*flags, data_dir) == 0 and strays(data_dir) == []
        assert hashes(data_dir) == hashes(tmp_path / "whole")
        assert not (data_dir / ".unfinished").exists()
        if code == 0:  # it touches the disk less often
            break
    assert n > 30


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--dataset", "custom"], ["--input FILE goes with --dataset custom"]),
        (["--input", ""], ["--input : must have at least 1 character"]),
        (["--dataset", "shakespeare", "--input", "a.txt"], ["goes with --dataset custom"]),
        (["--vocab_size", "500"], ["only for bpe"]),
        (["--tokenizer", "bpe", "--vocab_size", "256"], ["--vocab_size 256: must be at least 257"]),
        (["--val_fraction", "0", "--workers", "0"], ["--val_fraction 0: must", "--workers 0"]),
        (["--tokenizer", "none.json"], ["none.json: neither char, bpe, gpt2 nor a file"]),
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


PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"body": PLAY}, None),
        ({"body": PLAY[:1000], "length": len(PLAY)}, "IncompleteRead(1000 bytes read"),
        ({"body": b"<html>please log in</html>"}, "wrong sha256"),
        ({"status": 404, "body": b"no"}, "404"),
    ],
)
@pytest.mark.usefixtures("only_this_machine")
def test_a_download_is_whole_or_not_used(answer, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    monkeypatch.chdir(tmp_path)
    with server("input.txt", **answer) as (address, asked):
        monkeypatch.setattr(sources, "SHAKESPEARE", address)
        assert prepare() == 0 and len(asked) == 1
    err, folder = capsys.readouterr().err, Path("data/shakespeare")
    assert prepare("--overwrite") == 0  # nobody answers now
    (source,) = read_meta(folder)["sources"]
    used = sources.BUNDLED.read_bytes() if problem else PLAY
    assert source["sha256"] == hashlib.sha256(used).hexdigest() and strays(folder) == []
    assert (folder / "input.txt").exists() == (problem is None)
    if problem:
        (line,) = [line for line in err.splitlines() if "warning: " in line]
        assert problem in line and "sonnets.txt" in line and "--overwrite" in line


REPOSITORY, REVISION = "HuggingFaceFW/fineweb", "5a1b" * 10
RESOLVE = f"/resolve/{REVISION}/sample/10BT/"


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers for one repository; `cut` ends one after so many bytes, once."""

    answers, cut, asked = {}, {}, []

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        path = urllib.parse.unquote(self.path.split("?")[0]).partition(REPOSITORY)[2]
        if (raw := self.answers.get(path)) is None:
            return self.send_error(404)
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(raw) - first))
        self.send_header("Content-Range", f"bytes {first}-{len(raw) - 1}/{len(raw)}")
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw[first:][: self.cut.pop(path, None)])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path, only_this_machine):
    """Lets a hub of these files answer on this machine as long as the test runs."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        httpd.handle_error = lambda *a: None  # a client that was killed
        address = f"http://127.0.0.1:{httpd.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

        def start(files, cut=None):
            about, tree = json.dumps({"id": REPOSITORY, "sha": REVISION}).encode(), []
            for name, raw in files.items():
                lfs = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 9}
                file = {"path": f"sample/10BT/{name}", "size": len(raw), "oid": "0", "lfs": lfs}
                tree.append(file | {"type": "file"})
            answers = {RESOLVE + name: raw for name, raw in files.items()}
            answers |= {"": about, f"/tree/{REVISION}/sample/10BT": json.dumps(tree).encode()}
            settings = {"answers": answers, "asked": [], "cut": cut or {}}
            httpd.RequestHandlerClass = type("Hub", (Hub,), settings)
            return httpd.RequestHandlerClass

        yield start
        httpd.shutdown()


def fineweb(n=60):
    """Four files of fineweb's sample and one that is not of it, and the documents."""
    texts = [[nasty_text(f"{i} {j}", j % 60 + 1) for j in range(n)] for i in range(4)]
    files = {f"00{i}_00000.parquet": parquet(part) for i, part in enumerate(texts)}
    return files | {"README.md": b"no"}, [text for part in texts for text in part]


FINEWEB = ("--dataset", "fineweb", *BPE, "--val_fraction", 0.2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_hub_documents_are_split_by_hash_also_when_cut_and_killed(serve, tmp_path, capsys):
    (files, texts), name = fineweb(150), "001_00000.parquet"
    serve(files)
    assert prepare(*FINEWEB, "--data_dir", tmp_path / "whole") == 0
    dataset, expected = TokenDataset(tmp_path / "whole"), {"train": [], "val": []}
    for text in texts:
        share = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64
        ids = [*dataset.tokenizer.encode(text), dataset.tokenizer.eot_id]
        expected["val" if share < 0.2 else "train"] += ids
    assert {split: getattr(dataset, split).tolist() for split in expected} == expected
    n_bytes = sum(split["bytes"] for split in dataset.meta["splits"].values())
    assert n_bytes == sum(len(text.encode()) for text in texts) and dataset.vocab_size == 400
    source = dataset.meta["sources"][1]
    assert source["name"] == f"sample/10BT/{name}" and len(dataset.meta["sources"]) == 4
    assert source["sha256"] == hashlib.sha256(files[name]).hexdigest()
    append = prepare_data.append

    def append_and_die(folder, state, *piece):
        append(folder, state, *piece)
        if state["position"] == 2:  # in the third file
            os.kill(os.getpid(), signal.SIGKILL)

    def killed(*flags):
        prepare_data.append = append_and_die
        return prepare(*flags)

    for workers in (1, 2):
        hub, data_dir = serve(files, {RESOLVE + name: 1000}), tmp_path / str(workers)
        flags = (*FINEWEB, "--data_dir", data_dir, "--workers", workers)
        assert in_child(killed, *flags) == -signal.SIGKILL and read_meta(data_dir) is None
        assert sum(asked.startswith("GET") and name in asked for asked in hub.asked) == 2
        hub.asked.clear()
        assert prepare(*flags, "--name", "sample-100BT") == 2
        assert "is of something else (name: sample-10BT" in errors(capsys)[0]
        assert prepare(*flags) == 0 and "resuming" in capsys.readouterr().err
        assert hashes(data_dir) == hashes(tmp_path / "whole")
        assert not (data_dir / ".unfinished").exists()
        assert not any("000_0" in asked or "001_0" in asked for asked in hub.asked)


def test_bad_input_progress_of_another_form_is_refused_by_name(tmp_path, capsys):
    write(tmp_path / "d" / ".unfinished" / "progress.json", '{"position": [1, 0]}')
    flags = ("--input", write(tmp_path / "a.txt", STORY), "--data_dir", tmp_path / "d", *CHAR)
    assert prepare(*flags) == 2
    (line,) = errors(capsys)
    assert "progress.json: " in line and prepare(*flags, *line.split()[-1:]) == 0  # --overwrite


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_gigabyte_of_parquet_takes_600_mb(tmp_path, gpt2_vocabulary):
    """Four files of a quarter of a gigabyte of documents, the last of one row group."""
    base, rng = (ROOT / "data" / "sonnets.txt").read_text("utf-8"), random.Random(0)
    for i in range(4):
        starts = [rng.randrange(len(base) - 5000) for _ in range(100_000)]
        texts = [base[start : start + rng.randrange(5000)] for start in starts]
        raw = parquet(texts, rows=10**9 if i == 3 else 1000, compression="none")
        write(tmp_path / "in" / f"{i}.parquet", raw)
    for workers in "12":
        flags = ["--input", tmp_path / "in", "--workers", workers, "--data_dir", tmp_path / workers]
        code, megabytes, err = measured(*flags)
        print(f"{workers} workers: peak memory {megabytes:.0f} MB")
        assert code == 0 and megabytes < 600, err
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


def test_parquet_input_skips_nulls_and_replaces_bad_bytes(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    write(tmp_path / "in" / "0.parquet", parquet(["one", None, "", "two"]))
    bad = pyarrow.array([b"three", b"caf\xe9"]).view(pyarrow.string())
    write(tmp_path / "in" / "more" / "bad.PARQUET", parquet([None] * 2, text=bad))
    flags = ("--input", tmp_path / "in", *BPE, "--val_fraction", 0.3, "--data_dir", tmp_path / "d")
    assert prepare(*flags) == 2 and read_meta(tmp_path / "d") is None
    assert "bad.PARQUET, row 1: 'utf-8' codec can't decode" in errors(capsys)[0]
    assert prepare(*flags, "--errors", "replace", "--overwrite") == 0
    assert "1 U+FFFD" in capsys.readouterr().err
    expected = ["", "caf\ufffd", "one", "three", "two"]
    assert sorted(read_back(tmp_path / "d").split("<|endoftext|>")) == expected


def test_hub_problems_are_one_line_each(serve, tmp_path, monkeypatch, capsys):
    flags, files = (*FINEWEB, "--data_dir", tmp_path / "d"), fineweb()[0]
    serve({})
    assert prepare(*flags) == 2
    assert errors(capsys)[0].startswith(f"{REPOSITORY}: no .parquet file in sample/10BT/, see")
    del serve(files).answers[f"{RESOLVE}002_00000.parquet"]
    assert prepare(*flags) == 2
    assert errors(capsys)[0].startswith(f"{REPOSITORY}: the transfer failed, the same command")
    serve({"test-0.parquet": b"no"} | files)
    row = (REPOSITORY, lambda _: "sample/10BT/00", "sample-10BT")
    monkeypatch.setitem(sources.HUB_DATASETS, "fineweb", row)
    assert prepare(*flags) == 0
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert prepare(*flags) == 0  # there already
    assert prepare(*flags, "--overwrite") == 2
    assert "pip install -r requirements-hub.txt" in errors(capsys)[0]


def test_adopted_tokens_are_a_data_set_and_stay_as_they_are(tmp_path, gpt2_vocabulary, capsys):
    """A folder as nanoGPT's prepare.py leaves it."""
    encoding, folder = tiktoken.get_encoding("gpt2"), tmp_path / "n"
    texts = {"train": STORY * 9, "val": CHINESE + "<|endoftext|>"}
    for split, text in texts.items():
        ids = np.uint16(encoding.encode(text, allowed_special="all"))
        write(folder / f"{split}.bin", ids.tobytes())
    before = hashes(folder)
    for name, content, message in [
        ("meta.pkl", b"cos\nsystem\n(S'touch canary'\ntR.", "meta.pkl: not gpt2's tokens"),
        ("train.bin", b"123", "train.bin: 3 bytes are not tokens of 2 bytes each"),
        ("val.bin", b"", "val.bin: 0 bytes are not tokens"),
    ]:
        write(shutil.copytree(folder, tmp_path / message[:5]) / name, content)
        assert prepare("--adopt", tmp_path / message[:5]) == 2 and message in errors(capsys)[0]
        assert read_meta(tmp_path / message[:5]) is None
    for _ in range(2):
        assert prepare("--adopt", folder) == 0
        assert capsys.readouterr().out.endswith(f" --data_dir {folder}\n")
        dataset = TokenDataset(folder)
        for split, text in texts.items():
            assert dataset.tokenizer.decode(getattr(dataset, split)) == text
            assert dataset.meta["splits"][split]["bytes"] is None
        assert before.items() <= hashes(folder).items()
