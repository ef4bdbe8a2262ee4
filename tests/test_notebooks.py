"""The notebooks: they run from a clean checkout, and what they keep is whole and fit to be seen."""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
MAY_IMPORT = {path.stem for path in ROOT.glob("*.py")} | {"torch", "numpy", "matplotlib"}
MAY_IMPORT |= sys.stdlib_module_names
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def code_cells(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kinds(cell):
    """What a cell shows: the names of its streams and the types of its other outputs."""
    shown = set()
    for output in cell["outputs"]:
        shown |= {output["name"]} if output["output_type"] == "stream" else set(output["data"])
    return shown


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git has of the project, as far as notebooks may need it."""
    folder = tmp_path / "checkout"
    (folder / "data").mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "data" / "sonnets.txt", folder / "data")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    return folder


@each_notebook
def test_runs_offline_shows_what_it_has_kept_and_leaves_nothing(path, checkout, tmp_path):
    folders = {"TMPDIR": "temporary", "TIKTOKEN_CACHE_DIR": "cache", "HF_HOME": "cache"}
    folders = {name: str(tmp_path / empty) for name, empty in folders.items()}
    (tmp_path / "temporary").mkdir()
    nobody = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")  # answers there
    others = {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONDONTWRITEBYTECODE": "1"}
    before = files(checkout)
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    how = {"cwd": checkout / "notebooks", "env": os.environ | folders | nobody | others}
    done = subprocess.run([*command, path.name], **how, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = checkout / "notebooks" / f"{path.stem}.nbconvert.ipynb"
    assert list(map(kinds, code_cells(result))) == list(map(kinds, code_cells(path)))
    result.unlink()
    assert files(checkout) == before
    # "tmp" begins what tempfile makes; torch has a folder of another name there
    assert not list((tmp_path / "temporary").glob("tmp*"))


@each_notebook
def test_was_kept_after_a_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    assert {output["output_type"] for cell in cells for output in cell["outputs"]} <= {
        "stream",
        "display_data",
    }


@each_notebook
def test_keeps_nothing_of_the_machine_it_ran_on(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    for cell in code_cells(path):
        for output in cell["outputs"]:
            words = json.dumps(output.get("text", "")) + json.dumps(
                {kind: v for kind, v in output.get("data", {}).items() if kind != "image/png"}
            )
            assert not re.search(r"(?<![\w.])/\w[\w.-]*/|[A-Z]:\\", words), words
            assert output.get("name") != "stderr", words


@each_notebook
def test_is_small_enough_to_be_looked_at_in_a_browser(path):
    assert path.stat().st_size <= 400_000
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 4
    assert max(len(base64.b64decode(picture)) for picture in pictures) <= 60_000


@each_notebook
def test_uses_the_project_and_few_others_and_defines_nothing_again(path):
    source = "\n".join("".join(cell["source"]) for cell in code_cells(path))
    nodes = list(ast.walk(ast.parse(source)))
    modules = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= MAY_IMPORT
    own = {node.name for node in nodes if isinstance(node, DEFINITIONS)}
    files = [ast.parse(file.read_text("utf-8")) for file in ROOT.glob("*.py")]
    theirs = {n.name for file in files for n in file.body if isinstance(n, DEFINITIONS)}
    assert own and not own & theirs
