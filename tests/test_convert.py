"""Models in and out: the same numbers and the same text there and here, and refusals by name."""

import errno
import hashlib
import http.server
import json
import math
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT

import checkpoint
import convert
from checkpoint import CheckpointError
from config import GPT2Config
from convert import load_model, load_state, main, new_state, to_hf
from generate import Sampling, generate_ids, sample_text
from model import GPT2, context_start
from tokenizer import SYMBOLS, BPETokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from utils import run

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
CHINESE = "今天天气很好，我们去公园散步。" * 20


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cli(*arguments):
    return run(main, [str(argument) for argument in arguments])


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def random_weights(model):
    """Far from the start, where all logits are near zero and biases are nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim == 2 else 0.1))
            parameter.add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def theirs(dtype="float32", **fields):
    sizes = {"vocab_size": 100, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
    fields = sizes | {"bos_token_id": None, "eos_token_id": None} | fields
    model = random_weights(transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)))
    return model.to(getattr(torch, dtype))


def ours(path, tokenizer=None, **values):
    """A checkpoint of a random model."""
    sizes = {"vocab_size": 100, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32} | values
    if tokenizer is not None:
        sizes["vocab_size"] = tokenizer.vocab_size
    model = random_weights(GPT2(GPT2Config(**sizes)))
    checkpoint.save(path, new_state(model.config, model.state_dict(), tokenizer))
    return path


def change(folder, name="config.json", **fields):
    path = Path(folder) / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def load_double(folder):
    return load_model(folder, "cpu", "float64", need_tokenizer=False)[0]


def from_pretrained(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def difference(one, other):
    """The largest difference between the logits of our model and of theirs."""
    T = min(one.config.block_size, 40)
    idx = torch.randint(one.config.vocab_size, (2, T))
    return (one(idx)[0] - other(idx).logits).abs().max().item()


# ---------------------------------------------------------------- Hugging Face's models

POSITIONS = [8, 9, 16, 31, 64, 100, 128, 200, 256, 512, 1024]
VOCABULARIES = [100, 257, 1000, 5000, 20000, 50256, 50257]


def greedy_theirs(model, prompt, steps=50):
    """Token by token, without a cache; past n_positions by our rule of what is still seen."""
    ids = list(prompt)
    for _ in range(steps):
        seen = ids[context_start(len(ids), model.config.n_positions) :]
        with torch.no_grad():
            ids.append(model(torch.tensor([seen])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("seed", range(20))
def test_a_random_hugging_face_gpt2_comes_in_and_goes_out_unchanged(tmp_path, request, seed):
    torch.manual_seed(seed)
    n_head, vocab_size = 1 + seed % 12, VOCABULARIES[seed % len(VOCABULARIES)]
    n_positions, n_embd = POSITIONS[seed % len(POSITIONS)], n_head * (2 + seed % 3)
    if vocab_size == 50257:  # for which a folder without a tokenizer gets GPT-2's
        request.getfixturevalue("gpt2_vocabulary")
    sizes = {"n_head": n_head, "n_embd": n_embd, "n_layer": 1 + seed % 4}
    sizes |= {"n_positions": n_positions, "vocab_size": vocab_size}
    model = theirs(("float32", "bfloat16", "float16")[seed % 3], **sizes)
    model.save_pretrained(tmp_path / "hf")

    assert cli("from_hf", tmp_path / "hf", tmp_path / "ours.pt") == 0
    mine, model = load_double(tmp_path / "ours.pt"), model.double()
    assert difference(mine, model) <= 1e-10
    prompt = torch.randint(vocab_size, (5,)).tolist()
    text = greedy_theirs(model, prompt)
    greedy = Sampling(max_new_tokens=50, temperature=0)
    assert [new for [new] in generate_ids(mine, [prompt], greedy)] == text
    if n_positions >= 55:
        inputs = {"inputs": torch.tensor([prompt]), "attention_mask": torch.ones(1, 5)}
        assert model.generate(**inputs, max_new_tokens=50, do_sample=False)[0, 5:].tolist() == text

    assert cli("to_hf", tmp_path / "ours.pt", tmp_path / "back") == 0
    before = safetensors.load_file(tmp_path / "hf" / "model.safetensors")
    after = safetensors.load_file(tmp_path / "back" / "model.safetensors")
    assert list(before) == list(after)
    assert all(
        before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before
    )
    assert difference(mine, from_pretrained(tmp_path / "back")) <= 1e-10


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("bias", [True, False])
def test_our_model_is_the_same_in_transformers_and_back(tmp_path, bias, gelu):
    path = ours(tmp_path / "ours.pt", bias=bias, gelu=gelu)
    to_hf(path, tmp_path / "hf")
    mine, model = load_double(path), from_pretrained(tmp_path / "hf")
    assert difference(mine, model) <= 1e-10
    assert difference(load_double(tmp_path / "hf"), model) <= 1e-10
    model.save_pretrained(tmp_path / "theirs")
    written = [
        set(safetensors.load_file(tmp_path / folder / "model.safetensors"))
        for folder in ("hf", "theirs")
    ]
    assert written[0] == written[1]


def test_older_names_and_mask_buffers_and_shards_are_read(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert difference(load_double(tmp_path / "sharded"), model.double()) <= 1e-10
    # as openai-community's files are: no prefix, and the causal masks among the weights
    model.float().save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    found = safetensors.load_file(path)
    found = {key.removeprefix("transformer."): tensor for key, tensor in found.items()}
    found["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    found["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.save_file(found, path)
    assert difference(load_double(tmp_path / "old"), model.double()) <= 1e-10


def test_bad_input_of_a_config_is_named_all_at_once(tmp_path, capsys):
    theirs().save_pretrained(tmp_path / "hf")
    change(
        tmp_path / "hf",
        model_type="gpt_neo",
        activation_function="relu",
        n_inner=7,
        layer_norm_epsilon=1e-6,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
        n_head=5,
    )
    assert cli("from_hf", tmp_path / "hf", tmp_path / "out.pt") == 2
    lines = errors(capsys)
    assert len(lines) == 8
    for part in (
        "model_type 'gpt_neo', only 'gpt2'",
        "activation_function 'relu', only gelu_new, gelu_pytorch_tanh, gelu",
        "n_inner 7, only 4 x n_embd",
        "layer_norm_epsilon 1e-06, only 1e-05",
        "scale_attn_weights False",
        "scale_attn_by_inverse_layer_idx True",
        "tie_word_embeddings False",
        "n_embd 24: not divisible by",
    ):
        assert sum(part in line for line in lines) == 1, part
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ("[" * 100_000, "not JSON"),
        ('{"n_embd": {"a": 1}, "n_inner": 96}', "n_inner 96, only 4 x n_embd"),
        ('{"n_embd": "24", "n_inner": 96}', "n_embd '24': must be a whole number"),
    ],
    ids=["deep", "dict", "text"],
)
def test_a_config_of_any_json_is_refused_by_name(tmp_path, capsys, content, said):
    (tmp_path / "config.json").write_text(content)
    assert cli("from_hf", tmp_path, tmp_path / "out.pt") == 2
    assert said in capsys.readouterr().err


def test_sizes_under_the_names_that_other_models_have_are_read_as_transformers_does(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    fields = json.loads(path.read_text())
    fields["num_attention_heads"] = fields.pop("n_head")  # the default, 12, divides n_embd too
    fields["max_position_embeddings"] = fields.pop("n_positions")
    path.write_text(json.dumps(fields))
    assert difference(load_double(tmp_path / "hf"), from_pretrained(tmp_path / "hf")) <= 1e-10


def test_a_tensor_that_is_there_twice_is_refused(tmp_path, capsys):
    theirs().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    found = safetensors.load_file(path)
    found["wte.weight"] = found["transformer.wte.weight"] + 1
    safetensors.save_file(found, path)
    assert cli("from_hf", tmp_path / "hf", tmp_path / "out.pt") == 2
    assert "model.safetensors has transformer.wte.weight again" in capsys.readouterr().err


def test_what_only_rounds_or_says_the_same_is_taken(tmp_path):
    theirs(reorder_and_upcast_attn=True, n_inner=96).save_pretrained(tmp_path / "hf")
    assert load_double(tmp_path / "hf").config.n_embd == 24


def test_bad_input_among_the_tensors_is_named_all_at_once(tmp_path, capsys):
    theirs().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    found = safetensors.load_file(path)
    del found["transformer.h.0.ln_1.bias"]
    found["score.weight"] = torch.zeros(2, 24)
    found["transformer.h.1.attn.c_attn.weight"] = torch.zeros(24, 71)
    found["transformer.wpe.weight"][3, 3] = math.nan
    safetensors.save_file(found, path)
    assert cli("from_hf", tmp_path / "hf", tmp_path / "out.pt") == 2
    lines = "\n".join(sorted(errors(capsys)))
    assert lines.count("\n") == 3
    assert "no tensor transformer.h.0.ln_1.bias" in lines and "score.weight is no part" in lines
    assert "c_attn.weight is (24, 71), the config makes it (24, 72)" in lines
    assert "transformer.wpe.weight has values that are not finite" in lines


def test_an_untied_head_is_refused_and_a_tied_copy_is_taken(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    found = safetensors.load_file(path)
    found["lm_head.weight"] = found["transformer.wte.weight"].clone()
    safetensors.save_file(found, path)
    assert difference(load_double(tmp_path / "hf"), model.double()) <= 1e-10
    found["lm_head.weight"][0, 0] += 1
    safetensors.save_file(found, path)
    with pytest.raises(ValueError, match="the head is not tied"):
        load_state(tmp_path / "hf")


def test_no_pickle_is_opened_and_no_index_leads_outside(tmp_path, capsys):
    folder = tmp_path / "hf"
    theirs().save_pretrained(folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert cli("from_hf", folder, tmp_path / "out.pt") == 2
    assert "model.safetensors is damaged or cut short" in capsys.readouterr().err
    path.rename(folder / "pytorch_model.bin")
    assert cli("from_hf", folder, tmp_path / "out.pt") == 2
    assert "a pickle (pytorch_model.bin) may run code" in capsys.readouterr().err
    for shard, problem in (("../x", "does not name files"), ("x.safetensors", "is missing")):
        change(folder, "model.safetensors.index.json", weight_map={"wte.weight": shard})
        assert cli("from_hf", folder, tmp_path / "out.pt") == 2
        assert problem in capsys.readouterr().err
    (folder / "config.json").write_text("[")
    assert cli("from_hf", folder, tmp_path / "out.pt") == 2
    assert "not JSON" in capsys.readouterr().err


# ---------------------------------------------------------------- the folder that to_hf writes


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    path, folder = ours(tmp_path / "ours.pt"), tmp_path / "new" / "hf"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert cli("to_hf", path, folder) == 4
    assert "No space left" in capsys.readouterr().err and os.listdir(folder.parent) == []
    folder.mkdir()  # an empty one is filled
    assert cli("to_hf", path, folder) == 0
    assert os.listdir(folder.parent) == ["hf"]
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    capsys.readouterr()
    assert cli("to_hf", path, folder) == 2
    assert "not empty" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_the_current_folder_is_no_name_for_a_new_one(tmp_path, monkeypatch, capsys):
    path = ours(tmp_path / "ours.pt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", ""):
        assert cli("to_hf", path, name) == 2
        assert "choose another name" in capsys.readouterr().err
    assert cli("to_hf", path, "../here") == 2


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_positions_that_transformers_does_not_know_are_refused_by_name(position):
    with pytest.raises(ValueError, match=f"position '{position}'"):
        convert.config_to_hf(GPT2Config(position=position), None, torch.float32)


def test_a_file_that_exists_is_never_overwritten(tmp_path, capsys):
    path = ours(tmp_path / "ours.pt")
    before = path.read_bytes()
    theirs().save_pretrained(tmp_path / "hf")
    assert cli("from_hf", tmp_path / "hf", path) == 2
    assert "choose another name" in capsys.readouterr().err and path.read_bytes() == before


# ---------------------------------------------------------------- tokenizers

FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, prompts in json.load(sys.stdin).items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**ids, max_new_tokens=30, do_sample=False)[0]
        print(json.dumps([tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]))
"""


