"""The command line as a person meets it, and batch_generate."""

import io
import re
import shlex
import sys
from itertools import chain, repeat
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from test_sampling import ALPHABET, tiny_model

import checkpoint
import generate
import sampling
from checkpoint import load_model, new_state
from generate import batch_generate
from logger import run
from tokenizer import CharTokenizer


@pytest.fixture
def best(tmp_path, monkeypatch):
    """The checkpoint of a small char model, the best one of the working folder."""
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer.train(ALPHABET)
    model = tiny_model(tokenizer.vocab_size)
    state = new_state(model.config, model.state_dict(), tokenizer)
    path = tmp_path / "checkpoints" / checkpoint.BEST
    checkpoint.save(path, state | {"step": 7, "best_val_loss": 1.25})
    return path


def cli(*flags):
    fixed = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", "12"]
    return run(generate.main, [*fixed, *flags])


def out_of(capsys, *flags):
    assert cli(*flags) == 0
    return capsys.readouterr().out


def test_batch_generate_returns_and_writes_every_text(best, tmp_path):
    prompts = ["one", "two\nlines", "one"]
    texts = batch_generate(prompts, output_file="samples.txt", max_new_tokens=10, device="cpu")
    assert [text[: len(p)] for text, p in zip(texts, prompts, strict=True)] == prompts
    assert texts[0] == texts[2]
    assert (tmp_path / "samples.txt").read_text("utf-8") == "\n---\n".join(texts) + "\n"
    with pytest.raises(ValueError) as error:
        batch_generate(["a"], temperature=float("nan"), top_k=0, top_p=2, max_new_tokens=-1)
    assert len(str(error.value).splitlines()) == 4


def test_load_model_prefers_the_best_then_the_latest_and_says_which(best, capsys):
    model, _ = load_model(device="cpu", dtype=torch.float64)
    said = capsys.readouterr().err.replace("\\", "/")
    parts = "checkpoints/best_checkpoint.pt", "step 7", "1.25", f"{model.num_params():,}"
    assert all(part in said for part in parts)
    assert not model.training and next(model.parameters()).dtype == torch.float64
    best.rename(best.with_name(checkpoint.LATEST))
    load_model(device="cpu")
    assert "checkpoints/checkpoint.pt" in capsys.readouterr().err.replace("\\", "/")
    best.with_name(checkpoint.LATEST).unlink()
    for flags, said in ([], "python train.py"), (["--checkpoint", "missing.pt"], "missing.pt"):
        assert cli("--prompt", "a", *flags) == 3
        assert said in capsys.readouterr().err


def test_stdout_holds_text_alone_and_stderr_the_settings(best, capsys):
    assert cli("--prompt", "to be") == 0
    out, err = capsys.readouterr()
    assert out.startswith("to be") and len(out) == 5 + 12 + 1 and out.endswith("\n")
    assert "max_new_tokens 12, temperature 0.8, top_k 200, seed 1337\n" in err
    assert cli("--prompt", "abc " * 30, "--stop", "\n\n", "--max_new_tokens", "0") == 0
    out, err = capsys.readouterr()
    assert out == "abc " * 30 + "\n" and r"stop '\n\n', seed 1337" in err
    assert "prompt of 120 tokens is cropped to its last" in err and "block_size 16" in err


