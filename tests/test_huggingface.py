"""Hugging Face's models give the same logits and text there and here; refusals name the reason."""

import hashlib
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TEXT

import checkpoint
import huggingface
from checkpoint import load_model, load_state, new_state
from config import GPT2Config
from convert import main, to_hf
from huggingface import tokenizer_to_hf
from logger import run
from model import GPT2
from sampling import sample_text
from tokenizer import SYMBOLS, BPETokenizer, CharTokenizer, GPT2Tokenizer

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
WTE, WEIGHTS = "transformer.wte.weight", "model.safetensors"
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


def edit_tensors(folder, edit):
    found = safetensors.load_file(folder / WEIGHTS)
    edit(found)
    safetensors.save_file(found, folder / WEIGHTS)


def set_weight(folder, name, change):
    """Let a weight be what change makes of the embeddings."""
    edit_tensors(folder, lambda found: found.update({name: change(found[WTE])}))


def load_double(folder):
    return load_model(folder, "cpu", "float64", need_tokenizer=False)[0]


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


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("bias", [True, False])
def test_our_model_is_the_same_in_transformers_and_back(tmp_path, bias, gelu):
    path = ours(tmp_path / "ours.pt", bias=bias, gelu=gelu)
    to_hf(path, tmp_path / "hf")
    model = from_pretrained(tmp_path / "hf")
    assert len({file.stat().st_mode for file in (tmp_path / "hf").iterdir()}) == 1
    assert difference(load_double(path), model) <= 1e-10
    assert difference(load_double(tmp_path / "hf"), model) <= 1e-10


def sharded(folder):
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="10KB")


def old_names(found):
    """As in openai-community's files: no prefix, and the causal masks among the weights."""
    for name in list(found):
        found[name.removeprefix("transformer.")] = found.pop(name)
    found |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.ones(())}


