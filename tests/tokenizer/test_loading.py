"""The image tokenizer and the dtype of a language model that is loaded."""

import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch_states
from tiny import TINY, write_tokenizer

import tokenflow_jax as tfx
from tokenflow_jax.data.captions.codes import CodesError
from tokenflow_jax.tokenizer import loading, model
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.names import tokenizer_buffers, tokenizer_table
from tokenflow_jax.weights.formats.safetensors import write_safetensors


@pytest.fixture(scope="module")
def tiny():
    images = np.zeros((1, 16, 16, 3), np.float32)
    params = jax.jit(TokenFlow(TINY).init)(jax.random.key(0), images)["params"]
    return tfx.Tokenizer(TINY, params)


def test_finding_the_image_tokenizer(tiny, tmp_path, monkeypatch):
    """It is found where the checkpoint says or where it is now; another one is refused."""
    monkeypatch.setitem(model.VARIANTS, "tiny", TINY)
    path = str(tmp_path / "tiny.safetensors")
    buffers = tokenizer_buffers(TINY)
    write_safetensors(path, torch_states.to_torch(tiny.params, tokenizer_table(TINY), buffers))
    known = {"path": path, "variant": "tiny", "fingerprint": tiny.fingerprint}
    assert loading.find_tokenizer("runs/m", known).fingerprint == tiny.fingerprint
    moved = {**known, "path": str(tmp_path / "gone")}
    assert loading.find_tokenizer("runs/m", moved, path, "tiny").config == TINY
    assert loading.find_tokenizer("runs/m", {}, tiny) is tiny
    with pytest.raises(ValueError, match=r"gone' of runs/m does not exist; give its path"):
        loading.find_tokenizer("runs/m", moved)
    with pytest.raises(ValueError, match=r"runs/m does not record where.*--tokenizer="):
        loading.find_tokenizer("runs/m", {"path": "", "fingerprint": tiny.fingerprint})
    with pytest.raises(ValueError, match=r"is 0123, that .* codes mean something else"):
        loading.find_tokenizer("runs/m", {"fingerprint": "0123"}, tiny)


def test_the_image_tokenizer_is_found_where_it_is_now(tiny, tmp_path, monkeypatch):
    """Inside the checkpoint, where the record says, moved along, or beside; by its fingerprint."""
    monkeypatch.chdir(tmp_path)
    other = write_tokenizer(tmp_path / "other", seed=1)
    known = {"path": "runs/quickstart", "fingerprint": tiny.fingerprint}
    at = tmp_path / "elsewhere" / "runs"
    model = str(at / "mine")
    (at / "mine" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'runs/quickstart' of .*--tokenizer=") as error:
        loading.find_tokenizer(model, known)
    text = str(error.value)
    for place in ("mine/tokenizer", ", runs/quickstart", "elsewhere/runs/quickstart"):
        assert place in text
    assert "\n" not in text

    def found(model, **changes):
        return loading.find_tokenizer(model, {**known, **changes}).fingerprint

    # The likeliest place last: each is preferred to those before.
    places = [
        (at / "quickstart", {}),
        (tmp_path / "far" / "t", {"absolute_path": str(tmp_path / "far" / "t")}),
        (tmp_path / "runs" / "quickstart", {}),
        (at / "mine" / "tokenizer", {}),
    ]
    for place, more in places:
        shutil.copytree(other, place)  # another tokenizer there
        with pytest.raises(CodesError, match="codes mean something else"):
            found(model, **more)
        shutil.rmtree(place)
        tiny.save_pretrained(place)
        for path in (model, str(at / "mine" / "checkpoints" / "5"), str(at / "mine" / "x.pt")):
            assert found(path, **more) == tiny.fingerprint
        shutil.rmtree(place)
    # Another tokenizer in a likely place does not hide the right one.
    shutil.copytree(other, at / "mine" / "tokenizer")
    tiny.save_pretrained(at / "quickstart")
    assert found(model) == tiny.fingerprint
    assert found(model, path="/old/place/quickstart") == tiny.fingerprint


def test_text_tokenizers_are_found_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "new" / "mine"
    model.mkdir(parents=True)
    assert loading.find_text_tokenizer(str(model), "words") == "words"
    assert loading.find_text_tokenizer(str(model), "llama") == "llama"
    for place in (tmp_path / "new" / "llama", tmp_path / "llama", model / "text_tokenizer"):
        place.mkdir()
        assert os.path.abspath(loading.find_text_tokenizer(str(model), "llama")) == str(place)


def test_the_files_of_a_text_tokenizer_come_along(tiny, tmp_path, monkeypatch):
    """Only these: the folder may be a language model's."""
    folder, saved = tmp_path / "llama", {}
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "run.py"):
        (folder / name).write_text(name)
    keep = lambda path, *about, **how: saved.update(how, about=about)  # noqa: E731
    monkeypatch.setattr(loading, "save_folder", keep)
    lm = SimpleNamespace(layers=1, width=2, vocabulary_size=3)
    model = SimpleNamespace(config=SimpleNamespace(lm=lm), params={}, tokenizer=tiny, trained=None)
    text = SimpleNamespace(name_or_path=str(folder))
    loading.save_language_model(model, tmp_path / "x", None, {}, text)
    assert saved["about"][3]["text_tokenizer"] == "text_tokenizer"
    saved["parts"]["text_tokenizer"](tmp_path / "copy")
    copied = {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()}
    assert copied == {n: n for n in ("tokenizer.json", "tokenizer_config.json")}
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="llama"):
        loading.save_language_model(model, tmp_path / "x", None, {}, text)


def test_dtypes():
    assert loading.resolve_dtype("auto") == "float32"  # these tests run on CPU
    assert loading.resolve_dtype("bfloat16") == "bfloat16"
    with pytest.raises(ValueError, match="dtype 'half'"):
        loading.resolve_dtype("half")
