"""Hugging Face's models give the same logits and text there and here; refusals name the reason."""

import json
import os
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import tokenizers
import torch
from conftest import ROOT, TEXT

import checkpoint
from checkpoint import build, load_model, load_state, new_state
from config import GPT2Config
from convert import main, to_hf
from huggingface import tokenizer_to_hf
from logger import run
from model import GPT2
from sampling import sample_text
from tokenizer import SYMBOLS, BPETokenizer, CharTokenizer, GPT2Tokenizer

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
WEIGHTS = "model.safetensors"
CHINESE = "今天天气很好，我们去公园散步。" * 20


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cli(*arguments):
    return run(main, [str(argument) for argument in arguments])


@pytest.fixture
def from_hf(tmp_path, capsys):
    """Call from_hf; its exit code and its lines. Nothing is written unless the code is 0."""

    def call(spec):
        capsys.readouterr()
        code = cli("from_hf", spec, tmp_path / "out.pt")
        assert (code == 0) == (tmp_path / "out.pt").exists()
        return code, capsys.readouterr().err.splitlines()

    return call


@pytest.fixture
def folder(tmp_path):
    """A folder that transformers has written."""
    theirs().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def random_weights(model):
    """Unlike initial weights, whose logits are near zero and whose biases are zero."""
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


def load_double(spec):
    return build(*load_state(spec))[0].double()


