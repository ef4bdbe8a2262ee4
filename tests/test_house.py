"""The house itself: who imports whom, what importing does, how the code is kept."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "config": "",
    "model": "config",
    "tokenizer": "",
    "data": "",
    "optim": "config",
    "checkpoint": "config",
    "utils": "config",
    "prepare_data": "tokenizer data utils",
    "convert": "config model tokenizer checkpoint utils",
    "generate": "config model tokenizer convert utils",
    "evaluate": "config model data tokenizer convert utils",
    "bench": "config model optim data checkpoint generate utils",
}
MAY_IMPORT["train"] = " ".join([*MAY_IMPORT])
SCRIPTS = ("prepare_data", "train", "generate", "evaluate", "convert")
FILES = sorted(ROOT.glob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_follow_the_design(path):
    assert path.stem in MAY_IMPORT, "a file that the design does not have"
    ours = {name for name in imports(path) if name in MAY_IMPORT}
    assert ours <= set(MAY_IMPORT[path.stem].split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_opens_with_its_purpose_and_importing_it_does_nothing(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree)
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in tree.body[1:]:
        is_main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        assert isinstance(node, quiet) or is_main, ast.unparse(node)[:60]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_shows_its_help(name):
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""


def test_no_file_can_be_unpickled_or_executed():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("exec", "eval", "pickle.load", "pickle.loads"), path.name
                if name == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path.name


@pytest.mark.parametrize(
    "command", [["check", "."], ["format", "--check", "."]], ids=lambda c: c[0]
)
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_readmes_test_command_word_for_word():
    readme = (ROOT / "README.md").read_text("utf-8")
    command = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1]
    assert "pytest" in command and re.search(rf"^{re.escape(command)}$", readme, re.MULTILINE)
