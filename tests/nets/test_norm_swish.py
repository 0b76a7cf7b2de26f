"""GroupNorm with swish: equal to Flax's, forward and backward; the gradient keeps one map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenflow_jax.nets.norm_swish import NormSwish

X, G = (jax.random.normal(jax.random.key(i), (2, 6, 5, 12)) * 3 + i for i in (1, 2))
PARAMS = {
    "scale": jax.random.normal(jax.random.key(3), (12,)),
    "bias": jax.random.normal(jax.random.key(4), (12,)),
}


def plain(params, x):
    norm = nn.GroupNorm(4, epsilon=1e-6, use_fast_variance=False)
    return nn.swish(norm.apply({"params": params}, x))


def ours(params, x):
    return NormSwish(4).apply({"params": params}, x)


def test_equals_flax():
    got, pull = jax.vjp(ours, PARAMS, X)
    want, pull_plain = jax.vjp(plain, PARAMS, X)
    np.testing.assert_allclose(got, want, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 2e-5), pull(G), pull_plain(G))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_keeps_one_map(dtype):
    x = X.astype(dtype)
    got, pull = jax.vjp(lambda p, x: NormSwish(4, dtype).apply({"params": p}, x), PARAMS, x)
    assert got.dtype == dtype
    assert [leaf.size for leaf in jax.tree.leaves(pull)].count(X.size) == 1
    params, x_gradient = pull(G.astype(dtype))
    assert x_gradient.dtype == dtype and params["scale"].dtype == jnp.float32
    want = jax.vjp(plain, PARAMS, X)[1](G)[1]
    np.testing.assert_allclose(x_gradient, want, atol=0.05 if dtype == jnp.bfloat16 else 2e-5)
