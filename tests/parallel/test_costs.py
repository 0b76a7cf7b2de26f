"""Operations and live memory against hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tokenflow_jax.nets.attention import SAVED, attention
from tokenflow_jax.nets.masks import Mask
from tokenflow_jax.parallel import costs


def count(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return costs.operations(jax.make_jaxpr(function)(*arguments).jaxpr).computed


def test_products_and_their_gradients():
    assert count(jnp.dot, (4, 8), (8, 16)) == 2 * 4 * 8 * 16
    assert count(jax.vmap(jnp.dot), (3, 4, 8), (3, 8, 16)) == 3 * 2 * 4 * 8 * 16
    both = jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), (0, 1))
    assert count(both, (4, 8), (8, 16)) == 3 * 2 * 4 * 8 * 16


def test_convolutions_and_their_gradients():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (2, 17, 17, 3), (3, 3, 3, 8)
    forward = 2 * (2 * 8 * 8 * 8) * 27
    assert count(convolve, *shapes) == forward
    weights = jax.grad(lambda w, x: jnp.sum(convolve(x, w) ** 2))
    assert count(weights, *reversed(shapes)) == 2 * forward


def test_loops_branches_and_recomputation():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert count(loop, (4, 4), (4, 4)) == 5 * 2 * 4**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    assert count(branch, (4, 4)) == 2 * 4**3
    again = jax.value_and_grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ x) @ x)(x)))
    plain = jax.value_and_grad(lambda x: jnp.sum((lambda x: jnp.sin(x @ x) @ x)(x)))
    assert count(again, (4, 4)) > count(plain, (4, 4)) == 6 * 2 * 4**3
    jaxpr = jax.make_jaxpr(again)(np.zeros((4, 4), np.float32)).jaxpr
    assert costs.operations(jaxpr).needed == count(plain, (4, 4))


def multiply(x_ref, y_ref, out_ref):
    out_ref[...] = x_ref[...] @ y_ref[...]


def test_kernels_count_every_step_of_their_grid():
    def product(x, y):
        return pl.pallas_call(
            multiply,
            grid=(3,),
            in_specs=[
                pl.BlockSpec((8, 16), lambda i: (i, 0)),
                pl.BlockSpec((16, 4), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((8, 4), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((24, 4), jnp.float32),
        )(x, y)

    jaxpr = jax.make_jaxpr(product)(np.zeros((24, 16)), np.zeros((16, 4))).jaxpr
    assert costs.operations(jaxpr) == (3 * 2 * 8 * 16 * 4,) * 3


def test_attention_counts_the_pairs_that_its_mask_allows():
    """Two products forward, again for recomputation, and backward five, or seven in two kernels."""
    queries = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)
    keys = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.float32)
    pairs = (256 * 257 // 2) * 2 * 4  # causal, two rows of four heads

    def loss(q, k):
        return jax.checkpoint(lambda q: attention(q, k, k, Mask(), "splash"))(q).sum()

    for function, products, needed in (
        (loss, (2,), 2),
        (jax.value_and_grad(loss), (2 + 2 + 5, 2 + 2 + 7), 6),
        (lambda *x: attention(*x, x[1], Mask(), "splash"), (2,), 2),
    ):
        found = costs.operations(jax.make_jaxpr(function)(queries, keys).jaxpr)
        assert found.kernels in [n * 2 * 64 * pairs for n in products]
        # Outside the kernel, its gradient sums over rows.
        assert found.computed == pytest.approx(found.kernels, rel=1e-3)
        assert found.needed == pytest.approx(needed * 2 * 64 * pairs, rel=1e-3)


def test_a_kernel_whose_results_are_kept_is_counted_once():
    """Recomputation is traced with it, but nothing reads that."""
    queries = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.float32)
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)

    def kernels(**how):
        form = jax.checkpoint(lambda q: attention(q, q, q, Mask(), "splash"), **how)
        traced = jax.make_jaxpr(jax.value_and_grad(lambda q: form(q).sum()))(queries)
        return costs.operations(traced.jaxpr).kernels

    assert kernels(policy=policy) == pytest.approx(kernels() * 7 / 9)


def test_live_bytes_end_with_the_last_use():
    def chain(x):
        y = x + 1.0  # alive until z is there
        z = y * 2.0
        return z.sum() * 3.0

    jaxpr = jax.make_jaxpr(chain)(np.zeros(256, np.float32)).jaxpr
    assert 2 * 1024 <= costs.live_bytes(jaxpr) <= 2 * 1024 + 16