FORMS = {
    "sharded": sharded,
    "old names": lambda folder: edit_tensors(folder, old_names),
    "no change": lambda folder: change(folder, reorder_and_upcast_attn=True, n_inner=96),
    "a name": lambda folder: change(folder, activation_function="gelu_pytorch_tanh"),
    "a tied copy": lambda folder: set_weight(folder, "lm_head.weight", lambda w: w + 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_read_in_all_its_forms(folder, form):
    model = from_pretrained(folder)
    FORMS[form](folder)
    assert difference(load_double(folder), model) <= 1e-10


ANOTHER = {"model_type": "gpt_neo", "activation_function": "relu", "layer_norm_epsilon": 1e-6}
ANOTHER |= {"scale_attn_weights": False, "tie_word_embeddings": False, "n_head": 5}


def other_tensors(found):
    del found["transformer.h.0.ln_1.bias"]
    found["score.weight"] = torch.zeros(2, 24)
    found["transformer.h.1.attn.c_attn.weight"] = torch.zeros(24, 71)


BAD = {  # how it is made; what is said, a line for each problem
    "a config": (
        lambda folder: change(folder, **ANOTHER),
        "model_type 'gpt_neo', only gpt2",
        "activation_function 'relu', only gelu_new",
        "layer_norm_epsilon 1e-06, only 1e-05",
        "scale_attn_weights False",
        "tie_word_embeddings False",
        "n_embd 24: not divisible by",
    ),
    "tensors": (
        lambda folder: edit_tensors(folder, other_tensors),
        'Missing key(s) in state_dict: "transformer.h.0.ln_1.bias"',
        'Unexpected key(s) in state_dict: "transformer.score.weight"',
        "size mismatch for transformer.h.1.attn.c_attn.weight",
    ),
    "a text as a number": (lambda folder: change(folder, n_embd="24"), "must be a valid integer"),
    "weights that are not finite": (
        lambda folder: set_weight(folder, WTE, lambda w: w / 0),
        "transformer.wte.weight: has values that are not finite",
        "lm_head.weight: has values that are not finite",
    ),
    "a head of its own": (
        lambda folder: set_weight(folder, "lm_head.weight", lambda w: w + 1),
        "the head is not tied",
    ),
    "a file cut short": (lambda folder: os.truncate(folder / WEIGHTS, 5000), "is damaged or cut"),
    "a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "a pickle (pytorch_model.bin) may run code",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_in_a_folder_is_named_all_at_once(folder, from_hf, kind):
    make, *parts = BAD[kind]
    make(folder)
    code, lines = from_hf(folder)
    assert code == 2 and len(lines) == len(parts)
    assert all(sum(part in line for line in lines) == 1 for part in parts)


def test_what_exists_is_never_overwritten(tmp_path, monkeypatch, capsys, folder):
    path = ours(tmp_path / "ours.pt")
    before = [file.read_bytes() for file in (path, *sorted(folder.iterdir()))]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    targets = [("to_hf", path, name) for name in (folder, ".", "", "../here")]
    for words in [*targets, ("from_hf", folder, path)]:
        assert cli(*words) == 2
        assert "choose another name" in capsys.readouterr().err
    assert [file.read_bytes() for file in (path, *sorted(folder.iterdir()))] == before


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
    pairs = [first + symbol for first in "a1!" for symbol in SYMBOLS]
    tokenizer = BPETokenizer([*SYMBOLS, *pairs])
    exported = tokenizer_to_hf(tokenizer)
    for code in [*range(0, 0x3400, 3), *range(0xA000, 0xD800, 17), *range(0xE000, 0x20000, 97)]:
        for first in "a1!":
            text = first + chr(code)
            assert exported.encode(text).ids == tokenizer.encode(text), hex(code)
    ids = list(range(256))  # no UTF-8 at all
    assert exported.decode(ids) == tokenizer.decode(ids)


def trained_elsewhere(special, vocab_size=400):
    """A byte-level BPE as Hugging Face's course trains one: special tokens come first."""
    import tokenizers

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
    hf_folder(tmp_path / "hf", made, size + 6)  # ids without a token
    change(tmp_path / "hf", "tokenizer_config.json", eos_token={"content": "</s>"})
    _, tokenizer = load_model(tmp_path / "hf", "cpu")
    ids = made.encode(text).ids
    assert tokenizer.encode(text) == ids and min(ids) > 1 and tokenizer.decode(ids) == text
    assert tokenizer.decode([0, 1, size - 1, size]) == f"<s></s><pad><|unused {size}|>"
    assert min(tokenizer.encode("<s></s>")) > 1 and tokenizer.eot_id == 1  # text is text
    assert cli("from_hf", tmp_path / "hf", tmp_path / "ours.pt") == 0
    to_hf(tmp_path / "ours.pt", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back(text)["input_ids"] == ids and back.eos_token_id == 1
    _, tokenizer = load_model(hf_folder(tmp_path / "smaller", made, size - 1), "cpu")
    assert tokenizer.vocab_size == size - 1 and tokenizer.eot_id is None  # <pad> was added later


def test_gpt2s_own_vocabulary_is_known_in_both_spellings(tmp_path, gpt2_vocabulary):
    gpt2, model = GPT2Tokenizer(), theirs(vocab_size=50257, n_embd=6)
    assert hashlib.sha256(" ".join(gpt2.tokens).encode()).hexdigest() == huggingface.GPT2_TOKENS
    for name in ("none", "one", "two"):
        model.save_pretrained(tmp_path / name)
    # as openai-community has it: made by an early version
    old = json.loads(tokenizer_to_hf(gpt2).to_str())
    old["model"]["merges"] = [f"{a} {b}" for a, b in old["model"]["merges"]]
    del old["model"]["type"], old["pre_tokenizer"]["use_regex"]
    old["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(old))
    (tmp_path / "two" / "vocab.json").write_text(json.dumps(gpt2.id_of | gpt2.special))
    merges = "".join(f"{a} {b}\n" for a, b in gpt2.merges())
    (tmp_path / "two" / "merges.txt").write_text(f"#version: 0.2\n{merges}", "utf-8")
    for name in ("none", "one", "two"):
        tokenizer = load_model(tmp_path / name, "cpu")[1]
        assert tokenizer.kind == "gpt2" and tokenizer.hash() == gpt2.hash()
    (tmp_path / "two" / "merges.txt").unlink()
    os.mkfifo(tmp_path / "two" / "merges.txt")
    assert load_model(tmp_path / "two", "cpu", need_tokenizer=False)[1] is None


FOX = {"id": 400, "content": "fox", "special": False}
FOX |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}
INEXACT = {  # what is said: the size of the model's vocabulary, what is done to the tokenizer
    "pre_tokenizer": (400, lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True)),
    "its normalizer": (400, lambda spec: spec.update(normalizer={"type": "Lowercase"})),
    "prefix cannot": (400, lambda spec: spec["model"].update(continuing_subword_prefix="##")),
    "not made of two earlier": (401, lambda spec: spec["model"]["vocab"].update({"!#%": 400})),
    "its merges cannot be had here": (400, lambda spec: spec["model"]["merges"].pop()),
    "added_tokens": (401, lambda spec: spec["added_tokens"].append(FOX)),
    "its model is Unigram": (400, lambda spec: spec.update(model=UNIGRAM)),
    "tokens, the model 400": (400, lambda spec: spec["model"]["vocab"].update({"!#%": 400})),
    "left out": (400, dict.clear),
    "the model 300": (300, lambda spec: None),
}


@pytest.mark.parametrize("said", [*INEXACT, "add_prefix_space is set"])
def test_a_tokenizer_that_cannot_be_had_exactly_is_left_out_by_name(tmp_path, from_hf, said):
    vocab_size, edit = INEXACT.get(said, (400, lambda spec: None))
    folder = hf_folder(tmp_path / "hf", trained_elsewhere([]), vocab_size)
    spec = json.loads((folder / "tokenizer.json").read_text())
    edit(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    change(folder, "tokenizer_config.json", add_prefix_space=said not in INEXACT)
    code, lines = from_hf(folder)
    assert code == 0 and any("left out" in line and said in line for line in lines)
    assert checkpoint.load(tmp_path / "out.pt")["tokenizer"] == {}
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_model(tmp_path / "out.pt", "cpu")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub without a network, and org/tiny in its cache, as a download leaves it."""
    import huggingface_hub.errors

    ours(tmp_path / "tiny.pt", CharTokenizer.train(TEXT), block_size=16)
    to_hf(tmp_path / "tiny.pt", tmp_path / "tiny")
    cached = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(tmp_path / "tiny", cached / "snapshots" / ("5a" * 20))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("5a" * 20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return huggingface_hub


def same_model(tmp_path, spec):
    one, other = load_double(tmp_path / "tiny.pt"), load_double(spec)
    idx = torch.randint(one.config.vocab_size, (1, 9))
    return torch.equal(one(idx)[0], other(idx)[0])


def test_hub_models_come_from_the_cache_and_no_pickle_is_asked_for(
    hub, tmp_path, monkeypatch, from_hf
):
    assert same_model(tmp_path, "org/tiny")
    code, [line] = from_hf("org/other")
    assert code == 2 and "org/other: HF_HUB_OFFLINE is set" in line
    download = Mock(return_value=str(tmp_path / "tiny"))
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert same_model(tmp_path, "gpt2") and download.call_args.args == ("openai-community/gpt2",)
    wanted = download.call_args.kwargs["allow_patterns"]
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in wanted)


FAILURES = {
    "not found on the hub": lambda errors: errors.RepositoryNotFoundError("", response=Mock()),
    "access is by request": lambda errors: errors.GatedRepoError("", response=Mock()),
    "the same command tries again: cut short": lambda errors: OSError("cut short"),
}


@pytest.mark.parametrize("said", FAILURES)
def test_hub_failures_are_one_line_and_exit_2(hub, monkeypatch, from_hf, said):
    monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=FAILURES[said](hub.errors)))
    code, [line] = from_hf("org/tiny")
    assert code == 2 and line.startswith("error: org/tiny: ") and said in line


def test_push_uploads_the_folder_or_is_one_line(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HfApi", Mock())
    monkeypatch.setattr(hub, "get_token", lambda: None)
    api, pushed = hub.HfApi.return_value, tmp_path / "pushed"
    api.create_repo.return_value = "https://hub/org/tiny"
    words = ["to_hf", tmp_path / "tiny.pt", pushed, "--push"]
    for name, said in (("org/tiny", "no token; `hf auth login`"), ("tiny", "must be a name on")):
        assert cli(*words, name) == 2 and said in capsys.readouterr().err
    assert not pushed.exists()
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    assert cli(*words, "org/tiny") == 0
    assert "pushed     https://hub/org/tiny" in capsys.readouterr().err
    sent = api.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["folder_path"]) == ("org/tiny", pushed)
    assert len(os.listdir(pushed)) == 6 and same_model(tmp_path, pushed)
    assert '("text-generation", "org/tiny")' in (pushed / "README.md").read_text()
    api.create_repo.side_effect = OSError("no rights")
    assert cli("to_hf", tmp_path / "tiny.pt", tmp_path / "kept", "--push", "org/tiny") == 2
    assert "error: org/tiny: the transfer failed, `hf upload org/tiny" in capsys.readouterr().err
    assert same_model(tmp_path, tmp_path / "kept")
