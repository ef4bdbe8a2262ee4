"""Hugging Face's models give the same logits and text there and here; refusals name the reason."""

import base64
import errno
import hashlib
import http.server
import json
import os
import threading
from pathlib import Path

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


FORMS = {
    "sharded": sharded,
    "old names": lambda folder: edit_tensors(folder, old_names),
    "no change": lambda folder: change(folder, reorder_and_upcast_attn=True, n_inner=96),
    "a tied copy": lambda folder: set_weight(folder, "lm_head.weight", lambda w: w + 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_read_in_all_its_forms(folder, form):
    model = from_pretrained(folder)
    FORMS[form](folder)
    assert difference(load_double(folder), model) <= 1e-10


def another_config(folder):
    wrong = {"model_type": "gpt_neo", "activation_function": "relu", "n_inner": 7, "n_head": 5}
    wrong |= {"layer_norm_epsilon": 1e-6, "scale_attn_weights": False, "tie_word_embeddings": False}
    change(folder, **wrong, scale_attn_by_inverse_layer_idx=True)


def other_tensors(found):
    del found["transformer.h.0.ln_1.bias"]
    found["score.weight"] = torch.zeros(2, 24)
    found["transformer.h.1.attn.c_attn.weight"] = torch.zeros(24, 71)


def lose_a_shard(folder):
    sharded(folder)
    next(folder.glob("model-00002-of-*")).unlink()


BAD = {  # how it is made; what is said, a line for each problem
    "a config": (
        another_config,
        "model_type 'gpt_neo', only gpt2",
        "activation_function 'relu', only gelu_new, gelu_pytorch_tanh, gelu",
        "n_inner 7, only None, 96",
        "layer_norm_epsilon 1e-06, only 1e-05",
        "scale_attn_weights False",
        "scale_attn_by_inverse_layer_idx True",
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
    "a missing shard": (lose_a_shard, "Missing key(s) in state_dict"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_in_a_folder_is_named_all_at_once(folder, from_hf, kind):
    make, *parts = BAD[kind]
    make(folder)
    code, lines = from_hf(folder)
    assert code == 2 and len(lines) == len(parts)
    assert all(sum(part in line for line in lines) == 1 for part in parts)


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
@pytest.mark.parametrize("command", ["to_hf", "to_gguf"])
def test_positions_that_others_do_not_know_are_refused_by_name(tmp_path, capsys, command, position):
    path = ours(tmp_path / "ours.pt", BPETokenizer(SYMBOLS), position=position)
    assert cli(command, path, tmp_path / "out") == 2
    assert f"position '{position}'" in capsys.readouterr().err


# ---------------------------------------------------------------- tokenizers


def test_transformers_continues_text_as_we_do(tmp_path, gpt2_vocabulary):
    text, texts = TEXT + CHINESE + "naïve\tcafé 😀\r\n", set()
    for tokenizer in CharTokenizer.train(text), BPETokenizer.train(text, 400), GPT2Tokenizer():
        torch.manual_seed(3)
        path, folder = ours(tmp_path / f"{tokenizer.kind}.pt", tokenizer), tmp_path / tokenizer.kind
        to_hf(path, folder)
        assert load_state(folder)[0]["tokenizer"] == tokenizer.to_dict()
        mine, tokenizer = load_model(path, "cpu", "float64")
        model, their_own = (
            from_pretrained(folder),
            transformers.AutoTokenizer.from_pretrained(folder),
        )
        for prompt in ("line 7: the", "\tfox  jumps\n\n", "今天天气"):
            written = sample_text(mine, tokenizer, prompt, 30, temperature=0)
            asked = their_own(prompt, return_tensors="pt")
            ids = model.generate(**asked, max_new_tokens=30, do_sample=False)[0]
            assert their_own.decode(ids, skip_special_tokens=True) == written
            texts.add(written)
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


def test_exported_char_refuses_a_stranger_as_ours_does():
    tokenizer = CharTokenizer.train("ab \n\t😀你")
    exported = tokenizer_to_hf(tokenizer)
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
    # as openai-community has it: made by an early version
    old = json.loads(tokenizer_to_hf(gpt2).to_str())
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


@pytest.mark.parametrize("eos", [["</s>"], {"content": ["</s>"]}, None])
def test_without_an_end_of_text_there_is_none(tmp_path, eos):
    hf_folder(tmp_path / "hf", trained_elsewhere(["</s>"]))
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


@pytest.mark.parametrize(
    "edit, vocab_size, said",
    [
        (lambda spec, _: spec["pre_tokenizer"].update(add_prefix_space=True), 400, "pre_tokenizer"),
        (
            lambda spec, _: spec.update(normalizer={"type": "Lowercase"}),
            400,
            "its normalizer cannot",
        ),
        (
            lambda spec, _: spec["model"]["vocab"].update({"!#%": 400}),
            401,
            "not made of two earlier",
        ),
        (lambda spec, _: spec["model"]["merges"].pop(), 400, "its merges cannot be had here"),
        (lambda spec, _: spec["added_tokens"].append(FOX), 401, "it looks for 'fox' in every text"),
        (lambda spec, _: spec.clear(), 400, "left out"),
        (lambda spec, _: None, 300, "the model 300"),
        (
            lambda _, settings: settings.update(add_prefix_space=True),
            400,
            "add_prefix_space is set",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_had_exactly_is_left_out_by_name(
    tmp_path, from_hf, edit, vocab_size, said
):
    folder = hf_folder(tmp_path / "hf", trained_elsewhere([]), vocab_size)
    spec, settings = json.loads((folder / "tokenizer.json").read_text()), {}
    edit(spec, settings)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    change(folder, "tokenizer_config.json", **settings)
    code, lines = from_hf(folder)
    assert code == 0 and any("left out" in line and said in line for line in lines)
    assert checkpoint.load(tmp_path / "out.pt")["tokenizer"] == {}
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_model(tmp_path / "out.pt", "cpu")
    assert load_model(tmp_path / "out.pt", "cpu", need_tokenizer=False)[1] is None


# ---------------------------------------------------------------- the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP as a download and an upload need; one repository, org/tiny."""

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, files = self.server, self.server.files
        hub.seen.append(self.path)
        name = self.path.rsplit("/", 1)[1]
        if self.path.startswith("/api/models/org/gated"):
            self.reply(b"{}", 401, {"X-Error-Code": "GatedRepo"})
        elif self.path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            self.reply(json.dumps(tree).encode())
        elif self.path.startswith("/api/models/org/tiny"):
            self.reply(json.dumps({"id": "org/tiny", "sha": COMMIT}).encode())
        elif self.path.startswith("/org/tiny/resolve/") and name in files:
            body = files[name][: -100 if hub.fault == "short" and self.command == "GET" else None]
            self.reply(body, 200, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self):
        """What upload_folder asks, in its order; the commit brings each file, base64 in a line."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert self.headers["Authorization"] == "Bearer hf_secret"
        if self.server.fault == "forbidden":
            return self.reply(b'{"error": "no rights"}', 403)
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self.reply(json.dumps({"files": [file | plain for file in files]}).encode())
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.received[line["value"]["path"]] = content
            answer = {
                "commitUrl": f"{self.server.url}/org/tiny/commit/{COMMIT}",
                "commitOid": COMMIT,
            }
            return self.reply(json.dumps(answer).encode())
        return self.reply(json.dumps({"url": f"{self.server.url}/org/tiny"}).encode())

    def reply(self, body, code=200, headers=None):
        self.send_response(code)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on 127.0.0.1 that huggingface_hub takes for the real one, and an empty cache."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.fault, server.seen, server.received = None, [], {}
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
    fetched = [path for path in hub.seen if "resolve" in path]
    assert not any("pytorch_model" in path for path in fetched)
    hub.seen.clear()
    assert same_model(tmp_path, "org/tiny")
    assert not any("resolve" in path for path in hub.seen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert same_model(tmp_path, "org/tiny") and hub.seen == []
    code, [line] = from_hf("org/other")
    assert code == 2 and "HF_HUB_OFFLINE is set" in line


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


def test_push_uploads_the_folder_as_it_is(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = ("to_hf", tmp_path / "tiny.pt", tmp_path / "pushed", "--push", "org/tiny")
    assert cli(*words) == 0
    there = {path.name: path.read_bytes() for path in (tmp_path / "pushed").iterdir()}
    assert hub.received == there and len(there) == 6
    assert f"pushed     {hub.url}/org/tiny" in capsys.readouterr().err
    card = there["README.md"].decode()
    assert 'from_pretrained("org/tiny")' in card and "# tiny" in card


def test_bad_input_to_push_is_one_line_and_keeps_the_folder(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    words = ["to_hf", tmp_path / "tiny.pt", tmp_path / "pushed", "--push"]
    for name, said in (("org/tiny", "no token; `hf auth login`"), ("tiny", "must be a name on")):
        assert cli(*words, name) == 2 and said in capsys.readouterr().err
        assert not (tmp_path / "pushed").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fault = "forbidden"
    assert cli(*words, "org/tiny") == 2
    assert "error: org/tiny: the transfer failed, `hf upload org/tiny" in capsys.readouterr().err
    assert same_model(tmp_path, tmp_path / "pushed") and hub.received == {}
