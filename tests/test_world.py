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
from test_convert import numpy_example

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
    if kind == "char":
        tokenizer = CharTokenizer.train(text)
    elif kind == "bpe":
        text += CHINESE * 300
        tokenizer = BPETokenizer.train(text, 600)
    else:
        tokenizer = GPT2Tokenizer()
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
    """Whether a tool continues the prompt with the same tokens: its own ids, or those that its
    logits (T, V) for our text give. The logits differ by `most` at most.
    """
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
    from tokenizers import Tokenizer

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

TASKS = {
    "made_hellaswag": """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "made_lambada": """
output_type: loglikelihood
doc_to_text: "{{text.rsplit(' ', 1)[0]}}"
doc_to_target: "{{' ' + text.rsplit(' ', 1)[1]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
}


def made_examples(folder):
    """100 examples of each kind from the sonnets, and the harness's task files for them."""
    draw, rows = random.Random(0), {name: [] for name in TASKS}
    lines = (ROOT / "data" / "sonnets.txt").read_text("utf-8").split("\n")
    lines = [line for line in lines if len(line.split()) > 5]
    for _ in range(100):
        words = draw.choice(lines).split()
        endings = [" ".join(draw.choice(lines).split()[-3:]) for _ in range(3)]
        label = draw.randrange(4)
        endings.insert(label, " ".join(words[-3:]))
        row = {"ctx": " ".join(words[:-3]), "endings": endings, "label": label}
        rows["made_hellaswag"].append(row)
        rows["made_lambada"].append({"text": " ".join(draw.choice(lines).split())})
    for name, found in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        data = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        data += f"dataset_kwargs: {{data_files: {{test: {path}}}}}\n"
        (folder / f"{name}.yaml").write_text(data + TASKS[name])


def test_lm_evaluation_harness(export, tmp_path, monkeypatch):
    """Its figures and ours on the same 200 examples; acc_norm is defined otherwise there."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    if export.kind in ("124M", "char"):
        pytest.skip("random weights, or no end of text, which lm-eval asks for")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made_examples(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(export.folder), "dtype": "float32", "logits_cache": False},
        tasks=list(TASKS),
        task_manager=manager, device="cpu", batch_size=8, bootstrap_iters=0,
    )  # fmt: skip
    model, tokenizer = load_model(export.checkpoint, "cpu", "float32")
    options = evaluate.Options(device="cpu", batch_size=8)
    for name, found in theirs["results"].items():
        task, options.file = name.removeprefix("made_"), str(tmp_path / f"{name}.jsonl")
        ours = evaluate.TASKS[task](model, tokenizer, options)
        found = {key.partition(",")[0]: value for key, value in found.items()}
        for metric in {"acc", "acc_norm", "perplexity"} & found.keys():
            print(f"\n{task} {metric}, {export.kind}: {found[metric]:.4f} there,", end="")
            print(f" {ours[metric]:.4f} here", end="")
            assert metric == "acc_norm" or math.isclose(found[metric], ours[metric], rel_tol=1e-3)
