"""The filters against the reference's survivors, ties included, and draws from them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.nets.sampling import draw, survivors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "t2i_sampling.json").read_text())


def keep_likely(logits, top_k=0, top_p=0.0):
    """Return `survivors` as a mask of the entries, bool (..., V)."""
    values_k, _, kept_1, beyond_1 = survivors(logits, top_k, top_p)
    cut_1 = jnp.take_along_axis(values_k, kept_1 - 1, axis=-1)
    above_1 = jnp.sum(logits > cut_1, axis=-1, keepdims=True)
    equal = logits == cut_1
    rank = jnp.cumsum(equal, axis=-1)
    return (logits > cut_1) | (equal & (rank <= kept_1 + beyond_1 - above_1))


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c['array']}-{c['top_k']}-{c['top_p']}" for c in CASES]
)
def test_survivors(case):
    with np.load(GOLDEN / "t2i_sampling.npz") as file:
        logits = file[f"{case['array']}:logits"]
        want = file[f"{case['array']}:{case['index']}:survives"]
    # What had no probability before the filter has none after it, whether "kept" or not.
    keep = np.asarray(keep_likely(logits, case["top_k"], case["top_p"])) & np.isfinite(logits)
    np.testing.assert_array_equal(keep.sum(-1), case["count"])
    # Of equal values across the cut, the reference kept what its (unstable) sort put last: there
    # the values have to be the same, elsewhere the survivors.
    for values, ours, theirs in zip(
        *(x.reshape(-1, x.shape[-1]) for x in (logits, keep, want)), strict=True
    ):
        np.testing.assert_array_equal(np.sort(values[ours]), np.sort(values[theirs]))
        across = np.isin(values, values[theirs]) & ~theirs
        if not across.any():
            np.testing.assert_array_equal(ours, theirs)


def test_large_rows_equal_the_rule_written_out():
    """Against a sort of everything, at a size where running sums round."""
    logits = np.random.default_rng(0).standard_normal((4, 8192)).astype(np.float32) * 3
    for top_k, top_p in ((600, 0.6), (1200, 0.8), (0, 0.9)):
        want = np.zeros(logits.shape, bool)
        for row, out in zip(logits.astype(np.float64), want, strict=True):
            order = np.argsort(row)
            order = order[-top_k:] if top_k else order
            weights = np.exp(row[order])
            stays = np.cumsum(weights) / weights.sum() > 1 - top_p
            out[order[stays]] = True
        got = np.asarray(keep_likely(logits, top_k, top_p))
        assert np.abs(got.sum(-1) - want.sum(-1)).max() <= 1
        assert (got != want).sum() <= 4


def test_draws_follow_the_softmax_and_the_key_of_the_row():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    many = jnp.broadcast_to(logits, (2, 20000, 4))
    keys = jax.random.split(jax.random.key(0), 2)
    codes = np.asarray(draw(keys, many, 3))
    assert codes.dtype == np.int32
    shares = np.bincount(codes.ravel(), minlength=4) / codes.size
    np.testing.assert_allclose(shares, [0, 2 / 9, 3 / 9, 4 / 9], atol=0.01)
    assert (codes[0] != codes[1]).any()
    np.testing.assert_array_equal(draw(keys[1:], many[1:], 3)[0], codes[1])
    assert (np.asarray(draw(keys, many, 1)) == 3).all()


def test_ties_beyond_k_are_drawn_equally_often():
    """Of five equal values top-k counts two: all five are drawn, and no other."""
    logits = jnp.broadcast_to(jnp.array([0.0, 1, 1, -1, 1, 1, 0, 1]), (1, 20000, 8))
    keys = jax.random.split(jax.random.key(3), 1)
    for top_k in (1, 2, 4):
        shares = np.bincount(np.asarray(draw(keys, logits, top_k)).ravel(), minlength=8) / 20000
        np.testing.assert_allclose(shares, [0, 0.2, 0.2, 0, 0.2, 0.2, 0, 0.2], atol=0.02)
    # 1 - p removes two of the five, each of probability 0.2.
    drawn = np.asarray(draw(keys, logits, 2, 0.55))
    assert len(np.unique(drawn)) == keep_likely(logits[0, 0], 2, 0.55).sum() == 3


def test_negative_filters_are_rejected():
    with pytest.raises(ValueError, match=r"top_k=-1.*top_p=-0\.5"):
        keep_likely(jnp.zeros(3), -1, -0.5)
    assert keep_likely(jnp.arange(3.0), 10).all()
