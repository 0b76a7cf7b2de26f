"""Inception against the reference's features on the same weights and pictures."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from tokenflow_jax.nets.inception import Inception, layer_names
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.names.inception import inception_params, load_inception

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def state():
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    manifest = json.loads((GOLDEN / "parts.inception.manifest.json").read_text())
    return weights.state_dict(manifest, 0)


@pytest.fixture(scope="module")
def images():
    names = ("astronaut_256.png", "coffee_256.png")
    pictures = [np.asarray(Image.open(GOLDEN / "images" / name).convert("RGB")) for name in names]
    return np.stack(pictures).astype(np.float32) / 127.5 - 1


def test_features_equal_the_reference(state, images):
    golden = np.load(GOLDEN / "inception.npz")
    params = inception_params(state)
    out = jax.jit(Inception().apply)({"params": params}, images)
    assert out["Mixed_7c"].shape == (2, 8, 8, 2048)
    np.testing.assert_allclose(out["pool"], golden["inception_pool3"], atol=1e-4)
    for block, name in enumerate(("stem_1", "stem_2", "Mixed_6e")):
        expected = golden[f"inception_block{block}_channel_mean"]
        np.testing.assert_allclose(out[name].mean((1, 2)), expected, atol=1e-4)


def test_resize_equals_the_reference(images):
    golden = np.load(GOLDEN / "inception.npz")["inception_resize_299_rows"]
    resized = jax.image.resize(images[0], (299, 299, 3), "bilinear", antialias=False)
    rows = np.asarray(resized)[::23].transpose(2, 0, 1)
    np.testing.assert_allclose(rows, golden * 2 - 1, atol=1e-5)  # golden rows are in 0..1


def test_stops_early_with_the_same_values(state):
    params = inception_params(state)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 80, 80, 3)).astype(np.float32)
    whole = Inception(resize=0).apply({"params": params}, images)
    part = Inception(resize=0, last="Mixed_6a").apply({"params": params}, images)
    assert "Mixed_6b" not in part
    np.testing.assert_allclose(part["Mixed_6a"], whole["Mixed_6a"], atol=1e-6)
    np.testing.assert_allclose(part["pool"], whole["Mixed_6a"].mean((1, 2)), atol=1e-6)


def test_rejects_small_images_and_unknown_blocks():
    images = np.zeros((1, 64, 64, 3), np.float32)
    with pytest.raises(ValueError, match="64 x 64"):
        Inception(resize=0).init(jax.random.key(0), images)
    with pytest.raises(ValueError, match="Mixed_9z"):
        Inception(last="Mixed_9z").init(jax.random.key(0), images)


def test_both_namings_give_the_same_parameters(state):
    """The TorchScript archive has no gamma and numbers its layers by order."""
    ones = {k: np.ones_like(v) if k.endswith("bn.weight") else v for k, v in state.items()}
    ends = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean",
            "bn.running_var": "var"}  # fmt: skip
    scripted = {
        f"net.layers.{i}.{end}": ones[f"{name.replace('/', '.')}.{ours}"]
        for i, name in enumerate(layer_names())
        for ours, end in ends.items()
    }
    jax.tree.map(np.testing.assert_array_equal, inception_params(ones), inception_params(scripted))


def test_all_mismatches_are_named(state):
    broken = dict(state)
    del broken["Mixed_5b.branch1x1.conv.weight"]
    with pytest.raises(ValueError, match=r"Mixed_5b\.branch1x1\.conv\.weight"):
        inception_params(broken)
    broken = dict(state)
    broken["Mixed_7a.branch3x3_2.conv.weight"] = np.zeros((3, 192, 3, 3), np.float32)
    with pytest.raises(ValueError, match="Mixed_7a/branch3x3_2"):
        inception_params(broken)


def test_other_files_are_named_and_their_tensors_not_read(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {f"layer{i}.conv.weight": np.ones((1, 1, 1, 1)) for i in range(999)})
    with pytest.raises(ValueError, match=r"m\.safetensors: not the FID Inception") as error:
        load_inception(path)
    assert len(str(error.value)) < 2000


def test_wrong_shapes_and_types_are_all_named(state):
    first = f"{layer_names()[0].replace('/', '.')}"
    wrong = state | {f"{first}.conv.weight": np.ones(3), f"{first}.bn.bias": np.ones(32, np.int8)}
    with pytest.raises(ValueError, match=r"(?s)conv\.weight: \(3,\).*bn\.bias: \(32,\) int8"):
        inception_params(wrong)


def test_wrapped_names_are_read(state):
    wrapped = {f"model._orig_mod.{name}": array for name, array in state.items()}
    jax.tree.map(np.testing.assert_array_equal, inception_params(wrapped), inception_params(state))
