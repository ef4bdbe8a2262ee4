"""The loss against a slow plain loop, and what evaluate.py says and refuses."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import config as settings
import evaluate
from config import GPT2Config
from data import write_dataset
from evaluate import mean_loss
from model import GPT2
from tokenizer import CharTokenizer
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
    state = {
        "format": checkpoint.FORMAT,
        "step": 3,
        "best_val_loss": None,
        "model": model.state_dict(),
        "optimizer": {},
        "scaler": {},
        "rng": {},
        "config": settings.to_dict(model.config),
        "tokenizer": tokenizer.to_dict(),
        "data_hash": None,
        "run": None,
    }
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
    out = capsys.readouterr().out
    assert f"{plain_loss(model, val):.4f} nats" in out and "perplexity" in out and "bits" in out


def test_half_precision_evaluates_as_training_does(trained, capsys):
    model, val, _ = trained
    assert cli("--dtype", "bfloat16", "--json", "--batch_size", "4") == 0
    mixed = torch.autocast("cpu", torch.bfloat16)
    expected = mean_loss(model.float(), val, T, 4, "cpu", autocast=mixed)
    assert json.loads(capsys.readouterr().out)["loss"] == expected


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
