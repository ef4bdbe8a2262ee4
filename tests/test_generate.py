"""Sampling against a plain NumPy version; cached, batched and streamed text against the simplest
way to the same text; the command line as a person meets it."""

import contextlib
import io
import os
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import generate
from config import GPT2Config
from convert import load_model, new_state
from generate import Sampling, TextRow, batch_generate, generate_ids, generate_texts, sample_text
from model import GPT2
from tokenizer import BPETokenizer, CharTokenizer
from utils import run

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz=<|>/"


def tiny_model(vocab_size, block_size=16, position="learned"):
    """Far from the first random weights, where all logits are near zero."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "position": position}
    model = GPT2(GPT2Config(vocab_size=vocab_size, block_size=block_size, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5).add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save_checkpoint(path, tokenizer):
    model = tiny_model(tokenizer.vocab_size)
    state = new_state(model.config, model.state_dict(), tokenizer) | {
        "step": 7,
        "best_val_loss": 1.25,
    }
    checkpoint.save(path, state)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a small char model in checkpoints/best_checkpoint.pt."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "checkpoints" / checkpoint.BEST, CharTokenizer.train(ALPHABET))
    return tmp_path


@pytest.fixture
def char():
    tokenizer = CharTokenizer.train(ALPHABET)
    return tiny_model(tokenizer.vocab_size).double(), tokenizer


def cli(*flags):
    fixed = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", "12"]
    return run(generate.main, [*fixed, *flags])


def type_lines(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# ---------------------------------------------------------------- choosing a token


def plain_choice(logits, uniform, temperature, top_k, top_p):
    """The same rule for one row, in the words of its definition."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    p = np.exp((logits[order] - logits[order[0]]) / temperature)
    p /= p.sum()
    if top_p is not None:
        kept, total = [], 0.0
        for value in p:
            kept.append(value)
            total += value
            if total >= top_p:
                break
        p = np.array(kept) / total
    total = 0.0
    for token, value in zip(order, p, strict=False):
        total += value
        if uniform < total:
            return token
    return order[len(p) - 1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.9, 1.0])
def test_sample_is_the_plain_numpy_version(temperature, top_k, top_p):
    rng = np.random.default_rng(1)
    logits, uniform = rng.normal(size=(200, 40)) * 3, rng.random(200)
    found = generate.sample(
        torch.tensor(logits), torch.tensor(uniform), temperature, top_k, top_p
    ).tolist()
    rows = zip(logits, uniform, strict=True)
    assert found == [plain_choice(row, u, temperature, top_k, top_p) for row, u in rows]


def test_temperature_0_takes_the_most_likely():
    logits = torch.randn(50, 30)
    found = generate.sample(logits, torch.rand(50), temperature=0, top_k=3, top_p=0.1)
    assert torch.equal(found, logits.argmax(dim=1))


