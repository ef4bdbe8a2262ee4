"""nanoGPT's checkpoints; models by name."""

import os
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT, TEXT
from test_checkpoint import Canary, damage
from test_huggingface import cli, load_double, ours, random_weights, theirs

import checkpoint
from checkpoint import CheckpointError
from config import GPT2Config
from convert import load_model, to_gguf, to_hf
from model import GPT2
from tokenizer import SYMBOLS, BPETokenizer, CharTokenizer, GPT2Tokenizer

# ---------------------------------------------------------------- nanoGPT

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 30}


def nanogpt(path, bias=True, prefix="", **sizes):
    """A ckpt.pt as nanoGPT's train.py saves it, of random weights; its model, of the same names."""
    args = SIZES | sizes | {"bias": bias, "dropout": 0.0}
    model = random_weights(GPT2(GPT2Config(**args, gelu="exact")))
    state = {"model": OrderedDict((prefix + k, w) for k, w in model.state_dict().items())}
    state |= {"optimizer": {"state": {0: {"step": torch.tensor(20.0)}}}, "model_args": args}
    state |= {"iter_num": 20, "best_val_loss": torch.tensor(3.1), "config": {"out_dir": "out"}}
    torch.save(state, path)
    return model


@pytest.fixture
def from_nanogpt(tmp_path, capsys):
    """Call from_nanogpt for ckpt.pt; its exit code and what it says."""

    def call(*flags):
        code = cli("from_nanogpt", tmp_path / "ckpt.pt", tmp_path / "out.pt", *flags)
        assert (code == 0) == (tmp_path / "out.pt").exists()
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("bias, prefix", [(True, ""), (False, "_orig_mod.")])
def test_a_nanogpt_checkpoint_gives_the_same_logits(tmp_path, from_nanogpt, bias, prefix):
    theirs = nanogpt(tmp_path / "ckpt.pt", bias, prefix)
    CharTokenizer.train("".join(map(chr, range(65, 95)))).save(tmp_path / "tokenizer.json")
    code, said = from_nanogpt("--tokenizer", tmp_path / "tokenizer.json")
    assert code == 0 and "optimizer" in said
    model, tokenizer = load_model(tmp_path / "out.pt", "cpu", "float32")
    idx = torch.randint(30, (2, 16))
    assert torch.equal(model(idx)[0], theirs(idx)[0]) and tokenizer.kind == "char"
    assert checkpoint.load(tmp_path / "out.pt")["optimizer"] == {}


def test_a_nanogpt_vocabulary_that_is_padded_is_trimmed(tmp_path, from_nanogpt, gpt2_vocabulary):
    theirs = nanogpt(tmp_path / "ckpt.pt", vocab_size=50304)
    code, said = from_nanogpt()
    assert code == 0 and "from 50,304 to 50,257" in said
    model, tokenizer = load_model(tmp_path / "out.pt", "cpu", "float32")
    idx = torch.randint(50257, (1, 16))
    assert (model(idx)[0] - theirs(idx)[0][..., :50257]).abs().max() <= 1e-5
    assert tokenizer.kind == "gpt2" and model.config.vocab_size == 50257
    wte = checkpoint.load(tmp_path / "out.pt")["model"]["transformer.wte.weight"]
    assert wte.untyped_storage().nbytes() == 50257 * 24 * 4  # the padding is not in the file


def test_a_nanogpt_checkpoint_without_a_tokenizer_or_with_a_wrong_one(tmp_path, from_nanogpt):
    nanogpt(tmp_path / "ckpt.pt")
    CharTokenizer.train("abc").save(tmp_path / "tokenizer.json")
    code, said = from_nanogpt("--tokenizer", tmp_path / "tokenizer.json")
    assert code == 3 and "it has 3 tokens, the model 30" in said
    code, said = from_nanogpt("--gelu", "tanh")
    assert code == 0 and "no tokenizer (30 tokens)" in said
    assert load_double(tmp_path / "out.pt").config.gelu == "tanh"


