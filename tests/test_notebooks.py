"""The notebooks run from top to bottom, in a kernel of their own."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
FOLDER = Path(__file__).parents[1] / "notebooks"
pytestmark = pytest.mark.slow


def run(name, folder, monkeypatch, old="", new=""):
    """Run a notebook, with `new` for `old`, in a folder; return what its cells printed."""
    monkeypatch.delenv("XLA_FLAGS")  # optimized programs, as a reader has
    text = (FOLDER / name).read_text()
    assert old in text
    notebook = nbformat.reads(text.replace(old, new), as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    pictures = sum("image/png" in one.get("data", {}) for one in outputs)
    return "".join(one.get("text", "") for one in outputs), pictures


def test_codes_of_a_picture(tmp_path, monkeypatch):
    text, pictures = run("codes_of_a_picture.ipynb", tmp_path, monkeypatch)
    assert "8 pictures, 204 codes each" in text and pictures == 7


def test_train_on_your_own_pictures(tmp_path, monkeypatch):
    text, pictures = run(
        "train_on_your_own_pictures.ipynb",
        tmp_path,
        monkeypatch,
        "total_steps=100 --config.checkpoint_every=100",
        "total_steps=40 --config.checkpoint_every=40 --config.batch_size=4",
    )
    before, after = map(float, re.search(r"before ([\d.]+) dB, after ([\d.]+) dB", text).groups())
    assert after > before + 0.3 and pictures == 1
    assert (tmp_path / "my_tokenizer" / "config.json").exists()