def test_a_fresh_transformers_continues_text_as_we_do(tmp_path, gpt2_vocabulary):
    text = TEXT + CHINESE + "naïve\tcafé 😀\r\n"
    tokenizers = {
        "char": CharTokenizer.train(text),
        "bpe": BPETokenizer.train(text, 400),
        "gpt2": GPT2Tokenizer(),
    }
    prompts = ["line 7: the", "\tfox  jumps\n\n", "今天天气"]
    texts, asked = [], {}
    for kind, tokenizer in tokenizers.items():
        torch.manual_seed(3)
        path = ours(tmp_path / f"{kind}.pt", tokenizer)
        to_hf(path, tmp_path / kind)
        model, tokenizer = load_model(path, "cpu", "float64")
        texts += [sample_text(model, tokenizer, prompt, 30, temperature=0) for prompt in prompts]
        asked[str(tmp_path / kind)] = prompts
        assert load_state(tmp_path / kind)[0]["tokenizer"] == tokenizer.to_dict()
    done = subprocess.run(
        [sys.executable, "-c", FRESH], input=json.dumps(asked), cwd=tmp_path,
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [without_special for _, without_special in answers] == texts
    assert len(set(texts)) == 9 and all(len(text) > 20 for text in texts)


def fast(tokenizer):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(convert.tokenizer_to_hf(tokenizer)))


