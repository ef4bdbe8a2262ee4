"""Links lead somewhere, names and flags exist, and the commands of README and tour work."""

import contextlib
import functools
import gzip
import importlib
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, in_child
from test_house import EVENING, FILES, MAY_IMPORT, SCRIPTS

import checkpoint
from config import GPT2_CONFIGS, GPT2Config
from convert import to_hf
from model import GPT2
from tokenizer import BPETokenizer

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
TOURS = [ROOT / "docs" / "tour.md", ROOT / "docs" / "tour.zh-CN.md"]
WORLDS = [ROOT / "docs" / "world.md", ROOT / "docs" / "world.zh-CN.md"]
SOURCES = {path.stem: path.read_text("utf-8") for path in FILES}
TESTS = "".join(
    " ".join([path.stem, *re.findall(r"def (test_\w+)", path.read_text("utf-8"))])
    for path in ROOT.glob("tests/test_*.py")
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# [file.py](../file.py) `name`, `name`: what a stop of the tour asks to read
READ = re.compile(r"\[(\w+)\.py\]\(\.\./\1\.py\)((?:[\s,、]*`[\w.]+`)+)")
# a script that a command runs, and what follows it, over lines that end with a backslash
GOES_ON = r"(?:\\\n|[^`\n#|&])*"
COMMAND = re.compile(
    rf"\b(?:python|torchrun)\b(?:\\\n|[^`\n|])*?\b({'|'.join(SCRIPTS)})\.py( {GOES_ON})"
)


def prose(path):
    return BLOCK.sub("", path.read_text("utf-8"))


def anchors(path):
    """What a page's headings are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(path, language):
    return [text for name, text in BLOCK.findall(path.read_text("utf-8")) if name == language]


@functools.cache
def flags(script, *work):
    """The flags in the help of a script, or of a work of bench.py."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        importlib.import_module(script).main([*work, "--help"])
    return set(re.findall(r"--\w+", text.getvalue()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere_and_commands_have_only_flags_that_exist(path):
    for link in re.findall(r'(?:\]\(|src=")(?!https?:)([^)"\s]+)[)"]', prose(path)):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"
    for script, rest in COMMAND.findall(path.read_text("utf-8")):
        words = rest.replace("\\\n", " ").split()
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        work = words[:1] if script == "bench" else []
        assert used <= flags(script, *work), f"{script}.py{rest}"
    for words in re.findall(r'-k "?([\w ]+)', path.read_text("utf-8")):
        assert all(word in TESTS for word in words.strip().split(" or ")), words


@pytest.mark.parametrize("path", TOURS, ids=lambda path: path.name)
def test_what_a_tour_names_and_quotes_is_the_code_of_today(path):
    text = path.read_text("utf-8")
    found = READ.findall(text)
    assert {file for file, _ in found} >= {*EVENING, *SCRIPTS} - {"config", "bench"}
    for file, names in found:
        for name in re.findall(r"(\w+)`", names):
            assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.* = ", SOURCES[file], re.M), name
    code = "".join(SOURCES.values())
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", text):
        assert all(re.search(rf"\b{part.removesuffix('N')}", code) for part in name.split(".")), (
            name
        )
    assert all(map(is_quoted, blocks(path, "python")))
    files = [word for word in blocks(path, "text")[0].split() if word in SOURCES]
    assert files == list(MAY_IMPORT)  # a file imports those before it
    keys = re.findall(r"^\|?(.*?) \|", text.split("\n## 10.")[1].split("\n\n|")[1], re.M)
    assert re.findall(r"`(\w+)`", "".join(keys)) == [*checkpoint.State.model_fields]


def is_quoted(block):
    """Whether one file has all lines of the block, in this order; it may leave some out."""
    wanted = [line.strip() for line in block.splitlines()]
    for text in SOURCES.values():
        lines = map(str.strip, text.splitlines())
        if all(line in lines for line in wanted):  # each is looked for behind the one before
            return True
    return False


@pytest.mark.parametrize("pair", [READMES, TOURS, WORLDS], ids=["README", "tour", "world"])
def test_both_languages_have_the_same_headings_links_code_and_commands(pair):
    """README.zh-CN.md has more: what helps in China."""
    links = r"(tour|world)(\.zh-CN)?\.md(#[^)]*)?"
    texts = [re.sub(links, r"\1.md", prose(path)) for path in pair]
    to_itself = "|".join(re.escape(path.name) for path in pair)
    for pattern in (r"^#+ (?:\d+)?", rf"(?:\]\((?!#|{to_itself})|src=)[^)\s]+", r"`[^`\n]+`"):
        english, chinese = (Counter(re.findall(pattern, text, re.M)) for text in texts)
        assert not english - chinese
        assert pair is READMES or not chinese - english
    assert commands(pair[0]) and commands(pair[0]) == commands(pair[1])


def test_the_comparison_counts_what_is_here():
    lines = sum(len(SOURCES[file].splitlines()) for file in ("model", "train", "state"))
    for page in READMES:
        row = next(line for line in page.read_text("utf-8").splitlines() if "| 666 |" in line)
        said = int(re.search(r"[\d,]+", row)[0].replace(",", ""))
        assert abs(said - lines) < 0.05 * lines, f"{lines} lines"


# ---------------------------------------------------------------- the commands, run

NOT_RUN = (  # what a command begins with that is not run here: CI's first steps and this very test,
    *("python3 -m venv", ".venv/bin/pip install", "pip install", ".venv/bin/python -m pytest"),
    # servers, which do not end, torch's processes (test_parallel.py has many), minutes of training,
    *("tensorboard", "python playground.py", "torchrun", "python train.py --resume"),
    # what needs a network, and what needs GPT-2's vocabulary
    *("python prepare_data.py --dataset fineweb", "python evaluate.py --task hellaswag lambada"),
    *("python prepare_data.py --input crawl/", "python prepare_data.py --adopt"),
)


def commands(path):
    """The words of each command that a page asks to run, in order; Python, but for quoted code."""
    found = []
    for language, block in BLOCK.findall(path.read_text("utf-8")):
        assert language in ("", "python", "text"), f"{path.name}: ```{language}"
        if language == "python" and not is_quoted(block):
            found.append(["python", "-c", block])
        elif language == "":
            lines = block.replace("\\\n", " ").splitlines()
            typed = [line[2:] for line in lines if line.startswith("$ ")]  # what follows is printed
            for line in typed or lines:
                words = shlex.split(line, comments=True)
                chain = itertools.groupby(words, lambda word: word != "&&")
                found += [list(command) for is_command, command in chain if is_command]
    return found


def in_a_fork(command, folder):
    """Exit code and output of a command in a fork that has torch; presets train two steps."""
    printed, (_, script, *arguments) = folder / "printed.txt", command

    def child():
        os.chdir(folder)
        for name in ("shakespeare-cpu", "finetune"):
            GPT2_CONFIGS[name]["max_iters"] = 2
        sys.stdin, sys.argv = io.StringIO("To be, or not\n"), [script, *arguments]
        redirect, out = contextlib.redirect_stdout, printed.open("w", encoding="utf-8")
        with out, redirect(out), contextlib.redirect_stderr(out):
            try:
                if script == "-c":
                    exec(arguments[0], {"__name__": "__main__"})
                else:
                    runpy.run_path(script, run_name="__main__")
            except SystemExit as done:
                return done.code

    return in_child(child), printed.read_text("utf-8")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's folder: the scripts, all files that the pages speak of, and tiny GPT-2s."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("data/shakespeare", "books"):
        (tmp_path / name).mkdir(parents=True)
    for path in [*FILES, ROOT / "data" / "sonnets.txt"]:
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    sonnets = (ROOT / "data" / "sonnets.txt").read_text("utf-8")
    text = sonnets[:5000] + "".join(sorted(set(sonnets)))  # all of its characters
    for name in ("data/shakespeare/input.txt", "novel.txt", "books/one.txt", "notes.md"):
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "prompts.txt").write_text("To be\nShall I\n", "utf-8")
    (tmp_path / "talk.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Good morning."}\n'))
    tokenizer = BPETokenizer.train([text], 300)
    shape = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT2(GPT2Config(**(shape := shape | {"vocab_size": tokenizer.vocab_size})))
    state = checkpoint.new_state(model.config, model.state_dict(), tokenizer)
    checkpoint.save(tmp_path / "tiny.pt", state)
    for name in ("gpt2", "gpt2-xl"):
        to_hf(tmp_path / "tiny.pt", tmp_path / name)
    torch.save({"model": model.state_dict(), "model_args": shape}, tmp_path / "ckpt.pt")
    return tmp_path


@pytest.mark.parametrize("page", [READMES[0], TOURS[0]], ids=lambda path: path.name)
def test_the_commands_of_a_page_work_as_they_stand(page, reader):
    """From top to bottom in one folder, after README's first line, which sets up and trains."""
    to_run = commands(page)
    if page in TOURS:
        to_run = commands(READMES[0])[:5] + to_run
        (reader / "novel.txt").write_text(
            "却说那一日天色已晚，两个人沿着河边慢慢地走。" * 200, "utf-8"
        )
    for command in to_run:
        if not " ".join(command).startswith(NOT_RUN):
            code, printed = in_a_fork(command, reader)
            assert code == 0 and "Traceback" not in printed, f"{shlex.join(command)}\n{printed}"
