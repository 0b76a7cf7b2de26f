"""k-means start, moving-average codebook and revival of dead codes."""

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.tokenizer import codebook as learning
from tokenflow_jax.tokenizer.quantizer import Codebooks, nearest_codes, normalize_halves

CENTRES = normalize_halves(jax.random.normal(jax.random.key(0), (6, 7)), 4)


def _tokens(count=600, noise=0.02):
    keys = jax.random.split(jax.random.key(1))
    label = jax.random.randint(keys[0], (count,), 0, len(CENTRES))
    z = CENTRES[label] + noise * jax.random.normal(keys[1], (count, 7))
    return normalize_halves(z, 4), label


def test_kmeans_finds_separated_clusters():
    z, _ = _tokens()
    books = learning.kmeans(jax.random.key(2), z, 24, 4, iterations=15)
    table = books.normalized()
    error = jnp.linalg.norm(z - table[nearest_codes(z, table, 4)], axis=-1)
    assert error.mean() < 0.08
    np.testing.assert_allclose(jnp.linalg.norm(books.semantic_KC, axis=-1), 1, rtol=1e-5)


def test_kmeans_with_fewer_tokens_than_codes():
    z, _ = _tokens(5)
    books = learning.kmeans(jax.random.key(2), z, 16, 4)
    assert books.size == 16 and jnp.isfinite(books.normalized()).all()


def test_moving_average_reaches_the_cluster_means():
    z, label = _tokens()
    books = Codebooks(*jnp.split(normalize_halves(CENTRES + 0.3, 4), [4], axis=-1))
    sums = learning.EMACodebook.start(books)
    for _ in range(60):
        sums, books = sums.update(books, z, label, jnp.ones(len(z)), decay=0.8)
    np.testing.assert_allclose(books.normalized(), CENTRES, atol=0.02)


def test_moving_average_ignores_masked_tokens_and_unused_codes():
    z, _ = _tokens(10)
    books = Codebooks(*jnp.split(CENTRES, [4], axis=-1))
    sums = learning.EMACodebook.start(books)
    _, moved = sums.update(books, z, jnp.zeros(10, int), jnp.zeros(10), decay=0.5)
    np.testing.assert_allclose(moved.normalized(), CENTRES, atol=1e-6)
    _, moved = sums.update(books, z, jnp.zeros(10, int), jnp.ones(10), decay=0.5)
    np.testing.assert_allclose(moved.normalized()[1:], CENTRES[1:], atol=1e-6)
    assert jnp.abs(moved.normalized()[0] - CENTRES[0]).max() > 1e-3


def test_revival_replaces_dead_rows_only_by_tokens():
    z, _ = _tokens(20)
    books = Codebooks(*jnp.split(CENTRES, [4], axis=-1))
    counts = jnp.array([3, 0, 1, 0, 2, 5])
    revived = learning.revive_dead_codes(jax.random.key(0), books, z, counts).normalized()
    alive = np.flatnonzero(counts)
    np.testing.assert_allclose(revived[alive], CENTRES[alive], atol=1e-6)
    for row in np.flatnonzero(np.asarray(counts) == 0):
        assert jnp.abs(z - revived[row]).max(axis=-1).min() < 1e-5