def test_exported_bpe_splits_and_merges_as_ours_on_every_kind_of_character():
    """With tokens of a sign and any byte each, a word that is cut elsewhere shows in the ids."""
    pairs = [first + symbol for first in "a1!" for symbol in SYMBOLS]
    tokenizer = BPETokenizer([*SYMBOLS, *pairs])
    exported = fast(tokenizer)
    for code in [*range(0, 0x3400, 3), *range(0xA000, 0xD800, 17), *range(0xE000, 0x20000, 97)]:
        for first in "a1!":
            text = first + chr(code)
            assert exported.encode(text).ids == tokenizer.encode(text), hex(code)
    ids = list(range(256))  # no UTF-8 at all
    assert exported.decode(ids) == tokenizer.decode(ids)


def test_exported_char_refuses_a_stranger_as_ours_does():
    tokenizer = CharTokenizer.train("ab \n\t😀你")
    exported = fast(tokenizer)
    text = " a😀\n\n你\tb "
    assert exported.encode(text).ids == tokenizer.encode(text)
    assert exported.decode(tokenizer.encode(text)) == text
    with pytest.raises(Exception, match="WordLevel"):
        exported.encode("c")


def trained_elsewhere(special, vocab_size=400):
    """A byte-level BPE as Hugging Face's course trains one: special tokens come first."""
    import tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT + CHINESE], vocab_size, special_tokens=special)
    return made


