"""Operations, live memory and collectives against hand counts."""

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.parallel import costs


def count(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return costs.flops(jax.make_jaxpr(function)(*arguments).jaxpr)


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
    again = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ x) @ x)(x)))
    plain = jax.grad(lambda x: jnp.sum((lambda x: jnp.sin(x @ x) @ x)(x)))
    assert count(again, (4, 4)) > count(plain, (4, 4)) == 6 * 2 * 4**3


def test_live_bytes_end_with_the_last_use():
    def chain(x):
        y = x + 1.0  # alive until z is there
        z = y * 2.0
        return z.sum() * 3.0

    jaxpr = jax.make_jaxpr(chain)(np.zeros(256, np.float32)).jaxpr
    assert 2 * 1024 <= costs.live_bytes(jaxpr) <= 2 * 1024 + 16


HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%condition (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
}

%body (p: (s32[])) -> (s32[]) {
  %one = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}) all-reduce(%x, %y), to_apply=%add
}

%start (p: f32[8]) -> f32[32] {
  ROOT %gather = f32[32]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%beside (p: f32[8]) -> f32[32] {
  %gather = f32[32]{0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %sum = f32[32]{0} add(%gather, %gather)
}

ENTRY %main (p: f32[]) -> f32[] {
  %started = f32[32]{0} fusion(%x), kind=kCustom, calls=%start
  %going = f32[32]{0} fusion(%started), kind=kCustom, calls=%beside
  %kernel = f32[4]{0} custom-call(%p), frontend_attributes={kernel_metadata={
"metadata":"{}"
}}, metadata={op_name="attributes of several lines"}
  %loop = (s32[]) while(%t), condition=%condition, body=%body
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%z), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
}
"""


def test_collectives_in_loops_count_every_iteration():
    expected = {"all-gather": (2, 256), "all-reduce": (12, 12 * (2048 + 16))}
    assert costs.collectives(HLO) == expected
