"""What is exported runs elsewhere: the same text in every tool that is installed here.

python -m pytest -m slow tests/test_world.py -rs -s    # -rs names the tools that are skipped
"""

import json
import math
import random
from collections import namedtuple
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_huggingface import numpy_example
from tokenizers import Tokenizer

import checkpoint
import evaluate
from config import GPT2Config
from convert import load_model, to_gguf, to_hf
from model import GPT2
from playground import attention
from sampling import Sampling, generate_ids, sample_text
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer

pytestmark = pytest.mark.slow
NEW = 50  # tokens
CHINESE = "却说那一日天色已晚，两个人沿着河边慢慢地走回村里去，又说起从前的事情。\n"
PROMPTS = {"char": "From fairest", "bpe": "却说那一日", "gpt2": "From fairest", "124M": "The"}
Export = namedtuple("Export", "kind checkpoint folder prompt ids text logits")


def trained(tokenizer, text):
    """A small model after 60 steps on text."""
    sizes = {"block_size": 128, "n_layer": 3, "n_head": 4, "n_embd": 128}
    model, ids = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, **sizes)), tokenizer.encode(text)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    windows = torch.tensor(ids).unfold(0, 65, 1)
    for _ in range(60):
        batch = windows[torch.randint(len(windows), (8,))]
        model(batch[:, :-1], batch[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module", params=PROMPTS)
def export(request, tmp_path_factory, gpt2_vocabulary):
    """A model in all its forms, what it makes of a prompt, and its logits for that text."""
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    text = (ROOT / "data" / "sonnets.txt").read_text("utf-8")[:60000]
    text += CHINESE * 300 if kind == "bpe" else ""
    made = {"char": CharTokenizer.train, "bpe": lambda text: BPETokenizer.train(text, 600)}
    tokenizer = made[kind](text) if kind in made else GPT2Tokenizer()
    model = GPT2(GPT2Config()) if kind == "124M" else trained(tokenizer, text)
    state = checkpoint.new_state(model.config, model.state_dict(), tokenizer)
    checkpoint.save(folder / "model.pt", state)
    to_hf(folder / "model.pt", folder / "hf")
    model, tokenizer = load_model(folder / "model.pt", "cpu", "float32")
    prompt = PROMPTS[kind]
    text = sample_text(model, tokenizer, prompt, NEW, temperature=0)
    ids = tokenizer.encode(prompt)
    ids += [i for [i] in generate_ids(model, [ids], Sampling(max_new_tokens=NEW, temperature=0))]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0][0].numpy()
    return Export(kind, folder / "model.pt", folder / "hf", prompt, ids, text, logits)


def compare(tool, export, logits, most, ids=None):
    """Whether a tool's ids, or those of its logits (T, V), continue as ours; logits within most."""
    apart, first = np.abs(logits - export.logits).max(), len(export.ids) - NEW
    new = logits[first - 1 :].argmax(-1) if ids is None else ids[first:]
    same = int(np.equal(new, export.ids[first:]).sum())
    print(f"\n{tool}, {export.kind}: {same} of {NEW} tokens, logits differ by {apart:.1e}", end="")
    assert apart <= most
    return same == NEW


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_ctranslate2(export, tmp_path, kind):
    ctranslate2 = pytest.importorskip("ctranslate2")
    if export.kind == "char":
        pytest.skip("char has no end of text, which CTranslate2 asks for")
    tokenizer = Tokenizer.from_file(str(export.folder / "tokenizer.json"))
    converter = ctranslate2.converters.TransformersConverter(str(export.folder))
    converter.convert(str(tmp_path / "ct2"), quantization=kind)
    model = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type=kind)
    tokens = [tokenizer.id_to_token(i) for i in export.ids]
    assert tokenizer.encode(export.prompt).tokens == tokens[:-NEW]
    [done] = model.generate_batch(
        [tokens[:-NEW]], max_length=NEW, sampling_topk=1, include_prompt_in_result=False
    )
    logits = np.array(model.forward_batch([tokens[:-1]]))[0]
    ids, most = export.ids[:-NEW] + done.sequences_ids[0], 1e-3 if kind == "float32" else 1
    same = compare(f"CTranslate2 {kind}", export, logits, most, ids)
    assert same or kind == "int8"


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_llama_cpp(export, tmp_path, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    if export.kind == "char":
        pytest.skip("no char tokenizer in a GGUF")
    to_gguf(export.checkpoint, tmp_path / "model.gguf", kind)
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, logits_all=True, verbose=False)
    ids = model.tokenize(export.prompt.encode(), add_bos=False)
    assert ids == export.ids[:-NEW]
    ids += islice(model.generate(ids, temp=0), NEW)
    assert kind != "f32" or model.detokenize(ids).decode() == export.text
    model.reset()
    model.eval(export.ids[:-1])
    logits = np.array(model.scores[: len(export.ids) - 1])
    same = compare(f"llama.cpp {kind}", export, logits, 1, ids)
    assert same or kind != "f32"


