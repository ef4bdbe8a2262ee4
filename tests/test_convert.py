"""nanoGPT's checkpoints; models by name."""

import errno
import math
import os
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TEXT
from test_checkpoint import Canary, damage
from test_huggingface import cli, load_double, ours, random_weights, theirs
from tokenizers import models

import checkpoint
from checkpoint import CheckpointError
from config import GPT2Config
from convert import load_model, to_gguf, to_hf
from model import GPT2
from tokenizer import BYTE_OF, SYMBOL_OF, SYMBOLS, BPETokenizer, CharTokenizer, GPT2Tokenizer

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
        (head(torch.eye(30, 24).to_sparse()), 3, "more than plain data"),
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


# ---------------------------------------------------------------- GGUF

NAMES = {  # ours: llama.cpp's
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm", "transformer.h.": "blk.", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
MIXED = TEXT + "今天天气很好，我们去公园散步。" * 20


def read_gguf(path):
    """Its fields, and its tensors as float32."""
    gguf = pytest.importorskip("gguf")
    found = gguf.GGUFReader(path)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in found.tensors}
    return {name: field.contents() for name, field in found.fields.items()}, tensors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_gguf_has_every_tensor_of_the_model(tmp_path, kind, bias):
    path = ours(tmp_path / "ours.pt", BPETokenizer.train(MIXED, 400), bias=bias)
    assert cli("to_gguf", path, tmp_path / "new" / "out.gguf", "--type", kind) == 0
    fields, tensors = read_gguf(tmp_path / "new" / "out.gguf")
    for name, w in load_model(path, "cpu", "float32")[0].state_dict().items():
        for one, other in NAMES.items():
            name = name.replace(one, other)
        if name == "lm_head.weight":  # tied: llama.cpp takes token_embd
            continue
        found, step = torch.tensor(tensors.pop(name)), torch.zeros(())
        if w.ndim == 2 and name != "position_embd.weight":
            w = {"f16": w.half(), "bf16": w.bfloat16()}.get(kind, w).float()
            if kind == "q8_0":
                step = (w.unflatten(-1, (-1, 32)).abs().amax(-1) / 127).repeat_interleave(32, -1)
        assert found.shape == w.shape and ((found - w).abs() <= step).all(), name
    assert bias or len(tensors) == 13  # six in each block, and the last norm's
    assert all(name.endswith("bias") and not w.any() for name, w in tensors.items())
    sizes = ("context_length", 64), ("embedding_length", 32), ("block_count", 2)
    sizes += ("attention.head_count", 2), ("feed_forward_length", 128)
    assert all(fields[f"gpt2.{name}"] == size for name, size in sizes)


def test_a_gguf_has_the_tokenizer_in_its_order(tmp_path, gpt2_vocabulary):
    for tokenizer in BPETokenizer.train(MIXED, 400), GPT2Tokenizer():
        path = tmp_path / f"{tokenizer.kind}.gguf"
        to_gguf(ours(tmp_path / f"{tokenizer.kind}.pt", tokenizer), path)
        fields, _ = read_gguf(path)
        tokens, types, merges, eos, bos, kind, pre = [
            fields[f"tokenizer.ggml.{name}"]
            for name in "tokens token_type merges eos_token_id bos_token_id model pre".split()
        ]
        assert (kind, pre, eos, bos) == ("gpt2", "gpt-2", tokenizer.eot_id, tokenizer.eot_id)
        assert len(tokens) == len(types) == tokenizer.vocab_size == fields["gpt2.vocab_size"]
        assert types == [1] * eos + [3] and tokens[eos] == "<|endoftext|>"
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        made = models.BPE(ids, [tuple(pair.split(" ")) for pair in merges])
        for word in "Ġthe Ġquick jumps 天天 Ġé".split():
            word = "".join(SYMBOL_OF[byte] for byte in word.replace("Ġ", " ").encode())
            text = bytes(BYTE_OF[symbol] for symbol in word).decode()
            assert [token.id for token in made.tokenize(word)] == tokenizer.encode(text)


def huge(path):
    state = checkpoint.load(path)
    state["model"]["transformer.h.0.mlp.c_fc.weight"][0, 0] = 1e6
    checkpoint.save(path, state)


