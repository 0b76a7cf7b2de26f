"""Top-k and top-p filters with the reference's rules for ties, and draws from what they leave."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Survivors(NamedTuple):
    """The entries of each row of V logits that pass the filters; at a cut, the first of equal ones.

    The counts are int32 (..., 1).
    """

    values_k: jax.Array  # the k largest logits, largest first
    indices_k: jax.Array  # where they are, int32
    kept_1: jax.Array  # how many of them survive
    beyond_1: jax.Array  # how many more entries survive; they equal the last of `values_k`


def survivors(logits: jax.Array, top_k: int = 0, top_p: float = 0.0) -> Survivors:
    """Apply the top-k and then the top-p filter to logits (..., V).

    Top-k keeps everything not below the k-th largest value, so that ties can leave more than k.
    Top-p sorts the rest in ascending order and removes while the running sum of its renormalized
    probabilities is at most 1 - p, equality included; the largest value always stays. Zero switches
    a filter off.
    """
    if not (top_k >= 0 and top_p >= 0):
        raise ValueError(f"top_k={top_k}, top_p={top_p}: a filter is negative; 0 turns it off")
    size = logits.shape[-1]
    count = min(top_k, size) or size
    # Without barriers XLA turns this into a sort of whole rows on a CPU, twenty times as slow. (One
    # barrier for both results crashes it where a mesh is in use.)
    values_k, indices_k = map(jax.lax.optimization_barrier, jax.lax.top_k(logits, count))
    beyond_1 = jnp.sum(logits >= values_k[..., -1:], axis=-1, keepdims=True) - count
    if not top_p:
        kept_1 = jnp.full_like(beyond_1, count)
        return Survivors(values_k, indices_k, kept_1, beyond_1)
    weights_k = jnp.exp(values_k - values_k[..., :1])
    least_1 = weights_k[..., -1:]
    total_1 = weights_k.sum(-1, keepdims=True) + beyond_1 * least_1
    # Running sums from the smallest upwards: first the ties beyond k, then the k.
    sums_k = jnp.cumsum(weights_k[..., ::-1], axis=-1)[..., ::-1] + beyond_1 * least_1
    stays_k = (sums_k / total_1 > 1 - top_p).at[..., 0].set(True)
    kept_1 = jnp.sum(stays_k, axis=-1, keepdims=True)
    removed = jnp.floor((1 - top_p) * total_1 / jnp.maximum(least_1, jnp.finfo(jnp.float32).tiny))
    left_1 = jnp.maximum(beyond_1 - jnp.minimum(removed, size).astype(jnp.int32), 0)
    return Survivors(values_k, indices_k, kept_1, jnp.where(kept_1 == count, left_1, 0))


def draw(keys_B: jax.Array, logits_BLV: jax.Array, top_k: int = 0, top_p: float = 0.0) -> jax.Array:
    """Draw an int32 entry per position (B, L) from the softmax of what survives the filters.

    Each row has a key of its own, so that its draws do not depend on the rest of the batch.
    """
    values_BLk, indices_BLk, kept_BL1, beyond_BL1 = survivors(logits_BLV, top_k, top_p)
    count = values_BLk.shape[-1]
    keys_B2 = jax.vmap(jax.random.split)(keys_B)
    # All ties beyond k are one more entry, of the weight of all of them.
    least_BL1 = values_BLk[..., -1:]
    ties_BL1 = least_BL1 + jnp.log(beyond_BL1.astype(jnp.float32))
    first_BLk = jnp.where(jnp.arange(count) < kept_BL1, values_BLk, -jnp.inf)
    choices_BLn = jnp.concatenate([first_BLk, ties_BL1], axis=-1)
    choice_BL = jax.vmap(jax.random.categorical)(keys_B2[:, 0], choices_BLn)
    place_BL1 = jnp.minimum(choice_BL, count - 1)[..., None]
    drawn_BL = jnp.take_along_axis(indices_BLk, place_BL1, axis=-1)[..., 0]

    def among_ties(drawn_BL: jax.Array) -> jax.Array:
        # The ties among the k come first in the row, as top-k is stable.
        beyond_BL = jnp.maximum(beyond_BL1[..., 0], 1)
        pick = jax.vmap(lambda key, most: jax.random.randint(key, most.shape, 0, most))
        known_BL = jnp.sum(values_BLk == least_BL1, axis=-1)
        rank_BL = known_BL + 1 + pick(keys_B2[:, 1], beyond_BL)
        ranks_BLV = jnp.cumsum(logits_BLV == least_BL1, axis=-1)
        tied_BL = jnp.argmax(ranks_BLV == rank_BL[..., None], axis=-1)
        return jnp.where(choice_BL == count, tied_BL.astype(jnp.int32), drawn_BL)

    return jax.lax.cond(jnp.any(choice_BL == count), among_ties, lambda x: x, drawn_BL)
