"""Options: what is typed becomes typed values, every problem is named at once, --help fits."""

import importlib
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from config import GPT2Config
from options import FolderName, describe_fields, integer, named, number, parse_args, problems

DOC = "What the script is for.\n\n    python script.py source.txt     # an example\n\nMore."
SCRIPTS = ("prepare_data", "train", "generate", "evaluate", "convert", "bench")


@dataclass
class Base:
    # what to read
    source: FolderName  # all 100 % of it
    place: str | None = None  # cuda or cpu; unset: the best


@dataclass
class Options(Base):
    # how tokens are drawn
    command: Literal["read", "write"] | None = "read"  # what to do
    top_k: integer(1) | None = 200  # choose among the k most likely
    top_p: number(above=0, most=1) | None = None  # nucleus
    steps: integer(0, 10**6) = 3  # how many
    quiet: bool = False  # say less
    words: list[str] = ("a",)  # several; unset: a
    kinds: list[Literal["a", "b"]] | None = None  # some of these

    def conflicts(self):
        if self.command == "write" and self.place is None:
            yield "--command write: needs --place"


def errors(words):
    with pytest.raises(ValueError) as caught:
        parse_args(Options, shlex.split(words), DOC)
    return str(caught.value).splitlines()


def test_texts_become_values_of_the_fields_types():
    words = "x.txt --command none --top_k=7 --top_p 1 --steps 0 --place=a=b=c --quiet --words b c"
    options = parse_args(Options, words.split(), DOC)
    assert options == Options("x.txt", "a=b=c", None, 7, 1, 0, True, ["b", "c"])
    assert type(options.top_p) is float
    words = shlex.split("x.txt --top_k none --place '- x' --quiet false --kinds b")
    assert parse_args(Options, words, DOC) == Options(
        "x.txt", "- x", "read", None, words=["a"], kinds=["b"]
    )


@pytest.mark.parametrize(
    "words, line",
    [
        ("--top_k 0", "--top_k 0: must be at least 1"),
        ("--top_k six", "--top_k six: must be a valid integer"),
        ("--steps 10000000", "--steps 10000000: must be at most 1000000"),
        ("--top_p nan", "--top_p nan: must be a finite number"),
        ("--quiet none", "--quiet none: must be a valid boolean"),
        ("--kinds a c", "--kinds c: must be 'a' or 'b'"),
        ("--topk 1", "unknown argument --topk; try --top_k"),
        ("y.txt", "unknown argument y.txt; try "),
        ("--top_k", "argument --top_k: expected one argument (see "),
    ],
)
def test_bad_input_is_one_line_with_flag_value_and_limit(words, line):
    (said,) = errors(f"x.txt {words}")
    assert said.startswith(line)


def test_bad_input_all_problems_at_once():
    said = errors("--topk 1 --top_k 0 --steps -1 --command write x.txt")
    assert [line.split()[0] for line in said] == ["unknown", "--top_k", "--steps", "--command"]
    assert [line.split()[0] for line in errors("a/b --command write")] == ["source", "--command"]
    assert "source" in errors("")[0].lower()


def test_values_from_python_are_checked_too():
    options = Options("x.txt", top_p=1, top_k=0, steps="6", words=[1], quiet=3, place=3)
    assert [*map(named, problems(options))] == [{"place"}, {"top_k"}, {"quiet"}, {"words"}]
    assert type(options.top_p) is float and options.steps == 6


def test_help_has_groups_comments_defaults_and_examples(capsys):
    with pytest.raises(SystemExit):
        parse_args(Options, ["--help"], DOC)
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "What the script is for.",
        "what to read: SOURCE all 100 % of it --place PLACE cuda or cpu (default: the best)",
        "how tokens are drawn: --command {read,write} what to do (default: read)",
        "--top_k N choose among the k most likely (default: 200) --top_p X nucleus (default: none)",
        "--quiet [{true,false}] say less --words",
        "examples: python script.py source.txt # an example",
    ):
        assert part in text and "More" not in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_a_script_fits_and_its_examples_are_understood(name, tmp_path, monkeypatch, capsys):
    def understood(*arguments, **keywords):
        found = real(*arguments, **keywords)
        assert not isinstance(found, tuple) or not any([found[2], *map(problems, found[0])])
        raise KeyboardInterrupt  # before the script does any work

    script = importlib.import_module(name)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    examples = re.findall(rf"\b{name}\.py\b(.*)$", text.split("\nexamples:\n")[1], re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 79 and len(examples) >= 3
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").touch()
    Path("a.txt").touch()
    function = "parse" if hasattr(script, "parse") else "parse_args"
    real = getattr(script, function)
    monkeypatch.setattr(script, function, understood)
    for words in examples:
        with suppress(KeyboardInterrupt):
            assert script.main(shlex.split(words, comments=True)) == 0


def test_every_field_of_the_config_is_a_flag_in_its_group():
    notes = describe_fields(GPT2Config)
    assert set(notes) == {field.name for field in fields(GPT2Config)}
    assert all(comment for _, comment in notes.values())
    assert notes["n_embd"][0] == "model" and notes["log_dir"][0] == "checkpoints and logging"