REFUSED = [  # tokenizer, settings, what is done to the checkpoint, flags, exit code, what is said
    (CharTokenizer.train("ab"), {}, None, (), 2, "a char tokenizer: llama.cpp needs bpe or gpt2"),
    (None, {}, None, (), 2, "no tokenizer: llama.cpp needs"),
    (BPETokenizer(SYMBOLS, {"<s>": 0}, None), {}, None, (), 2, "no end of text"),
    (BPETokenizer(SYMBOLS), {"n_embd": 24}, None, ("--type", "q8_0"), 2, "take --type f16"),
    (BPETokenizer(SYMBOLS), {}, huge, ("--type", "f16"), 2, "mlp.c_fc.weight has values beyond"),
    (BPETokenizer(SYMBOLS), {}, None, ("--type", "q4"), 2, "--type q4"),
    (BPETokenizer(SYMBOLS), {}, None, ("--gelu", "tanh"), 2, "--gelu: for from_nanogpt only"),
    (BPETokenizer(SYMBOLS), {}, damage, (), 3, "not usable"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[-1])
def test_bad_input_for_a_gguf_is_one_line_and_writes_nothing(tmp_path, capsys, case):
    tokenizer, settings, change, flags, code, said = case
    path = ours(tmp_path / "ours.pt", tokenizer, **settings)
    if change:
        change(path)
    capsys.readouterr()
    assert cli("to_gguf", path, tmp_path / "out.gguf", *flags) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and os.listdir(tmp_path) == ["ours.pt"]


def test_a_gguf_is_whole_or_absent_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    gguf, path = pytest.importorskip("gguf"), ours(tmp_path / "ours.pt", BPETokenizer(SYMBOLS))
    out, close = tmp_path / "out.gguf", gguf.GGUFWriter.close

    def full(writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flip(writer):
        close(writer)
        content = bytearray(writer.path.read_bytes())
        content[-1] ^= 1
        writer.path.write_bytes(content)

    for fault, said in ((full, "No space left"), (flip, "what was read back is not what was")):
        with monkeypatch.context() as patched:
            patched.setattr(gguf.GGUFWriter, "close", fault)
            assert cli("to_gguf", path, out) == 4
        assert said in capsys.readouterr().err and os.listdir(tmp_path) == ["ours.pt"]
    out.write_text("mine")
    assert cli("to_gguf", path, out) == 2 and "choose another name" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_exact_gelu_in_a_gguf_is_named_with_its_largest_difference(tmp_path, capsys):
    to_gguf(ours(tmp_path / "ours.pt", BPETokenizer(SYMBOLS), gelu="exact"), tmp_path / "out.gguf")
    assert "differs by 0.0005 at most" in capsys.readouterr().err
    x = torch.linspace(-10, 10, 200001, dtype=torch.float64)
    assert 0.0004 < (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() < 0.0005


# ---------------------------------------------------------------- the card; docs/world.md


def test_the_card_says_what_the_model_was_trained_on(tmp_path):
    path = ours(tmp_path / "ours.pt", CharTokenizer.train("abc"))
    state = checkpoint.load(path)
    config = state["config"] | {"data_dir": "/home/me/data/poems"}
    checkpoint.save(path, state | {"step": 1200, "best_val_loss": 1.5, "config": config})
    to_hf(path, tmp_path / "poet")
    card = (tmp_path / "poet" / "README.md").read_text("utf-8")
    for part in ("# poet", "1,200 steps on the data set `poems`", "1.5000 nats", '"n_embd": 32'):
        assert part in card
    assert "/home/me" not in card and '"learning_rate": 0.0006' in card


def numpy_example(folder):
    """The function from ids to logits (T, V) of the page's example, for a folder."""
    blocks = (ROOT / "docs" / "world.md").read_text("utf-8").split("```python\n")
    [block] = [block.split("```")[0] for block in blocks if "import load_file" in block]
    space = {}
    exec(block.split("\ntokenizer = ")[0].replace("my-model", str(folder)), space)
    return space["logits"]


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_numpy_alone_gives_the_same_logits(tmp_path, gelu):
    path = ours(tmp_path / "ours.pt", CharTokenizer.train("abc"), gelu=gelu)
    to_hf(path, tmp_path / "hf")
    ids = [0, 2, 1, 1, 2, 0]
    with torch.no_grad():
        logits = load_double(path)(torch.tensor([ids]))[0][0].numpy()
    assert abs(numpy_example(tmp_path / "hf")(ids) - logits).max() <= 1e-4


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
