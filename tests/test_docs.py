"""The documents: their links lead somewhere, and the names and flags in them exist."""

import ast
import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

import bench
import convert
import evaluate
import generate
import prepare_data
import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TOURS = [ROOT / "docs" / "tour.md", ROOT / "docs" / "tour.zh-CN.md"]
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
each_tour = pytest.mark.parametrize("path", TOURS, ids=lambda path: path.name)
PARSERS = {
    "prepare_data": prepare_data.parse,
    "train": train.parse,
    "generate": generate.parse,
    "evaluate": evaluate.parse,
    "convert": convert.parse,
    "bench": bench.main,
}
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# [file.py](../file.py) `name`, `name`: what a stop of the tour asks to read
READ = re.compile(r"\[(\w+)\.py\]\(\.\./\1\.py\)((?:[\s,、]*`[\w.]+`)+)")
# a script that a command runs, and what follows it, over lines that end with a backslash
GOES_ON = r"(?:\\\n|[^`\n#|&])*"
COMMAND = re.compile(
    rf"\b(?:python|torchrun)\b(?:\\\n|[^`\n|])*?\b({'|'.join(PARSERS)})\.py( {GOES_ON})"
)


def links(path):
    """Where the links and pictures of a page lead, those to other sites left out."""
    found = re.findall(r'(?:\]\(|src=")([^)"\s]+)[)"]', BLOCK.sub("", path.read_text("utf-8")))
    return [link for link in found if not re.match(r"https?:", link)]


def anchors(path):
    """What a page's headings are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_to_read(path):
    """(file, name) for everything that a tour asks to read."""
    for file, names in READ.findall(path.read_text("utf-8")):
        yield from ((file, name) for name in re.findall(r"`([\w.]+)`", names))


def source(file):
    return (ROOT / f"{file}.py").read_text("utf-8")


@functools.cache
def defined_in(file):
    """The functions, classes, methods (as Class.method) and constants of a file."""
    return set(definitions(ast.parse(source(file))))


def definitions(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
            methods = node.body if isinstance(node, ast.ClassDef) else []
            yield from (f"{node.name}.{m.name}" for m in methods if isinstance(m, ast.FunctionDef))


@functools.cache
def flags(script, *subcommand):
    """The flags in the help of a script, or of one of its subcommands."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        PARSERS[script]([*subcommand, "--help"])
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
        subcommand = words[:1] if script in ("convert", "bench") else []
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= flags(script, *subcommand), f"{script}.py{rest}"


@each_tour
def test_what_a_tour_asks_to_read_is_there(path):
    found = set(names_to_read(path))
    assert {file for file, _ in found} >= {*PARSERS, "model", "data", "optim"} - {"bench"}
    assert not [(file, name) for file, name in found if name not in defined_in(file)]


@each_tour
def test_other_names_in_a_tour_occur_in_the_code(path):
    files = [file.stem for file in ROOT.glob("*.py")]
    defined = set().union(*map(defined_in, files))
    words = {word for file in files for word in re.findall(r"\w+", source(file))}
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", path.read_text("utf-8")):
        is_method = "." in name and name.split(".")[0] in defined and name[0].isupper()
        assert name in defined if is_method else set(name.split(".")) <= words, name


def test_both_tours_lead_the_same_way():
    assert list(names_to_read(TOURS[0])) == list(names_to_read(TOURS[1]))
    english, chinese = (path.read_text("utf-8") for path in TOURS)
    for pattern in (r"^#+ (?:\d+)?", r"(?:\]\((?!#|tour)|src=)[^)\s]+", r"`[^`\n]+`"):
        in_each = [sorted(re.findall(pattern, BLOCK.sub("", t), re.M)) for t in (english, chinese)]
        assert in_each[0] == in_each[1]
    commands = [
        re.findall(r"^(?:python|torchrun|pip) [^#\n]*\b", t, re.M) for t in (english, chinese)
    ]
    assert commands[0] and commands[0] == commands[1]


@each_page
def test_chinese_stands_without_spaces_that_a_line_break_would_make(path):
    text = BLOCK.sub("", path.read_text("utf-8"))
    assert not re.findall(r"[\u4e00-\u9fff，。；：]\n[\u4e00-\u9fff`*]", text)


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/images/*.svg")), ids=lambda p: p.name)
def test_pictures_need_nothing_from_elsewhere(path):
    svg = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "<title" in svg and "viewBox" in svg and "<text" in svg
    assert not re.search(r"https?:|href|<script|@import|data:", svg)
