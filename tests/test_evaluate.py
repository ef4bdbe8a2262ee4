"""Every score against a slow plain loop, and what evaluate.py says and refuses."""

import hashlib
import json
import math
import os
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, prepare, server

import checkpoint
import evaluate
from config import GPT2Config
from data import TokenDataset
from logger import run
from model import GPT2
from tokenizer import BPETokenizer, CharTokenizer

TEXT = "to be, or not to be: that is the question. £\n" * 24
T = 8


def plain_tokens(model, ids, first=1):
    """(nats, whether it is the likeliest) of each of ids[first:], by a forward pass for each."""
    found = []
    for i in range(first, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:i]]))[0][0, -1]
        found.append((-F.log_softmax(logits, 0)[ids[i]].item(), logits.argmax().item() == ids[i]))
    return found


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A folder with a data set and a checkpoint made for it; the model, val and its bytes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    val = np.array(TokenDataset(prepare(TEXT, tmp_path / "data" / "hamlet")).val)
    tokenizer = CharTokenizer.train(TEXT)
    torch.manual_seed(0)
    sizes = {"block_size": T, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT2(GPT2Config(tokenizer.vocab_size, **sizes, data_dir="./data/hamlet"))
    for parameter in model.parameters():
        parameter.data *= 5
    state = checkpoint.new_state(model.config, model.state_dict(), tokenizer) | {"step": 3}
    checkpoint.save(tmp_path / "checkpoints" / checkpoint.BEST, state)
    capsys.readouterr()
    return model.double().eval(), val, len(TEXT[-len(val) :].encode())


def cli(*flags):
    return run(evaluate.main, ["--device", "cpu", "--dtype", "float64", *flags])


def refused(capsys, *flags):
    """The one line that is said with exit code 2."""
    assert cli(*flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1
    return err


def numbers(line):
    return {name: v for name, v in json.loads(line).items() if not isinstance(v, str)}


@pytest.mark.parametrize("block_size", [T, 4])
def test_loss_perplexity_and_bits_per_byte_of_a_split(trained, capsys, block_size):
    model, val, val_bytes = trained
    flags = ["--block_size", str(block_size), "--batch_size", "7"]
    assert cli(*flags, "--json") == 0 and cli(*flags) == 0
    line, *rows = capsys.readouterr().out.splitlines()
    windows = range(0, len(val) - block_size, block_size)
    found = [plain_tokens(model, val[start : start + block_size + 1].tolist()) for start in windows]
    loss = np.mean(found, axis=(0, 1))[0]
    bits = loss * len(val) / math.log(2) / val_bytes
    expected = {"tokens": len(val), "windows": len(windows), "block_size": block_size}
    expected |= {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}
    assert numbers(line) == pytest.approx(expected, rel=1e-9) and val_bytes > len(val)
    assert dict(row.split() for row in rows)["loss"] == f"{loss:.4f}"


def test_half_precision_evaluates_as_training_does(trained, capsys):
    model, val, _ = trained
    assert cli("--dtype", "bfloat16", "--json", "--batch_size", "4") == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        windows = (len(val) - 1) // T
        val = torch.from_numpy(val[: windows * T + 1].astype(np.int64))
        _, expected = model.float()(val[:-1].view(-1, T), val[1:].view(-1, T))
    out, err = capsys.readouterr()
    assert math.isclose(json.loads(out)["loss"], expected.item(), rel_tol=1e-5)
    assert "float32 on cpu" in err and "precision  bfloat16 for matrix products" in err


@pytest.mark.parametrize(
    "length, block_size, stride",
    [(270, None, None), (100, None, 1), (100, 8, 8), (100, 5, 3), (9, 8, 4), (10, 8, 4), (2, 8, 4)],
)
def test_perplexity_is_a_plain_loop(trained, tmp_path, capsys, length, block_size, stride):
    text = TEXT[:length]
    (tmp_path / "text.txt").write_text(text, "utf-8-sig")  # a byte order mark is not text
    flags = [f"--block_size={block_size}", f"--stride={stride}"]
    assert cli("--task", "perplexity", "--file", "text.txt", "--json", *flags) == 0
    block_size, stride, words = block_size or T, stride or T // 2, len(text.split())
    ids, nats = CharTokenizer.train(TEXT).encode(text), []
    for i in range(1, length):  # in the first window (one every `stride`) that reaches it
        start = next(start for start in range(0, length, stride) if start + block_size >= i)
        assert start == 0 or i - start > block_size - stride
        nats.append(plain_tokens(trained[0], ids[start : i + 1], i - start)[0][0])
    expected = {"tokens": length - 1, "words": words, "block_size": block_size, "stride": stride}
    expected |= {"loss": np.mean(nats), "perplexity": math.exp(np.mean(nats))}
    expected |= {"word_perplexity": math.exp(sum(nats) / words)}
    expected |= {"bits_per_byte": sum(nats) / math.log(2) / len(text.encode())}
    assert numbers(capsys.readouterr().out) == pytest.approx(expected, rel=1e-9)


def test_what_json_cannot_say_is_null(capsys):
    evaluate.print_result({"task": "val", "perplexity": math.inf, "loss": math.nan}, as_json=True)
    parsed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert parsed == {"task": "val", "perplexity": None, "loss": None}


WORDS = "the quick brown fox jumps over a lazy dog and then sleeps under an old tree".split()


@pytest.fixture(scope="module")
def taught():
    """A small model in float64 that knows the order of WORDS a little, and its tokenizer."""
    tokenizer = BPETokenizer.train(" ".join(WORDS * 20), 290)
    torch.manual_seed(0)
    sizes = {"block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT2(GPT2Config(tokenizer.vocab_size, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    windows = torch.tensor(tokenizer.encode(" ".join(WORDS * 20))).unfold(0, 25, 1)
    for step in range(40):
        optimizer.zero_grad()
        model(windows[step % 7 : 200 : 11, :-1], windows[step % 7 : 200 : 11, 1:])[1].backward()
        optimizer.step()
    return model.double().eval(), tokenizer


def some_words(rng, least, most):
    """Words that follow on one another as WORDS do, most of the time."""
    start = rng.randrange(len(WORDS))
    words = [WORDS[(start + i) % len(WORDS)] for i in range(rng.randint(least, most))]
    return " ".join(word if rng.random() < 0.8 else rng.choice(WORDS) for word in words)


def plain_scores(model, tokenizer, context, endings):
    """(nats, greedy) of each token of each ending, (tokens, 2) each; contexts are cropped."""
    endings = [tokenizer.encode(f" {ending}") for ending in endings]
    room = model.config.block_size + 1 - max(map(len, endings))
    context = tokenizer.encode(context)[-room:]
    return [np.array(plain_tokens(model, context + ids, len(context))) for ids in endings]


def results(task, taught, path, lines):
    """Of evaluating these lines, at four batch sizes."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    options = [evaluate.Options(file=path, batch_size=size) for size in (1, 3, 8, 300)]
    return [evaluate.TASKS[task](*taught, each) for each in options]


def test_hellaswag_is_a_plain_loop_to_the_example(taught, tmp_path):
    lines, rng = [], random.Random(1)
    for _ in range(50):
        context, endings = some_words(rng, 1, 12), [some_words(rng, 1, 6) for _ in range(4)]
        lines.append({"ctx": context, "endings": endings, "label": rng.randrange(4), "ind": 0})
    lines += [line | {"endings": ["brown fox"] * 4, "label": 0} for line in lines[:9]]
    scores = [plain_scores(*taught, line["ctx"], line["endings"]) for line in lines]
    by_sum = [np.argmin([ending[:, 0].sum() for ending in four]) for four in scores]
    by_mean = [np.argmin([ending[:, 0].mean() for ending in four]) for four in scores]
    labels = [line["label"] for line in lines]
    assert by_sum != by_mean
    for result in results("hellaswag", taught, tmp_path / "h.jsonl", lines):
        assert result["acc"] == np.mean(np.equal(by_sum, labels))
        assert result["acc_norm"] == np.mean(np.equal(by_mean, labels))


def test_lambada_is_a_plain_loop_to_the_example(taught, tmp_path):
    rng = random.Random(2)
    texts = [some_words(rng, 2, 16) for _ in range(50)]
    pairs = [text.rsplit(" ", 1) for text in texts]
    scores = [plain_scores(*taught, context, [word])[0] for context, word in pairs]
    acc = np.mean([word[:, 1].all() for word in scores])
    assert 0.1 < acc < 0.9
    expected = math.exp(np.mean([word[:, 0].sum() for word in scores]))
    for result in results("lambada", taught, tmp_path / "l.jsonl", [{"text": t} for t in texts]):
        assert result["acc"] == acc
        assert math.isclose(result["perplexity"], expected, rel_tol=1e-10)


def test_contexts_that_are_too_long_are_cropped_and_counted(taught, capsys):
    examples = [(" ".join(WORDS * 3), ["fox", "brown fox jumps"]), ("the quick", ["fox", "dog"])]
    nats, _, tokens = evaluate.score_endings(*taught, examples, 8)
    said = "warning: 1 of 2 contexts cropped to fit block_size 24"
    assert capsys.readouterr().err.strip() == said
    plain = [plain_scores(*taught, *example) for example in examples]
    assert tokens.tolist() == [[len(ending) for ending in endings] for endings in plain]
    expected = [[ending[:, 0].sum() for ending in endings] for endings in plain]
    np.testing.assert_allclose(nats, expected, rtol=1e-10)
    with pytest.raises(ValueError, match="tokens are more than block_size 24"):
        evaluate.score_endings(*taught, [("the", ["fox", " ".join(WORDS * 3)])], 8)


EXAMPLE = {"ctx": "to", "endings": ["be", "not", "or not", "that is"], "label": 1}
GOOD = json.dumps(EXAMPLE) + "\n"
BAD = [
    ("--data_dir nowhere", "", "nowhere"),
    ("--task lambada hellaswag --file x", "", "--file: name the one task"),
    ("--task lambada --file none.jsonl", "", "--file none.jsonl: no such file"),
    ("--task perplexity", "", "name a text with --file"),
    ("--block_size 16", "", "16 tokens are more than block_size 8"),
    ("--task perplexity --file x", " \n", "x: no text"),
    ("--task perplexity --file x", "to be \xff", "x: not UTF-8 (byte 6)"),
    ("--task perplexity --file x", "to be \xc3\xa9", "U+00E9 '\u00e9' at position 6"),
    ("--task perplexity --file x --stride 9", "to be", "at most --block_size 8"),
    ("--task lambada --file x --block_size 4", "", "--block_size: not for"),
    ("--task hellaswag --file x", "\n", "no examples"),
    ("--task hellaswag --file x", f"{GOOD}\n[", "line 3: Invalid JSON"),
    ("--task hellaswag --file x", GOOD.replace("1}", "4}"), "line 1: label: must be 0"),
    ("--task lambada --file x", '{"text": "a b"}\n{"text": " be "}', "line 2: text: must"),
]


@pytest.mark.parametrize("flags, content, words", BAD)
def test_bad_input_is_one_line(trained, tmp_path, capsys, flags, content, words):
    (tmp_path / "x").write_text(content, "latin-1")
    assert words in refused(capsys, *flags.split())


def test_a_data_set_that_does_not_fit_is_refused(trained, tmp_path, capsys):
    path = tmp_path / "checkpoints" / checkpoint.BEST
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"config": state["config"] | {"data_dir": "../outside"}})
    prepare(TEXT, tmp_path.parent / "outside")
    prepare("abcdefg\n" * 40, tmp_path / "other")
    prepare(TEXT[: T * 10], tmp_path / "short")
    ids = np.fromfile("data/hamlet/val.bin", "<u2")
    ids[7] = 333
    ids.tofile("data/hamlet/val.bin")
    capsys.readouterr()
    assert "names ../outside, outside this folder" in refused(capsys)
    for folder, words in {
        "other": "its tokenizer is not the model's",
        "data/hamlet": "val of data/hamlet: unknown token id 333 at position 7",
        "short": f"val has {T} tokens, needs {T + 1}",
    }.items():
        assert words in refused(capsys, "--data_dir", folder)
    assert cli("--data_dir", "../outside") == 0


def test_two_processes_get_what_one_gets(trained, tmp_path, capsys):
    lines = [EXAMPLE | {"ctx": TEXT[: i + 2], "label": i % 4} for i in range(11)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--task", "val", "hellaswag", "--file", "h.jsonl", "--json", "--batch_size", "4"]
    assert cli(*flags) == 0
    alone = capsys.readouterr().out

    def member():
        with open(f"out{os.environ['RANK']}", "w") as sys.stdout:
            return cli(*flags)

    assert in_processes(2, member) == [0, 0]
    assert (tmp_path / "out0").read_text() == alone and alone.count("\n") == 2
    assert (tmp_path / "out1").read_text() == ""


@pytest.mark.usefixtures("trained", "only_this_machine")
def test_examples_are_downloaded_whole_and_once(tmp_path, monkeypatch, capsys):
    content, folder = (GOOD * 40).encode(), tmp_path / "data" / "hellaswag"
    for sent in (content[: len(content) // 2], content):
        with server("data/hellaswag_val.jsonl", sent, length=len(content)) as (address, asked):
            example = address, hashlib.sha256(content).hexdigest()
            monkeypatch.setitem(evaluate.EXAMPLES, evaluate.HellaSwag, example)
            codes = [cli("--task", "hellaswag", "--json") for _ in range(2)]
        if sent != content:
            assert codes == [2, 2] and not folder.exists()
            assert f"error: {address}: " in capsys.readouterr().err
    assert codes == [0, 0] and asked == ["/data/hellaswag_val.jsonl"]
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and json.loads(first)["examples"] == 40
    assert [path.read_bytes() for path in folder.iterdir()] == [content]
