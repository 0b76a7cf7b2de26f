"""Gradients of codes against NumPy forms of their papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.tokenizer import estimators, quantizer
from tokenflow_jax.tokenizer.quantizer import Codebooks, nearest_codes, normalize_halves

CHANNELS = SEMANTIC, PIXEL = 5, 3


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(tokens=7, codes=37, seed=0):
    """Features, raw codebooks and the gradient of a loss at the codes, float64."""
    rng = np.random.default_rng(seed)
    books = [rng.standard_normal((codes, c)) for c in CHANNELS]
    return rng.standard_normal((tokens, 8)), books, rng.standard_normal((tokens, 8))


def test_a_rotation_takes_each_half_to_its_code_and_its_gradient_back():
    features, books, g_NC = draw()
    z = np.asarray(normalize_halves(jnp.asarray(features), SEMANTIC))
    codes = np.concatenate([unit(book)[: len(z)] for book in books], -1).astype(np.float32)
    codes[0, :SEMANTIC] = z[0, :SEMANTIC]  # nothing to turn
    codes[1, :SEMANTIC] = -z[1, :SEMANTIC]  # no plane to turn in
    value, pull_back = jax.vjp(lambda z: estimators.rotate(z, codes, CHANNELS), z)
    np.testing.assert_allclose(value, codes, atol=1e-6)
    (gradient,) = pull_back(jnp.asarray(g_NC, jnp.float32))
    expected = np.empty_like(g_NC)
    for n in range(len(z)):
        for where in (slice(0, SEMANTIC), slice(SEMANTIC, 8)):
            e, q = z[n, where].astype(np.float64), codes[n, where].astype(np.float64)
            length = np.linalg.norm(e + q)
            r = (e + q) / length if length > 1e-6 else 0 * e
            # Eq. 4: the matrix of the rotation, and the factor of the lengths.
            matrix = np.eye(len(e)) - 2 * np.outer(r, r) + 2 * np.outer(q, e)
            matrix *= np.linalg.norm(q) / np.linalg.norm(e)
            if length > 1e-6:
                np.testing.assert_allclose(matrix @ e, q, atol=1e-6)
                np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(e)), atol=1e-6)
            expected[n, where] = matrix.T @ g_NC[n, where]
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def surrogate(features, books, hard_N, fixed_KC, g_NC, weight, temperature):
    """The scalar whose gradient index backpropagation takes: dense, in float64."""
    z = np.concatenate([unit(h) for h in np.split(features, [SEMANTIC], -1)], -1)
    codes = np.concatenate([unit(book) for book in books], -1)
    square = (z[:, None] - codes[None]) ** 2
    distance = square[..., :SEMANTIC].sum(-1) + weight * square[..., SEMANTIC:].sum(-1)
    p = np.exp(-distance / temperature)
    p /= p.sum(-1, keepdims=True)
    return np.sum(g_NC * (codes[hard_N] + p @ fixed_KC))


@pytest.mark.parametrize("rows", [8, 37])
def test_index_backpropagation_reaches_all_codes(monkeypatch, rows):
    monkeypatch.setattr(quantizer, "_MAX_CHUNK", rows)  # several chunks, the last one padded
    features, books, g_NC = draw()
    weight, temperature = 0.7, 0.5

    @jax.jit
    def quantized(features, books):
        books = Codebooks(*books)
        z_NC, tables = books.inputs(features), books.tables()
        searches = books.searches(z_NC, tables, weight)
        codes_N = nearest_codes(*searches[0])
        chosen = books.rows(tables, codes_N)
        return estimators.propagate_to_index(chosen, searches, temperature), codes_N

    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (features, books))
    value, pull_back, codes_N = jax.vjp(quantized, *arguments, has_aux=True)
    fixed = np.concatenate([unit(book) for book in books], -1)
    np.testing.assert_allclose(value, fixed[codes_N], atol=1e-6)
    to_features, to_books = pull_back(jnp.asarray(g_NC, jnp.float32))
    assert all(np.abs(g).min(axis=-1).all() for g in to_books)  # also of codes that nothing chose

    def numeric(array, index):
        values = []
        for sign in (1, -1):
            array[index] += sign * 1e-5
            values.append(surrogate(features, books, codes_N, fixed, g_NC, weight, temperature))
            array[index] -= sign * 1e-5
        return (values[0] - values[1]) / 2e-5

    for array, gradient in ((features, to_features), *zip(books, to_books, strict=True)):
        for index in np.ndindex(array.shape):
            np.testing.assert_allclose(gradient[index], numeric(array, index), atol=1e-4)


def test_index_backpropagation_without_an_array_of_tokens_by_codes():
    """In the compiled program, at TokenFlow's codebook size."""
    tokens, codes = 4096, 32768
    shapes = [jax.ShapeDtypeStruct((n, 40), jnp.float32) for n in (tokens, codes)]

    def loss(z_NC, table_KC):
        search = quantizer.Search(z_NC, table_KC, 32)
        chosen = table_KC[nearest_codes(*search)]
        return jnp.sum(estimators.propagate_to_index(chosen, [search], 0.1) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * codes * 4 / 2
    assert f"[{tokens},{codes}]" not in compiled.as_text()