def hf_folder(folder, made, vocab_size=None):
    theirs(vocab_size=vocab_size or made.get_vocab_size()).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))


def test_special_tokens_at_any_id_are_taken_and_go_out_again(tmp_path):
    made = trained_elsewhere(["<s>", "<pad>", "</s>"])
    hf_folder(tmp_path / "hf", made)
    change(tmp_path / "hf", "tokenizer_config.json", eos_token={"content": "</s>"})
    _, tokenizer = load_model(tmp_path / "hf", "cpu")
    text = "the lazy dog 今天 é 😀\n"
    assert tokenizer.encode(text) == made.encode(text).ids and min(tokenizer.encode(text)) > 2
    assert (
        tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.decode([1, 2]) == "<pad></s>"
    )
    assert tokenizer.eot_id == 2 and tokenizer.vocab_size == made.get_vocab_size()
    assert min(tokenizer.encode("<pad></s>")) > 2  # text is text
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").hash() == tokenizer.hash()
    assert cli("from_hf", tmp_path / "hf", tmp_path / "ours.pt") == 0
    to_hf(tmp_path / "ours.pt", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back(text)["input_ids"] == made.encode(text).ids and back.eos_token_id == 2


def test_ids_without_a_token_and_tokens_without_an_id(tmp_path):
    made = trained_elsewhere(["<|endoftext|>"])
    made.add_special_tokens(["<pad>"])
    size = made.get_vocab_size()
    theirs(vocab_size=size + 6).save_pretrained(tmp_path / "padded")
    made.save(str(tmp_path / "padded" / "tokenizer.json"))
    _, tokenizer = load_model(tmp_path / "padded", "cpu")
    assert tokenizer.vocab_size == size + 6 and tokenizer.eot_id == 0
    assert tokenizer.encode("the fox") == made.encode("the fox").ids
    assert tokenizer.decode([size - 1, size]) == f"<pad><|unused {size}|>"
    theirs(vocab_size=size - 1).save_pretrained(tmp_path / "without")  # <pad> was added later
    made.save(str(tmp_path / "without" / "tokenizer.json"))
    _, tokenizer = load_model(tmp_path / "without", "cpu")
    assert tokenizer.vocab_size == size - 1


def test_gpt2s_own_vocabulary_is_known_in_both_spellings(tmp_path, gpt2_vocabulary, capsys):
    gpt2, model = GPT2Tokenizer(), theirs(vocab_size=50257, n_embd=6)
    assert hashlib.sha256(" ".join(gpt2.tokens).encode()).hexdigest() == convert.GPT2_TOKENS
    model.save_pretrained(tmp_path / "none")
    model.save_pretrained(tmp_path / "one")
    old = convert.tokenizer_to_hf(gpt2)  # as openai-community has it: made by an early version
    old["model"]["merges"] = [f"{a} {b}" for a, b in old["model"]["merges"]]
    del old["model"]["type"], old["pre_tokenizer"]["use_regex"]
    old["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(old))
    model.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "vocab.json").write_text(json.dumps(gpt2.id_of | gpt2.special))
    merges = "".join(f"{a} {b}\n" for a, b in gpt2.merges())
    (tmp_path / "two" / "merges.txt").write_text(f"#version: 0.2\n{merges}", "utf-8")
    for folder in ("none", "one", "two"):
        tokenizer = load_model(tmp_path / folder, "cpu")[1]
        assert tokenizer.kind == "gpt2" and tokenizer.hash() == gpt2.hash()
        assert "gpt2 tokenizer (50,257 tokens)" in capsys.readouterr().err
    theirs_now = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "two")
    assert theirs_now("Hello  wörld 你好\n")["input_ids"] == gpt2.encode("Hello  wörld 你好\n")


