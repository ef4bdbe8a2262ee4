"""nanoGPT's checkpoints; models by name."""

import math
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from test_checkpoint import Canary, damage
from test_huggingface import cli, load_double, ours, random_weights, theirs

import checkpoint
from checkpoint import CheckpointError
from config import GPT2Config
from convert import load_model, to_hf
from model import GPT2
from tokenizer import CharTokenizer

# ---------------------------------------------------------------- nanoGPT

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 30}


def nanogpt(path, bias=True, prefix="", **sizes):
    """A ckpt.pt as nanoGPT's train.py saves it, of random weights; its model_args and weights."""
    args = SIZES | sizes | {"bias": bias, "dropout": 0.0}
    w = random_weights(GPT2(GPT2Config(**args))).state_dict()  # of the same names
    state = {
        "model": OrderedDict((prefix + name, tensor) for name, tensor in w.items()),
        "optimizer": {"state": {0: {"step": torch.tensor(20.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": args,
        "iter_num": 20,
        "best_val_loss": torch.tensor(3.1),
        "config": {"out_dir": "out", "dataset": "shakespeare_char"},
    }
    torch.save(state, path)
    return args, w


@pytest.fixture
def from_nanogpt(tmp_path, capsys):
    """Call from_nanogpt for ckpt.pt; its exit code and what it says."""

    def call(*flags):
        code = cli("from_nanogpt", tmp_path / "ckpt.pt", tmp_path / "out.pt", *flags)
        assert (code == 0) == (tmp_path / "out.pt").exists()
        return code, capsys.readouterr().err

    return call


def nanogpt_logits(args, w, idx):
    """nanoGPT's network written out: exact GELU, biases where there are any."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    (B, T), C, H = idx.shape, args["n_embd"], args["n_head"]
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for layer in range(args["n_layer"]):
        name = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").view(B, T, 3, H, C // H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(C // H)).masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(y, f"{name}.attn.c_proj")
        u = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        x = x + linear(u * 0.5 * (1 + torch.erf(u / math.sqrt(2))), f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_nanogpt_checkpoint_gives_the_same_logits(tmp_path, from_nanogpt, bias, prefix):
    args, w = nanogpt(tmp_path / "ckpt.pt", bias, prefix)
    CharTokenizer.train("".join(map(chr, range(65, 95)))).save(tmp_path / "tokenizer.json")
    code, said = from_nanogpt("--tokenizer", tmp_path / "tokenizer.json")
    assert code == 0 and "optimizer" in said
    model, tokenizer = load_model(tmp_path / "out.pt", "cpu", "float32")
    idx = torch.randint(30, (2, 16))
    with torch.no_grad():
        assert (model(idx)[0] - nanogpt_logits(args, w, idx)).abs().max() <= 1e-5
    assert tokenizer.kind == "char" and model.config.gelu == "exact"
    state = checkpoint.load(tmp_path / "out.pt")
    assert state["step"] == 0 and state["optimizer"] == {}


def test_a_nanogpt_vocabulary_that_is_padded_is_trimmed(tmp_path, from_nanogpt, gpt2_vocabulary):
    args, w = nanogpt(tmp_path / "ckpt.pt", vocab_size=50304)
    code, said = from_nanogpt()
    assert code == 0 and "from 50,304 to 50,257" in said
    model, tokenizer = load_model(tmp_path / "out.pt", "cpu", "float32")
    idx = torch.randint(50257, (1, 16))
    with torch.no_grad():
        logits = nanogpt_logits(args, w, idx)[..., :50257]
        assert (model(idx)[0] - logits).abs().max() <= 1e-5
    assert tokenizer.kind == "gpt2" and model.config.vocab_size == 50257
    wte = checkpoint.load(tmp_path / "out.pt")["model"]["transformer.wte.weight"]
    assert wte.untyped_storage().nbytes() == 50257 * 24 * 4  # the padding is not in the file


def test_a_nanogpt_checkpoint_without_a_tokenizer_or_with_a_wrong_one(tmp_path, from_nanogpt):
    nanogpt(tmp_path / "ckpt.pt")
    CharTokenizer.train("abc").save(tmp_path / "tokenizer.json")
    code, said = from_nanogpt("--tokenizer", tmp_path / "tokenizer.json")
    assert code == 2 and "the tokenizer has 3 tokens" in said
    code, said = from_nanogpt("--gelu", "tanh")
    assert code == 0 and "no tokenizer (30 tokens)" in said
    assert load_double(tmp_path / "out.pt").config.gelu == "tanh"


def head(value):
    return lambda found, canary: found["model"].update({"lm_head.weight": value})


@pytest.mark.parametrize(
    "edit, code, said",
    [
        (head(3), 2, "lm_head.weight"),
        (head(torch.eye(30, 24).to_sparse()), 2, "lm_head.weight"),
        (head(torch.empty(30, 24, device="meta")), 2, "lm_head.weight"),
        (head(torch.eye(3)), 2, "lm_head.weight"),
        (lambda found, canary: found["model_args"].update(n_layer=10**9), 2, "n_layer 1000000000"),
        (lambda found, canary: found["model_args"].pop("n_head"), 2, "n_head None"),
        (lambda found, canary: found.pop("model"), 3, "model: is missing"),
        (lambda found, canary: found.update(config=Canary(canary)), 3, "might run code"),
    ],
)
def test_a_hostile_nanogpt_file_is_refused_by_name(tmp_path, from_nanogpt, edit, code, said):
    path, canary = tmp_path / "ckpt.pt", tmp_path / "canary"
    nanogpt(path)
    found = torch.load(path, weights_only=True)
    edit(found, canary)
    torch.save(found, path)
    exit_code, err = from_nanogpt()
    assert exit_code == code and said in err and err.count("error: ") == 1
    assert not canary.exists()


def test_damage_to_a_nanogpt_file_is_found(tmp_path, from_nanogpt):
    nanogpt(tmp_path / "ckpt.pt")
    damage(tmp_path / "ckpt.pt")
    assert from_nanogpt()[0] == 3


# ---------------------------------------------------------------- loading by name


def test_load_model_draws_no_random_weights_and_keeps_the_head_tied(tmp_path):
    theirs().save_pretrained(tmp_path / "hf")
    before = torch.get_rng_state()
    model, _ = load_model(tmp_path / "hf", "cpu", "bfloat16", need_tokenizer=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training


def test_a_path_that_exists_wins_over_a_name_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs(vocab_size=77).save_pretrained("gpt2")
    assert load_model("gpt2", "cpu", need_tokenizer=False)[0].config.vocab_size == 77
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(checkpoint, "download_model", lambda repo: pytest.fail("no path was meant"))
    for name in ("checkpoints/none", "org/none.pt", "./org/none", "none"):
        with pytest.raises(CheckpointError, match="no such file"):
            load_model(name)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model("checkpoints")


def test_a_missing_package_is_exit_2_with_the_command(tmp_path, monkeypatch, capsys):
    theirs().save_pretrained(tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert cli("from_hf", tmp_path / "hf", tmp_path / "out.pt") == 2
    assert "pip install -r requirements-hub.txt" in capsys.readouterr().err


def test_weights_that_are_worse_than_guessing_are_warned_of(tmp_path, capsys):
    tokenizer = CharTokenizer.train(checkpoint.SANE_TEXT)
    path = ours(tmp_path / "wild.pt", tokenizer)  # random weights as large as these are wild
    to_hf(path, tmp_path / "wild")
    load_model(tmp_path / "wild", "cpu")
    assert "warning: that is worse than guessing" in capsys.readouterr().err
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, block_size=64, n_embd=32, n_head=2))
    loss = checkpoint.check_loss(model, tokenizer)
    assert loss == pytest.approx(math.log(tokenizer.vocab_size), abs=0.3)
    assert "warning" not in capsys.readouterr().err
    assert checkpoint.check_loss(model, CharTokenizer(["你"] * 1)) is None
