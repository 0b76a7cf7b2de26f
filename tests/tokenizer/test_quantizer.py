"""The shared mapping: nearest codes, losses, entropy, statistics, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.tokenizer import quantizer
from tokenflow_jax.tokenizer.quantizer import Codebooks

SEMANTIC, PIXEL = 5, 3


def _setup(tokens=50, codes=37, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    books = Codebooks(
        jax.random.normal(keys[0], (codes, SEMANTIC)), jax.random.normal(keys[1], (codes, PIXEL))
    )
    z = jax.random.normal(keys[2], (tokens, SEMANTIC + PIXEL))
    return quantizer.normalize_halves(z, SEMANTIC), books


def _dense_distances(z_NC, books, pixel_weight):
    table = books.normalized()
    square = (z_NC[:, None] - table[None]) ** 2
    return square[..., :SEMANTIC].sum(-1) + pixel_weight * square[..., SEMANTIC:].sum(-1)


@pytest.mark.parametrize("pixel_weight", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("rows", [8, 16, 37])
def test_nearest_code_minimizes_the_sum_of_both_distances(monkeypatch, pixel_weight, rows):
    monkeypatch.setattr(quantizer, "_MAX_CHUNK", rows)  # several chunks, the last one padded
    z, books = _setup()
    ours = quantizer.nearest_codes(z, books.normalized(), SEMANTIC, pixel_weight)
    expected = jnp.argmin(_dense_distances(z, books, pixel_weight), axis=-1)
    np.testing.assert_array_equal(ours, expected)


def test_ties_go_to_the_lowest_index_within_and_across_chunks(monkeypatch):
    monkeypatch.setattr(quantizer, "_MAX_CHUNK", 8)
    _, books = _setup(codes=32)
    doubled = Codebooks(*(jnp.concatenate([half, half[::-1]]) for half in books))
    table = doubled.normalized()
    codes = quantizer.nearest_codes(table, table, SEMANTIC)
    np.testing.assert_array_equal(codes, np.r_[np.arange(32), np.arange(32)[::-1]])


def test_no_array_of_tokens_by_codes_in_forward_or_backward():
    """In the compiled program, at TokenFlow's codebook size."""
    tokens, codes = 4096, 32768
    z = jax.ShapeDtypeStruct((tokens, 40), jnp.float32)
    books = Codebooks(
        jax.ShapeDtypeStruct((codes, 32), jnp.float32),
        jax.ShapeDtypeStruct((codes, 8), jnp.float32),
    )

    def loss(z, books):
        z = quantizer.normalize_halves(z, 32)
        chosen = quantizer.nearest_codes(z, books.normalized(), 32)
        weights = jnp.full(tokens, 1 / tokens)
        entropy = quantizer.entropy_loss(z, books.normalized(), weights, 32)
        return entropy + sum(
            quantizer.codebook_losses(z[None], books.look_up(chosen[None]), weights)
        )

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(z, books).compile()
    dense = tokens * codes * 4
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 2
    assert f"[{tokens},{codes}]" not in compiled.as_text()


def test_losses_and_their_gradients():
    z, books = _setup()
    codes = quantizer.nearest_codes(z, books.normalized(), SEMANTIC)
    weights = jnp.full(len(z), 1 / len(z))

    def loss(books, z):
        return jnp.stack(quantizer.codebook_losses(z[None], books.look_up(codes[None]), weights))

    value = loss(books, z)
    expected = jnp.mean((z - books.normalized()[codes]) ** 2)
    np.testing.assert_allclose(value, jnp.stack([expected, expected]), rtol=1e-6)
    to_books, to_z = jax.jacrev(loss, argnums=(0, 1))(books, z)
    assert all(jnp.abs(g[0]).max() > 0 for g in to_books)  # codebook loss moves the codebooks only
    assert all(jnp.abs(g[1]).max() == 0 for g in to_books)
    assert jnp.abs(to_z[0]).max() == 0 and jnp.abs(to_z[1]).max() > 0
    unused = np.setdiff1d(np.arange(books.size), codes)
    assert jnp.abs(to_books.semantic_KC[0][unused]).max() == 0


def test_straight_through():
    z, books = _setup()
    chosen = books.normalized()[: len(z)]
    z = z[: len(chosen)]
    np.testing.assert_allclose(quantizer.straight_through(z, chosen), chosen, atol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(quantizer.straight_through(z, chosen) * 3.0))(z)
    np.testing.assert_array_equal(gradient, jnp.full_like(z, 3.0))


@pytest.mark.parametrize("rows", [8, 37])
def test_entropy_loss_against_the_dense_form(monkeypatch, rows):
    monkeypatch.setattr(quantizer, "_MAX_CHUNK", rows)
    z, books = _setup()
    weights = jax.random.dirichlet(jax.random.key(1), jnp.ones(len(z)))

    def dense(z, books):
        p = jax.nn.softmax(-_dense_distances(z, books, 0.7) / 0.01)
        entropy = -jnp.sum(weights[:, None] * p * jax.nn.log_softmax(jnp.log(p + 1e-30)))
        mean = weights @ p
        return entropy + jnp.sum(mean * jnp.log(mean + 1e-5))

    def ours(z, books):
        return quantizer.entropy_loss(z, books.normalized(), weights, SEMANTIC, 0.7)

    np.testing.assert_allclose(ours(z, books), dense(z, books), rtol=1e-4, atol=1e-5)
    ours_grad = jax.grad(ours, argnums=(0, 1))(z, books)
    dense_grad = jax.grad(dense, argnums=(0, 1))(z, books)
    for a, b in zip(jax.tree.leaves(ours_grad), jax.tree.leaves(dense_grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(jnp.abs(b).max()))


def test_distance_statistics_against_the_dense_form():
    z, books = _setup()
    weights = jax.random.dirichlet(jax.random.key(1), jnp.ones(len(z)))
    ours = quantizer.distance_statistics(z, books.normalized(), weights, SEMANTIC)
    square = (z[:, None] - books.normalized()[None]) ** 2
    halves = (square[..., :SEMANTIC].sum(-1), square[..., SEMANTIC:].sum(-1))
    expected = [jnp.sum(weights * (d**2).sum(-1)) for d in halves]
    np.testing.assert_allclose(jnp.stack(ours), jnp.stack(expected), rtol=1e-5)


def test_normalizing_zero_is_finite_both_ways():
    value, gradient = jax.value_and_grad(lambda x: quantizer.l2_normalize(x).sum())(jnp.zeros(4))
    assert value == 0 and jnp.all(jnp.isfinite(gradient))
