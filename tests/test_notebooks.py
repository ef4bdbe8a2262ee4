"""The notebooks: they run from a clean checkout, and what they keep is whole and fit to be seen."""

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


def kinds(cell):
    """What a cell shows: the names of its streams and the types of its other outputs."""
    return {kind for out in cell["outputs"] for kind in out.get("data", [out.get("name")])}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what git has, without a network; nothing in it changes."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / "data").mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "data" / "sonnets.txt"]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    for name in ("TMPDIR", "TIKTOKEN_CACHE_DIR", "HF_HOME", "IPYTHONDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = files(folder)
    yield folder
    assert files(folder) == before


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
    assert in_child(run_in_a_fork, checkout / "notebooks" / path.name) == 0


@pytest.mark.slow
@each_notebook
def test_runs_in_a_kernel_as_it_stands_and_leaves_nothing(path, checkout, tmp_path):
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    command += [f"--output={tmp_path / 'result.ipynb'}", checkout / "notebooks" / path.name]
    subprocess.run(command, cwd=checkout / "notebooks", check=True, timeout=300)
    assert [*map(kinds, code_cells(tmp_path / "result.ipynb"))] == [*map(kinds, code_cells(path))]
    # "tmp" begins what tempfile makes; torch has a folder of another name there
    assert not list((tmp_path / "TMPDIR").glob("tmp*"))


@each_notebook
def test_is_kept_as_one_run_left_it_small_and_without_traces_of_the_machine(path):
    notebook, cells, pictures = json.loads(path.read_text("utf-8")), code_cells(path), []
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells) and path.stat().st_size <= 400_000
    for output in (output for cell in cells for output in cell["outputs"]):
        shown = output.get("data", {})
        pictures += [base64.b64decode(shown.pop("image/png"))] if "image/png" in shown else []
        words = json.dumps([output.get("text", ""), shown])
        assert not re.search(r"(?<![\w.])/\w[\w.-]*/|[A-Z]:\\", words), words
        assert output.get("name") != "stderr", words
    assert len(pictures) >= 4 and max(map(len, pictures)) <= 60_000
