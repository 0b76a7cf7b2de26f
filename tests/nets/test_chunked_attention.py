"""Attention in chunks of queries: as with dense scores, which it never keeps; for CPUs only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.nets import chunked_attention
from tokenflow_jax.nets.attention import attention, choose
from tokenflow_jax.nets.masks import Blocks, Mask

LENGTH = 70
Q, G = (jax.random.normal(jax.random.key(i), (2, LENGTH, 4, 8)) for i in (0, 1))
K, V = (jax.random.normal(jax.random.key(i), (2, LENGTH, 2, 8)) for i in (2, 3))
REAL = jnp.arange(LENGTH) >= jnp.array([[0], [9]])
MASKS = {
    "causal": Mask(),
    "blocks after padding": Mask(REAL, Blocks(12, (1, 4, 16, 36))),
    "blocks known at run time": Mask(
        last_BK=jnp.maximum(jnp.arange(LENGTH), jnp.where(jnp.arange(LENGTH) < 40, 45, 0))[None]
    ),
    "texts that share a row": Mask(segments_BK=jnp.repeat(jnp.arange(2), 35)[None].repeat(2, 0)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(chunked_attention, "_QUERIES", 32)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_dense_scores(mask):
    """Rows of padding, too: the last of them predicts a text's first token."""
    found = []
    for read, kernel in ((mask, "chunked"), (mask.allowed(LENGTH, LENGTH), "xla")):
        out, pull = jax.vjp(
            lambda *x, read=read, kernel=kernel: attention(*x, read, kernel), Q, K, V
        )
        found.append((out, pull(G)))
    got, want = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), got, want)


def test_keeps_no_scores():
    _, pull = jax.vjp(lambda *arrays: attention(*arrays, Mask(), "chunked"), Q, K, V)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert kept < 2 * (Q.size + K.size + V.size) + LENGTH**2
    _, dense = jax.vjp(lambda *a: attention(*a, Mask().allowed(LENGTH, LENGTH)), Q, K, V)
    assert sum(leaf.size for leaf in jax.tree.leaves(dense)) > 2 * kept


def test_auto_takes_it_for_long_rows_on_a_cpu(monkeypatch):
    def chosen(length, kind="auto", mask=MASKS["causal"], cached=False):
        return choose(kind, mask, jnp.float32, (2, length, 4, 64), cached)

    assert chosen(64) == "chunked"
    assert chosen(63) == chosen(64, "xla") == chosen(64, cached=True) == "xla"
    assert chosen(64, mask=Mask().allowed(64, 64)) == "xla"
    monkeypatch.setattr(chunked_attention.placement, "platform", lambda: "rocm")
    assert chosen(64) == "xla"
