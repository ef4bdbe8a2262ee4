"""The documents: their links lead somewhere, the names and flags in them exist, and the commands of
README and of the tour do what they are there for.
"""

import ast
import contextlib
import functools
import gzip
import importlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
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
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
each_tour = pytest.mark.parametrize("path", TOURS, ids=lambda path: path.name)
each_pair = pytest.mark.parametrize(
    "pair", [READMES, TOURS, WORLDS], ids=["README", "tour", "world"]
)
PARTS = ("plan", "to_loss", "gpu")  # of bench.py, in docs/
MAINS = {name: importlib.import_module(name).main for name in (*SCRIPTS, *PARTS)}
SOURCES = {path.stem: path.read_text("utf-8") for path in FILES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# [file.py](../file.py) `name`, `name`: what a stop of the tour asks to read
READ = re.compile(r"\[(\w+)\.py\]\(\.\./\1\.py\)((?:[\s,、]*`[\w.]+`)+)")
# a script that a command runs, and what follows it, over lines that end with a backslash
GOES_ON = r"(?:\\\n|[^`\n#|&])*"
COMMAND = re.compile(
    rf"\b(?:python|torchrun)\b(?:\\\n|[^`\n|])*?\b({'|'.join(MAINS)})\.py( {GOES_ON})"
)


def links(path):
    """Where the links and pictures of a page lead, those to other sites left out."""
    found = re.findall(r'(?:\]\(|src=")([^)"\s]+)[)"]', BLOCK.sub("", path.read_text("utf-8")))
    return [link for link in found if not re.match(r"https?:", link)]


def anchors(path):
    """What a page's headings are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(path, language):
    return [text for name, text in BLOCK.findall(path.read_text("utf-8")) if name == language]


@functools.cache
def defined_in(file):
    """The functions, classes, methods (as Class.method) and constants of a file."""
    found = set()
    for node in ast.parse(SOURCES[file]).body:
        name = getattr(node, "name", None) or ast.unparse(node).split(" =")[0]
        parts = node.body if isinstance(node, ast.ClassDef) else []
        found |= {name, *(f"{name}.{part.name}" for part in parts if hasattr(part, "name"))}
    return found


@functools.cache
def flags(script):
    """The flags in the help of a script."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        MAINS[script](["--help"])
    return set(re.findall(r"--\w+", text.getvalue()))


@each_page
def test_links_lead_somewhere(path):
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@each_page
def test_commands_have_only_flags_that_exist(path):
    for script, rest in COMMAND.findall(path.read_text("utf-8")):
        words = rest.replace("\\\n", " ").split()
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        part = words[0] if words and words[0] in PARTS else script
        assert used <= flags(part), f"{script}.py{rest}"


@each_tour
def test_what_a_tour_asks_to_read_is_there(path):
    found = READ.findall(path.read_text("utf-8"))
    assert {file for file, _ in found} >= {*EVENING, *SCRIPTS} - {"config", "bench"}
    for file, names in found:
        assert set(re.findall(r"`([\w.]+)`", names)) <= defined_in(file), file


@each_tour
def test_other_names_in_a_tour_occur_in_the_code(path):
    defined = set().union(*map(defined_in, SOURCES))
    words = {word for text in SOURCES.values() for word in re.findall(r"\w+", text)}
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", path.read_text("utf-8")):
        is_method = "." in name and name.split(".")[0] in defined and name[0].isupper()
        assert name in defined if is_method else set(name.split(".")) <= words, name


@each_tour
def test_what_a_tour_quotes_is_the_code_of_today(path):
    quotes = blocks(path, "python")
    assert quotes and all(map(is_quoted, quotes))
    files = [word for word in blocks(path, "text")[0].split() if word in SOURCES]
    assert files == list(MAY_IMPORT)  # a file imports those before it
    keys = path.read_text("utf-8").split("\n## 10.")[1].split("\n\n|")[1]
    assert re.findall(r"`(\w+)`", "".join(re.findall(r"^\|?(.*?) \|", keys, re.M))) == [
        *checkpoint.KEYS
    ]


def is_quoted(block):
    """Whether one file has all lines of the block, in this order; it may leave some out."""
    wanted = [line.strip() for line in block.splitlines()]
    for text in SOURCES.values():
        lines = map(str.strip, text.splitlines())
        if all(line in lines for line in wanted):  # each is looked for behind the one before
            return True
    return False


@each_pair
def test_both_languages_have_the_same_headings_links_code_and_commands(pair):
    """README.zh-CN.md has more: what helps in China."""
    texts = [BLOCK.sub("", path.read_text("utf-8")) for path in pair]
    texts = [re.sub(r"(tour|world)(\.zh-CN)?\.md(#[^)]*)?", r"\1.md", text) for text in texts]
    to_itself = "|".join(re.escape(path.name) for path in pair)
    for pattern in (r"^#+ (?:\d+)?", rf"(?:\]\((?!#|{to_itself})|src=)[^)\s]+", r"`[^`\n]+`"):
        english, chinese = (Counter(re.findall(pattern, text, re.M)) for text in texts)
        assert not english - chinese
        assert pair is READMES or not chinese - english
    assert commands(pair[0]) and commands(pair[0]) == commands(pair[1])


@pytest.mark.parametrize("page", READMES, ids=lambda path: path.name)
def test_the_comparison_counts_what_is_here(page):
    row = next(line for line in page.read_text("utf-8").splitlines() if "| 666 |" in line)
    said = int(re.search(r"\d,\d{3}", row)[0].replace(",", ""))
    lines = sum(len(SOURCES[file].splitlines()) for file in ("model", "train", "state"))
    assert abs(said - lines) < 0.05 * lines, f"{lines} lines"


@each_page
def test_chinese_stands_without_spaces_that_a_line_break_would_make(path):
    text = BLOCK.sub("", path.read_text("utf-8"))
    assert not re.findall(r"[\u4e00-\u9fff，。；：]\n[\u4e00-\u9fff`*]", text)


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/images/*.svg")), ids=lambda p: p.name)
def test_pictures_need_nothing_from_elsewhere(path):
    svg = path.read_text("utf-8")
    assert "viewBox" in svg
    assert not re.search(r"""<script|@import|(href|src)=["'](?!#)|url\(["']?(?!#)""", svg)


# ---------------------------------------------------------------- the commands, run

# what a command begins with that is not run here, and why
NOT_RUN = {
    "python3 -m venv": "CI's first step",
    ".venv/bin/pip install": "CI's first step",
    "pip install": "CI's first step",
    ".venv/bin/python -m pytest": "this is it",
    "tensorboard": "a server, which does not end",
    "python playground.py": "another",
    "torchrun --nproc_per_node 8": "needs eight GPUs",
    "python prepare_data.py --dataset fineweb": "needs a network, and hours",
    "python evaluate.py --task hellaswag lambada": "needs a network",
}
# what is run with -m slow only: minutes of training, or a torchrun that imports torch anew
SLOW = ("python train.py --resume --max_iters 2000", "torchrun --nproc_per_node 2")
NEEDS_VOCABULARY = (  # GPT-2's, which not every machine has
    "python prepare_data.py --input crawl/",
    "python prepare_data.py --adopt",
)
TYPED = "To be, or not\n"  # into generate.py --interactive
NOVEL = "却说那一日天色已晚，两个人沿着河边慢慢地走回村里去。"


def commands(path):
    """The words of each command that a page asks to run, in order. A block of Python is one, unless
    it quotes the code; a ```text block is there to be read.
    """
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


def begins(command, beginnings):
    return " ".join(command).startswith(tuple(beginnings))


def in_a_fork(command, folder):
    """Run a command as Python would, in a fork that has torch already, which takes seconds to
    import; what a preset trains ends after two steps. Returns the exit code and what was printed.
    """
    printed, (python, *arguments) = folder / "printed.txt", command
    assert Path(python).name == "python", f"{python}: cannot be run here"

    def child():
        os.chdir(folder)
        for name in ("shakespeare-cpu", "finetune"):
            GPT2_CONFIGS[name]["max_iters"] = 2
        sys.stdin, sys.argv = io.StringIO(TYPED), arguments
        with printed.open("w", encoding="utf-8") as out:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    if arguments[0] == "-c":
                        exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
                    else:
                        runpy.run_path(arguments[0], run_name="__main__")
                except SystemExit as done:
                    return done.code

    return in_child(child), printed.read_text("utf-8")


def in_a_new_process(command, folder):
    """Run a command as a reader does. Returns the exit code and what was printed."""
    program = Path(sys.executable).parent / Path(command[0]).name
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    done = subprocess.run([program, *command[1:]], cwd=folder, input=TYPED, timeout=600, **output)
    return done.returncode, done.stdout


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder of a reader on a machine without a GPU: the scripts and every file that the pages
    speak of; GPT-2s of a few parameters, gpt2 and gpt2-xl, which go before the hub's.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("safetensors")
    for name in ("data/shakespeare", "docs", "books", "crawl", "nanoGPT/data/openwebtext"):
        (tmp_path / name).mkdir(parents=True)
    for path in [*FILES, ROOT / "data" / "sonnets.txt", ROOT / "docs" / "plan.py"]:
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    sonnets = (ROOT / "data" / "sonnets.txt").read_text("utf-8")
    text = sonnets[:5000] + "".join(sorted(set(sonnets)))  # all of its characters
    for name in ("data/shakespeare/input.txt", "novel.txt", "books/one.txt", "notes.md"):
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "prompts.txt").write_text("To be\nShall I\n", "utf-8")
    with gzip.open(tmp_path / "talk.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "Good morning. And to you."}) + "\n")
    table = pyarrow.table({"text": sonnets[:20000].split("\n\n")})
    parquet.write_table(table, tmp_path / "crawl" / "part.parquet")
    for split in ("train", "val"):
        path = tmp_path / "nanoGPT" / "data" / "openwebtext" / f"{split}.bin"
        np.arange(1000, dtype="<u2").tofile(path)

    tokenizer = BPETokenizer.train([text], 300)
    sizes = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, **sizes))
    state = checkpoint.new_state(model.config, model.state_dict(), tokenizer)
    checkpoint.save(tmp_path / "tiny.pt", state)
    for name in ("gpt2", "gpt2-xl"):
        to_hf(tmp_path / "tiny.pt", tmp_path / name)
    arguments = sizes | {"vocab_size": tokenizer.vocab_size}
    torch.save({"model": model.state_dict(), "model_args": arguments}, tmp_path / "ckpt.pt")
    return tmp_path


@pytest.mark.parametrize(
    "run", [in_a_fork, pytest.param(in_a_new_process, marks=pytest.mark.slow)], ids=["quick", "all"]
)
@pytest.mark.parametrize("page", [READMES[0], TOURS[0]], ids=lambda path: path.name)
def test_the_commands_of_a_page_work_as_they_stand(page, run, reader, request):
    """From top to bottom in one folder, after README's first line, which sets up and trains."""
    to_run = commands(page)
    if page in TOURS:
        to_run = commands(READMES[0])[:5] + to_run
        (reader / "novel.txt").write_text(NOVEL * 200, "utf-8")
    left_out = [*NOT_RUN, *(SLOW if run is in_a_fork else [])]
    try:
        request.getfixturevalue("gpt2_vocabulary")
    except pytest.skip.Exception:
        left_out += NEEDS_VOCABULARY
    for command in to_run:
        if not begins(command, left_out):
            code, printed = run(command, reader)
            assert code == 0 and "Traceback" not in printed, f"{shlex.join(command)}\n{printed}"


def test_nothing_is_left_out_that_no_page_has():
    found = commands(READMES[0]) + commands(TOURS[0])
    for beginning in (*NOT_RUN, *SLOW, *NEEDS_VOCABULARY):
        assert any(begins(command, [beginning]) for command in found), beginning
