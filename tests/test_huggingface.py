"""Hugging Face's models give the same logits and text there and here; refusals name the reason."""

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import TEXT

import checkpoint
import convert
import huggingface
from checkpoint import load_model, load_state, new_state
from config import GPT2Config
from convert import main, to_hf
from huggingface import tokenizer_to_hf
from logger import run
from model import GPT2, context_start
from sampling import Sampling, generate_ids, sample_text
from tokenizer import SYMBOLS, BPETokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer

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
    """Call from_hf; its exit code and its error lines. Nothing is written unless the code is 0."""

    def call(spec, command="from_hf"):
        capsys.readouterr()
        code = cli(command, spec, tmp_path / "out.pt")
        assert (code == 0) == (tmp_path / "out.pt").exists()
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line.startswith("error: ") or code == 0]

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
    """Let edit change the dict of a folder's tensors, or return a new one."""
    path = folder / "model.safetensors"
    found = safetensors.load_file(path)
    safetensors.save_file(edit(found) or found, path)


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
    T = min(one.config.block_size, 40)
    idx = torch.randint(one.config.vocab_size, (2, T))
    return (one(idx)[0] - other(idx).logits).abs().max().item()


# ---------------------------------------------------------------- Hugging Face's models

POSITIONS = [8, 9, 16, 31, 64, 100, 128, 200, 256, 512, 1024]
VOCABULARIES = [100, 257, 1000, 5000, 20000, 50256, 50257]


def greedy_theirs(model, prompt, steps=50):
    """Token by token, without a cache; past n_positions by our rule for the context."""
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
    model = from_pretrained(tmp_path / "hf")
    assert difference(load_double(path), model) <= 1e-10
    assert difference(load_double(tmp_path / "hf"), model) <= 1e-10
    model.save_pretrained(tmp_path / "theirs")
    one, other = (
        safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("hf", "theirs")
    )
    assert one.keys() == other.keys()


def sharded(folder):
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="10KB")


def old_names(found):
    """As in openai-community's files: no prefix, and the causal masks among the weights."""
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return {key.removeprefix("transformer."): found[key] for key in found} | masks


def sizes_of_other_models(folder):
    path = folder / "config.json"
    text = path.read_text().replace(
        '"n_head"', '"num_attention_heads"'
    )  # 12, the default, fits too
    path.write_text(text.replace('"n_positions"', '"max_position_embeddings"'))


