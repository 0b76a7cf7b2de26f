"""k-means start, moving-average codebook, revival of dead codes; the sliding window of usage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.loading import GOLDEN

from tokenflow_jax.tokenizer import codebook
from tokenflow_jax.tokenizer.codebook import Usage
from tokenflow_jax.tokenizer.kinds import QuantizerConfig
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import Codebooks, nearest_codes, normalize_halves

SCALES = Scales((1, 2, 3))
CENTERS = normalize_halves(jax.random.normal(jax.random.key(0), (6, 7)), 4)


def _tokens(count=600, noise=0.02):
    keys = jax.random.split(jax.random.key(1))
    label = jax.random.randint(keys[0], (count,), 0, len(CENTERS))
    z = CENTERS[label] + noise * jax.random.normal(keys[1], (count, 7))
    return normalize_halves(z, 4), label


def test_kmeans_finds_separated_clusters():
    z, _ = _tokens()
    books = codebook.kmeans(jax.random.key(2), z, 24, 4, iterations=15)
    table = books.normalized()
    error = jnp.linalg.norm(z - table[nearest_codes(z, table, 4)], axis=-1)
    assert error.mean() < 0.08
    np.testing.assert_allclose(jnp.linalg.norm(books.semantic_KC, axis=-1), 1, rtol=1e-5)


def test_kmeans_with_fewer_tokens_than_codes():
    z, _ = _tokens(5)
    books = codebook.kmeans(jax.random.key(2), z, 16, 4)
    assert books.size == 16 and jnp.isfinite(books.normalized()).all()


def test_moving_average_reaches_the_cluster_means():
    z, label = _tokens()
    books = Codebooks(*jnp.split(normalize_halves(CENTERS + 0.3, 4), [4], axis=-1))
    sums = codebook.EMACodebook.start(books)
    for _ in range(60):
        sums, books = sums.update(books, z, label, jnp.ones(len(z)), decay=0.8)
    np.testing.assert_allclose(books.normalized(), CENTERS, atol=0.02)


def test_moving_average_ignores_masked_tokens_and_unused_codes():
    z, _ = _tokens(10)
    books = Codebooks(*jnp.split(CENTERS, [4], axis=-1))
    sums = codebook.EMACodebook.start(books)
    _, moved = sums.update(books, z, jnp.zeros(10, int), jnp.zeros(10), decay=0.5)
    np.testing.assert_allclose(moved.normalized(), CENTERS, atol=1e-6)
    _, moved = sums.update(books, z, jnp.zeros(10, int), jnp.ones(10), decay=0.5)
    np.testing.assert_allclose(moved.normalized()[1:], CENTERS[1:], atol=1e-6)
    assert jnp.abs(moved.normalized()[0] - CENTERS[0]).max() > 1e-3


def test_revival_replaces_dead_rows_only_by_tokens():
    z, _ = _tokens(20)
    books = Codebooks(*jnp.split(CENTERS, [4], axis=-1))
    counts = jnp.array([3, 0, 1, 0, 2, 5])
    revived = codebook.revive_dead_codes(jax.random.key(0), books, z, counts).normalized()
    alive = np.flatnonzero(counts)
    np.testing.assert_allclose(revived[alive], CENTERS[alive], atol=1e-6)
    for row in np.flatnonzero(np.asarray(counts) == 0):
        assert jnp.abs(z - revived[row]).max(axis=-1).min() < 1e-5


@pytest.mark.parametrize("options", [{"mapping": "separate"}, {"heads": 2}])
def test_revival_counts_each_index_by_itself(options):
    z = normalize_halves(jax.random.normal(jax.random.key(3), (20, 6)), 4)
    config = QuantizerConfig(**options)
    keys = jax.random.split(jax.random.key(4))
    tables = {"semantic_codebook": (keys[0], (5, 4)), "pixel_codebook": (keys[1], (5, 2))}
    params = {name: jax.random.normal(*how) for name, how in tables.items()}
    books, used = config.codebooks(params, 2), jnp.array([1, 1, 0, 1, 1])
    first, second = ("semantic", "pixel") if config.heads == 1 else ("head_0", "head_1")
    counts = {first: used, second: used[::-1] * jnp.array([1, 1, 1, 0, 1])}
    revived = codebook.revive_dead_codes(jax.random.key(0), books, z, counts)
    moved = [np.asarray(new != old) for new, old in zip(revived, books, strict=True)]
    if config.heads == 1:  # code 2 of the semantic half; 2 and 3 of the pixel half
        expected = [[2], [2, 3]]
        for half, rows in zip(moved, expected, strict=True):
            assert (
                np.flatnonzero(half.all(-1)).tolist()
                == rows
                == np.flatnonzero(half.any(-1)).tolist()
            )
        return
    for half in moved:  # the first head's columns of code 2, the second's of 2 and 3
        width = half.shape[1] // 2
        assert np.flatnonzero(half[:, :width].all(-1)).tolist() == [2]
        assert np.flatnonzero(half[:, width:].all(-1)).tolist() == [2, 3]
        assert half.sum() == 3 * width


def _list_window(window, batches):
    """Return the last `window` entries (scale, code) in the reference's order."""
    entries = []
    for codes, keep in batches:
        for s, where in enumerate(SCALES.slices()):
            if keep[s]:
                entries += [(s, c) for c in codes[:, where].ravel()]
    return entries[-window:]


def test_window_equals_a_list_of_the_last_codes():
    rng = np.random.default_rng(0)
    for window in (10, 40, 1000):  # smaller than a batch, between, larger than all
        usage, batches = Usage.empty(window, SCALES, 8), []
        update = jax.jit(lambda u, c, k: u.update(c, SCALES, k))
        for step in range(6):
            codes = rng.integers(0, 8, (2, SCALES.tokens))
            keep = np.ones(3)
            if step % 2:
                keep[1 + step % 3 % 2] = 0
            batches.append((codes, keep))
            usage = update(usage, jnp.asarray(codes), jnp.asarray(keep))
            expected = np.zeros((3, 8), int)
            for s, c in _list_window(window, batches):
                expected[s, c] += 1
            np.testing.assert_array_equal(usage.counts_SK, expected)


def test_usage_and_perplexity():
    usage = Usage.empty(100, SCALES, 8)
    codes = jnp.asarray([[0] + [0, 1, 2, 3] + [5] * 9])
    metrics = usage.update(codes, SCALES, jnp.ones(3)).metrics(SCALES)
    assert metrics["usage/all"] == 5 / 8
    assert metrics["usage/scale_2"] == 4 / 8
    np.testing.assert_allclose(metrics["perplexity/scale_1"], 1.0)
    np.testing.assert_allclose(metrics["perplexity/scale_2"], 4.0, rtol=1e-6)
    p = np.bincount(np.asarray(codes)[0], minlength=8) / codes.size
    entropy = -np.sum(p[p > 0] * np.log(p[p > 0]))
    np.testing.assert_allclose(metrics["perplexity/all"], np.exp(entropy), rtol=1e-6)


def test_order_is_the_reference_s():
    golden = np.load(GOLDEN / "train_clipb_224.npz")
    scales = Scales((1, 2, 4, 6, 8, 10, 12, 14))
    usage = Usage.empty(131072, scales, 32768)
    usage = usage.update(jnp.asarray(golden["keep_indices"]), scales, jnp.ones(8))
    tail = golden["keep_history_tail"]
    np.testing.assert_array_equal(np.asarray(usage.history_W)[: len(tail)] % 32768, tail)
    assert (np.asarray(usage.history_W)[len(tail) :] == -1).all()
