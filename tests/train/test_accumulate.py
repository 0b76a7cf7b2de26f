"""Gradient accumulation: sums, rows in order, carries, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.train.accumulate import accumulate


def function(carry, rows, key):
    noise = 0.0 if key is None else jax.random.uniform(key)
    return carry + 1, {"sum": rows["x"].sum(), "noise": noise}, rows["x"] * 2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sums_are_of_the_batch_and_rows_in_its_order(count):
    x = jnp.arange(8.0)
    carry, sums, rows = jax.jit(lambda x: accumulate(function, {"x": x}, count, 0))(x)
    assert int(carry) == count and float(sums["sum"]) == 28
    np.testing.assert_array_equal(rows, 2 * x)


def test_each_microbatch_has_a_key_of_its_own():
    key = jax.random.key(0)
    _, sums, _ = accumulate(function, {"x": jnp.arange(8.0)}, 4, 0, key)
    each = [float(jax.random.uniform(k)) for k in jax.random.split(key, 4)]
    np.testing.assert_allclose(sums["noise"], sum(each), rtol=1e-6)


def test_a_batch_that_does_not_split_is_an_error():
    with pytest.raises(ValueError, match="batch of 8 rows does not split by accumulate=3"):
        accumulate(function, {"x": jnp.arange(8.0)}, 3, 0)
