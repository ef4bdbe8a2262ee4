"""Every score against a slow plain loop, and what evaluate.py says and refuses."""

import contextlib
import hashlib
import json
import math
import os
import random
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, server

import checkpoint
import evaluate
import generate
from config import GPT2Config
from convert import new_state
from data import write_dataset
from evaluate import Score, mean_loss
from model import GPT2
from tokenizer import BPETokenizer, CharTokenizer
from utils import run

TEXT = "to be, or not to be: that is the question. £\n" * 12
T = 8


def tiny_model(vocab_size, **values):
    torch.manual_seed(0)
    sizes = {"block_size": T, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT2(GPT2Config(vocab_size=vocab_size, **sizes, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def plain_loss(model, tokens):
    """One token at a time, every one that a whole window predicts."""
    losses = []
    for start in range(0, len(tokens) - T, T):
        window = torch.tensor(np.array(tokens[start : start + T + 1], dtype=np.int64))
        with torch.no_grad():
            logits, _ = model(window[None, :-1])
        losses += [-F.log_softmax(logits[0, t], 0)[window[t + 1]].item() for t in range(T)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("length", [T + 1, 2 * T, 101])
def test_mean_loss_is_a_plain_loop_whatever_the_batch_size(length):
    model = tiny_model(20).double().eval()
    tokens = np.random.default_rng(0).integers(20, size=length).astype("<u2")
    expected = plain_loss(model, tokens)
    for batch_size in (1, 3, 5, 64):
        found = mean_loss(model, tokens, T, batch_size, "cpu")
        assert math.isclose(found, expected, rel_tol=1e-12)


def test_mean_loss_on_fewer_windows_spreads_them_over_the_split():
    model = tiny_model(20).double().eval()
    tokens = np.random.default_rng(0).integers(20, size=101).astype("<u2")
    some = [np.array(tokens[start : start + T + 1]) for start in (0, 24, 48, 72)]
    expected = sum(plain_loss(model, window) for window in some) / 4
    assert math.isclose(mean_loss(model, tokens, T, 3, "cpu", max_windows=4), expected)


def test_mean_loss_leaves_mode_and_random_state_alone():
    model = tiny_model(20, dropout=0.5).train()
    tokens = np.arange(100, dtype="<u2") % 20
    before = torch.get_rng_state()
    first = mean_loss(model, tokens, T, 4, "cpu", autocast=torch.autocast("cpu", torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), before) and model.training
    again = mean_loss(model, tokens, T, 4, "cpu", autocast=torch.autocast("cpu", torch.bfloat16))
    assert first == again
    model.eval()
    mean_loss(model, tokens, T, 4, "cpu")
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_mean_loss_refuses_what_cannot_be_measured():
    model = tiny_model(20)
    with pytest.raises(ValueError, match=r"8 tokens .* 9"):
        mean_loss(model, np.zeros(T, "<u2"), T, 4, "cpu")
    with pytest.raises(ValueError, match="33"):
        mean_loss(model, np.full(T + 1, 33, "<u2"), T, 4, "cpu", vocab_size=20)
    assert model.training


# ---------------------------------------------------------------- the command line


def make_dataset(folder, text):
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode(text)
    cut = len(ids) // 2
    parts = {"train": (ids[:cut], text[:cut]), "val": (ids[cut:], text[cut:])}
    splits = {name: [(part, len(words.encode()))] for name, (part, words) in parts.items()}
    write_dataset(folder, splits, tokenizer)
    return tokenizer, np.array(ids[cut:]), len(text[cut:].encode())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder with a data set and a checkpoint made for it; the model, val and its bytes."""
    monkeypatch.chdir(tmp_path)
    tokenizer, val, val_bytes = make_dataset(tmp_path / "data" / "hamlet", TEXT)
    model = tiny_model(tokenizer.vocab_size, data_dir="./data/hamlet")
    state = new_state(model.config, model.state_dict(), tokenizer) | {"step": 3}
    checkpoint.save(tmp_path / "checkpoints" / checkpoint.BEST, state)
    return model.double().eval(), val, val_bytes


def cli(*flags):
    return run(evaluate.main, ["--device", "cpu", "--dtype", "float64", *flags])


def test_json_has_loss_perplexity_and_bits_per_byte_of_the_split(trained, capsys):
    model, val, val_bytes = trained
    assert cli("--json", "--batch_size", "7") == 0
    result = json.loads(capsys.readouterr().out)
    expected = plain_loss(model, val)
    assert math.isclose(result["loss"], expected, rel_tol=1e-12)
    assert math.isclose(result["perplexity"], math.exp(expected), rel_tol=1e-9)
    bits = expected * len(val) / math.log(2) / val_bytes
    assert val_bytes > len(val) and math.isclose(result["bits_per_byte"], bits, rel_tol=1e-9)
    assert result["tokens"] == len(val) and result["windows"] == (len(val) - 1) // T


def test_the_table_shows_the_same_numbers(trained, capsys):
    model, val, _ = trained
    assert cli() == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert rows["loss"] == f"{plain_loss(model, val):.4f}" and rows["tokens"] == str(len(val))


def test_the_next_command_keeps_the_model_the_device_and_the_type(trained, capsys):
    assert cli("--checkpoint", "checkpoints/best_checkpoint.pt") == 0
    line = capsys.readouterr().err.splitlines()[-1]
    flags = "--checkpoint checkpoints/best_checkpoint.pt --device cpu --dtype float64 --interactive"
    assert line.startswith("next ") and line.endswith(f"generate.py {flags}")
    assert run(generate.main, [*flags.split()[:-1], "--prompt", "to"]) == 0


def test_out_of_gpu_memory_is_one_line_that_names_batch_size(trained, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(GPT2, "forward", full)
    assert cli("--batch_size", "64") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "--batch_size 64: out of GPU memory" in line


def test_half_precision_evaluates_as_training_does(trained, capsys):
    model, val, _ = trained
    assert cli("--dtype", "bfloat16", "--json", "--batch_size", "4") == 0
    mixed = torch.autocast("cpu", torch.bfloat16)
    expected = mean_loss(model.float(), val, T, 4, "cpu", autocast=mixed)
    out, err = capsys.readouterr()
    assert json.loads(out)["loss"] == expected
    assert "float32 on cpu" in err and "precision  bfloat16 for matrix products" in err


def test_a_data_set_of_another_tokenizer_is_refused(trained, tmp_path, capsys):
    make_dataset(tmp_path / "other", "abcdefg\n" * 40)
    assert cli("--data_dir", "other") == 2
    err = capsys.readouterr().err
    assert "other was made with another tokenizer (char, 8 tokens)" in err and "checkpoint's" in err


@pytest.mark.parametrize(
    "flags, code, word",
    [
        (["--data_dir", "nowhere"], 2, "nowhere"),
        (["--batch_size", "0"], 2, "--batch_size 0"),
        (["--split", "test"], 2, "--split"),
        (["--dtype", "int8"], 2, "--dtype int8"),
        (["--checkpoint", "missing.pt"], 3, "missing.pt"),
        (["--task", "squad"], 2, "squad"),
        (["--stride", "4"], 2, "--stride is for --task perplexity only"),
        (["--task", "lambada", "--split", "val"], 2, "--split is for --task val only"),
        (["--file", "a.txt"], 2, "--file: name the one task"),
        (["--task", "lambada", "hellaswag", "--file", "a"], 2, "--file: name the one task"),
        (["--task", "lambada", "--file", "none.jsonl"], 2, "--file none.jsonl: no such file"),
        (["--task", "perplexity"], 2, "name a text with --file"),
        (["--block_size", "16"], 2, "--block_size 16: the model has learned 8 positions"),
        (["--block_size", "0"], 2, "--block_size 0"),
    ],
)
def test_bad_input_is_one_line(trained, capsys, flags, code, word):
    assert cli(*flags) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and word in err.split("error: ")[1]


def test_a_folder_named_by_a_checkpoint_is_opened_only_below_this_one(trained, tmp_path, capsys):
    make_dataset(tmp_path.parent / "outside", TEXT)
    path = tmp_path / "checkpoints" / checkpoint.BEST
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"config": state["config"] | {"data_dir": "../outside"}})
    assert cli() == 2
    assert "../outside" in capsys.readouterr().err
    assert cli("--data_dir", "../outside") == 0


def test_all_problems_of_the_flags_are_told_at_once(trained, capsys):
    assert cli("--task", "lambada", "--stride", "0", "--batch_size", "-1", "--data_dir", "x") == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 4
    assert all(name in err for name in ("--stride 0", "--batch_size -1", "--data_dir is"))


def test_a_model_that_comes_by_name_needs_a_data_set(trained):
    with pytest.raises(ValueError, match=r"^gpt2 comes without a data set.*--data_dir"):
        evaluate.find_dataset(None, "gpt2", trained[0], None)


def test_only_learned_positions_bound_the_window():
    alibi = GPT2Config(block_size=8, position="alibi")
    assert evaluate.window_length("context", 32, alibi) == 32
    assert evaluate.window_length("context", 4, GPT2Config(block_size=8)) == 4
    assert evaluate.window_length("context", None, alibi) == 8
    with pytest.raises(ValueError, match=r"--context 9: .* 8 positions"):
        evaluate.window_length("context", 9, GPT2Config(block_size=8))


def test_a_shorter_window_of_the_split(trained, capsys):
    model, val, _ = trained
    assert cli("--json", "--block_size", "4") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["block_size"] == 4 and result["windows"] == (len(val) - 1) // 4
    assert math.isclose(result["loss"], mean_loss(model, val, 4, 8, torch.device("cpu")))


# ---------------------------------------------------------------- a text


def plain_log_probability(model, context, token):
    """One forward for one token."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([context]))
    return F.log_softmax(logits[0, -1], 0)[token].item()


def plain_sliding_nats(model, ids, context, stride):
    """Each token but the first, in the first window (one every `stride`) that reaches it."""
    nats = []
    for i in range(1, len(ids)):
        start = next(start for start in range(0, len(ids), stride) if start + context >= i)
        assert start == 0 or i - start > context - stride
        nats.append(-plain_log_probability(model, ids[start:i], ids[i]))
    return nats


@pytest.mark.parametrize(
    "length, context, stride",
    [(270, None, None), (100, None, 1), (100, 8, 8), (100, 5, 3), (9, 8, 4), (10, 8, 4), (2, 8, 4)],
)
def test_perplexity_is_a_plain_loop(trained, tmp_path, capsys, length, context, stride):
    model, val, _ = trained
    text = CharTokenizer.train(TEXT).decode(val[:length])
    (tmp_path / "text.txt").write_text(text, "utf-8")
    flags = [f"--{name}={value}" for name, value in (("context", context), ("stride", stride))]
    flags = [flag for flag in flags if not flag.endswith("None")]
    assert cli("--task", "perplexity", "--file", "text.txt", "--json", *flags) == 0
    result = json.loads(capsys.readouterr().out)
    expected = plain_sliding_nats(model, val[:length].tolist(), context or T, stride or T // 2)
    assert result["tokens"] == length - 1 == len(expected)
    total = sum(expected)
    assert math.isclose(result["loss"], total / (length - 1), rel_tol=1e-12)
    assert math.isclose(result["perplexity"], math.exp(total / (length - 1)), rel_tol=1e-9)
    words = len(text.split())
    assert result["words"] == words
    assert result["word_perplexity"] == pytest.approx(math.exp(min(700, total / words)), rel=1e-9)
    bits = total / math.log(2) / len(text.encode())
    assert math.isclose(result["bits_per_byte"], bits, rel_tol=1e-12)


def test_a_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    text = "The cat, the dog\r\nand the 字 bird: thethethe\n" * 40
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    tokenizer = BPETokenizer.train(text, 300)
    monkeypatch.setattr(evaluate, "CHUNK", 70)
    pieces = list(evaluate.encoded_pieces(tmp_path / "text.txt", tokenizer))
    assert len(pieces) > 20 and [i for piece in pieces for i in piece] == tokenizer.encode(text)
    measured = evaluate.measure_text(tmp_path / "text.txt")
    assert measured == (len(text.encode()), len(text.split()))


def test_what_json_cannot_say_is_null():
    result = {"task": "perplexity", "word_perplexity": math.inf, "loss": math.nan, "words": 1}
    parsed = json.loads(evaluate.one_line(result), parse_constant=pytest.fail)
    assert parsed == {"task": "perplexity", "word_perplexity": None, "loss": None, "words": 1}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no text"),
        (b" \n\t", "no text"),
        (b"to be \xff", "not UTF-8"),
        (b"t", "one token"),
        ("qu\u00e9".encode(), "U+00E9"),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused(trained, tmp_path, capsys, content, words):
    (tmp_path / "text.txt").write_bytes(content)
    assert cli("--task", "perplexity", "--file", "text.txt") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and words in err


def test_a_character_that_the_model_lacks_is_named_with_its_place(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "CHUNK", 5)
    (tmp_path / "text.txt").write_text("to be or not qu\u00e9", "utf-8")
    assert cli("--task", "perplexity", "--file", "text.txt") == 2
    assert "text.txt, from character 15 on: character U+00E9 '\u00e9' at position 0" in (
        capsys.readouterr().err
    )


def test_a_stride_beyond_the_context_would_leave_tokens_out(trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be", "utf-8")
    assert cli("--task", "perplexity", "--file", "text.txt", "--stride", "9") == 2
    assert "--stride 9: must be at most the context of 8 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------- HellaSwag and LAMBADA

WORDS = "the quick brown fox jumps over a lazy dog and then sleeps under an old tree".split()


@pytest.fixture(scope="module")
def taught():
    """A small model in float64 that knows the order of WORDS a little, and its tokenizer."""
    tokenizer = BPETokenizer.train(" ".join(WORDS * 20), 290)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, block_size=24, n_layer=2, n_head=2, n_embd=32
    )
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


def hellaswag_lines():
    rng = random.Random(1)
    return [
        {
            "ctx": some_words(rng, 1, 12),
            "endings": [some_words(rng, 1, 6) for _ in range(4)],
            "label": rng.randrange(4),
            "ind": number,
        }
        for number in range(50)
    ]


def lambada_lines():
    rng = random.Random(2)
    return [{"text": some_words(rng, 2, 16)} for _ in range(50)]


def plain_scores(model, tokenizer, context, completions):
    """For each completion its tokens' log-probabilities, one forward each, and which are greedy.

    The context loses its beginning where the longest of the completions would not fit.
    """
    found, completions = [], [tokenizer.encode(completion) for completion in completions]
    context = tokenizer.encode(context)
    while len(context) + max(map(len, completions)) > model.config.block_size + 1:
        context.pop(0)
    for completion in completions:
        found.append([])
        for i, token in enumerate(completion):
            with torch.no_grad():
                logits = model(torch.tensor([context + completion[:i]]))[0][0, -1]
            probability = F.log_softmax(logits, 0)[token].item()
            found[-1].append((probability, logits.argmax().item() == token))
    return found


@pytest.fixture(scope="module")
def plain_hellaswag(taught):
    """For each example the log-probabilities of each ending's tokens."""
    found = []
    for line in hellaswag_lines():
        scores = plain_scores(*taught, line["ctx"], [" " + ending for ending in line["endings"]])
        found.append([[p for p, _ in ending] for ending in scores])
    return found


@pytest.fixture(scope="module")
def plain_lambada(taught):
    """For each example the nats of the last word, and whether it is guessed."""
    found = []
    for line in lambada_lines():
        context, word = line["text"].rsplit(" ", 1)
        (scores,) = plain_scores(*taught, context, [" " + word])
        found.append((-sum(p for p, _ in scores), all(greedy for _, greedy in scores)))
    return found


def options(**values):
    plain = {"batch_size": 8, "device": torch.device("cpu"), "autocast": contextlib.nullcontext()}
    return SimpleNamespace(**plain | values)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.mark.parametrize("batch_size", [1, 3, 8, 300])
def test_hellaswag_is_a_plain_loop_to_the_example(taught, plain_hellaswag, tmp_path, batch_size):
    path = write_lines(tmp_path / "h.jsonl", hellaswag_lines())
    asked = options(file=path, batch_size=batch_size)
    examples = evaluate.read_examples(path, evaluate.parse_hellaswag)
    scored = evaluate.score_completions(*taught, examples, asked)
    found = [found.nats for scores in scored for found in scores]
    expected = [-sum(ending) for endings in plain_hellaswag for ending in endings]
    assert np.allclose(found, expected, rtol=0, atol=1e-10)

    by_sum = [int(np.argmax([sum(e) for e in endings])) for endings in plain_hellaswag]
    by_mean = [int(np.argmax([np.mean(e) for e in endings])) for endings in plain_hellaswag]
    assert by_sum != by_mean and any(len(set(line["endings"])) < 4 for line in hellaswag_lines())
    assert [evaluate.choices(s) for s in scored] == list(zip(by_sum, by_mean, strict=True))
    labels = [line["label"] for line in hellaswag_lines()]
    result = evaluate.evaluate_hellaswag(*taught, asked)
    assert result["examples"] == 50
    assert result["acc"] == np.mean(np.equal(by_sum, labels))
    assert result["acc_norm"] == np.mean(np.equal(by_mean, labels))


def test_choices_take_the_first_of_equals():
    scores = [Score(4.0, 2, False), Score(4.0, 2, False), Score(5.0, 3, False)]
    assert evaluate.choices(scores) == (0, 2)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 300])
def test_lambada_is_a_plain_loop_to_the_example(taught, plain_lambada, tmp_path, batch_size):
    path = write_lines(tmp_path / "l.jsonl", lambada_lines())
    asked = options(file=path, batch_size=batch_size)
    examples = evaluate.read_examples(path, evaluate.parse_lambada)
    scored = [found for (found,) in evaluate.score_completions(*taught, examples, asked)]
    nats, right = zip(*plain_lambada, strict=True)
    assert 5 < sum(right) < 45
    assert [found.greedy for found in scored] == list(right)
    assert np.allclose([found.nats for found in scored], nats, rtol=0, atol=1e-10)
    result = evaluate.evaluate_lambada(*taught, asked)
    assert result["examples"] == 50 and result["acc"] == sum(right) / 50
    assert math.isclose(result["perplexity"], math.exp(sum(nats) / 50), rel_tol=1e-10)


def test_lambada_reads_plain_text_too(taught, tmp_path):
    path = tmp_path / "l.txt"
    path.write_text("\n\n".join(line["text"] + "  " for line in lambada_lines()), "utf-8")
    lines = write_lines(tmp_path / "l.jsonl", lambada_lines())
    plain = evaluate.evaluate_lambada(*taught, options(file=path))
    assert plain | {"file": ""} == evaluate.evaluate_lambada(*taught, options(file=lines)) | {
        "file": ""
    }


def test_contexts_that_are_too_long_are_cropped_and_counted(taught, capsys):
    long, room = " ".join(WORDS * 3), "the quick"
    said = "warning: 1 of 2 contexts cropped to fit block_size 24"
    for context, line in ((long, said), (room, "")):
        examples = [(context, [" fox", " brown fox jumps"]), ("the", [" fox"])]
        scored = evaluate.score_completions(*taught, examples, options())
        assert capsys.readouterr().err.strip() == line
        for example, scores in zip(examples, scored, strict=True):
            for plain, found in zip(plain_scores(*taught, *example), scores, strict=True):
                assert math.isclose(found.nats, -sum(p for p, _ in plain), rel_tol=1e-10)
                assert found.tokens == len(plain)


def test_an_ending_longer_than_the_model_sees_is_refused(taught):
    with pytest.raises(ValueError, match=r"example 2: \d+ tokens .* block_size 24"):
        examples = [("the", [" fox"]), ("the", [" fox", " " + " ".join(WORDS * 3)])]
        evaluate.score_completions(*taught, examples, options())


GOOD = '{"ctx": "to", "endings": ["be", "not"], "label": 1}\n'


@pytest.mark.parametrize(
    "task, content, words",
    [
        ("hellaswag", "", "no examples"),
        ("hellaswag", GOOD + "\nto be\n", "line 3: not JSON"),
        ("hellaswag", GOOD + "[1]\n", "line 2: no field 'ctx'"),
        ("hellaswag", '{"ctx": "to", "endings": ["be"]}', "line 1: no field 'label'"),
        ("hellaswag", '{"ctx": "", "endings": ["be"], "label": 0}', "line 1: 'ctx'"),
        ("hellaswag", '{"ctx": "to", "endings": "be", "label": 0}', "line 1: 'endings'"),
        ("hellaswag", '{"ctx": "to", "endings": [2], "label": 0}', "line 1: 'endings'"),
        ("hellaswag", '{"ctx": "to", "endings": ["be"], "label": 1}', "'label' is 1, not one of 1"),
        ("hellaswag", '{"ctx": "to", "endings": ["be"], "label": -1}', "'label' is -1"),
        ("hellaswag", '{"ctx": "to", "endings": ["be"], "label": "0"}', "'label' is '0'"),
        ("hellaswag", '{"ctx": "to", "endings": ["\u00e9"], "label": 0}', "U+00E9"),
        ("hellaswag", '"' + "[" * 100_000, "line 1: not JSON"),
        ("lambada", "[" * 100_000, "line 1: "),
        ("lambada", '{"passage": "to be"}', "line 1: no field 'text'"),
        ("lambada", '{"text": 7}', "line 1: 'text'"),
        ("lambada", '{"text": "to be"}\n{"text": " be "}', "line 2: fewer than two words"),
        ("lambada", b'{"text": "to \xff"}', "not UTF-8"),
    ],
)
def test_bad_examples_are_one_line_with_their_number(
    trained, tmp_path, capsys, task, content, words
):
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "examples.jsonl").write_bytes(raw)
    assert cli("--task", task, "--file", "examples.jsonl") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and words in err


def test_several_tasks_print_one_object_a_line(trained, tmp_path, capsys):
    (tmp_path / "h.jsonl").write_text(GOOD, "utf-8")
    assert cli("--task", "val", "hellaswag", "--file", "h.jsonl", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["task"] == "val" and second["task"] == "hellaswag" and second["examples"] == 1


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("count", [1, 4, 5, 7, 12, 13])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_rows_and_call_the_model_equally_often(count, world_size, monkeypatch):
    """Each process in turn, in this one: what it adds is kept for those that come after it."""
    model, calls, gathered, losses = tiny_model(20).double().eval(), [], [], []
    rng = random.Random(count)
    rows = [([rng.randrange(20) for _ in range(rng.randint(2, T))], 1) for _ in range(count)]
    tokens = np.array([rng.randrange(20) for _ in range(count * T + 1)])

    def both():
        calls.clear()
        scores = evaluate.score(model, rows, 2, "cpu", contextlib.nullcontext())
        for_rows = len(calls)
        return scores, mean_loss(model, tokens, T, 2, "cpu"), (for_rows, len(calls) - for_rows)

    model.register_forward_hook(lambda *_: calls.append(1))
    scores, loss, _ = both()
    monkeypatch.setattr(evaluate, "world_size", lambda: world_size)
    monkeypatch.setattr(evaluate, "gather_from_processes", lambda x: gathered.extend(x) or gathered)
    monkeypatch.setattr(evaluate, "sum_over_processes", lambda x: losses.append(x) or sum(losses))
    called = set()
    for rank in range(world_size):
        monkeypatch.setattr(evaluate, "rank", lambda rank=rank: rank)
        shared_scores, shared_loss, calls_of_rank = both()
        called.add(calls_of_rank)
    assert len(called) == 1
    assert shared_scores == scores
    assert math.isclose(shared_loss, loss, rel_tol=1e-12)


def in_two_processes(*flags):
    """stdout and stderr of evaluate.py as torchrun would start it twice."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(ROOT / "evaluate.py"), "--device", "cpu", "--dtype", "float64"]
    started = [
        subprocess.Popen(
            [*command, *flags],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        return [(*process.communicate(timeout=100), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


def test_two_processes_get_what_one_gets(trained, tmp_path, capsys):
    endings = ["be", "or not", "that is"]
    lines = [{"ctx": TEXT[: i + 2], "endings": endings, "label": i % 3} for i in range(11)]
    write_lines(tmp_path / "h.jsonl", lines)
    flags = ["--task", "val", "hellaswag", "--file", "h.jsonl", "--json", "--batch_size", "4"]
    assert cli(*flags) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (out, err, code), (second_out, second_err, second_code) = in_two_processes(*flags)
    assert (code, second_code) == (0, 0), err + second_err
    assert second_out == "" and "error" not in second_err
    together = [json.loads(line) for line in out.splitlines()]
    assert math.isclose(alone[0].pop("loss"), together[0].pop("loss"), rel_tol=1e-12)
    for name in ("perplexity", "bits_per_byte"):
        assert math.isclose(alone[0].pop(name), together[0].pop(name), rel_tol=1e-9)
    assert alone == together


# ---------------------------------------------------------------- the download

LINES = (GOOD * 40).encode()


@pytest.fixture
def published(trained, monkeypatch, only_this_machine):
    """Say where HellaSwag is."""
    digest = hashlib.sha256(LINES).hexdigest()
    return lambda address: monkeypatch.setitem(evaluate.DOWNLOADS, "hellaswag", (address, digest))


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


@pytest.mark.parametrize(
    "answer, problem",
    [
        ({"body": LINES[:1000], "length": len(LINES)}, "1,000 of 2,080 bytes"),
        ({"body": b"<html>please log in</html>"}, "26 bytes with a wrong sha256"),
        ({"status": 404, "body": b"no"}, "404"),
        (None, "refused"),
    ],
    ids=["cut short", "another file", "404", "refused"],
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing(
    published, tmp_path, capsys, answer, problem
):
    with server("data/hellaswag_val.jsonl", **{"body": LINES, **(answer or {})}) as (address, _):
        published(address if answer else "http://127.0.0.1:9/hellaswag_val.jsonl")
        assert cli("--task", "hellaswag") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "hellaswag_val.jsonl: " in line and problem in line and "--file" in line
    assert not (tmp_path / "data/hellaswag").exists()


def test_a_folder_that_cannot_be_made_for_the_download_is_exit_4(published, tmp_path, capsys):
    (tmp_path / "data").rename(tmp_path / "sets")
    (tmp_path / "data").write_text("a file")
    with server("data/hellaswag_val.jsonl", LINES) as (address, _):
        published(address)
        assert cli("--task", "hellaswag") == 4
    assert "data" in capsys.readouterr().err and (tmp_path / "data").read_text() == "a file"


def test_a_disk_that_refuses_the_download_is_exit_4(published, monkeypatch, tmp_path, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with server("data/hellaswag_val.jsonl", LINES) as (address, _):
        published(address)
        assert cli("--task", "hellaswag") == 4
    assert "No space left" in capsys.readouterr().err
    assert list((tmp_path / "data/hellaswag").iterdir()) == []
