"""Estimators: what gradient passes a nearest code, which has none of its own.

An estimator returns the codes' vectors, to rounding, in the forward pass, and decides about the
backward pass. It is deterministic, since pictures are encoded through it, too. The paper's is
`quantizer.straight_through`; all of them are of training only, a trained tokenizer does not depend
on them. `kinds` says which quantizer takes which.

Shapes: N tokens, C channels, R codes of a chunk.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tokenflow_jax.parallel import placement
from tokenflow_jax.parallel.placement import Split
from tokenflow_jax.tokenizer.quantizer import (
    Search,
    chunk_scores,
    fold_weight,
    in_chunks,
    l2_normalize,
    straight_through,
)


def rotate(z: jax.Array, codes: jax.Array, channels: Sequence[int]) -> jax.Array:
    """Return the codes; turn the gradient back as the rotation that takes z to them does.

    The rotation trick (arXiv 2410.06424, sec. 4.2): for unit vectors e and q, and r along e + q of
    norm one, q = R e with R = 1 - 2 r r' + 2 q e', and R is held constant. `channels` are the sizes
    of the parts of z that have norm one; each is rotated by itself, and the paper's factor
    |q| / |e| is one.
    """
    ends = [sum(channels[: i + 1]) for i in range(len(channels) - 1)]
    rotated = []
    for e, code in zip(jnp.split(z, ends, -1), jnp.split(codes, ends, -1), strict=True):
        unit, q = jax.lax.stop_gradient((l2_normalize(e), code))
        r = l2_normalize(unit + q)
        along_r, along_e = (jnp.sum(e * axis, axis=-1, keepdims=True) for axis in (r, unit))
        rotated.append(e - 2 * along_r * r + 2 * along_e * q)
    return straight_through(jnp.concatenate(rotated, axis=-1), codes)


def propagate_to_index(
    codes_NC: jax.Array, searches: Sequence[Search], temperature: float
) -> jax.Array:
    """Return the codes; pass the gradient on to all codes through the softmax of their scores.

    Index backpropagation (IBQ, arXiv 2412.02692, eq. 3 to 5): the vector is Ind' codes with Ind =
    onehot + p - sg(p), where p = softmax(-d / temperature) over the distances d that the index
    minimizes. `codes_NC` are differentiable rows of the tables: that is the onehot's part. There is
    no straight-through gradient to z, which learns through p and the commitment loss. The paper's
    further loss |Ind' codes - z|^2 is not taken: `codebook_losses` are those of all quantizers.
    """
    soft_NC = jnp.concatenate([_expected(s, temperature) for s in searches], axis=-1)
    return codes_NC + soft_NC - jax.lax.stop_gradient(soft_NC)


def _expected(search: Search, temperature: float) -> jax.Array:
    """Return sum_k p_k sg(code_k), (N, C), without an array of tokens x codes; two passes."""
    z_NC, codes_KC, *halves = search
    # A constant added to the logits cancels, so twice the inner product replaces -d.
    scaled_NC = fold_weight(z_NC, *halves) * (2 / temperature)
    run = placement.over_codes(_soft_codes, z_NC.shape[0], codes_KC.shape[0])
    return run(codes_KC, scaled_NC)


def _soft_codes(split: Split, codes_KC: jax.Array, scaled_NC: jax.Array) -> jax.Array:
    size = codes_KC.shape[0]
    chunks = in_chunks(codes_KC, scaled_NC.shape[0])

    @jax.checkpoint
    def accumulate(carry, chunk):
        top_N, total_N = carry
        logits_NR = chunk_scores(scaled_NC, *chunk, size)
        new_top_N = jnp.maximum(top_N, jax.lax.stop_gradient(logits_NR.max(axis=-1)))
        total_N *= jnp.exp(top_N - new_top_N)
        return (new_top_N, total_N + jnp.exp(logits_NR - new_top_N[:, None]).sum(-1)), None

    zeros_N = jnp.zeros(scaled_NC.shape[0], jnp.float32)
    (top_N, total_N), _ = jax.lax.scan(accumulate, (zeros_N - 1e30, zeros_N), chunks)
    if split.codes:
        all_top_N = jax.lax.pmax(jax.lax.stop_gradient(top_N), split.codes)
        total_N = jax.lax.psum(total_N * jnp.exp(top_N - all_top_N), split.codes)
        top_N = all_top_N
    log_total_N = top_N + jnp.log(total_N)

    @jax.checkpoint
    def expect(sum_NC, chunk):
        chunk_RC, start = chunk
        p_NR = jnp.exp(chunk_scores(scaled_NC, chunk_RC, start, size) - log_total_N[:, None])
        fixed_RC = jax.lax.stop_gradient(chunk_RC)
        return sum_NC + jnp.einsum("nr,rc->nc", p_NR, fixed_RC, precision="highest"), None

    sum_NC, _ = jax.lax.scan(expect, jnp.zeros_like(scaled_NC), chunks)
    return jax.lax.psum(sum_NC, split.codes) if split.codes else sum_NC