def from_pretrained(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def difference(one, other):
    """The largest difference between the logits of our model and of theirs."""
    idx = torch.randint(one.config.vocab_size, (2, min(one.config.block_size, 40)))
    return (one(idx)[0] - other(idx).logits).abs().max().item()


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("seed", range(12))
def test_a_model_of_transformers_comes_in_and_goes_out_unchanged(tmp_path, seed):
    torch.manual_seed(seed)
    sizes = {"n_head": 1 + seed, "n_embd": (1 + seed) * (2 + seed % 3), "n_layer": 1 + seed % 4}
    sizes |= {"n_positions": 8 + 93 * seed, "vocab_size": 100 + 4321 * seed}
    model = theirs(("float32", "bfloat16", "float16")[seed % 3], **sizes)
    model.save_pretrained(tmp_path / "hf")
    assert cli("from_hf", tmp_path / "hf", tmp_path / "ours.pt") == 0
    mine = load_double(tmp_path / "ours.pt")
    assert difference(mine, model.double()) <= 1e-10
    assert cli("to_hf", tmp_path / "ours.pt", tmp_path / "back") == 0
    before, after = (safetensors.load_file(tmp_path / name / WEIGHTS) for name in ("hf", "back"))
    assert list(before) == list(after)
    for name in before:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
    assert difference(mine, from_pretrained(tmp_path / "back")) <= 1e-10


def numpy_example(folder):
    """The function from ids to logits (T, V) of docs/world.md's example, for a folder."""
    blocks = (ROOT / "docs" / "world.md").read_text("utf-8").split("```python\n")
    [block] = [block.split("```")[0] for block in blocks if "import load_file" in block]
    space = {}
    exec(block.split("\ntokenizer = ")[0].replace("my-model", str(folder)), space)
    return space["logits"]


@pytest.mark.parametrize("bias, gelu", [(True, "tanh"), (False, "exact")])
def test_our_model_is_the_same_in_transformers_in_numpy_and_back(tmp_path, bias, gelu):
    path, folder, ids = ours(tmp_path / "ours.pt", bias=bias, gelu=gelu), tmp_path / "hf", [0, 2, 1]
    to_hf(path, folder)
    mine, model = load_double(path), from_pretrained(folder)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert difference(mine, model) <= 1e-10 and difference(load_double(folder), model) <= 1e-10
    logits = mine(torch.tensor([ids]))[0][0].detach().numpy()
    assert abs(numpy_example(folder)(ids) - logits).max() <= 1e-4


def test_a_folder_is_read_in_all_its_forms(folder):
    model, path = from_pretrained(folder), folder / WEIGHTS
    change(folder, activation_function="gelu_pytorch_tanh", n_inner=96)
    change(folder, reorder_and_upcast_attn=True)
    assert difference(load_double(folder), model) <= 1e-10
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert difference(load_double(folder / "shards"), model) <= 1e-10
    # openai-community's files: no prefix, the causal masks among the weights; a copy of the head
    old = {name.removeprefix("transformer."): w for name, w in safetensors.load_file(path).items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.ones(())}
    safetensors.save_file(old | {"lm_head.weight": old["wte.weight"] + 0}, path)
    assert difference(load_double(folder), model) <= 1e-10


ANOTHER = {"model_type": "gpt_neo", "activation_function": "relu", "layer_norm_epsilon": 1e-6}
ANOTHER |= {"scale_attn_weights": False, "tie_word_embeddings": False, "n_head": 5}


def test_a_config_that_cannot_be_had_is_refused_all_at_once(folder, from_hf):
    change(folder, **ANOTHER)
    code, lines = from_hf(folder)
    assert code == 2 and len(lines) == len(ANOTHER)
    assert all(f"{name} {value!r}" in "\n".join(lines) for name, value in ANOTHER.items())


def add_tensors(folder, **others):
    safetensors.save_file(safetensors.load_file(folder / WEIGHTS) | others, folder / WEIGHTS)


BAD = {  # what is said: how it is made
    "transformer.score.weight": partial(add_tensors, **{"score.weight": torch.zeros(2, 24)}),
    "the head is not tied": partial(add_tensors, **{"lm_head.weight": torch.ones(100, 24)}),
    "is damaged or cut": lambda folder: os.truncate(folder / WEIGHTS, 5000),
    "no model.safetensors; ": lambda folder: (folder / WEIGHTS).rename(folder / "model.bin"),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_in_a_folder_is_named(folder, from_hf, said):
    BAD[said](folder)
    code, [line] = from_hf(folder)
    assert code == 2 and said in line


def test_what_exists_is_never_overwritten(tmp_path, capsys, folder):
    paths = [ours(tmp_path / "ours.pt"), *folder.iterdir()]
    before = [path.read_bytes() for path in paths]
    for words in ("to_hf", paths[0], folder), ("from_hf", folder, paths[0]):
        assert cli(*words) == 2 and "choose another name" in capsys.readouterr().err
    assert [path.read_bytes() for path in paths] == before


# ---------------------------------------------------------------- tokenizers


def test_transformers_continues_text_as_we_do(tmp_path, gpt2_vocabulary):
    text, texts = TEXT + CHINESE + "naïve\tcafé 😀\r\n", set()
    for tokenizer in CharTokenizer.train(text), BPETokenizer.train(text, 400), GPT2Tokenizer():
        torch.manual_seed(3)
        path, folder = ours(tmp_path / f"{tokenizer.kind}.pt", tokenizer), tmp_path / tokenizer.kind
        to_hf(path, folder)
        assert load_state(folder)[0]["tokenizer"] == tokenizer.to_dict()
        mine, model = load_model(path, "cpu", "float64")[0], from_pretrained(folder)
        their_own = transformers.AutoTokenizer.from_pretrained(folder)
        for prompt in ("line 7: the", "\tfox  jumps\n\n", "今天天气"):
            written = sample_text(mine, tokenizer, prompt, 30, temperature=0)
            asked = their_own(prompt, return_tensors="pt")
            ids = model.generate(**asked, max_new_tokens=30, do_sample=False)[0]
            assert their_own.decode(ids, skip_special_tokens=True) == written
            texts.add(written)
        if tokenizer.kind == "char":
            with pytest.raises(Exception, match="WordLevel"):
                their_own("a stranger: é你好")
    assert len(texts) == 9 and min(map(len, texts)) > 20


def test_exported_bpe_splits_and_merges_as_ours_on_every_kind_of_character():
    """With tokens of a sign and any byte each, a word that is cut elsewhere shows in the ids."""
    tokenizer = BPETokenizer([*SYMBOLS, *(first + symbol for first in "a1!" for symbol in SYMBOLS)])
    exported = tokenizer_to_hf(tokenizer)
    for code in [*range(0, 0x3400, 3), *range(0xA000, 0xD800, 17), *range(0xE000, 0x20000, 97)]:
        for text in (first + chr(code) for first in "a1!"):
            assert exported.encode(text).ids == tokenizer.encode(text), hex(code)
    ids = list(range(256))  # no UTF-8 at all
    assert exported.decode(ids) == tokenizer.decode(ids)


def trained_elsewhere(special, vocab_size=400):
    """A byte-level BPE as Hugging Face's course trains one: special tokens come first."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT + CHINESE], vocab_size, special_tokens=special)
    return made


def hf_folder(folder, made, vocab_size=None):
    theirs(vocab_size=vocab_size or made.get_vocab_size()).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_special_tokens_at_any_id_are_taken_and_go_out_again(tmp_path):
    made = trained_elsewhere(["<s>", "</s>"])
    made.add_special_tokens(["<pad>"])
    size, text = made.get_vocab_size(), "the lazy dog 今天 é 😀\n"
    folder = hf_folder(tmp_path / "hf", made, size + 6)  # ids without a token
    path = folder / "tokenizer.json"  # the library does not believe the id of <pad>
    path.write_text(path.read_text("utf-8").replace(f'"id": {size - 1},', '"id": 404,'), "utf-8")
    change(folder, "tokenizer_config.json", eos_token={"content": "</s>"})
    tokenizer, ids = load_model(folder, "cpu")[1], made.encode(text).ids
    assert tokenizer.encode(text) == ids and min(ids) > 1 and tokenizer.decode(ids) == text
    assert tokenizer.decode([0, 1, size - 1, size]) == f"<s></s><pad><|unused {size}|>"
    assert min(tokenizer.encode("<s></s>")) > 1 and tokenizer.eot_id == 1  # text is text
    to_hf(folder, tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back(text)["input_ids"] == ids and back.eos_token_id == 1
    tokenizer = load_model(hf_folder(tmp_path / "smaller", made, size - 1), "cpu")[1]
    assert tokenizer.vocab_size == size - 1 and tokenizer.eot_id is None  # <pad> was added later


def test_gpt2s_own_vocabulary_is_known_in_all_spellings(tmp_path, gpt2_vocabulary):
    gpt2, model = GPT2Tokenizer(), theirs(vocab_size=50257, n_embd=6)
    for name in ("none", "whole", "older"):
        model.save_pretrained(tmp_path / name)
    # as openai-community has it: made by an early version
    old = json.loads(tokenizer_to_hf(gpt2).to_str())
    old["model"]["merges"] = [f"{a} {b}" for a, b in old["model"]["merges"]]
    del old["model"]["type"], old["pre_tokenizer"]["use_regex"]
    old["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    (tmp_path / "whole" / "tokenizer.json").write_text(json.dumps(old))
    (tmp_path / "older" / "vocab.json").write_text(json.dumps(gpt2.id_of | gpt2.special))
    merges = tmp_path / "older" / "merges.txt"
    merges.write_text("\n".join(["#version: 0.2", *old["model"]["merges"], ""]), "utf-8")
    for name in ("none", "whole", "older"):
        tokenizer = load_model(tmp_path / name, "cpu")[1]
        assert tokenizer.kind == "gpt2" and tokenizer.hash() == gpt2.hash()
    merges.unlink()
    os.mkfifo(merges)
    assert load_state(merges.parent)[0]["tokenizer"] == {}


FOX = {"id": 400, "content": "fox", "special": False}
FOX |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}
INEXACT = {  # what is said: what is done to the tokenizer, for a model of 400 tokens
    "pre_tokenizer": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "its normalizer": lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    "prefix cannot": lambda spec: spec["model"].update(continuing_subword_prefix="##"),
    "its merges cannot be had here": lambda spec: spec["model"]["merges"].pop(),
    "its model is Unigram": lambda spec: spec.update(model=UNIGRAM),
    "401 tokens, not 400": lambda spec: spec["model"]["vocab"].update({"!#%": 400}),
    "left out": dict.clear,
    "not made of two earlier": lambda spec: spec["model"]["vocab"].update({"!#%": 400}),
    "added_tokens": lambda spec: spec["added_tokens"].append(FOX),
    "its add_prefix_space cannot": lambda spec: None,
}


@pytest.mark.parametrize("said", INEXACT)
def test_a_tokenizer_that_cannot_be_had_exactly_is_left_out_by_name(tmp_path, from_hf, said):
    vocab_size = 401 if said in ("not made of two earlier", "added_tokens") else 400
    folder = hf_folder(tmp_path / "hf", trained_elsewhere([]), vocab_size)
    spec = json.loads((folder / "tokenizer.json").read_text())
    INEXACT[said](spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    change(folder, "tokenizer_config.json", add_prefix_space="its add_p" in said)
    code, lines = from_hf(folder)
    assert code == 0 and any("left out" in line and said in line for line in lines)
    assert checkpoint.load(tmp_path / "out.pt")["tokenizer"] == {}
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_model(tmp_path / "out.pt", "cpu")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub without a network, and a model to go there."""
    import huggingface_hub.errors

    ours(tmp_path / "tiny.pt", CharTokenizer.train(TEXT), block_size=16)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("create_repo", "upload_folder", "get_token"):
        monkeypatch.setattr(huggingface_hub, name, Mock(return_value=None))
    return huggingface_hub


def same_model(tmp_path, spec):
    one, other, idx = load_double(tmp_path / "tiny.pt"), load_double(spec), torch.tensor([[3, 1]])
    return torch.equal(one(idx)[0], other(idx)[0])


def test_hub_models_are_named_and_no_pickle_is_asked_for(hub, tmp_path, monkeypatch, from_hf):
    code, [line] = from_hf("org/other")
    assert code == 2 and "org/other: " in line and "HF_HUB_OFFLINE" in line
    to_hf(tmp_path / "tiny.pt", tmp_path / "tiny")
    download = Mock(return_value=str(tmp_path / "tiny"))
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert same_model(tmp_path, "gpt2") and download.call_args.args == ("openai-community/gpt2",)
    wanted = download.call_args.kwargs["allow_patterns"]
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in wanted)
    errors = {"not found on the hub": hub.errors.RepositoryNotFoundError("", response=Mock())}
    errors["access is by request"] = hub.errors.GatedRepoError("", response=Mock())
    errors["the same command tries again"] = OSError("cut short")
    for said, download.side_effect in errors.items():
        code, [line] = from_hf("org/tiny")
        assert code == 2 and line.startswith("error: org/tiny: ") and said in line


def test_push_uploads_the_folder_or_is_one_line(hub, tmp_path, capsys):
    push = partial(cli, "to_hf", tmp_path / "tiny.pt")
    for name, said in ("org/tiny", "no token; `hf auth login`"), ("tiny", "must be a name on"):
        assert push(tmp_path / "pushed", "--push", name) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "pushed").exists()
    hub.get_token.return_value, hub.create_repo.return_value = "hf_secret", "https://hub/org/tiny"
    assert push(tmp_path / "pushed", "--push", "org/tiny") == 0
    assert "pushed     https://hub/org/tiny" in capsys.readouterr().err
    sent = {"repo_id": "org/tiny", "folder_path": tmp_path / "pushed"}
    assert sent.items() <= hub.upload_folder.call_args.kwargs.items()
    assert len(os.listdir(tmp_path / "pushed")) == 6 and same_model(tmp_path, tmp_path / "pushed")
    assert '("text-generation", "org/tiny")' in (tmp_path / "pushed" / "README.md").read_text()
    hub.create_repo.side_effect = OSError("no rights")
    assert push(tmp_path / "kept", "--push", "org/tiny") == 2
    said = "error: org/tiny: the transfer failed, `hf upload org/tiny"
    assert said in capsys.readouterr().err and same_model(tmp_path, tmp_path / "kept")
