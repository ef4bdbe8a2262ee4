"""The command line as a person meets it, and batch_generate."""

import io
import os
import re
import shlex
import sys
import traceback

import pytest
import torch
from test_sampling import ALPHABET, tiny_model

import checkpoint
import generate
import logger
import sampling
from checkpoint import load_model, new_state
from generate import batch_generate
from logger import run
from model import GPT2
from tokenizer import BPETokenizer, CharTokenizer


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


def cli(*flags):
    fixed = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", "12"]
    return run(generate.main, [*fixed, *flags])


def type_lines(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


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
    written = (here / "samples.txt").read_text()
    assert written.startswith("a") and seen[0] == (len(written), "old")


def test_batch_generate_reports_all_wrong_settings_at_once(here):
    with pytest.raises(ValueError) as error:
        batch_generate(["a"], temperature=float("nan"), top_k=0, top_p=2, max_new_tokens=-1)
    assert len(str(error.value).splitlines()) == 4


def test_an_output_that_cannot_be_written_is_exit_4_before_the_work(here, capsys):
    (here / "file").touch()
    assert cli("--prompt", "a", "--output", str(here / "file" / "in_a_file.txt")) == 4
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
    assert cli("--prompt", "to be", "--stop", "\n\n", "--max_new_tokens", "0") == 0
    out, err = capsys.readouterr()
    assert out == "to be\n" and r"stop '\n\n', seed 1337" in err
    assert cli("--prompt", "to be") == 0
    out, err = capsys.readouterr()
    assert out.startswith("to be") and len(out) == 5 + 12 + 1 and out.endswith("\n")
    for word in ("temperature 0.8", "top_k 200", "seed 1337", "max_new_tokens 12"):
        assert word in err


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


def test_out_of_memory_is_one_line_with_what_needs_less(here, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(sampling, "prefill", full)
    assert cli("--prompt", "a", "--num_samples", "9") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "out of memory" in line and "--num_samples" in line


@pytest.mark.parametrize("several", [[], ["--num_samples", "3"], ["--output", "x.txt"]])
def test_stats_count_every_token_and_change_no_text(here, capsys, several):
    assert cli("--prompt", "to be", *several) == 0
    plain = capsys.readouterr().out
    assert cli("--prompt", "to be", *several, "--stats") == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("stats ")]
    tokens = 12 * (3 if "3" in several else 1)
    assert re.search(rf"{tokens} tokens in [\d.]+ s, [\d,.]+ a second; the first after", line)
    assert float(re.search(r"([\d,]+) MB", line)[1].replace(",", "")) > 50
    assert out == plain and ("wrote      1 text to" in err) == ("--output" in several)


def test_several_samples_are_separated_by_a_line(here, capsys):
    assert cli("--prompt", "to be") == 0
    alone = capsys.readouterr().out
    assert cli("--prompt", "to be", "--num_samples", "2") == 0
    assert capsys.readouterr().out.startswith(alone + "---\nto be")


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


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt", "é"], ["U+00E9 'é'", "position 0"]),
        (["--top_k", "0"], ["--top_k 0", "at least 1"]),
        (["--top_k", "-1"], ["--top_k -1"]),
        (["--top_p", "0"], ["--top_p 0", "greater than 0"]),
        (["--top_p", "1.5"], ["--top_p 1.5"]),
        (["--top_p", "nan"], ["--top_p nan"]),
        (["--max_new_tokens", "-1"], ["--max_new_tokens -1"]),
        (["--max_new_tokens", "many"], ["--max_new_tokens many", "valid integer"]),
        (["--temperature", "-0.5"], ["--temperature -0.5"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--temperature", "inf"], ["--temperature inf"]),
        (["--num_samples", "0"], ["--num_samples 0"]),
        (["--stop", ""], ["--stop"]),
        (["--temprature", "1"], ["--temperature"]),
        (["--dtype", "int4"], ["--dtype int4"]),
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


# ---------------------------------------------------------------- interactive


def test_interactive_continues_every_line_and_leaves_with_0(here, capsys, monkeypatch):
    type_lines(monkeypatch, "to be\n/set temperature 0.5\nshall i\n")
    assert cli("--interactive") == 0
    out, err = capsys.readouterr()
    assert out.startswith("to be") and "\nshall i" in out and "> " not in out
    assert "temperature 0.5" in err and "error" not in err


def test_interactive_counts_seeds_from_the_one_that_is_set(here, capsys, monkeypatch):
    type_lines(monkeypatch, "to be\nto be\n/set seed 5\nto be\nto be\n")
    assert cli("--interactive") == 0
    lines, alone = capsys.readouterr().out, []
    for seed in ("1337", "1338", "5", "6"):
        assert cli("--prompt", "to be", "--seed", seed) == 0
        alone.append(capsys.readouterr().out)
    assert lines == "".join(alone) and len(set(alone)) == 4


def test_interactive_takes_a_prompt_of_several_lines_and_continues_it_again(
    here, capsys, monkeypatch
):
    type_lines(monkeypatch, "/again\nto be\\\nshall i\n/again\nend\\")
    assert cli("--interactive") == 0
    out, err = capsys.readouterr()
    alone = []
    for prompt, seed in (("to be\nshall i", "1337"), ("to be\nshall i", "1338"), ("end\n", "1339")):
        assert cli("--prompt", prompt, "--seed", seed) == 0
        alone.append(capsys.readouterr().out)
    assert out == "".join(alone) and len(set(alone)) == 3
    assert err.count("error: /again") == 1  # before there was anything to continue


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
    real, calls = generate.stream_text, []

    def typed(_):
        for line in lines:
            return line
        raise KeyboardInterrupt

    def interrupted_once(*arguments):
        calls.append(arguments)
        stream = real(*arguments)
        yield next(stream)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from stream

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(generate, "stream_text", interrupted_once)
    assert cli("--interactive") == 130
    out = capsys.readouterr().out
    assert out.startswith("to be\nshall i") and len(out) == len("to be\nshall i\n") + 12


def test_few_frames_lie_between_the_command_line_and_the_model(here, monkeypatch):
    found = []

    def forward(model, *arguments, **named):
        frames = [frame for frame in traceback.extract_stack() if frame.filename in ours]
        found.append([frame.name for frame in frames])
        return real(model, *arguments, **named)

    ours = {generate.__file__, sampling.__file__, logger.__file__}
    real = GPT2.forward
    monkeypatch.setattr(GPT2, "forward", forward)
    assert cli("--prompt", "a") == 0
    assert found[-1][:5] == ["run", "main", "show_texts", "stream_text", "generate_ids"]
    assert len(found[-1]) <= 6
