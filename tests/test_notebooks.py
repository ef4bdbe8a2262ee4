"""The notebooks: they run from a clean checkout, and what they keep is whole and fit to be seen."""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT, in_child

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
MAY_IMPORT = {path.stem for path in ROOT.glob("*.py")} | {"torch", "numpy", "matplotlib"}
MAY_IMPORT |= sys.stdlib_module_names
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
# what takes long is less in the quick form: steps of training, and tokens without a cache
SHORTER = {
    "max_iters=500": "max_iters=20",
    "eval_interval=250": "eval_interval=20",
    "max_iters=120, eval_interval=120": "max_iters=4, eval_interval=4",
    "range(4, 121, 4)": "[4]",
    "axis.text(120": "axis.text(4",
    "max_iters=120, dropout=0.1, eval_interval=40": "max_iters=30, dropout=0.1, eval_interval=10",
    "len(read_curve(killed)) < 60": "len(read_curve(killed)) < 15",
    "block_size=256": "block_size=25",
    "Sampling(450)": "Sampling(45)",
    "range(1, 451)": "range(1, 46)",
}


def code_cells(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def kinds(cell):
    """What a cell shows: the names of its streams and the types of its other outputs."""
    shown = set()
    for output in cell["outputs"]:
        shown |= {output["name"]} if output["output_type"] == "stream" else set(output["data"])
    return shown


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what git has of the project, as far as notebooks may need it, without a network."""
    folder = tmp_path / "checkout"
    (folder / "data").mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "data" / "sonnets.txt", folder / "data")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for name in ("TMPDIR", "TIKTOKEN_CACHE_DIR", "HF_HOME", "IPYTHONDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return folder


def run_in_a_fork(path):
    """A notebook's cells as its kernel runs them, made shorter: each shows what it has kept."""
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    os.chdir(path.parent)
    tempfile.tempdir, sys.dont_write_bytecode = None, True  # as the environment has them
    shell = InteractiveShell.instance()
    matplotlib.use("module://matplotlib_inline.backend_inline")
    for cell in code_cells(path):
        source = "".join(cell["source"])
        for text, shorter in SHORTER.items():
            source = source.replace(text, shorter)
        with capture_output() as shown:
            result = shell.run_cell(source)
        result.raise_error()
        found = {name for name in ("stdout", "stderr") if getattr(shown, name)}
        assert found.union(*(output.data for output in shown.outputs)) == kinds(cell), source


@each_notebook
def test_runs_offline_shows_what_it_has_kept_and_changes_nothing(path, checkout):
    before = files(checkout)
    assert in_child(run_in_a_fork, checkout / "notebooks" / path.name) == 0
    assert files(checkout) == before


@pytest.mark.slow
@each_notebook
def test_runs_in_a_kernel_as_it_stands_and_leaves_nothing(path, checkout, tmp_path):
    before = files(checkout)
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    how = {"cwd": checkout / "notebooks", "capture_output": True, "text": True}
    done = subprocess.run([*command, path.name], **how, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = checkout / "notebooks" / f"{path.stem}.nbconvert.ipynb"
    assert list(map(kinds, code_cells(result))) == list(map(kinds, code_cells(path)))
    result.unlink()
    assert files(checkout) == before
    # "tmp" begins what tempfile makes; torch has a folder of another name there
    assert not list((tmp_path / "TMPDIR").glob("tmp*"))


def test_what_is_made_shorter_is_there():
    source = "".join(word for path in NOTEBOOKS for c in code_cells(path) for word in c["source"])
    assert all(text in source for text in SHORTER)


@each_notebook
def test_was_kept_after_a_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    assert {output["output_type"] for output in outputs(path)} <= {"stream", "display_data"}


@each_notebook
def test_keeps_nothing_of_the_machine_it_ran_on(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    for output in outputs(path):
        data = {kind: v for kind, v in output.get("data", {}).items() if kind != "image/png"}
        words = json.dumps([output.get("text", ""), data])
        assert not re.search(r"(?<![\w.])/\w[\w.-]*/|[A-Z]:\\", words), words
        assert output.get("name") != "stderr", words


@each_notebook
def test_is_small_enough_to_be_looked_at_in_a_browser(path):
    assert path.stat().st_size <= 400_000
    pictures = [o["data"]["image/png"] for o in outputs(path) if "image/png" in o.get("data", {})]
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
