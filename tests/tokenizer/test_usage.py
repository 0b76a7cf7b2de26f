"""The sliding window of code usage against a plain list of the last codes."""

import jax
import jax.numpy as jnp
import numpy as np
from golden.loading import GOLDEN

from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.usage import Usage

SCALES = Scales((1, 2, 3))


def _list_window(window, batches):
    """The last `window` entries (scale, code) in the reference's order."""
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


def test_figures():
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