@pytest.mark.parametrize("temperature", [1e-5, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_temperatures_give_valid_ids(temperature, dtype):
    logits = (torch.randn(100, 30) * 1000).to(dtype)
    found = generate.sample(logits, torch.rand(100), temperature)
    assert ((found >= 0) & (found < 30)).all()
    if temperature < 1:
        assert torch.equal(logits.gather(1, found[:, None])[:, 0], logits.max(dim=1).values)


def test_the_ends_of_the_unit_interval_choose_tokens_with_probability():
    p = torch.tensor([[0.5, 0.25, 0.0, 0.0]]).repeat(2, 1)
    assert generate.draw(p, torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_a_top_p_of_1_leaves_no_token_out():
    values = torch.tensor([[0.0] + [-17.0] * 1000])  # a sum in float32 reaches 1 before its end
    assert (generate.probabilities(values, top_p=1.0) > 0).all()


def test_tokens_come_as_often_as_their_probability_says():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    counts = torch.zeros(4)
    for uniform, _ in zip(generate.uniform_numbers(3, [0], "cpu"), range(20_000), strict=False):
        counts[generate.sample(logits, uniform)] += 1
    assert torch.allclose(counts / 20_000, logits.softmax(dim=1)[0], atol=0.015)


# ---------------------------------------------------------------- tokens


PROMPTS = [[1, 2, 3], [4], list(range(16)), [5] * 11, list(range(30)) * 2]


def columns(model, prompts, sampling, **options):
    """The new ids of each row."""
    return list(zip(*generate_ids(model, prompts, sampling, **options), strict=True))


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_cached_is_uncached_and_a_row_is_its_prompt_alone_past_block_size(temperature, position):
    model = tiny_model(len(ALPHABET), position=position).double()
    sampling = Sampling(60, temperature, top_k=20)
    cached = columns(model, PROMPTS, sampling)
    assert cached == columns(model, PROMPTS, sampling, use_cache=False)
    assert cached == [columns(model, [prompt], sampling)[0] for prompt in PROMPTS]


def test_packed_weights_multiply_as_before_and_leave_no_trace():
    model = tiny_model(len(ALPHABET)).bfloat16()
    cache = generate.new_cache(model, 3)
    packed = generate.pack_linears(model, 3)
    if not packed:
        pytest.skip("no oneDNN for bfloat16 on this CPU")
    assert len(packed) == 2 * 4 + 1  # each linear layer once, the head too
    x = torch.randn(3, 1, 16).bfloat16()
    with torch.inference_mode():
        for layer, multiply in packed.items():
            some = x if layer.in_features == 16 else x.repeat(1, 1, 4)
            assert (multiply(some) - layer(some)).abs().max() < 0.02 * layer(some).abs().max()
        logits = generate.decoder(model, cache)(torch.tensor([1, 2, 3]))
        expected = model(torch.tensor([[1], [2], [3]]))[0][:, 0]
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert not any("forward" in vars(module) for module in model.modules())
    assert generate.pack_linears(model, 3) is packed
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(2)
    assert generate.pack_linears(model, 3) is not packed
    with torch.inference_mode():
        assert generate.pack_linears(tiny_model(len(ALPHABET)).bfloat16(), 3)


def test_ctrl_c_while_weights_are_swapped_stays_ctrl_c_and_leaves_no_trace():
    class Interrupted(dict):
        def items(self):
            yield next(iter(super().items()))
            raise KeyboardInterrupt

    layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    packed = Interrupted(dict.fromkeys(layers, abs))
    with pytest.raises(KeyboardInterrupt):
        with generate.fast_linears(packed, 1, torch.device("cpu")):
            pass
    assert not any("forward" in vars(layer) for layer in layers)


class FakeCUDA:
    """As much of torch.cuda as recording needs, on a CPU: a graph's replay calls the step again,
    with the host's numbers as they were when it was recorded.
    """

    def __init__(self, decoder):
        self.decoder, self.streams = decoder, []  # those that something was run or recorded on

    def device(self, device):
        return contextlib.nullcontext()

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self):
        return self.Stream()

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        yield

    def CUDAGraph(self):
        return SimpleNamespace(replay=self.replay)

    def graph(self, graph, stream=None):
        self.lengths = list(self.decoder.cache.lengths)
        return self.stream(stream)

    def replay(self):
        decoder, cache = self.decoder, self.decoder.cache
        now, cache.lengths = cache.lengths, self.lengths
        decoder.logits = decoder.decode(decoder.new)
        cache.lengths = now


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_the_step_of_a_graph_gives_the_same_text_past_block_size(monkeypatch, position):
    model, plain = tiny_model(len(ALPHABET), position=position).double(), generate.decoder
    rows = [PROMPTS, [[5] * 15], PROMPTS[:2]]  # learned, begun full; nearly full; any positions
    expected = [columns(model, prompts, Sampling(60, 0.9)) for prompts in rows]

    def graphed(model, cache):
        decoder = generate.GraphedDecoder(plain(model, cache), cache)
        monkeypatch.setattr(torch, "cuda", FakeCUDA(decoder))
        return decoder

    monkeypatch.setattr(generate, "decoder", graphed)
    assert [columns(model, prompts, Sampling(60, 0.9)) for prompts in rows] == expected
    warm, recorded = torch.cuda.streams
    assert warm is recorded  # torch's own stream is on the first device that ever recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_gives_the_text_of_plain_steps(monkeypatch):
    model = tiny_model(len(ALPHABET)).double().cuda()
    graphed = columns(model, PROMPTS, Sampling(60, 0.9))
    monkeypatch.setattr(generate, "GraphedDecoder", lambda decode, cache: decode)
    assert columns(model, PROMPTS, Sampling(60, 0.9)) == graphed


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_contexts_agree_too(block_size):
    model = tiny_model(30, block_size).double()
    sampling = Sampling(12, 0.9)
    cached = columns(model, [[1], [2, 3, 4, 5]], sampling)
    assert cached == columns(model, [[1], [2, 3, 4, 5]], sampling, use_cache=False)


def test_a_sample_is_known_by_its_number_not_by_its_row(char):
    model, _ = char
    together = columns(model, [[1, 2]] * 3, Sampling(20), samples=[0, 1, 2])
    alone = [columns(model, [[1, 2]], Sampling(20), samples=[n])[0] for n in range(3)]
    assert together == alone and len(set(together)) == 3


def test_more_tokens_begin_with_the_same_ones(char):
    model, _ = char
    long = columns(model, [[1, 2]], Sampling(300))[0]
    assert long[:20] == columns(model, [[1, 2]], Sampling(20))[0]


def test_a_row_ends_at_eot_and_the_others_go_on(char):
    model, _ = char
    free = columns(model, PROMPTS, Sampling(40))
    eot = free[0][5]
    rows = columns(model, PROMPTS, Sampling(40), eot_id=eot)
    for row, whole in zip(rows, free, strict=True):
        end = whole.index(eot) if eot in whole else len(row)
        assert row == (whole[:end] + (None,) * (len(row) - end))
    assert columns(model, PROMPTS[:1], Sampling(40), eot_id=eot)[0].count(None) == 1


def test_generating_leaves_global_random_state_alone(char):
    model, tokenizer = char
    model.train()
    before = torch.get_rng_state()
    text = sample_text(model, tokenizer, "ab", 20, temperature=0.8, top_k=200, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and text.startswith("ab") and len(text) == 22
    assert text == sample_text(model, tokenizer, "ab", 20, seed=3)


def test_sample_text_works_under_autocast(char):
    _, tokenizer = char
    model = tiny_model(tokenizer.vocab_size)
    with torch.autocast("cpu", torch.bfloat16):
        text = sample_text(model, tokenizer, "", 40)
    assert len(text) == 40


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("stop", [None, "\n\n", "aab", "é"])
def test_streamed_text_is_the_whole_text_up_to_the_stop(stop):
    tokenizer = BPETokenizer.train("aab é 你好 🙂 " * 20, 290)
    rng = np.random.default_rng(2)
    for _ in range(200):
        ids = rng.integers(tokenizer.vocab_size, size=int(rng.integers(60))).tolist()
        ids += tokenizer.encode("aaab\n\n\né") * int(rng.integers(2))
        row, pieces = TextRow(tokenizer, stop), []
        for token in ids:
            pieces.append(row.push(token))
            assert stop is None or stop not in "".join(pieces)
        whole = tokenizer.decode(ids)
        assert "".join(pieces) + row.finish() == (whole.split(stop)[0] if stop else whole)
        assert row.finish() == ""


def test_text_ends_before_the_stop_text(char):
    model, tokenizer = char
    free = sample_text(model, tokenizer, "to be", 80)
    stop = free[20:23]
    [text] = generate_texts(model, tokenizer, ["to be"], Sampling(80, stop=stop))
    assert text == "to be" + free[5:].split(stop)[0]


def test_several_texts_come_in_the_order_of_the_prompts(char):
    model, tokenizer = char
    prompts = ["ab", "", "hello world and more", "z"]
    sampling = Sampling(20, num_samples=2)
    texts = list(generate_texts(model, tokenizer, prompts, sampling, batch_size=3))
    alone = [generate_texts(model, tokenizer, [prompt], sampling) for prompt in prompts]
    assert texts == [text for pair in alone for text in pair]
    assert texts[4].startswith("hello world and more") and texts[4] != texts[5]


def test_an_empty_prompt_starts_from_end_of_text_unseen():
    tokenizer = BPETokenizer.train("abc " * 20, 270)
    model = tiny_model(tokenizer.vocab_size).double()
    [expected] = columns(model, [[tokenizer.eot_id]], Sampling(15), eot_id=tokenizer.eot_id)
    expected = [token for token in expected if token is not None]
    assert sample_text(model, tokenizer, "", 15) == tokenizer.decode(expected)


def test_an_empty_prompt_works_without_newline_in_the_vocabulary():
    assert generate.prompt_ids(CharTokenizer.train("abc"), "") == [0]
    assert generate.prompt_ids(CharTokenizer.train("ab\n"), "") == [0]
    assert generate.prompt_ids(CharTokenizer.train("\tab\n"), "") == [1]


# ---------------------------------------------------------------- batch_generate


def test_batch_generate_returns_and_writes_every_text(here):
    prompts = ["one", "two\nlines", "one"]
    texts = batch_generate(prompts, output_file="samples.txt", max_new_tokens=10, device="cpu")
    assert [text[: len(p)] for text, p in zip(texts, prompts, strict=True)] == prompts
    assert texts[0] == texts[2]
    written = (here / "samples.txt").read_text("utf-8")
    assert written == "\n---\n".join(texts) + "\n"
    assert sorted(path.name for path in here.iterdir()) == ["checkpoints", "samples.txt"]


def test_an_output_takes_any_text_and_is_on_the_disk_before_it_replaces_another(here, monkeypatch):
    tokenizer = BPETokenizer.train("abc " * 20, 270)
    save_checkpoint(here / "checkpoints" / checkpoint.BEST, tokenizer)
    (here / "samples.txt").write_text("old")
    seen, fsync = [], os.fsync

    def watched(descriptor):
        seen.append((os.fstat(descriptor).st_size, (here / "samples.txt").read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    batch_generate("a\udcff", "samples.txt", max_new_tokens=0, device="cpu")  # no UTF-8 has it
    assert (here / "samples.txt").read_text() == "a?\n" and seen == [(3, "old")]


def test_batch_generate_reports_all_wrong_settings_at_once(here):
    with pytest.raises(ValueError) as error:
        batch_generate(["a"], temperature=float("nan"), top_k=0, top_p=2, max_new_tokens=-1)
    assert len(str(error.value).splitlines()) == 4


def test_an_output_that_cannot_be_written_is_exit_4_before_the_work(here, capsys):
    assert cli("--prompt", "a", "--output", str(here / "no" / "folder.txt")) == 4
    assert capsys.readouterr().out == ""
    assert cli("--prompt", "a", "--output", "checkpoints") == 2


def test_prompts_that_cannot_be_encoded_are_all_named_before_the_work(here, capsys):
    (here / "prompts.txt").write_text("ok\n" * 20 + "é\nok\n你\n", "utf-8")
    assert cli("--prompts_file", "prompts.txt") == 2
    out, err = capsys.readouterr()
    assert out == "" and "prompt 21: character U+00E9" in err and "prompt 23: character" in err


# ---------------------------------------------------------------- loading


def test_load_model_prefers_the_best_and_says_which(here, capsys):
    model, tokenizer = load_model(device="cpu", dtype=torch.float64)
    said = capsys.readouterr().err
    assert "checkpoints/best_checkpoint.pt" in said.replace("\\", "/") and "step 7" in said
    assert "1.25" in said and f"{model.num_params():,}" in said
    assert not model.training and next(model.parameters()).dtype == torch.float64
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    (here / "checkpoints" / checkpoint.BEST).rename(here / "checkpoints" / checkpoint.LATEST)
    load_model(device="cpu")
    assert "checkpoints/checkpoint.pt" in capsys.readouterr().err.replace("\\", "/")


def test_no_checkpoint_is_exit_3_and_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli("--prompt", "a") == 3
    assert "python train.py" in capsys.readouterr().err
    assert cli("--prompt", "a", "--checkpoint", "missing.pt") == 3
    assert "missing.pt" in capsys.readouterr().err


def test_a_checkpoint_whose_tokenizer_does_not_fit_is_exit_3(here, capsys):
    path = here / "checkpoints" / checkpoint.BEST
    state = checkpoint.load(path)
    for tokenizer in (CharTokenizer.train("abc").to_dict(), {"kind": "other"}):
        checkpoint.save(path, state | {"tokenizer": tokenizer})
        assert cli("--prompt", "a") == 3
        assert "best_checkpoint.pt" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_dtype_generates_on_a_cpu(here, capsys, dtype):
    assert cli("--prompt", "ab", "--max_new_tokens", "40", "--dtype", dtype) == 0
    assert len(capsys.readouterr().out) == 2 + 40 + 1


# ---------------------------------------------------------------- the command line


def test_stdout_holds_text_alone_and_stderr_the_settings(here, capsys):
    assert cli("--prompt", "to be") == 0
    out, err = capsys.readouterr()
    assert out.startswith("to be") and len(out) == 5 + 12 + 1 and out.endswith("\n")
    for word in ("temperature 0.8", "top_k 200", "seed 1337", "max_new_tokens 12"):
        assert word in err
    assert cli("--prompt", "to be", "--seed", "1337") == 0
    assert capsys.readouterr().out == out


def test_the_next_command_keeps_the_model_the_device_and_the_type(here, capsys, monkeypatch):
    (here / "checkpoints" / checkpoint.BEST).rename(here / "my model.pt")
    assert cli("--prompt", "to be", "--checkpoint", "my model.pt") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("next ")]
    _, *flags = shlex.split(line.split("generate.py")[1])
    assert shlex.split(line)[-1] == "--interactive"
    type_lines(monkeypatch, "a\n")
    assert run(generate.main, shlex.split(line.split("generate.py ")[1])) == 0
    assert "float32 on cpu" in capsys.readouterr().err and "float32" in flags


def test_numbers_that_overflow_are_said_to(here, capsys):
    path = here / "checkpoints" / checkpoint.BEST
    state = checkpoint.load(path)
    torch.manual_seed(0)
    state["model"]["transformer.h.0.mlp.c_fc.weight"].normal_(0, 1e4)  # float16 ends at 65,504
    checkpoint.save(path, state)
    for dtype, said in (("float32", 0), ("float16", 1)):
        assert cli("--prompt", "to be", "--dtype", dtype) == 0
        assert capsys.readouterr().err.count(f"not finite in {dtype}") == said


def test_a_stop_text_is_shown_on_the_line_of_the_settings(here, capsys):
    assert cli("--prompt", "a", "--stop", "\n\n") == 0
    assert r"stop '\n\n', seed 1337" in capsys.readouterr().err


def test_out_of_gpu_memory_is_one_line_with_what_needs_less(here, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(generate, "window_logits", full)
    assert cli("--prompt", "a", "--num_samples", "9") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "out of GPU memory" in line and "--num_samples" in line


def test_several_samples_are_separated_by_a_line(here, capsys):
    assert cli("--prompt", "to be") == 0
    alone = capsys.readouterr().out
    assert cli("--prompt", "to be", "--num_samples", "2") == 0
    both = capsys.readouterr().out
    assert both.startswith(alone + "---\nto be")


def test_prompts_file_has_a_prompt_a_line(here, capsys):
    (here / "prompts.txt").write_bytes("\ufeffone\r\n\r\ntwo\n".encode())
    assert cli("--prompts_file", "prompts.txt") == 0
    out = capsys.readouterr().out
    assert cli("--prompts_file", "prompts.txt", "--output", "out.txt") == 0
    assert capsys.readouterr().out == ""
    assert (here / "out.txt").read_text("utf-8") == out
    assert out.startswith("one") and "\n---\ntwo" in out


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", ""],
        [],
        ["--prompt", "abc " * 30],
        ["--prompt", "a", "--top_k", "100000"],
        ["--prompt", "a", "--top_k", "none", "--top_p", "0.9"],
        ["--prompt", "a=b"],
        ["--prompt=a=b"],
        ["--prompt", "<|endoftext|>"],
        ["--prompt", "a", "--temperature", "1e-30"],
    ],
)
def test_unusual_input_works(here, capsys, flags):
    assert cli(*flags) == 0
    assert len(capsys.readouterr().out) >= 12 + 1


def test_a_long_prompt_is_printed_whole_and_said_to_be_cropped(here, capsys):
    assert cli("--prompt", "abc " * 30) == 0
    out, err = capsys.readouterr()
    assert out.startswith("abc " * 30)
    assert "120 tokens" in err and "cropped" in err and "block_size 16" in err


def test_temperature_0_is_the_same_with_any_seed(here, capsys):
    texts = set()
    for seed in "12":
        assert cli("--prompt", "a", "--temperature", "0", "--seed", seed) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


def test_no_new_tokens_prints_just_the_prompt(here, capsys):
    assert cli("--prompt", "to be", "--max_new_tokens", "0") == 0
    assert capsys.readouterr().out == "to be\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt", "é"], ["U+00E9 'é'", "position 0"]),
        (["--top_k", "0"], ["--top_k 0", "none"]),
        (["--top_k", "-1"], ["--top_k -1"]),
        (["--top_p", "0"], ["--top_p 0", "(0, 1]"]),
        (["--top_p", "1.5"], ["--top_p 1.5"]),
        (["--top_p", "nan"], ["--top_p nan"]),
        (["--max_new_tokens", "-1"], ["--max_new_tokens -1"]),
        (["--max_new_tokens", "many"], ["--max_new_tokens many", "whole number"]),
        (["--temperature", "-0.5"], ["--temperature -0.5"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--temperature", "inf"], ["--temperature inf"]),
        (["--num_samples", "0"], ["--num_samples 0"]),
        (["--stop", ""], ["--stop"]),
        (["--temprature", "1"], ["--temperature"]),
        (["--dtype", "int8"], ["--dtype int8"]),
        (["--device", "toaster"], ["--device toaster"]),
        (["--prompts_file", "missing.txt"], ["missing.txt"]),
        (["--prompts_file", "checkpoints"], ["checkpoints"]),
        (["--interactive", "--output", "x"], ["--output"]),
        (["--interactive", "--prompt", "x"], ["not allowed with"]),
    ],
)
def test_bad_input_is_exit_2_with_the_value(here, capsys, flags, words):
    assert cli(*flags) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1
    assert all(word in lines[0] for word in words)


def test_all_problems_are_reported_at_once(here, capsys):
    assert cli("--top_k", "0", "--top_p", "2", "--temperature", "hot", "--sede", "1") == 2
    assert capsys.readouterr().err.count("error: ") == 4


def test_prompts_that_are_not_utf8_or_missing_are_exit_2(here, capsys):
    (here / "bad.txt").write_bytes(b"ab\xff")
    (here / "blank.txt").write_bytes(b"\n \n")
    for name, word in (("bad.txt", "byte 2"), ("blank.txt", "no prompt")):
        assert cli("--prompts_file", name) == 2
        assert word in capsys.readouterr().err


def test_control_characters_are_escaped_on_a_terminal_only(monkeypatch, capsys):
    text = "a\x1b[2J\x00\x7f\x9b\r\n\té你"
    generate.show(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate.show(text)
    assert capsys.readouterr().out == "a\\x1b[2J\\x00\\x7f\\x9b\\x0d\n\té你"


def test_a_closed_pipe_is_exit_0(here, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return spare.fileno()

    with open(here / "spare", "w") as spare:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert cli("--prompt", "a") == 0


# ---------------------------------------------------------------- interactive


def test_interactive_continues_every_line_and_leaves_with_0(here, capsys, monkeypatch):
    type_lines(monkeypatch, "to be\n/set temperature 0.5\nshall i\n")
    assert cli("--interactive") == 0
    out, err = capsys.readouterr()
    assert out.startswith("to be") and "\nshall i" in out and "> " not in out
    assert "temperature 0.5" in err and "error" not in err


def test_interactive_takes_the_next_seed_for_every_line(here, capsys, monkeypatch):
    type_lines(monkeypatch, "to be\nto be\n")
    assert cli("--interactive", "--seed", "5") == 0
    both = capsys.readouterr().out
    alone = []
    for seed in ("5", "6"):
        assert cli("--prompt", "to be", "--seed", seed) == 0
        alone.append(capsys.readouterr().out)
    assert both == "".join(alone) and alone[0] != alone[1]


def test_interactive_counts_from_the_seed_that_is_set(here, capsys, monkeypatch):
    type_lines(monkeypatch, "to be\n/set seed 5\nto be\nto be\n")
    assert cli("--interactive") == 0
    lines = capsys.readouterr().out
    alone = []
    for seed in ("1337", "5", "6"):
        assert cli("--prompt", "to be", "--seed", seed) == 0
        alone.append(capsys.readouterr().out)
    assert lines == "".join(alone)


def test_interactive_without_any_input_leaves_with_0(here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # python generate.py --interactive <&-
    assert cli("--interactive") == 0


def test_interactive_shows_an_error_in_a_line_and_goes_on(here, capsys, monkeypatch):
    bad = [
        "é",
        "/set top_k 0",
        "/set top_k none",
        "/set sede 3",
        "/set temperature hot",
        "/nothing",
    ]
    type_lines(monkeypatch, "\n".join([*bad, "/help", "/show", "ok", "/quit", "never"]))
    assert cli("--interactive") == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok") and "never" not in out
    assert err.count("error: ") == 5
    assert "U+00E9" in err and "/set top_k 0" in err and "top_k none" in err and "--seed + 1" in err


def test_ctrl_c_ends_a_text_and_at_the_prompt_leaves_with_130(here, capsys, monkeypatch):
    lines = iter(["to be", "shall i"])
    real, calls = generate.show_texts, []

    def typed(_):
        for line in lines:
            return line
        raise KeyboardInterrupt

    def interrupted_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(generate, "show_texts", interrupted_once)
    assert cli("--interactive") == 130
    assert "\nshall i" in capsys.readouterr().out