@pytest.mark.parametrize("eos", [["</s>"], {"content": ["</s>"]}, 7, None])
def test_an_end_of_text_that_is_no_text_is_none(tmp_path, eos):
    hf_folder(tmp_path / "hf", trained_elsewhere(["</s>"]))
    change(tmp_path / "hf", "tokenizer_config.json", eos_token=eos)
    _, tokenizer = load_model(tmp_path / "hf", "cpu")
    assert tokenizer.kind == "bpe" and tokenizer.eot_id is None


def test_a_vocabulary_without_special_tokens_has_no_end_of_text(tmp_path):
    hf_folder(tmp_path / "hf", trained_elsewhere([]))
    _, tokenizer = load_model(tmp_path / "hf", "cpu")
    assert tokenizer.eot_id is None and tokenizer.vocab_size == 400
    assert load_tokenizer(tokenizer.to_dict()).to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize("special", [[], {"<s>": "0"}, {"<s>": 258}, {"<s>": -1}, {"a": 0, "b": 0}])
def test_bad_input_as_special_tokens_is_refused(special):
    fields = BPETokenizer(SYMBOLS).to_dict() | {"special": special, "eot": None}
    with pytest.raises(ValueError, match="'special'"):
        load_tokenizer(fields)


@pytest.mark.parametrize(
    "problem, said",
    [
        ("prefix", "add_prefix_space is set"),
        ("pre_tokenizer", "its pre_tokenizer cannot be had here"),
        ("normalizer", "its normalizer cannot be had here"),
        ("merges", "is not made of two earlier ones"),
        ("order", "its merges cannot be had here"),
        ("added", "it looks for 'fox' in every text"),
        ("unigram", "its model is Unigram"),
        ("vocab.txt", "no readable tokenizer.json"),
        ("model", "the model 300"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_exactly_is_left_out_by_name(
    tmp_path, capsys, problem, said
):
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    made, folder = trained_elsewhere([]), tmp_path / "hf"
    spec = json.loads(made.to_str())
    if problem == "pre_tokenizer":
        made._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif problem == "normalizer":
        made._tokenizer.normalizer = normalizers.Lowercase()
    elif problem == "added":
        made.add_tokens(["fox"])
    elif problem in ("merges", "order"):
        merges = spec["model"]["merges"]
        merges[:] = merges[:-1] if problem == "order" else merges
        if problem == "merges":  # a token of three bytes of which no two are one
            spec["model"]["vocab"]["!#%"] = len(spec["model"]["vocab"])
        made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    elif problem == "unigram":
        made = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], None, False))
    hf_folder(folder, made, 300 if problem == "model" else None)
    if problem == "prefix":
        change(folder, "tokenizer_config.json", add_prefix_space=True)
    if problem == "vocab.txt":
        (folder / "tokenizer.json").rename(folder / "vocab.txt")
    assert cli("from_hf", folder, tmp_path / "out.pt") == 0
    err = capsys.readouterr().err
    assert "left out" in err and said in err and "no tokenizer (" in err
    assert checkpoint.load(tmp_path / "out.pt")["tokenizer"] == {}
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_model(tmp_path / "out.pt", "cpu")
    assert load_model(tmp_path / "out.pt", "cpu", need_tokenizer=False)[1] is None


