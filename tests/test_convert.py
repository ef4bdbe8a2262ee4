"""nanoGPT's checkpoints; models by name."""

import os
from collections import OrderedDict

import pytest
import torch
from conftest import TEXT
from test_huggingface import cli, load_double, ours, random_weights, theirs

import checkpoint
from checkpoint import CheckpointError
from config import GPT2Config
from convert import load_model, to_gguf, to_hf
from model import GPT2
from tokenizer import SYMBOLS, BPETokenizer, CharTokenizer, GPT2Tokenizer

# ---------------------------------------------------------------- nanoGPT

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 30}


def nanogpt(folder, prefix="", **changes):
    """A ckpt.pt as nanoGPT's train.py saves it, of random weights; its model, of the same names."""
    args = SIZES | {"bias": True, "dropout": 0.0} | changes
    model = random_weights(GPT2(GPT2Config(**args, gelu="exact")))
    state = {"model": OrderedDict((prefix + k, w) for k, w in model.state_dict().items())}
    state |= {"optimizer": {"state": {0: {"step": torch.tensor(20.0)}}}, "model_args": args}
    state |= {"iter_num": 20, "best_val_loss": torch.tensor(3.1), "config": {"out_dir": "out"}}
    torch.save(state, folder / "ckpt.pt")
    return model


def from_nanogpt(folder, *flags):
    return cli("from_nanogpt", folder / "ckpt.pt", folder / "out.pt", *flags)


@pytest.mark.parametrize("bias, prefix", [(True, ""), (False, "_orig_mod.")])
def test_a_nanogpt_checkpoint_gives_the_same_logits(tmp_path, bias, prefix):
    theirs = nanogpt(tmp_path, prefix, bias=bias)
    CharTokenizer.train("".join(map(chr, range(65, 95)))).save(tmp_path / "tokenizer.json")
    assert from_nanogpt(tmp_path, "--tokenizer", tmp_path / "tokenizer.json") == 0
    model, tokenizer = load_model(tmp_path / "out.pt", "cpu", "float32")
    idx = torch.randint(30, (2, 16))
    assert torch.equal(model(idx)[0], theirs(idx)[0]) and tokenizer.kind == "char"


def test_a_nanogpt_vocabulary_that_is_padded_is_trimmed(tmp_path, gpt2_vocabulary):
    theirs = nanogpt(tmp_path, vocab_size=50304)
    assert from_nanogpt(tmp_path) == 0
    model, tokenizer = load_model(tmp_path / "out.pt", "cpu", "float32")
    idx = torch.randint(50257, (1, 16))
    assert (model(idx)[0] - theirs(idx)[0][..., :50257]).abs().max() <= 1e-5
    assert tokenizer.kind == "gpt2" and model.config.vocab_size == 50257
    wte = checkpoint.load(tmp_path / "out.pt")["model"]["transformer.wte.weight"]
    assert wte.untyped_storage().nbytes() == 50257 * 24 * 4  # the padding is not in the file


def test_a_nanogpt_checkpoint_without_a_tokenizer_or_with_a_wrong_one(tmp_path, capsys):
    nanogpt(tmp_path)
    CharTokenizer.train("abc").save(tmp_path / "tokenizer.json")
    assert from_nanogpt(tmp_path, "--tokenizer", tmp_path / "tokenizer.json") == 3
    assert "its tokenizer cannot be used: it has 3 tokens, not 30" in capsys.readouterr().err
    assert from_nanogpt(tmp_path, "--gelu", "tanh") == 0
    assert "no tokenizer (30 tokens)" in capsys.readouterr().err
    assert load_double(tmp_path / "out.pt").config.gelu == "tanh"


HOSTILE = {  # what is said: what is changed
    "model.lm_head.weight": {"model": {"lm_head.weight": 3}},
    "n_head None": {"model_args": {"n_head": None}},
    "model: must be a valid dictionary": {"model": 3},
}


@pytest.mark.parametrize("said", HOSTILE)
def test_a_hostile_nanogpt_file_is_refused_by_name(tmp_path, capsys, said):
    nanogpt(tmp_path)
    found, [(key, value)] = torch.load(tmp_path / "ckpt.pt"), HOSTILE[said].items()
    found[key] = found[key] | value if isinstance(value, dict) else value
    torch.save(found, tmp_path / "ckpt.pt")
    assert from_nanogpt(tmp_path) in (2, 3) and not (tmp_path / "out.pt").exists()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


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