def test_onnxruntime(export, tmp_path):
    """As docs/world.md has it."""
    onnxruntime, transformers = map(pytest.importorskip, ("onnxruntime", "transformers"))
    pytest.importorskip("onnxscript")
    model = transformers.AutoModelForCausalLM.from_pretrained(export.folder, use_cache=False)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    shapes = {"ids": {1: torch.export.Dim("T", min=2, max=model.config.n_positions)}}
    asked, path = (torch.tensor([export.ids[:8]]),), str(tmp_path / "model.onnx")
    torch.onnx.export(Logits().eval(), asked, path, dynamo=True, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    logits = session.run(None, {"ids": np.array([export.ids[:-1]])})[0]
    assert compare("onnxruntime", export, logits[0], 1e-3)


def test_transformer_lens(export):
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    model = bridge.TransformerBridge.boot_transformers(str(export.folder), device="cpu")
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.tensor([export.ids[:-1]]))
    T = len(export.ids) - 1
    assert cache["blocks.0.attn.hook_pattern"].shape == (1, model.cfg.n_heads, T, T)
    assert compare("TransformerLens", export, logits[0].numpy(), 1e-3)


def test_bertviz(export):
    bertviz, transformers = map(pytest.importorskip, ("bertviz", "transformers"))
    options = {"attn_implementation": "eager", "output_attentions": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(export.folder, **options)
    weights = model(torch.tensor([export.ids])).attentions
    mine, tokenizer = load_model(export.checkpoint, "cpu", "float32")
    assert (torch.cat(weights) - attention(mine, export.ids)).abs().max() <= 1e-5
    tokens = [tokenizer.decode([i]) for i in export.ids]
    page = bertviz.head_view(weights, tokens, html_action="return").data
    assert len(page) > 10000 and json.dumps(tokens[0])[1:-1] in page


def test_numpy_alone(export):
    logits = numpy_example(export.folder)(export.ids[:-1])
    assert compare("NumPy", export, logits, 1e-3)


# ---------------------------------------------------------------- lm-evaluation-harness

CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{ctx}}", "doc_to_target": "{{label}}"}
CHOICE |= {"doc_to_choice": "{{endings}}"}
CHOICE |= {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
WORD = {"output_type": "loglikelihood", "doc_to_text": "{{text.rsplit(' ', 1)[0]}}"}
WORD |= {"doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}"}
WORD |= {"metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]}
TASKS = {"hellaswag": CHOICE, "lambada": WORD}


def made_examples(folder):
    """Files of 100 examples of each kind from the sonnets, and the harness's tasks for them."""
    draw, rows = random.Random(0), {name: [] for name in TASKS}
    lines = (ROOT / "data" / "sonnets.txt").read_text("utf-8").split("\n")
    lines = [line.split() for line in lines if len(line.split()) > 5]
    for _ in range(100):
        words, endings = draw.choice(lines), [draw.choice(lines)[-3:] for _ in range(3)]
        endings.insert(label := draw.randrange(4), words[-3:])
        endings = [" ".join(ending) for ending in endings]
        rows["hellaswag"] += [{"ctx": " ".join(words[:-3]), "endings": endings, "label": label}]
        rows["lambada"] += [{"text": " ".join(draw.choice(lines))}]
    for name, found in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        yield {"task": f"made_{name}", "test_split": "test"} | data | TASKS[name]


def test_lm_evaluation_harness(export, tmp_path, monkeypatch):
    """Its figures and ours on the same 200 examples; acc_norm is defined otherwise there."""
    lm_eval = pytest.importorskip("lm_eval")
    if export.kind in ("124M", "char"):
        pytest.skip("random weights, or no end of text, which lm-eval asks for")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = {"pretrained": str(export.folder), "dtype": "float32", "logits_cache": False}
    tasks, where = list(made_examples(tmp_path)), {"device": "cpu", "batch_size": 8}
    theirs = lm_eval.simple_evaluate("hf", asked, tasks=tasks, bootstrap_iters=0, **where)
    model, tokenizer = load_model(export.checkpoint, "cpu", "float32")
    for name in TASKS:
        found = theirs["results"][f"made_{name}"].items()
        found = {key.partition(",")[0]: value for key, value in found}
        options = evaluate.Options(file=str(tmp_path / f"{name}.jsonl"), **where)
        ours = evaluate.TASKS[name](model, tokenizer, options)
        for metric in {"acc", "acc_norm", "perplexity"} & found.keys():
            print(f"\n{name} {metric}, {export.kind}: {found[metric]:.4f} there,", end="")
            print(f" {ours[metric]:.4f} here", end="")
            assert metric == "acc_norm" or math.isclose(found[metric], ours[metric], rel_tol=1e-3)
