"""Convolutions on CPUs: tiny maps as one product, weight gradients of large maps as products."""

import jax
import numpy as np
import pytest

from tokenflow_jax.nets import convolve
from tokenflow_jax.nets.layers import conv3x3

X = jax.random.normal(jax.random.key(0), (2, 9, 8, 5))
CONV = conv3x3(32, np.float32, "conv")
PARAMS = CONV.init(jax.random.key(1), X)


def both(x=X):
    out, pull = jax.vjp(CONV.apply, PARAMS, x)
    return out, pull(jax.random.normal(jax.random.key(2), out.shape))


def text():
    return jax.jit(lambda x: both(x)).lower(X).as_text()  # not traced before


def test_equals_xla(monkeypatch):
    want, plain = both(), text()
    monkeypatch.setattr(convolve, "_PIXELS", 72)
    assert text().count("dot_general") == 9 and "dot_general" not in plain
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), both(), want)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 9)])
def test_tiny_maps_are_one_product(monkeypatch, size):
    x = jax.random.normal(jax.random.key(3), (2, *size, 5))
    assert "convolution" not in jax.jit(lambda x: both(x)).lower(x).as_text()
    found = both(x)
    monkeypatch.setattr(convolve, "_FEW_PIXELS", 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, both(x))


@pytest.mark.parametrize(
    "platform, pixels, channels", [("tpu", 72, 32), ("cpu", 73, 32), ("cpu", 72, 33)]
)
def test_elsewhere_nothing_changes(monkeypatch, platform, pixels, channels):
    plain = text()
    monkeypatch.setattr(convolve.placement, "platform", lambda: platform)
    monkeypatch.setattr(convolve, "_PIXELS", pixels)
    monkeypatch.setattr(convolve, "_CHANNELS", channels)
    assert text() == plain
