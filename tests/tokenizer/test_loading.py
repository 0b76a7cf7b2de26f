"""The image tokenizer and the dtype of a language model that is loaded."""

import jax
import numpy as np
import pytest
import torch_states
from tiny import TINY

import tokenflow_jax as tfx
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


def test_dtypes():
    assert loading.resolve_dtype("auto") == "float32"  # these tests run on CPU
    assert loading.resolve_dtype("bfloat16") == "bfloat16"
    with pytest.raises(ValueError, match="dtype 'half'"):
        loading.resolve_dtype("half")