def test_the_next_command_keeps_the_model_the_device_and_the_type(best, capsys, monkeypatch):
    best.rename("my model.pt")
    assert cli("--prompt", "to be", "--checkpoint", "my model.pt") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("next ")]
    flags = shlex.split(line.split("generate.py ")[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    assert flags[-1] == "--interactive" and run(generate.main, flags) == 0
    assert "float32 on cpu" in capsys.readouterr().err


def test_numbers_that_overflow_are_said_to(best, capsys):
    state = checkpoint.load(best)
    torch.manual_seed(0)
    state["model"]["transformer.h.0.mlp.c_fc.weight"].normal_(0, 1e4)  # float16 ends at 65,504
    checkpoint.save(best, state)
    for dtype, said in (("float32", 0), ("float16", 1)):
        assert cli("--prompt", "to be", "--dtype", dtype) == 0
        assert capsys.readouterr().err.count(f"not finite in {dtype}") == said


@pytest.mark.parametrize("count, several", [(12, []), (36, ["--num_samples", "3"])])
def test_stats_count_every_token_and_change_no_text(best, capsys, count, several):
    plain = out_of(capsys, "--prompt", "to be", *several)
    assert cli("--prompt", "to be", *several, "--stats") == 0
    out, err = capsys.readouterr()
    speed = r"[\d.]+ s, [\d,.]+ a second; the first after"
    found = re.search(rf"^stats +{count} tokens in {speed} .*?([\d,]+) MB$", err, re.MULTILINE)
    assert int(found[1].replace(",", "")) > 50 and out == plain


def test_several_texts_are_separated_by_a_line(best, tmp_path, capsys):
    alone = out_of(capsys, "--prompt", "one")
    assert out_of(capsys, "--prompt", "one", "--num_samples", "2").startswith(f"{alone}---\none")
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\r\n\r\ntwo\n".encode())
    out = out_of(capsys, "--prompts_file", "prompts.txt")
    assert out.startswith(alone + "---\ntwo")
    assert cli("--prompts_file", "prompts.txt", "--output", "out.txt") == 0
    said = capsys.readouterr()
    assert said.out == "" and "wrote      2 texts to" in said.err
    assert (tmp_path / "out.txt").read_text("utf-8") == out


PLAIN = ("--top_k 100000", "--top_k none --top_p 0.9", "--temperature 0", "--dtype float64")
PLAIN += ("--dtype bfloat16", "--dtype float16", "--prompt=a=b", "--prompt <|endoftext|>", "")


@pytest.mark.parametrize("flags", [*(f"--prompt=a {p}".split() for p in PLAIN), ["--prompt="]])
def test_unusual_input_works(best, capsys, flags):
    assert len(out_of(capsys, *flags)) >= 12 + 1


LIMITS = ("--top_k 0", "--top_p 0", "--max_new_tokens -1", "--temperature -0.5", "--num_samples 0")
LIMITS += ("--temperature nan", "--dtype int4", "--device toaster")
WRONG = {
    "--prompt é": "U+00E9 'é' at position 0",
    "--stop=": "--stop",
    "--temprature 1": "--temperature",
    "--prompts_file missing.txt": "missing.txt",
    "--prompts_file checkpoints": "checkpoints",
    "--prompts_file bad.txt": "byte 2",
    "--prompts_file blank.txt": "no prompt",
    "--interactive --output x": "--output",
    "--interactive --prompt x": "not allowed with",
    "--prompt a --output checkpoints": "checkpoints: not",
}


@pytest.mark.parametrize("flags, said", [*zip(LIMITS, LIMITS, strict=True), *WRONG.items()])
def test_bad_input_is_exit_2_with_the_value(best, tmp_path, capsys, flags, said):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "blank.txt").write_bytes(b"\n \n")
    assert cli(*flags.split()) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and said in line


def test_all_problems_are_reported_at_once(best, tmp_path, capsys):
    assert cli("--top_k", "0", "--top_p", "2", "--temperature", "hot", "--sede", "1") == 2
    assert capsys.readouterr().err.count("error: ") == 4
    (tmp_path / "prompts.txt").write_text("ok\n" * 20 + "é\nok\n你\n", "utf-8")
    assert cli("--prompts_file", "prompts.txt") == 2
    out, err = capsys.readouterr()  # before the work
    assert out == "" and "prompt 21: character U+00E9" in err and "prompt 23: character" in err


def test_no_room_on_disk_or_in_memory_is_one_line(best, capsys, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
    monkeypatch.setattr(sampling, "prefill", Mock(side_effect=full))
    assert cli("--prompt", "a", "--output", str(best / "in_a_file.txt")) == 4  # before the work
    assert cli("--prompt", "a", "--num_samples", "9") == 2
    assert re.search("^error: .*out of memory.*--num_samples", capsys.readouterr().err, re.M)


def test_interactive_continues_what_is_typed_with_the_next_seed(best, capsys, monkeypatch):
    typed = "to be|to be\\|shall i|/again|/set seed 5|/set temperature 0.5|to be|end\\"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed.replace("|", "\n")))
    assert cli("--interactive") == 0
    out, err = capsys.readouterr()
    asked = [("to be", 1337, 0.8), ("to be\nshall i", 1338, 0.8), ("to be\nshall i", 1339, 0.8)]
    asked += [("to be", 5, 0.5), ("end\n", 6, 0.5)]
    names = "--prompt", "--seed", "--temperature"
    flags = [[f"{n}={v}" for n, v in zip(names, values, strict=True)] for values in asked]
    alone = [out_of(capsys, *words) for words in flags]
    assert out == "".join(alone) and len(set(alone)) == 5 and "error: " not in err
    monkeypatch.setattr(sys, "stdin", None)  # python generate.py --interactive <&-
    assert cli("--interactive") == 0


def test_interactive_shows_an_error_in_a_line_and_goes_on(best, capsys, monkeypatch):
    bad = ["é", "/set top_k 0", "/set sede 3", "/set temperature hot", "/nothing"]
    lines = [*bad, "/set top_k none", "/help", "ok", "/quit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli("--interactive") == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok") and "never" not in out and err.count("error: ") == 5
    assert all(part in err for part in ("U+00E9", "top_k 0", "sede", "top_k None", "--seed + 1"))


def test_ctrl_c_ends_a_text_and_at_the_prompt_leaves_with_130(best, capsys, monkeypatch):
    typed = Mock(side_effect=["to be", "shall i", KeyboardInterrupt])
    monkeypatch.setattr("builtins.input", typed)
    once = Mock(side_effect=chain([KeyboardInterrupt], repeat(DEFAULT)), wraps=sampling.prefill)
    monkeypatch.setattr(sampling, "prefill", once)
    assert cli("--interactive") == 130
    out = capsys.readouterr().out
    assert out.startswith("to be\nshall i") and len(out) == len("to be\nshall i\n") + 12
