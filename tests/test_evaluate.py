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
from conftest import in_processes, server

import checkpoint
import evaluate
import generate
from config import GPT2Config
from data import TokenDataset
from logger import run
from model import GPT2
from parallel import process_group
from prepare_data import prepare_file
from tokenizer import BPETokenizer, CharTokenizer

TEXT = "to be, or not to be: that is the question. £\n" * 24
T = 8


def tiny_model(vocab_size, **values):
    torch.manual_seed(0)
    sizes = {"block_size": T, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT2(GPT2Config(vocab_size=vocab_size, **sizes, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def plain_tokens(model, ids, first=1):
    """(nats, whether it is the likeliest) of each of ids[first:], by a forward pass for each."""
    found = []
    for i in range(first, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:i]]))[0][0, -1]
        found.append((-F.log_softmax(logits, 0)[ids[i]].item(), logits.argmax().item() == ids[i]))
    return found


def plain_loss(model, tokens, T=T):
    """The mean over every token that a whole window of T predicts."""
    starts = range(0, len(tokens) - T, T)
    found = [plain_tokens(model, tokens[start : start + T + 1].tolist()) for start in starts]
    return np.mean([nats for window in found for nats, _ in window])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_scores_are_a_plain_loop_whatever_the_batch_size(batch_size):
    model, rng = tiny_model(20).double().eval(), random.Random(0)
    rows = [([rng.randrange(20) for _ in range(n)], 1 + n // 3) for n in range(2, T + 2)]
    before = torch.get_rng_state()
    scores = evaluate.score(model, rows, batch_size)
    assert torch.equal(torch.get_rng_state(), before)
    for row, score in zip(rows, scores, strict=True):
        nats, greedy = zip(*plain_tokens(model, *row), strict=True)
        assert math.isclose(score.nats, sum(nats), rel_tol=1e-12)
        assert score.tokens == len(nats) and score.greedy == all(greedy)


# ---------------------------------------------------------------- a data set


def make_dataset(folder, text):
    """The val of a data set of characters, and its bytes."""
    path = folder.with_suffix(".txt")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8", newline="")
    prepare_file(path, "char", folder)
    val = np.array(TokenDataset(folder).val)
    return val, len(text[-len(val) :].encode())


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A folder with a data set and a checkpoint made for it; the model, val and its bytes."""
    monkeypatch.chdir(tmp_path)
    val, val_bytes = make_dataset(tmp_path / "data" / "hamlet", TEXT)
    tokenizer = CharTokenizer.train(TEXT)
    model = tiny_model(tokenizer.vocab_size, data_dir="./data/hamlet")
    state = checkpoint.new_state(model.config, model.state_dict(), tokenizer) | {"step": 3}
    checkpoint.save(tmp_path / "checkpoints" / checkpoint.BEST, state)
    capsys.readouterr()
    return model.double().eval(), val, val_bytes


def cli(*flags):
    return run(evaluate.main, ["--device", "cpu", "--dtype", "float64", *flags])


def errors(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return [line.removeprefix("error: ") for line in err.splitlines() if "error: " in line]


@pytest.mark.parametrize("block_size", [T, 4])
def test_loss_perplexity_and_bits_per_byte_of_a_split(trained, capsys, block_size):
    model, val, val_bytes = trained
    flags = ["--block_size", str(block_size), "--batch_size", "7"]
    assert cli(*flags, "--json") == 0 and cli(*flags) == 0
    line, *rows = capsys.readouterr().out.splitlines()
    result, rows = json.loads(line), dict(row.split() for row in rows)
    expected = plain_loss(model, val, block_size)
    bits = expected * len(val) / math.log(2) / val_bytes
    assert math.isclose(result["loss"], expected, rel_tol=1e-12)
    assert math.isclose(result["perplexity"], math.exp(expected), rel_tol=1e-9)
    assert val_bytes > len(val) and math.isclose(result["bits_per_byte"], bits, rel_tol=1e-9)
    assert result["tokens"] == len(val) and result["windows"] == (len(val) - 1) // block_size
    assert result["block_size"] == block_size
    assert rows["loss"] == f"{expected:.4f}" and rows["tokens"] == str(len(val))


def test_the_next_command_keeps_the_model_the_device_and_the_type(trained, capsys):
    assert cli("--checkpoint", "checkpoints/best_checkpoint.pt") == 0
    line = capsys.readouterr().err.splitlines()[-1]
    flags = "--checkpoint checkpoints/best_checkpoint.pt --device cpu --dtype float64 --interactive"
    assert line.startswith("next ") and line.endswith(f"generate.py {flags}")
    assert run(generate.main, [*flags.split()[:-1], "--prompt", "to"]) == 0


def test_out_of_gpu_memory_is_one_line_that_names_batch_size(trained, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(GPT2, "hidden", full)
    assert cli("--batch_size", "64") == 2
    assert errors(capsys) == ["--batch_size 64: out of memory on cpu; take less"]


def test_half_precision_evaluates_as_training_does(trained, capsys):
    model, val, _ = trained
    assert cli("--dtype", "bfloat16", "--json", "--batch_size", "4") == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        windows = (len(val) - 1) // T
        x = torch.from_numpy(val[: windows * T].astype(np.int64)).view(-1, T)
        y = torch.from_numpy(val[1 : windows * T + 1].astype(np.int64)).view(-1, T)
        _, expected = model.float()(x, y)
    out, err = capsys.readouterr()
    assert math.isclose(json.loads(out)["loss"], expected.item(), rel_tol=1e-5)
    assert "float32 on cpu" in err and "precision  bfloat16 for matrix products" in err


def test_a_data_set_that_does_not_fit_is_refused(trained, tmp_path, capsys):
    make_dataset(tmp_path / "other", "abcdefg\n" * 40)
    make_dataset(tmp_path / "short", TEXT[: T * 10])
    ids = np.fromfile("data/hamlet/val.bin", "<u2")
    ids[7] = 333
    ids.tofile("data/hamlet/val.bin")
    capsys.readouterr()
    for name, words in {
        "other": "its tokenizer (char, 8 tokens) is not the model's (char, 18 tokens)",
        "data/hamlet": "val of data/hamlet: token id 333 at position 7",
        "short": f"val has {T} tokens, needs {T + 1}",
    }.items():
        assert cli("--data_dir", name) == 2
        (line,) = errors(capsys)
        assert words in line


@pytest.mark.parametrize(
    "flags, code, word",
    [
        (["--data_dir", "nowhere"], 2, "nowhere"),
        (["--split", "test"], 2, "--split"),
        (["--checkpoint", "missing.pt"], 3, "missing.pt"),
        (["--task", "squad"], 2, "squad"),
        (["--stride", "4"], 2, "--stride is for --task perplexity only"),
        (["--task", "lambada", "--split", "val"], 2, "--split is for --task val only"),
        (["--file", "a.txt"], 2, "--file: name the one task"),
        (["--task", "lambada", "hellaswag", "--file", "a"], 2, "--file: name the one task"),
        (["--task", "lambada", "--file", "none.jsonl"], 2, "--file none.jsonl: no such file"),
        (["--task", "perplexity"], 2, "name a text with --file"),
        (["--block_size", "16"], 2, "--block_size 16: the model has learned 8 positions"),
    ],
)
def test_bad_input_is_one_line(trained, capsys, flags, code, word):
    assert cli(*flags) == code
    (line,) = errors(capsys)
    assert word in line


def test_a_folder_named_by_a_checkpoint_is_opened_only_below_this_one(trained, tmp_path, capsys):
    make_dataset(tmp_path.parent / "outside", TEXT)
    path = tmp_path / "checkpoints" / checkpoint.BEST
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"config": state["config"] | {"data_dir": "../outside"}})
    assert cli() == 2
    assert "../outside" in capsys.readouterr().err
    assert cli("--data_dir", "../outside") == 0


def test_all_problems_of_the_flags_are_told_at_once(trained, capsys):
    flags = ["--stride", "0", "--batch_size", "-1", "--data_dir", "x", "--file", "nowhere"]
    assert cli("--task", "lambada", *flags) == 2
    starts = ["--stride 0: ", "--batch_size -1: ", "--data_dir is for", "--file nowhere: no such"]
    for line, start in zip(errors(capsys), starts, strict=True):
        assert line.startswith(start)


def test_a_model_that_comes_by_name_needs_a_data_set(trained):
    with pytest.raises(ValueError, match=r"^gpt2 comes without a data set.*--data_dir"):
        evaluate.find_dataset(None, "gpt2", trained[0], None)


def test_only_learned_positions_bound_the_window():
    alibi, learned = (GPT2Config(block_size=8, position=name) for name in ("alibi", "learned"))
    assert evaluate.window_length("context", 32, alibi) == 32
    with pytest.raises(ValueError, match=r"--context 9: .* 8 positions"):
        evaluate.window_length("context", 9, learned)


# ---------------------------------------------------------------- a text


def plain_sliding_nats(model, ids, context, stride):
    """Each token but the first, in the first window (one every `stride`) that reaches it."""
    nats = []
    for i in range(1, len(ids)):
        start = next(start for start in range(0, len(ids), stride) if start + context >= i)
        assert start == 0 or i - start > context - stride
        nats.append(plain_tokens(model, ids[start : i + 1], i - start)[0][0])
    return nats


@pytest.mark.parametrize(
    "length, context, stride",
    [(270, None, None), (100, None, 1), (100, 8, 8), (100, 5, 3), (9, 8, 4), (10, 8, 4), (2, 8, 4)],
)
def test_perplexity_is_a_plain_loop(trained, tmp_path, capsys, length, context, stride):
    model, text = trained[0], TEXT[:length]
    ids = CharTokenizer.train(TEXT).encode(text)
    (tmp_path / "text.txt").write_text(text, "utf-8-sig")  # a byte order mark is not text
    given = {"--context": context, "--stride": stride}
    flags = [f"{flag}={value}" for flag, value in given.items() if value]
    assert cli("--task", "perplexity", "--file", "text.txt", "--json", *flags) == 0
    result = json.loads(capsys.readouterr().out)
    expected = plain_sliding_nats(model, ids, context or T, stride or T // 2)
    assert result["tokens"] == length - 1 == len(expected)
    total = sum(expected)
    assert math.isclose(result["loss"], total / (length - 1), rel_tol=1e-12)
    assert math.isclose(result["perplexity"], math.exp(total / (length - 1)), rel_tol=1e-9)
    words = len(text.split())
    assert result["words"] == words
    assert result["word_perplexity"] == pytest.approx(math.exp(min(700, total / words)), rel=1e-9)
    bits = total / math.log(2) / len(text.encode())
    assert math.isclose(result["bits_per_byte"], bits, rel_tol=1e-12)


def test_what_json_cannot_say_is_null(capsys):
    result = {"task": "perplexity", "word_perplexity": math.inf, "loss": math.nan, "words": 1}
    evaluate.print_result(result, as_json=True)
    parsed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert parsed == {"task": "perplexity", "word_perplexity": None, "loss": None, "words": 1}


@pytest.mark.parametrize(
    "content, stride, words",
    [
        (b"", 4, "text.txt: no text"),
        (b" \n", 4, "text.txt: no text"),
        (b"to be \xff", 4, "text.txt: not UTF-8 (byte 6)"),
        (b"t", 4, "one token"),
        ("to be or not qu\u00e9".encode(), 4, "U+00E9 '\u00e9' at position 15"),
        (b"to be", 9, "--stride 9: must be at most the context of 8 tokens"),  # leaves tokens out
    ],
)
def test_a_text_that_cannot_be_measured_is_refused(
    trained, tmp_path, capsys, content, stride, words
):
    (tmp_path / "text.txt").write_bytes(content)
    assert cli("--task", "perplexity", "--file", "text.txt", "--stride", str(stride)) == 2
    (line,) = errors(capsys)
    assert words in line


# ---------------------------------------------------------------- HellaSwag and LAMBADA

WORDS = "the quick brown fox jumps over a lazy dog and then sleeps under an old tree".split()


@pytest.fixture(scope="module")
def taught():
    """A small model in float64 that knows the order of WORDS a little, and its tokenizer."""
    tokenizer = BPETokenizer.train(" ".join(WORDS * 20), 290)
    sizes = {"block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = GPT2Config(vocab_size=tokenizer.vocab_size, **sizes)
    torch.manual_seed(0)
    model = GPT2(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor(tokenizer.encode(" ".join(WORDS * 20)))
    for step in range(40):
        batch = torch.stack([ids[start : start + 25] for start in range(step % 7, 200, 11)])
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:])[1].backward()
        optimizer.step()
    return model.double().eval(), tokenizer


def some_words(rng, least, most):
    """Words that follow on one another as WORDS do, most of the time."""
    start = rng.randrange(len(WORDS))
    words = [WORDS[(start + i) % len(WORDS)] for i in range(rng.randint(least, most))]
    return " ".join(word if rng.random() < 0.8 else rng.choice(WORDS) for word in words)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def plain_scores(model, tokenizer, context, completions):
    """Nats and whether greedy of each token of each completion. The context loses its beginning
    where the longest of the completions would not fit.
    """
    completions = [tokenizer.encode(completion) for completion in completions]
    context = tokenizer.encode(context)
    while len(context) + max(map(len, completions)) > model.config.block_size + 1:
        context.pop(0)
    return [plain_tokens(model, context + ids, len(context)) for ids in completions]


def run_task(task, taught, path, **values):
    return evaluate.TASKS[task](*taught, evaluate.Options(file=path, **values))


def test_hellaswag_is_a_plain_loop_to_the_example(taught, tmp_path):
    lines, rng = [], random.Random(1)
    for number in range(50):
        context, endings = some_words(rng, 1, 12), [some_words(rng, 1, 6) for _ in range(4)]
        label = rng.randrange(4)
        lines.append({"ctx": context, "endings": endings, "label": label, "ind": number})
    assert any(len(set(line["endings"])) < 4 for line in lines)
    by_sum, by_mean, labels = [], [], [line["label"] for line in lines]
    for line in lines:
        scores = plain_scores(*taught, line["ctx"], [f" {ending}" for ending in line["endings"]])
        nats = [[nats for nats, _ in ending] for ending in scores]
        by_sum.append(np.argmin([np.sum(ending) for ending in nats]))
        by_mean.append(np.argmin([np.mean(ending) for ending in nats]))
    assert by_sum != by_mean
    path = write_lines(tmp_path / "h.jsonl", lines)
    for batch_size in (1, 3, 8, 300):
        result = run_task("hellaswag", taught, path, batch_size=batch_size)
        assert result["examples"] == 50
        assert result["acc"] == np.mean(np.equal(by_sum, labels))
        assert result["acc_norm"] == np.mean(np.equal(by_mean, labels))


@pytest.mark.parametrize("label, accuracy", [(0, 1), (1, 0)])
def test_of_equal_endings_the_first_is_taken(taught, tmp_path, label, accuracy):
    line = {"ctx": "the quick", "endings": ["brown fox"] * 3, "label": label}
    result = run_task("hellaswag", taught, write_lines(tmp_path / "h.jsonl", [line]))
    assert result["acc"] == result["acc_norm"] == accuracy


def test_lambada_is_a_plain_loop_to_the_example(taught, tmp_path):
    nats, right, rng = 0, 0, random.Random(2)
    texts = [some_words(rng, 2, 16) for _ in range(50)]
    for text in texts:
        context, word = text.rsplit(" ", 1)
        (scores,) = plain_scores(*taught, context, [f" {word}"])
        nats += sum(nats for nats, _ in scores)
        right += all(greedy for _, greedy in scores)
    assert 5 < right < 45
    path = write_lines(tmp_path / "l.jsonl", [{"text": text} for text in texts])
    for batch_size in (1, 3, 8, 300):
        result = run_task("lambada", taught, path, batch_size=batch_size)
        assert result["examples"] == 50 and result["acc"] == right / 50
        assert math.isclose(result["perplexity"], math.exp(nats / 50), rel_tol=1e-10)
    plain = tmp_path / "l.txt"  # a passage a line
    plain.write_text("\n\n".join(text + "  " for text in texts), "utf-8")
    assert run_task("lambada", taught, plain, batch_size=300) == result | {"file": str(plain)}


def test_contexts_that_are_too_long_are_cropped_and_counted(taught, capsys):
    long, room = " ".join(WORDS * 3), "the quick"
    said = "warning: 1 of 2 contexts cropped to fit block_size 24"
    for context, line in ((long, said), (room, "")):
        examples = [(context, [" fox", " brown fox jumps"], 0), ("the", [" fox"], 0)]
        scored = evaluate.score_completions(*taught, examples, 8)
        assert capsys.readouterr().err.strip() == line
        for example, scores in zip(examples, scored, strict=True):
            for plain, found in zip(plain_scores(*taught, *example[:2]), scores, strict=True):
                assert math.isclose(found.nats, sum(n for n, _ in plain), rel_tol=1e-10)
                assert found.tokens == len(plain)


def test_an_ending_longer_than_the_model_sees_is_refused(taught):
    examples = [("the", [" fox"], 0), ("the", [" fox", " " + " ".join(WORDS * 3)], 0)]
    with pytest.raises(ValueError, match=r"example 2: \d+ tokens exceed block_size 24"):
        evaluate.score_completions(*taught, examples, 8)


GOOD = '{"ctx": "to", "endings": ["be", "not"], "label": 1}\n'


@pytest.mark.parametrize(
    "task, content, words",
    [
        ("hellaswag", "", "no examples"),
        ("hellaswag", GOOD + "\nto be\n", "line 3: Invalid JSON"),
        ("hellaswag", GOOD + "[1]\n", "line 2: must be an object"),
        ("hellaswag", '{"ctx": "to", "endings": ["be"]}', "line 1: label: is missing"),
        ("hellaswag", '{"ctx": "", "endings": ["be"], "label": 0}', "line 1: ctx: "),
        ("hellaswag", '{"ctx": "to", "endings": [2], "label": 0}', "line 1: endings.0: "),
        ("hellaswag", '{"ctx": "to", "endings": ["be"], "label": 1}', "label 1: not one of 1"),
        ("hellaswag", '{"ctx": "to", "endings": ["\u00e9"], "label": 0}', "U+00E9"),
        ("hellaswag", '"' + "[" * 100_000, "line 1: Invalid JSON"),
        ("lambada", '{"passage": "to be"}', "line 1: text: is missing"),
        ("lambada", '{"text": "to be"}\n{"text": " be "}', "line 2: text: fewer than two words"),
        ("lambada", b'{"text": "to \xff"}', "not UTF-8"),
    ],
)
def test_bad_examples_are_one_line_with_their_number(
    trained, tmp_path, capsys, task, content, words
):
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "examples.jsonl").write_bytes(raw)
    assert cli("--task", task, "--file", "examples.jsonl") == 2
    (line,) = errors(capsys)
    assert words in line


def test_several_tasks_print_one_object_a_line(trained, tmp_path, capsys):
    (tmp_path / "h.jsonl").write_text(GOOD, "utf-8")
    assert cli("--task", "val", "hellaswag", "--file", "h.jsonl", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["task"] == "val" and second["task"] == "hellaswag" and second["examples"] == 1


# ---------------------------------------------------------------- several processes


def test_ranks_share_the_rows_and_all_get_every_score():
    model, rng = tiny_model(20).double().eval(), random.Random(0)
    rows = [([rng.randrange(20) for _ in range(rng.randint(2, T))], 1) for _ in range(13)]
    alone = {count: evaluate.score(model, rows[:count], 2) for count in (1, 4, 5, 13)}

    def member():
        with process_group(torch.device("cpu")):
            return int(any(evaluate.score(model, rows[:n], 2) != alone[n] for n in alone))

    assert in_processes(3, member) == [0, 0, 0]


def test_two_processes_get_what_one_gets(trained, tmp_path, capsys):
    endings = ["be", "or not", "that is"]
    lines = [{"ctx": TEXT[: i + 2], "endings": endings, "label": i % 3} for i in range(11)]
    write_lines(tmp_path / "h.jsonl", lines)
    flags = ["--task", "val", "hellaswag", "--file", "h.jsonl", "--json", "--batch_size", "4"]
    assert cli(*flags) == 0
    alone = capsys.readouterr().out

    def member():
        with open(f"out{os.environ['RANK']}", "w") as sys.stdout:
            return cli(*flags)

    assert in_processes(2, member) == [0, 0]
    assert (tmp_path / "out0").read_text() == alone and alone.count("\n") == 2
    assert (tmp_path / "out1").read_text() == ""


# ---------------------------------------------------------------- the download

LINES = (GOOD * 40).encode()


@pytest.fixture
def published(trained, monkeypatch, only_this_machine):
    """Says where HellaSwag is."""
    schema, digest = evaluate.EXAMPLES["hellaswag"][0], hashlib.sha256(LINES).hexdigest()
    set_item = monkeypatch.setitem
    return lambda at: set_item(evaluate.EXAMPLES, "hellaswag", (schema, at, digest))


def test_examples_are_downloaded_once_and_kept(published, tmp_path, capsys):
    with server("data/hellaswag_val.jsonl", LINES) as (address, asked):
        published(address)
        assert cli("--task", "hellaswag", "--json") == 0
        assert cli("--task", "hellaswag", "--json") == 0
    assert asked == ["/data/hellaswag_val.jsonl"]
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == second and json.loads(first)["examples"] == 40
    assert err.count(f"fetching   {address}\n") == 1
    assert (tmp_path / "data/hellaswag/hellaswag_val.jsonl").read_bytes() == LINES
    assert len(list((tmp_path / "data/hellaswag").iterdir())) == 1


def test_a_download_that_fails_is_one_line_and_leaves_nothing(published, tmp_path, capsys):
    with server("data/hellaswag_val.jsonl", LINES[:1000], length=len(LINES)) as (address, _):
        published(address)
        assert cli("--task", "hellaswag") == 2
    (line,) = errors(capsys)
    assert line.startswith(address) and "1,000 of 2,080 bytes" in line and "--file" in line
    assert not (tmp_path / "data/hellaswag").exists()
