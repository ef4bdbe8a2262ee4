"""Options: what is typed becomes typed values, every problem is named at once, --help fits."""

import importlib
import io
import re
import shlex
import subprocess
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest

from config import GPT2Config
from options import Problem, describe_fields, integer, number, parse, parse_args, problems, validate

DOC = """What the script is for.

    python script.py source.txt     # an example

More.
"""
SCRIPTS = ("prepare_data", "train", "generate", "evaluate", "convert", "bench")


@dataclass
class Base:
    # what to read
    source: str  # all 100 % of it
    place: str | None = None  # cuda or cpu; unset: the best


@dataclass
class Options(Base):
    # how tokens are drawn
    command: Literal["read", "write"] | None = "read"  # what to do
    top_k: integer(1) | None = 200  # choose among the k most likely
    top_p: number(above=0, most=1) | None = None  # nucleus
    steps: integer(0, 10**6) = 3  # how many
    quiet: bool = False  # say less
    compile: bool | None = None  # faster
    words: list[str] = field(default_factory=list)  # several
    kinds: list[Literal["a", "b"]] | None = None  # some of these

    def problems(self):
        if self.command == "write" and self.place is None:
            yield Problem(("command", "place"), "--command write: needs --place")


def errors(*words):
    with pytest.raises(ValueError) as caught:
        parse_args(Options, words, DOC)
    return str(caught.value).splitlines()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "words, value",
    [
        ("--top_k 7", 7),
        ("--top_k=7", 7),
        ("--top_k none", None),
        ("--steps 1e5", 100_000),
        ("--top_p 5e-1", 0.5),
        ("--top_p 1", 1.0),
        ("--place=a=b=c", "a=b=c"),
        ("--place=-x", "-x"),
        ("--place '- x'", "- x"),
        ("--place=", ""),
        ("--place None", None),
        ("--quiet", True),
        ("--quiet false", False),
        ("--compile none", None),
        ("--compile --steps 4", True),
        ("--words a b", ["a", "b"]),
        ("--kinds b", ["b"]),
    ],
)
def test_a_text_becomes_its_field_s_value(words, value):
    options = parse_args(Options, ["x.txt", *shlex.split(words)], DOC)
    name = words.split(" ")[0].split("=")[0].removeprefix("--")
    assert getattr(options, name) == value and type(getattr(options, name)) is type(value)
    assert options.source == "x.txt"


# ---------------------------------------------------------------- problems


@pytest.mark.parametrize(
    "words, line",
    [
        ("--top_k 0", "--top_k 0: must be at least 1"),
        ("--top_k six", "--top_k six: must be a valid integer"),
        ("--top_k 2.5", "--top_k 2.5: must be a valid integer"),
        ("--top_k=-1", "--top_k -1: must be at least 1"),
        ("--steps 1e7", "--steps 10000000.0: must be at most 1000000"),
        ("--top_p nan", "--top_p nan: must be a finite number"),
        ("--top_p inf", "--top_p inf: must be a finite number"),
        ("--top_p 0", "--top_p 0: must be greater than 0"),
        ("--quiet maybe", "--quiet maybe: must be a valid boolean"),
        ("--quiet none", "--quiet none: must be a valid boolean"),
        ("--command go", "--command go: must be one of read, write"),
        ("--kinds a c", "--kinds c: must be one of a, b"),
        ("--command write", "--command write: needs --place"),
        ("--topk 1", "unknown flag --topk; did you mean --top_k?"),
        ("y.txt", "unexpected argument 'y.txt' (see "),
        ("--top_k", "argument --top_k: expected one argument (see "),
    ],
)
def test_bad_input_is_one_line_with_flag_value_and_limit(words, line):
    (said,) = errors("x.txt", *shlex.split(words))
    assert said.startswith(line)


def test_bad_input_all_problems_at_once():
    words = ["--topk", "1", "--top_k", "0", "--steps", "-1", "--command", "write", "x.txt"]
    assert [line.split(" ")[1] for line in errors(*words)] == ["flag", "0:", "-1:", "write:"]
    assert "source" in errors()[0].lower()


def test_values_from_python_keep_their_types():
    options = Options("x.txt", top_p=1, top_k=True, steps="6", words=[1], quiet=0, place=3)
    names = [problem.fields for problem in problems(options)]
    assert sorted(names) == [("place",), ("quiet",), ("steps",), ("top_k",), ("words",)]
    assert type(options.top_p) is float
    with pytest.raises(ValueError, match="--steps '6': must be a valid integer"):
        validate(options)


# ---------------------------------------------------------------- --help


def help_of(monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", "80")
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        parse_args(*arguments)
    return text.getvalue()


def test_help_has_groups_comments_defaults_and_examples(monkeypatch):
    text = help_of(monkeypatch, Options, ["--help"], DOC)
    assert "What the script is for." in text and "More" not in text
    assert "examples:\n  python script.py source.txt     # an example" in text
    groups = dict(re.findall(r"^(\w.*):\n((?:  .*\n)+)", text, re.MULTILINE))
    assert "all 100 % of it" in groups["what to read"]
    assert "cuda or cpu (default: the best)" in groups["what to read"]
    drawn = " ".join(groups["how tokens are drawn"].split())
    assert "--top_k N choose among the k most likely (default: 200)" in drawn
    assert "--top_p X nucleus (default: none)" in drawn
    assert "--command {read,write} what to do (default: read)" in drawn
    assert "--quiet [{true,false}] say less --compile" in drawn


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_a_script_fits_and_its_examples_are_understood(name, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    monkeypatch.setenv("COLUMNS", "80")
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        script.main(["--help"])
    assert max(map(len, text.getvalue().splitlines())) <= 79

    class Understood(Exception):
        pass

    def checked(function):
        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            if isinstance(result, tuple) and result[2]:
                raise ValueError(result[2])
            raise Understood

        return call

    for file in ("novel.txt", "a.txt"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    function = "parse" if hasattr(script, "parse") else "parse_args"
    monkeypatch.setattr(script, function, checked(getattr(script, function)))
    monkeypatch.setattr(subprocess, "call", lambda *words, **options: 0)  # docs/ of bench.py
    _, examples = text.getvalue().split("\nexamples:\n")
    examples = re.findall(rf"\b{name}\.py\b(.*)$", examples, re.MULTILINE)
    assert len(examples) >= 3
    for words in examples:
        with suppress(Understood):
            assert script.main(shlex.split(words, comments=True)) == 0


def test_every_field_of_the_config_is_a_flag_in_its_group(monkeypatch):
    notes = describe_fields(GPT2Config)
    assert set(notes) == {field.name for field in fields(GPT2Config)}
    assert all(comment for _, comment in notes.values())
    assert notes["n_embd"][0] == "model" and notes["log_dir"][0] == "checkpoints and logging"
    words = ["x.txt", "--grad_clip=none", "--n_layer", "0"]
    (base, config), given, found = parse(words, DOC, Base, GPT2Config)
    assert (base.source, config.grad_clip, config.n_layer) == ("x.txt", None, 12)
    assert given == {"source", "grad_clip", "n_layer"}
    assert found == [Problem(("n_layer",), "--n_layer 0: must be at least 1")]