@pytest.mark.parametrize("bias, gelu", [(True, "tanh"), (False, "exact")])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_gguf_has_every_tensor_of_the_model(tmp_path, kind, bias, gelu, capsys):
    path = ours(tmp_path / "ours.pt", BPETokenizer.train(MIXED, 400), bias=bias, gelu=gelu)
    assert cli("to_gguf", path, tmp_path / "new" / "out.gguf", "--type", kind) == 0
    assert ("differs by 0.0005 at most" in capsys.readouterr().err) == (gelu == "exact")
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
        path, eot = tmp_path / f"{tokenizer.kind}.gguf", tokenizer.eot_id
        to_gguf(ours(tmp_path / f"{tokenizer.kind}.pt", tokenizer), path)
        fields, _ = read_gguf(path)
        expected = {"model": "gpt2", "pre": "gpt-2", "eos_token_id": eot, "bos_token_id": eot}
        expected |= {"tokens": [*tokenizer.tokens, "<|endoftext|>"], "token_type": [1] * eot + [3]}
        expected["merges"] = [" ".join(pair) for pair in tokenizer.merges()]
        assert {name: fields[f"tokenizer.ggml.{name}"] for name in expected} == expected
        assert fields["gpt2.vocab_size"] == tokenizer.vocab_size


NO_END = BPETokenizer(SYMBOLS, {"<s>": 0}, None)
REFUSED = [  # what is said, tokenizer, settings, command and flags
    ("llama.cpp needs a bpe or gpt2 tok", CharTokenizer.train("ab"), {}, "to_gguf"),
    ("with an end of text", NO_END, {}, "to_gguf"),
    ("take --type f16", BPETokenizer(SYMBOLS), {"n_embd": 24}, "to_gguf --type q8_0"),
    ("--gelu: for from_nanogpt only", BPETokenizer(SYMBOLS), {}, "to_gguf --gelu tanh"),
    ("position rope: ", BPETokenizer(SYMBOLS), {"position": "rope"}, "to_gguf"),
    ("position alibi: ", BPETokenizer(SYMBOLS), {"position": "alibi"}, "to_hf"),
]


@pytest.mark.parametrize("said, tokenizer, settings, words", REFUSED)
def test_bad_input_for_an_export_is_one_line(tmp_path, capsys, said, tokenizer, settings, words):
    path, (command, *flags) = ours(tmp_path / "ours.pt", tokenizer, **settings), words.split()
    capsys.readouterr()
    assert cli(command, path, tmp_path / "out", *flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and os.listdir(tmp_path) == ["ours.pt"]


def test_a_gguf_that_reads_back_otherwise_is_not_written(tmp_path, monkeypatch, capsys):
    gguf = pytest.importorskip("gguf")
    path, close = ours(tmp_path / "ours.pt", BPETokenizer(SYMBOLS)), gguf.GGUFWriter.close

    def flip(writer):
        close(writer)
        content = writer.path.read_bytes()
        writer.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(gguf.GGUFWriter, "close", flip)
    assert cli("to_gguf", path, tmp_path / "out.gguf") == 4
    assert "what was read back is not what was written" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["ours.pt"]


def test_the_card_says_what_the_model_was_trained_on(tmp_path):
    path = ours(tmp_path / "ours.pt", CharTokenizer.train("abc"))
    state = checkpoint.load(path) | {"step": 1200, "best_val_loss": 1.5}
    state["config"]["data_dir"] = "/home/me/data/poems"
    checkpoint.save(path, state)
    to_hf(path, tmp_path / "poet")
    card = (tmp_path / "poet" / "README.md").read_text("utf-8")
    assert all(part in card for part in ("# poet", "1,200 steps on `poems`", "loss 1.5000 nats"))
    assert "/home/me" not in card


def test_a_path_that_exists_wins_over_a_name_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs(vocab_size=77).save_pretrained("gpt2")
    assert load_double("gpt2").config.vocab_size == 77
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(checkpoint, "download_model", lambda repo: pytest.fail("no path was meant"))
    for name in ("checkpoints/none", "org/none.pt", "./org/none", "none"):
        with pytest.raises(CheckpointError, match="no file or folder"):
            load_model(name)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model("checkpoints")
