"""Splash attention's tiles, and how often kernels run where the backward pass recomputes."""

import contextlib
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from nets.test_lm import plain_loss, tiny

from tokenflow_jax.nets import attention as attention_lib
from tokenflow_jax.nets.masks import Blocks, Mask
from tokenflow_jax.parallel import mesh


@pytest.mark.slow
@pytest.mark.parametrize("heads, blocks", [(2, Blocks()), (1, Blocks(200, (1, 4, 400, 200)))])
def test_splash_attention_of_several_tiles_equals_xla(heads, blocks):
    q = jax.random.normal(jax.random.key(0), (1, 1100, heads, 64))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 1100, 1, 64))
    mask, weights = Mask(blocks=blocks), jax.random.normal(jax.random.key(2), q.shape)

    def xla(q, k, v):
        return attention_lib.attention(q, k, v, mask.allowed(1100, 1100))

    def splash(q, k, v):
        return attention_lib._splash(q, k, v, mask, interpret=True)

    np.testing.assert_allclose(splash(q, k, v), xla(q, k, v), atol=2e-5)
    got, want = (
        jax.grad(lambda *x, f=f: (f(*x) * weights).sum(), (0, 1, 2))(q, k, v) for f in (splash, xla)
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.slow
def test_splash_attention_of_blocks_known_at_run_time_equals_xla():
    """Two rows with pictures at other places, one across tiles; the second of two conversations."""
    q, weights = jax.random.normal(jax.random.key(0), (2, 2, 1100, 2, 64))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 1100, 1, 64))
    last = np.stack([Blocks(n, (1, 4, 100)).last_key(1100) for n in (530, 300)])
    segments = jnp.asarray((np.arange(1100) >= [[0], [299]]) + 1)
    mask = Mask(segments_BK=segments, last_BK=jnp.asarray(last), ahead=99)

    def loss(function, q, k, v):
        out = function(q, k, v)
        return (out * weights).sum(), out

    def xla(q, k, v):
        return attention_lib.attention(q, k, v, mask.allowed(1100, 1100))

    splash = functools.partial(attention_lib._splash, mask=mask, interpret=True)
    (got, want) = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2), has_aux=True))(q, k, v)
        for f in (splash, xla)
    )
    np.testing.assert_allclose(got[1], want[1], atol=2e-5)
    for one, other in zip(got[0], want[0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_splash_tiles_are_large_and_few():
    """Tiles of one row, and the padding that they need."""
    rows = {100: 128, 512: 512, 947: 1024, 1152: 640, 1536: 768, 2048: 1024, 2560: 896, 4096: 1024}
    assert {length: attention_lib._splash_block(length) for length in rows} == rows
    for length in range(1, 5000, 61):
        side = attention_lib._splash_block(length)
        assert side <= 1024 and -length % side < 128 * -(-length // 1024)


def test_splash_neither_repeats_keys_nor_reads_tiles_without_any():
    """Two groups of four heads, four tiles of which the upper right one is empty."""

    def function(q, k, v):
        return attention_lib._splash(q, k, v, Mask(blocks=Blocks(1100, (400,))))

    q, k = (jax.ShapeDtypeStruct((1, 2048, heads, 64), jnp.bfloat16) for heads in (8, 2))
    jaxpr = jax.make_jaxpr(function)(q, k, k)
    (kernel,) = (equation for equation in equations(jaxpr.jaxpr) if is_kernel(equation))
    assert kernel.params["grid_mapping"].grid == (2, 4, 2, 2)
    shapes = [x.aval.shape for x in kernel.invars if x.aval.dtype == jnp.bfloat16]
    assert shapes == [(2, 4, 2048, 64), (2, 2048, 64), (2, 2048, 64)]
    tiles = [x.tolist() for x in jaxpr.consts if x.shape == (1, 2, 2)]
    assert [[[1, 0], [2, 1]]] in tiles  # partly, not at all; whole, partly


def is_kernel(equation):
    return equation.primitive.name == "pallas_call"


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.slow
def test_remat_changes_no_gradient_of_splash(monkeypatch):
    interpreted = functools.partial(attention_lib._splash, interpret=True)
    monkeypatch.setattr(attention_lib, "_splash", interpreted)
    monkeypatch.setattr(attention_lib, "choose", lambda *_: "splash")

    def gradients(remat):
        decoder, params, ids = tiny(remat=remat)
        return jax.tree.leaves(
            jax.jit(jax.grad(lambda p: plain_loss(decoder, p, ids, ids)))(params)
        )

    want = gradients("none")
    for remat in ("block", "dots"):
        for one, other in zip(gradients(remat), want, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("remat, times", [("none", 1), ("block", 2), ("dots", 1)])
def test_kernels_of_attention_in_a_training_step(remat, times, split, monkeypatch):
    """With "dots" the backward pass reads the forward kernel's results; "block" runs it again."""
    decoder, params, ids = tiny(remat=remat)
    monkeypatch.setattr(attention_lib, "choose", lambda *_: "splash")
    devices = mesh.make_abstract_mesh({"data": 3, "tensor": 2}, 6)
    with mesh.use(devices) if split else contextlib.nullcontext():
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: plain_loss(decoder, p, ids, ids)))(params).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    names = [equation.params["name"] for equation in equations(used) if is_kernel(equation)]
    assert sum("fwd" in name for name in names) == times
    assert sum("dkv" in name for name in names) == 1
