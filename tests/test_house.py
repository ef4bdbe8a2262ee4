"""The house itself: who imports whom, how large it is, what importing does, how it is kept."""

import ast
import re
import subprocess
import symtable
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| (\w+)\.py \| (.*) \| ?(.*?) ?\|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
MAY_IMPORT = {name: imports.split(", ") if imports else [] for name, _, imports in ROWS}
SCRIPTS = [name for name, purpose, _ in ROWS if purpose.startswith("script: ")]
EVENING = ("config", "model", "data", "optim", "state", "train", "sampling", "generate")
FILES = sorted(ROOT.glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text("utf-8")) for path in FILES}
BY_NAME = pytest.mark.parametrize("name", TREES)


def lines(*paths):
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def test_the_code_can_be_read_in_an_evening():
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    ceilings = {  # a percent above where the code stands: a feature may raise them, less is better
        "lines of a file": (max(map(lines, FILES)), 406),
        "lines of the evening": (lines(*(ROOT / f"{name}.py" for name in EVENING)), 1863),
        "lines": (lines(*FILES), 5350),
        "statements": (sum(isinstance(node, ast.stmt) for node in nodes), 3785),
        "functions": (sum(isinstance(node, ast.FunctionDef) for node in nodes), 329),
        "lines of tests": (lines(*ROOT.glob("tests/*.py")), 6565),
    }
    assert {name: size for name, size in ceilings.items() if size[0] > size[1]} == {}


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_readme_has_a_row_for_every_file_those_of_the_evening_first(page):
    rows = re.findall(r"^\| \[(\w+)\.py\]", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert rows[: len(EVENING)] == list(EVENING) and sorted(rows) == sorted(TREES)


def test_contributing_has_a_row_for_every_file_below_those_that_it_imports_and_scripts_last():
    names = list(MAY_IMPORT)
    assert sorted(names) == sorted(TREES) and names[-len(SCRIPTS) :] == SCRIPTS
    for name, others in MAY_IMPORT.items():
        assert all(names.index(other) < names.index(name) for other in others)
        assert not set(others) & set(SCRIPTS)


@BY_NAME
def test_imports_are_those_of_contributing_and_do_nothing(name):
    assert ast.get_docstring(TREES[name])
    nodes = list(ast.walk(TREES[name]))
    found = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert found & TREES.keys() <= set(MAY_IMPORT[name])
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in TREES[name].body[1:]:
        is_main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        assert isinstance(node, quiet) or is_main, ast.unparse(node)[:60]


def test_a_name_means_one_thing():
    """Top-level names that two files define; every script has these of its own."""
    homes = defaultdict(set)
    for path in FILES:
        for symbol in symtable.symtable(path.read_text("utf-8"), path.name, "exec").get_symbols():
            if symbol.is_assigned() and not symbol.is_imported():
                homes[symbol.get_name()].add(path.name)
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    # attention: in model.py what it puts out, in playground.py its weights
    assert twice.keys() <= {"parse", "main", "Options", "USAGE", "attention"}, twice


def test_preparing_text_does_not_wait_for_torch():
    code = "import sys, prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@BY_NAME
def test_no_file_can_be_unpickled_or_executed(name):
    called = {ast.unparse(n.func) for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)}
    assert not called & {"exec", "eval", "pickle.load", "pickle.loads", "torch.load"}


@pytest.mark.parametrize("flags", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(flags):
    assert subprocess.run([sys.executable, "-m", "ruff", *flags], cwd=ROOT).returncode == 0


def test_ci_runs_the_readmes_test_command_word_for_word():
    readme = (ROOT / "README.md").read_text("utf-8")
    command = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1]
    assert "pytest" in command and re.search(rf"^{re.escape(command)}$", readme, re.MULTILINE)