# ---------------------------------------------------------------- nanoGPT

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 30}


def nanogpt(path, bias=True, prefix="", **sizes):
    """A ckpt.pt as nanoGPT's train.py saves it, of random weights; its model_args and weights."""
    args = SIZES | sizes | {"bias": bias, "dropout": 0.0}
    C = args["n_embd"]
    shapes = {
        "transformer.wte": (args["vocab_size"], C),
        "transformer.wpe": (args["block_size"], C),
    }
    for layer in range(args["n_layer"]):
        block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
        block |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    shapes["transformer.ln_f"] = (C,)
    w = OrderedDict()
    for name, shape in shapes.items():
        w[f"{name}.weight"] = torch.randn(shape) * 0.3 + (len(shape) == 1)
        if bias and not name.endswith(("wte", "wpe")):
            w[f"{name}.bias"] = torch.randn(shape[0]) * 0.1
    w["lm_head.weight"] = w["transformer.wte.weight"]
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


@pytest.mark.parametrize(
    "head", [3, torch.eye(30, 24).to_sparse(), torch.empty(30, 24, device="meta"), torch.eye(3)]
)
def test_a_nanogpt_head_that_is_no_plain_tensor_is_refused(tmp_path, capsys, head):
    nanogpt(tmp_path / "ckpt.pt")
    found = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    found["model"]["lm_head.weight"] = head
    torch.save(found, tmp_path / "ckpt.pt")
    assert cli("from_nanogpt", tmp_path / "ckpt.pt", tmp_path / "out.pt") == 2
    [line] = errors(capsys)
    assert "lm_head.weight" in line and not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_nanogpt_checkpoint_gives_the_same_logits(tmp_path, capsys, bias, prefix):
    args, w = nanogpt(tmp_path / "ckpt.pt", bias, prefix)
    CharTokenizer.train("".join(map(chr, range(65, 95)))).save(tmp_path / "tokenizer.json")
    flags = ["--tokenizer", tmp_path / "tokenizer.json"]
    assert cli("from_nanogpt", tmp_path / "ckpt.pt", tmp_path / "out.pt", *flags) == 0
    assert "optimizer" in capsys.readouterr().err
    model, tokenizer = load_model(tmp_path / "out.pt", "cpu", "float32")
    idx = torch.randint(30, (2, 16))
    with torch.no_grad():
        assert (model(idx)[0] - nanogpt_logits(args, w, idx)).abs().max() <= 1e-5
    assert tokenizer.kind == "char" and model.config.gelu == "exact"
    state = checkpoint.load(tmp_path / "out.pt")
    assert state["step"] == 0 and state["optimizer"] == {}


