"""LPIPS against the reference's distances, and its behavior as a training loss."""

import functools
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_states
from PIL import Image

from tokenflow_jax.nets.lpips import LPIPS, lpips_template
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.names.lpips import LPIPS as TABLE

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
VECTORS = np.load(GOLDEN / "parts_small.npz")


@functools.cache
def golden_params():
    manifest = json.loads((GOLDEN / "parts.lpips.manifest.json").read_text())
    state = runpy.run_path(str(GOLDEN / "weights.py"))["state_dict"](manifest, 0)
    params = rules.to_flax(state, TABLE, lpips_template())
    back = torch_states.to_torch(params, TABLE, torch_states.read_buffers(state, TABLE))
    assert back.keys() == state.keys()
    assert all(back[name].tobytes() == state[name].tobytes() for name in state)
    return params


@functools.cache
def images(size=256):
    """Both golden images, (2, size, size, 3) in [-1, 1], cut from the top left of 256 px."""
    files = [GOLDEN / f"images/{name}_256.png" for name in ("astronaut", "coffee")]
    pixels = [np.asarray(Image.open(file), np.float32)[:size, :size] for file in files]
    return np.stack(pixels) / np.float32(127.5) - 1


@functools.partial(jax.jit, static_argnames=("dtype",))
def _layers(params, x, y, dropout_rng, dtype):
    return LPIPS(dtype).apply({"params": params}, x, y, dropout_rng, method="layer_distances")


def layers(x, y, dropout_rng=None, dtype=jnp.float32):
    return _layers(golden_params(), x, y, dropout_rng, dtype)


@jax.jit
def gradient(params, x, y):
    return jax.value_and_grad(lambda x: LPIPS().apply({"params": params}, x, y).sum())(x)


@pytest.mark.parametrize(("name", "weight"), [("lpips_0_1", 1.0), ("lpips_0_mix", 0.1)])
def test_distances_and_their_layers(name, weight):
    x, y = images()[:1], images()[1:]
    y = (1 - weight) * x + weight * y
    parts = layers(x, y.astype(np.float32))
    assert parts.shape == (5, 1) and parts.dtype == jnp.float32
    np.testing.assert_allclose(parts[:, 0], VECTORS[f"{name}_layers"], rtol=1e-4)
    np.testing.assert_allclose(parts.sum(), VECTORS[name], rtol=1e-4)


def test_the_call_is_the_sum_of_the_layers():
    x, y = images(32), images(32)[::-1]
    distance = jax.jit(LPIPS().apply)({"params": golden_params()}, x, y)
    assert distance.shape == (2,) and distance.dtype == jnp.float32
    np.testing.assert_allclose(distance, layers(x, y).sum(0), rtol=1e-6)
    np.testing.assert_allclose(distance[0], distance[1], rtol=1e-5)  # symmetric in x and y
    np.testing.assert_array_equal(layers(x, x), np.zeros((5, 2)))


def test_template_has_the_modules_shapes():
    made = jax.eval_shape(lambda: LPIPS().init(jax.random.key(0), images(32), images(32)))
    assert made["params"] == lpips_template()


def test_gradients_are_finite_where_features_vanish():
    """Equal images, and a bias that makes whole layers zero."""
    dead = jax.tree.map(lambda leaf: leaf, golden_params())
    dead["conv_5"] = {**dead["conv_5"], "bias": dead["conv_5"]["bias"] - 1e6}

    x, y = images(32), images(32)[::-1]
    for params, other in ((golden_params(), x), (dead, y)):
        assert np.isfinite(gradient(params, x, other)[1]).all()


def test_gradient_is_the_slope():
    """Along the gradient's own direction the distance rises by the gradient's length."""
    x, y = images(32), images(32)[::-1]
    slope = gradient(golden_params(), x, y)[1]
    length = np.linalg.norm(slope)
    step = 0.05 * slope / length
    up, down = (gradient(golden_params(), x + sign * step, y)[0] for sign in (1, -1))
    assert length > 1e-3
    np.testing.assert_allclose((up - down) / 0.1, length, rtol=2e-2)


def test_dropout_of_the_original_is_an_option_with_the_same_mean():
    x, y = images(32), images(32)[::-1]
    plain = layers(x, y)
    keys = jax.random.split(jax.random.key(0), 8)
    dropped = np.stack([layers(x, y, key) for key in keys])
    np.testing.assert_array_equal(dropped[0], layers(x, y, keys[0]))  # a function of the key
    assert np.abs(dropped[0] - dropped[1]).max() > 0
    np.testing.assert_allclose(dropped.mean(0).sum(0), plain.sum(0), rtol=0.05)


def test_bfloat16_convolutions_stay_near():
    x, y = images(32), images(32)[::-1]
    parts = layers(x, y, dtype=jnp.bfloat16)
    assert parts.dtype == jnp.float32
    np.testing.assert_allclose(parts.sum(0), layers(x, y).sum(0), rtol=0.05)


def test_too_small_images_are_rejected():
    with pytest.raises(ValueError, match=r"\(8, 8\).*at least 16"):
        layers(images(8), images(8))
