"""The house itself: who imports whom, how large it is, what importing does, how it is kept."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| (\w+)\.py \| (.*) \| ?(.*?) ?\|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
MAY_IMPORT = {name: imports.split(", ") if imports else [] for name, _, imports in ROWS}
SCRIPTS = [name for name, purpose, _ in ROWS if purpose.startswith("script: ")]
EVENING = ("config", "model", "data", "optim", "train", "sampling", "generate")
FILES = sorted(ROOT.glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text("utf-8")) for path in FILES}
BY_NAME = pytest.mark.parametrize("name", TREES)


def test_contributing_has_every_file_below_those_that_it_imports_and_scripts_last():
    names = list(MAY_IMPORT)
    assert sorted(names) == sorted(TREES) and names[-len(SCRIPTS) :] == SCRIPTS
    for name, others in MAY_IMPORT.items():
        assert all(names.index(other) < names.index(name) for other in others)
        assert not set(others) & set(SCRIPTS)


@BY_NAME
def test_imports_are_those_of_contributing(name):
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert found & TREES.keys() <= set(MAY_IMPORT[name])


@BY_NAME
def test_a_file_opens_with_its_purpose_and_importing_it_does_nothing(name):
    assert ast.get_docstring(TREES[name])
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in TREES[name].body[1:]:
        is_main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        assert isinstance(node, quiet) or is_main, ast.unparse(node)[:60]


def test_a_name_means_one_thing():
    """Top-level names that two files define; every script has the first three of its own."""
    homes = defaultdict(set)
    for file, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                homes[node.name].add(file)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = getattr(node, "targets", None) or [node.target]
                for name in re.findall(r"\w+", ", ".join(map(ast.unparse, targets))):
                    homes[name].add(file)
    allowed = {"parse", "main", "Options", "USAGE"}
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert twice.keys() <= allowed, {n: files for n, files in twice.items() if n not in allowed}


def test_the_code_can_be_read_in_an_evening():
    """The sums are ceilings a little above where the code stands: lower them as it shrinks."""
    lines = {path.stem: len(path.read_text("utf-8").splitlines()) for path in FILES}
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {name: count for name, count in lines.items() if count > 520} == {}
    assert sum(lines[name] for name in EVENING) <= 2150
    assert sum(lines.values()) <= 6600 and len(functions) <= 395
    assert sum(isinstance(node, ast.stmt) for node in nodes) <= 4300


def test_preparing_text_does_not_wait_for_torch():
    code = "import sys, prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@BY_NAME
def test_no_file_can_be_unpickled_or_executed(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert function not in ("exec", "eval", "pickle.load", "pickle.loads")
            if function == "torch.load":
                assert "weights_only=True" in ast.unparse(node)


@pytest.mark.parametrize("flags", [["check", "."], ["format", "--check", "."]])
def test_ruff_has_nothing_to_say(flags):
    command = [sys.executable, "-m", "ruff", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_readmes_test_command_word_for_word():
    readme = (ROOT / "README.md").read_text("utf-8")
    command = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1]
    assert "pytest" in command and re.search(rf"^{re.escape(command)}$", readme, re.MULTILINE)