def test_a_nanogpt_vocabulary_that_is_padded_is_trimmed(tmp_path, gpt2_vocabulary, capsys):
    args, w = nanogpt(tmp_path / "ckpt.pt", vocab_size=50304)
    assert cli("from_nanogpt", tmp_path / "ckpt.pt", tmp_path / "out.pt") == 0
    assert "from 50,304 to 50,257" in capsys.readouterr().err
    model, tokenizer = load_model(tmp_path / "out.pt", "cpu", "float32")
    idx = torch.randint(50257, (1, 16))
    with torch.no_grad():
        logits = nanogpt_logits(args, w, idx)[..., :50257]
        assert (model(idx)[0] - logits).abs().max() <= 1e-5
    assert (
        tokenizer.kind == "gpt2"
        and model.num_params() == sum(t.numel() for t in w.values()) - 50304 * 24 - 47 * 24
    )
    wte = checkpoint.load(tmp_path / "out.pt")["model"]["transformer.wte.weight"]
    assert wte.untyped_storage().nbytes() == 50257 * 24 * 4  # the padding is not in the file


def test_a_nanogpt_checkpoint_without_a_tokenizer_or_with_a_wrong_one(tmp_path, capsys):
    nanogpt(tmp_path / "ckpt.pt")
    CharTokenizer.train("abc").save(tmp_path / "tokenizer.json")
    flags = ["--tokenizer", tmp_path / "tokenizer.json"]
    assert cli("from_nanogpt", tmp_path / "ckpt.pt", tmp_path / "out.pt", *flags) == 2
    assert "the tokenizer has 3 tokens" in capsys.readouterr().err
    assert cli("from_nanogpt", tmp_path / "ckpt.pt", tmp_path / "out.pt", "--gelu", "tanh") == 0
    assert "no tokenizer (30 tokens)" in capsys.readouterr().err
    assert load_double(tmp_path / "out.pt").config.gelu == "tanh"


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_no_nanogpt_file_can_run_code_and_damage_is_found(tmp_path, capsys):
    path, canary = tmp_path / "ckpt.pt", tmp_path / "canary"
    nanogpt(path)
    found = torch.load(path, weights_only=True)
    torch.save(found | {"config": Hostile(canary)}, path)
    assert cli("from_nanogpt", path, tmp_path / "out.pt") == 3
    assert "might run code" in capsys.readouterr().err and not canary.exists()
    torch.save({"weights": 1}, path)
    assert cli("from_nanogpt", path, tmp_path / "out.pt") == 3
    assert "no checkpoint of nanoGPT" in capsys.readouterr().err
    found["model_args"]["n_layer"] = 10**9
    del found["model_args"]["n_head"]
    torch.save(found, path)
    assert cli("from_nanogpt", path, tmp_path / "out.pt") == 2
    err = capsys.readouterr().err
    assert "n_layer 1000000000" in err and "n_head None" in err
    nanogpt(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert cli("from_nanogpt", path, tmp_path / "out.pt") == 3
    assert not (tmp_path / "out.pt").exists()


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
    monkeypatch.setattr(convert, "download", lambda repo: pytest.fail("no path was meant"))
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
    tokenizer = CharTokenizer.train(convert.SANE_TEXT)
    path = ours(tmp_path / "wild.pt", tokenizer)  # random weights as large as these are wild
    to_hf(path, tmp_path / "wild")
    load_model(tmp_path / "wild", "cpu")
    assert "warning: that is worse than guessing" in capsys.readouterr().err
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, block_size=64, n_embd=32, n_head=2))
    loss = convert.check_loss(model, tokenizer)
    assert loss == pytest.approx(math.log(tokenizer.vocab_size), abs=0.3)
    assert "warning" not in capsys.readouterr().err
    assert convert.check_loss(model, CharTokenizer(["你"] * 1)) is None


