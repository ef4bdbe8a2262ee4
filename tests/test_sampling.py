"""Sampling against plain NumPy; cached, batched and streamed text against the simplest way."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sampling
from config import GPT2Config
from model import GPT2
from sampling import Sampling, TextStream, generate_ids, generate_texts, sample_text
from tokenizer import BPETokenizer, CharTokenizer

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz=<|>/"


def tiny_model(vocab_size, block_size=16, position="learned"):
    """With logits that are not all near zero."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "position": position}
    model = GPT2(GPT2Config(vocab_size=vocab_size, block_size=block_size, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5).add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture
def char():
    tokenizer = CharTokenizer.train(ALPHABET)
    return tiny_model(tokenizer.vocab_size).double(), tokenizer


def plain_choice(logits, uniform, temperature, top_k, top_p):
    """The rule for one row, in the words of its definition."""
    order = np.argsort(-logits)[:top_k]
    p = np.exp(logits[order] / temperature)
    p = p[: 1 + (p.cumsum() < (top_p or 1) * p.sum()).sum()]
    passed = p.cumsum() / p.sum()
    return order[min((passed <= uniform).sum(), len(p) - 1)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.9, 1.0])
def test_sample_is_the_plain_numpy_version(temperature, top_k, top_p):
    rng, settings = np.random.default_rng(1), Sampling(0, temperature, top_k, top_p)
    logits, uniform = rng.normal(size=(200, 40)) * 3, rng.random(200)
    found = sampling.sample(torch.tensor(logits), torch.tensor(uniform), settings).tolist()
    rows = zip(logits, uniform, strict=True)
    assert found == [plain_choice(row, u, temperature, top_k, top_p) for row, u in rows]


@pytest.mark.parametrize("temperature", [0, 1e-5, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_temperatures_give_valid_ids(temperature, dtype):
    logits = (torch.randn(100, 30) * 1000).to(dtype)
    found = sampling.sample(logits, torch.rand(100), Sampling(temperature=temperature, top_k=None))
    assert ((found >= 0) & (found < 30)).all()
    is_most = logits.gather(1, found[:, None])[:, 0] == logits.max(dim=1).values
    assert temperature > 1 or is_most.all()


def test_only_tokens_with_probability_are_chosen():
    p = torch.tensor([[0.5, 0.25, 0.0, 0.0]]).repeat(2, 1)
    assert sampling.inverse_cdf(p, torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    values = torch.tensor([[0.0] + [-17.0] * 1000])  # a sum in float32 reaches 1 before its end
    assert (sampling.logits_to_probs(values, Sampling(1, 1.0, None, 1.0))[0] > 0).all()


PROMPTS = [[1, 2, 3], [4], list(range(16)), [5] * 11, list(range(30)) * 2]
POSITIONS = ["learned", "rope", "alibi"]


def columns(model, prompts, settings, **options):
    return list(zip(*generate_ids(model, prompts, settings, **options), strict=True))


SIZES = [("learned", 1), ("learned", 2), ("learned", 3), *((p, 16) for p in POSITIONS)]


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("position, size", SIZES)
def test_cached_is_uncached_and_a_row_is_its_prompt_alone(temperature, position, size):
    """Also past block_size."""
    model = tiny_model(len(ALPHABET), size, position).double()
    settings = Sampling(60, temperature, top_k=20)
    cached = columns(model, PROMPTS, settings)
    assert cached == columns(model, PROMPTS, settings, use_cache=False)
    assert cached == [columns(model, [prompt], settings)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("position", POSITIONS)
def test_the_step_of_a_graph_gives_the_same_text_past_block_size(monkeypatch, position):
    """On a CPU, where a replay calls the step again; as for a graph, no mask may be left out."""
    model = tiny_model(len(ALPHABET), position=position).double()
    rows = [PROMPTS, [[5] * 15], PROMPTS[:2]]  # learned, begun full; nearly full; any positions
    expected = [columns(model, prompts, Sampling(60, 0.9)) for prompts in rows]
    graphs = []

    def graphed(step, sample, num_warmup_iters):
        graphs.extend(step(*sample) for _ in range(num_warmup_iters))
        return step

    cuda = SimpleNamespace(device=contextlib.nullcontext, make_graphed_callables=graphed)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(sampling, "use_graph", lambda device: True)
    assert [columns(model, prompts, Sampling(60, 0.9)) for prompts in rows] == expected
    assert len(graphs) == len(rows)  # one a text, its steps past block_size too


def test_a_row_ends_at_end_of_text_and_the_others_go_on(char):
    model, tokenizer = char
    prompts = ["ab", "z", "hello world and more"]
    rows = columns(model, [tokenizer.encode(prompt) for prompt in prompts], Sampling(40))
    tokenizer.eot_id = rows[0][5]
    ends = [row.index(tokenizer.eot_id) if tokenizer.eot_id in row else 40 for row in rows]
    texts = map("".join, generate_texts(model, tokenizer, prompts, Sampling(40)))
    for prompt, row, end, text in zip(prompts, rows, ends, texts, strict=True):
        assert text == prompt + tokenizer.decode(row[:end])
    assert ends[0] <= 5 and len(set(ends)) > 1


def test_generating_leaves_global_random_state_alone(char):
    model, tokenizer = char
    model.train()
    before = torch.get_rng_state()
    text = sample_text(model, tokenizer, "ab", 20, temperature=0.8, top_k=200, seed=3)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert text == sample_text(model, tokenizer, "ab", 20, seed=3) and text[:2] == "ab"
    with torch.autocast("cpu", torch.bfloat16):
        assert len(sample_text(model.float(), tokenizer, "", 40)) == 40


@pytest.mark.parametrize("stop", [None, "\n\n", "aab", "é"])
def test_streamed_text_is_the_whole_text_up_to_the_stop(stop):
    tokenizer = BPETokenizer.train("aab é 你好 🙂 " * 20, 290)
    rng = np.random.default_rng(2)
    for _ in range(200):
        ids = rng.integers(tokenizer.eot_id, size=int(rng.integers(60))).tolist()
        ids += tokenizer.encode("aaab\n\n\né") * int(rng.integers(2))
        row, pieces = TextStream(tokenizer, stop), []
        for token in ids:
            pieces.append(row.push(token))
            assert stop is None or stop not in "".join(pieces)
        whole = tokenizer.decode(ids)
        assert "".join(pieces) + row.push(None) == (whole.split(stop)[0] if stop else whole)
        assert row.push(None) == ""


def test_several_texts_come_in_the_order_of_the_prompts_and_end_before_the_stop(char):
    model, tokenizer = char

    def texts(prompts, settings, batch_size=16):
        return [*map("".join, generate_texts(model, tokenizer, prompts, settings, batch_size))]

    prompts, settings = ["ab", "", "hello world and more", "z"], Sampling(20, num_samples=2)
    found = texts(prompts, settings, batch_size=3)
    assert found == [text for prompt in prompts for text in texts([prompt], settings, 1)]
    assert found[4].startswith("hello world and more") and found[4] != found[5]
    new = found[6][1:]
    assert texts(["z"], Sampling(20, stop=new[9:12])) == ["z" + new.split(new[9:12])[0]]


def test_an_empty_prompt_starts_from_what_the_tokenizer_has():
    tokenizer = BPETokenizer.train("abc " * 20, 270)
    assert sampling.prompt_ids(tokenizer, "") == [tokenizer.eot_id]
    assert sampling.prompt_ids(CharTokenizer.train("ab\n"), "") == [0]
