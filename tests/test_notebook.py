"""The notebook of the book: it runs, and its stored outputs are small."""

import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "ballbot.ipynb"


def kinds_of_outputs(notebook):
    """The kinds of outputs, such as image/png, of each code cell, by the cell's name."""
    return {cell.id: {kind for output in cell.outputs for kind in output.get("data", [output.output_type])}
            for cell in notebook.cells if cell.cell_type == "code"}  # fmt: skip


@pytest.mark.slow
def test_it_runs(opengl, tmp_path, monkeypatch):
    """As Jupyter runs it, in docs/ of a copy, with two iterations for each training."""
    for name in ("ballbot_utils", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("ballbot_env.py", "ppo_ballbot.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("NOTEBOOK_STEPS", "8192")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path / "docs"}})
    client.execute()
    assert kinds_of_outputs(notebook) == kinds_of_outputs(nbformat.read(NOTEBOOK, as_version=4))


def test_stored_outputs_are_small():
    kinds = kinds_of_outputs(nbformat.read(NOTEBOOK, as_version=4))
    assert "image/png" in kinds["tuned"] & kinds["slower"] and "text/html" in kinds["video"]
    assert NOTEBOOK.stat().st_size < 1_500_000