# ---------------------------------------------------------------- the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP as a download needs; one repository, org/tiny."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, files = self.server, self.server.files
        hub.seen.append((self.command, self.path, self.headers.get("Range")))
        if self.path.startswith("/api/models/org/gated"):
            return self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"})
        if self.path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            return self.reply(200, json.dumps(tree).encode())
        if self.path.startswith("/api/models/org/tiny"):
            return self.reply(200, json.dumps({"id": "org/tiny", "sha": COMMIT}).encode())
        name = self.path.rsplit("/", 1)[1]
        if not self.path.startswith("/org/tiny/resolve/") or name not in files:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        return self.send_file(name, files[name])

    def send_file(self, name, body):
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        part, length = body[first:], len(body) - first
        if self.command == "GET" and name == "model.safetensors" and not asked:
            part = part[: len(part) // 2] if self.server.fault == "cut" else part
            if self.server.fault == "short":
                part, length = part[:-100], length - 100
        self.reply(206 if asked else 200, part, headers, length)

    def reply(self, code, body, headers=None, length=None):
        length = len(body) if length is None else length
        self.send_response(code)
        for name, value in ((headers or {}) | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = length != len(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on 127.0.0.1 that huggingface_hub takes for the real one, and an empty cache."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.fault, server.seen = None, []
    ours(tmp_path / "tiny.pt", CharTokenizer.train(TEXT), block_size=16)
    to_hf(tmp_path / "tiny.pt", tmp_path / "tiny")
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    server.files["pytorch_model.bin"] = b"never asked for"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    yield server
    server.shutdown()
    server.server_close()


def same_model(tmp_path, spec):
    one, other = load_double(tmp_path / "tiny.pt"), load_double(spec)
    idx = torch.randint(one.config.vocab_size, (1, 9))
    return torch.equal(one(idx)[0], other(idx)[0])


def test_hub_success_then_nothing_is_downloaded_twice_then_offline(
    hub, tmp_path, monkeypatch, capsys
):
    assert same_model(tmp_path, "org/tiny")
    assert "model      org/tiny\n" in capsys.readouterr().err
    fetched = [path for command, path, _ in hub.seen if command == "GET" and "resolve" in path]
    assert len(fetched) == 4 and not any("pytorch_model" in path for path in fetched)
    hub.seen.clear()
    assert same_model(tmp_path, "org/tiny")
    assert not any("resolve" in path for _, path, _ in hub.seen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert same_model(tmp_path, "org/tiny") and hub.seen == []
    assert cli("from_hf", "org/other", tmp_path / "out.pt") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_hub_interrupted_download_goes_on_where_it_was(hub, tmp_path):
    hub.fault = "cut"
    assert same_model(tmp_path, "org/tiny")
    size = len(hub.files["model.safetensors"])
    [asked] = [byte_range for _, _, byte_range in hub.seen if byte_range]
    first = int(asked.removeprefix("bytes=").removesuffix("-"))
    assert size // 2 - 1024 <= first <= size // 2


@pytest.mark.parametrize(
    "fault, name, said",
    [
        ("short", "org/tiny", "should be of size"),
        (None, "org/none", "not found on the hub"),
        (None, "org/gated", "access is by request"),
        ("gone", "org/tiny", "the hub cannot be reached"),
    ],
)
def test_hub_failures_are_one_line_and_exit_2(
    hub, tmp_path, monkeypatch, capsys, fault, name, said
):
    hub.fault = fault
    if fault == "gone":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert cli("from_hf", name, tmp_path / "out.pt") == 2
    [line] = errors(capsys)
    assert f"{name}: " in line and said in line
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.slow
def test_hub_endpoint_of_the_environment_is_used(hub, tmp_path):
    """HF_ENDPOINT is read when huggingface_hub is imported, so in a process of its own."""
    script = Path(convert.__file__)
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, script, "from_hf", "org/tiny", tmp_path / "out.pt"],
        env=environment | {"HF_HUB_DISABLE_XET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same_model(tmp_path, tmp_path / "out.pt")