FORMS = {
    "sharded": sharded,
    "old names": lambda folder: edit_tensors(folder, old_names),
    "other names of sizes": sizes_of_other_models,
    "no change": lambda folder: change(folder, reorder_and_upcast_attn=True, n_inner=96),
    "a tied copy": lambda folder: set_weight(folder, "lm_head.weight", lambda w: w + 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_read_in_all_its_forms(folder, form):
    model = from_pretrained(folder)
    FORMS[form](folder)
    assert difference(load_double(folder), model) <= 1e-10


def test_bad_input_of_a_config_is_named_all_at_once(folder, from_hf):
    wrong = {"model_type": "gpt_neo", "activation_function": "relu", "n_inner": 7, "n_head": 5}
    wrong |= {"layer_norm_epsilon": 1e-6, "scale_attn_weights": False, "tie_word_embeddings": False}
    change(folder, **wrong, scale_attn_by_inverse_layer_idx=True)
    code, lines = from_hf(folder)
    assert code == 2 and len(lines) == 8
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


def test_bad_input_among_the_tensors_is_named_all_at_once(folder, from_hf):
    def edit(found):
        del found["transformer.h.0.ln_1.bias"]
        found["score.weight"] = torch.zeros(2, 24)
        found["transformer.h.1.attn.c_attn.weight"] = torch.zeros(24, 71)

    edit_tensors(folder, edit)
    code, lines = from_hf(folder)
    assert code == 2 and len(lines) == 3
    assert 'Missing key(s) in state_dict: "transformer.h.0.ln_1.bias"' in lines[0]
    assert 'Unexpected key(s) in state_dict: "transformer.score.weight"' in lines[1]
    assert "size mismatch for transformer.h.1.attn.c_attn.weight" in lines[2]


def index(folder, shard):
    (folder / WEIGHTS).rename(folder.parent / "x.safetensors")
    change(folder, f"{WEIGHTS}.index.json", weight_map={"wte.weight": shard})


C_ATTN = "transformer.h.0.attn.c_attn.weight"
BAD = {  # how it is made, and what is said
    "a config of a dict": (
        lambda folder: change(folder, n_embd={"a": 1}, n_inner=96),
        "n_inner 96, only 4 x n_embd",
    ),
    "a text as a number": (lambda folder: change(folder, n_embd="24"), "must be a valid integer"),
    "weights that are not finite": (
        lambda folder: set_weight(folder, WTE, lambda w: w / 0),
        "transformer.wte.weight: has values that are not finite",
    ),
    "a head of its own": (
        lambda folder: set_weight(folder, "lm_head.weight", lambda w: w + 1),
        "the head is not tied",
    ),
    "three dimensions": (
        lambda folder: set_weight(folder, C_ATTN, lambda w: w[None] + 0),
        f"size mismatch for {C_ATTN}",
    ),
    "a file cut short": (lambda folder: os.truncate(folder / WEIGHTS, 5000), "is damaged or cut"),
    "a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "a pickle (pytorch_model.bin) may run code",
    ),
    "a shard outside": (lambda folder: index(folder, "../x.safetensors"), "json is missing"),
    "a missing shard": (lambda folder: index(folder, "x.safetensors"), "json is missing"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_in_a_folder_is_refused_by_name(folder, from_hf, kind):
    make, said = BAD[kind]
    make(folder)
    code, lines = from_hf(folder)
    assert code == 2 and said in "\n".join(lines)


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
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


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


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_positions_that_transformers_does_not_know_are_refused_by_name(position):
    with pytest.raises(ValueError, match=f"position '{position}'"):
        huggingface.config_to_hf(GPT2Config(position=position), None, torch.float32)


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

    return Tokenizer.from_str(json.dumps(tokenizer_to_hf(tokenizer)))


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
    return folder


def test_special_tokens_at_any_id_are_taken_and_go_out_again(tmp_path):
    made = trained_elsewhere(["<s>", "<pad>", "</s>"])
    hf_folder(tmp_path / "hf", made)
    change(tmp_path / "hf", "tokenizer_config.json", eos_token={"content": "</s>"})
    _, tokenizer = load_model(tmp_path / "hf", "cpu")
    text = "the lazy dog 今天 é 😀\n"
    ids = made.encode(text).ids
    assert tokenizer.encode(text) == ids and min(ids) > 2 and tokenizer.decode(ids) == text
    assert tokenizer.decode([1, 2]) == "<pad></s>" and tokenizer.eot_id == 2
    assert min(tokenizer.encode("<pad></s>")) > 2  # text is text
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").hash() == tokenizer.hash()
    assert cli("from_hf", tmp_path / "hf", tmp_path / "ours.pt") == 0
    to_hf(tmp_path / "ours.pt", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back(text)["input_ids"] == ids and back.eos_token_id == 2


def test_ids_without_a_token_and_tokens_without_an_id(tmp_path):
    made = trained_elsewhere(["<|endoftext|>"])
    made.add_special_tokens(["<pad>"])
    size = made.get_vocab_size()
    _, tokenizer = load_model(hf_folder(tmp_path / "padded", made, size + 6), "cpu")
    assert tokenizer.vocab_size == size + 6 and tokenizer.eot_id == 0
    assert tokenizer.encode("the fox") == made.encode("the fox").ids
    assert tokenizer.decode([size - 1, size]) == f"<pad><|unused {size}|>"
    _, tokenizer = load_model(hf_folder(tmp_path / "without", made, size - 1), "cpu")
    assert tokenizer.vocab_size == size - 1  # <pad> was added later


def test_gpt2s_own_vocabulary_is_known_in_both_spellings(tmp_path, gpt2_vocabulary, capsys):
    gpt2, model = GPT2Tokenizer(), theirs(vocab_size=50257, n_embd=6)
    assert hashlib.sha256(" ".join(gpt2.tokens).encode()).hexdigest() == huggingface.GPT2_TOKENS
    model.save_pretrained(tmp_path / "none")
    model.save_pretrained(tmp_path / "one")
    old = tokenizer_to_hf(gpt2)  # as openai-community has it: made by an early version
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
@pytest.mark.parametrize("special", [["</s>"], []])
def test_without_an_end_of_text_there_is_none(tmp_path, eos, special):
    hf_folder(tmp_path / "hf", trained_elsewhere(special))
    change(tmp_path / "hf", "tokenizer_config.json", eos_token=eos)
    _, tokenizer = load_model(tmp_path / "hf", "cpu")
    assert tokenizer.kind == "bpe" and tokenizer.eot_id is None
    assert load_tokenizer(tokenizer.to_dict()).to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize("special", [[], {"<s>": "0"}, {"<s>": 258}, {"<s>": -1}, {"a": 0, "b": 0}])
def test_bad_input_as_special_tokens_is_refused(special):
    with pytest.raises(ValueError, match="special"):
        load_tokenizer(BPETokenizer(SYMBOLS).to_dict() | {"special": special, "eot": None})


FOX = {"id": 400, "content": "fox", "special": False}
FOX |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["b", -2.0]]}


@pytest.mark.parametrize(
    "edit, vocab_size, said",
    [
        (lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), 400, "pre_tokenizer"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), 400, "its normalizer cannot"),
        (lambda spec: spec["model"]["vocab"].update({"!#%": 400}), 401, "not made of two earlier"),
        (lambda spec: spec["model"]["merges"].pop(), 400, "its merges cannot be had here"),
        (lambda spec: spec["added_tokens"].append(FOX), 401, "it looks for 'fox' in every text"),
        (lambda spec: spec.update(model=UNIGRAM), 400, "its model is Unigram"),
        (dict.clear, 400, "no readable tokenizer.json"),
        (lambda spec: None, 300, "the model 300"),
        (None, 400, "add_prefix_space is set"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_exactly_is_left_out_by_name(
    tmp_path, from_hf, edit, vocab_size, said
):
    folder = hf_folder(tmp_path / "hf", trained_elsewhere([]), vocab_size)
    spec = json.loads((folder / "tokenizer.json").read_text())
    if edit is None:
        change(folder, "tokenizer_config.json", add_prefix_space=True)
    else:
        edit(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    code, lines = from_hf(folder)
    said_all = "\n".join(lines)
    assert code == 0 and "left out" in said_all and said in said_all
    assert checkpoint.load(tmp_path / "out.pt")["tokenizer"] == {}
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_model(tmp_path / "out.pt", "cpu")
    assert load_model(tmp_path / "out.pt", "cpu", need_tokenizer=False)[1] is None


def test_a_tokenizer_of_another_kind_is_left_out(folder, from_hf):
    (folder / "vocab.txt").write_text("a")
    assert "no readable tokenizer.json" in "\n".join(from_hf(folder)[1])


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
        if asked := self.headers.get("Range"):
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            return self.reply(206, body[first:], headers)
        part, length = body, len(body)
        if self.command == "GET" and name == "model.safetensors":
            if self.server.fault == "cut":
                part = body[: length // 2]
            if self.server.fault == "short":
                part, length = body[:-100], length - 100
        return self.reply(200, part, headers, length)

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
    hub, tmp_path, monkeypatch, capsys, from_hf
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
    code, [line] = from_hf("org/other")
    assert code == 2 and "HF_HUB_OFFLINE is set" in line


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
def test_hub_failures_are_one_line_and_exit_2(hub, monkeypatch, from_hf, fault, name, said):
    hub.fault = fault
    if fault == "gone":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, [line] = from_hf(name)
    assert code == 2 and f"{name}: " in line and said in line


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