@pytest.mark.parametrize(
    "change, code, said",
    [
        ({"model": {"lm_head.weight": 3}}, 2, "lm_head.weight"),
        ({"model": {"lm_head.weight": torch.eye(3)}}, 2, "lm_head.weight"),
        ({"model_args": {"n_layer": 10**9}}, 2, "n_layer 1000000000"),
        ({"model_args": {"n_head": None}}, 2, "n_head None"),
        ({"model": 3}, 3, "model: must be a valid dictionary"),
        ({"config": "a canary"}, 3, "might run code"),
        (None, 3, "not usable"),
    ],
)
def test_a_hostile_nanogpt_file_is_refused_by_name(tmp_path, from_nanogpt, change, code, said):
    path, canary = tmp_path / "ckpt.pt", tmp_path / "canary"
    nanogpt(path)
    if change is None:
        damage(path)
    else:
        found = torch.load(path, weights_only=True)
        for key, value in change.items():
            found[key] = found[key] | value if isinstance(value, dict) else value
        if "config" in change:
            found["config"] = Canary(canary)
        torch.save(found, path)
    exit_code, err = from_nanogpt()
    assert exit_code == code and said in err and err.count("error: ") == 1
    assert not canary.exists()


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
        assert types == [1] * eos + [3] and tokens == [*tokenizer.tokens, "<|endoftext|>"]
        assert merges == [" ".join(pair) for pair in tokenizer.merges()]


NO_END = BPETokenizer(SYMBOLS, {"<s>": 0}, None)
REFUSED = [  # what is said, tokenizer, settings, command and flags
    ("llama.cpp needs a bpe or gpt2 tok", CharTokenizer.train("ab"), {}, ["to_gguf"]),
    ("llama.cpp needs a bpe or gpt2 tok", None, {}, ["to_gguf"]),
    ("with an end of text", NO_END, {}, ["to_gguf"]),
    ("take --type f16", BPETokenizer(SYMBOLS), {"n_embd": 24}, ["to_gguf", "--type", "q8_0"]),
    ("--type q4", BPETokenizer(SYMBOLS), {}, ["to_gguf", "--type", "q4"]),
    ("--gelu: for from_nanogpt only", BPETokenizer(SYMBOLS), {}, ["to_gguf", "--gelu", "tanh"]),
    ("position 'rope'", BPETokenizer(SYMBOLS), {"position": "rope"}, ["to_gguf"]),
    ("position 'alibi'", BPETokenizer(SYMBOLS), {"position": "alibi"}, ["to_hf"]),
]


@pytest.mark.parametrize("said, tokenizer, settings, words", REFUSED)
def test_bad_input_for_an_export_is_one_line(tmp_path, capsys, said, tokenizer, settings, words):
    path = ours(tmp_path / "ours.pt", tokenizer, **settings)
    capsys.readouterr()
    command, *flags = words
    assert cli(command, path, tmp_path / "out", *flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and os.listdir(tmp_path) == ["ours.pt"]


def test_a_gguf_that_reads_back_otherwise_is_not_written(tmp_path, monkeypatch, capsys):
    gguf = pytest.importorskip("gguf")
    path, close = ours(tmp_path / "ours.pt", BPETokenizer(SYMBOLS)), gguf.GGUFWriter.close

    def flip(writer):
        close(writer)
        content = bytearray(writer.path.read_bytes())
        content[-1] ^= 1
        writer.path.write_bytes(content)

    monkeypatch.setattr(gguf.GGUFWriter, "close", flip)
    assert cli("to_gguf", path, tmp_path / "out.gguf") == 4
    assert "what was read back is not what was written" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["ours.pt"]


def test_exact_gelu_in_a_gguf_is_named(tmp_path, capsys):
    to_gguf(ours(tmp_path / "ours.pt", BPETokenizer(SYMBOLS), gelu="exact"), tmp_path / "out.gguf")
    assert "differs by 0.0005 at most" in capsys.readouterr().err


# ---------------------------------------------------------------- the card; docs/world.md


def test_the_card_says_what_the_model_was_trained_on(tmp_path):
    path = ours(tmp_path / "ours.pt", CharTokenizer.train("abc"))
    state = checkpoint.load(path)
    config = state["config"] | {"data_dir": "/home/me/data/poems"}
    checkpoint.save(path, state | {"step": 1200, "best_val_loss": 1.5, "config": config})
    to_hf(path, tmp_path / "poet")
    card = (tmp_path / "poet" / "README.md").read_text("utf-8")
    assert all(part in card for part in ("# poet", "1,200 steps on `poems`", "1.5000 nats"))
    assert "/home/me" not in card


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


def test_a_path_that_exists_wins_over_a_name_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs(vocab_size=77).save_pretrained("gpt2")
    assert load_model("gpt2", "cpu", need_tokenizer=False)[0].config.vocab_size == 77
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(checkpoint, "download_model", lambda repo: pytest.fail("no path was meant"))
    for name in ("checkpoints/none", "org/none.pt", "./org/none", "none"):
        with pytest.raises(CheckpointError, match="no file or folder"):
            load_model(name)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model("checkpoints")
