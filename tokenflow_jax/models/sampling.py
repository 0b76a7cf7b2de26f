"""Filters of a distribution over codes, with the reference's rules for ties, and draws from it."""

import jax
import jax.numpy as jnp


def keep_likely(logits: jax.Array, top_k: int = 0, top_p: float = 0.0) -> jax.Array:
    """Which entries survive the top-k and then the top-p filter.

    Top-k keeps everything not below the k-th largest value, so that ties can leave more than k.
    Top-p sorts the rest in ascending order and removes while the running sum of its renormalised
    probabilities is at most 1 - p, equality included; the largest value always stays. Of equal
    values across that cut, the last ones are kept, as a stable sort has it.

    Args:
      logits: (..., V); minus infinity is a probability of zero.
      top_k: how many; 0 is off, and so is V or more.
      top_p: the probability to keep; 0 is off, and so is 1 or more.

    Returns:
      bool (..., V).

    Raises:
      ValueError: a negative top_k or top_p.
    """
    problems = [f"top_k={top_k} is negative; 0 turns it off"] if top_k < 0 else []
    if not top_p >= 0:
        problems.append(f"top_p={top_p} is negative; 0 turns it off")
    if problems:
        raise ValueError("; ".join(problems))
    size = logits.shape[-1]
    count = min(top_k, size) or size
    if count == size and not top_p:
        return jnp.ones(logits.shape, bool)
    if count == 1:
        return logits == logits.max(-1, keepdims=True)
    # Sorted, largest first. Ties beyond the k-th are not among them: they are only counted.
    values_k = jax.lax.top_k(logits, count)[0]
    least = values_k[..., -1:]
    if not top_p:
        return logits >= least
    beyond = jnp.sum(logits >= least, axis=-1, keepdims=True) - count
    return _keep_probable(logits, values_k, beyond, top_p)


def _keep_probable(
    logits: jax.Array, values_k: jax.Array, beyond: jax.Array, top_p: float
) -> jax.Array:
    """The top-p filter.

    Args:
      logits: (..., V).
      values_k: (..., k), what top-k has left, largest first.
      beyond: (..., 1), how many more of it there are that equal the last of `values_k`.
      top_p: the probability to keep.
    """
    weights_k = jnp.exp(values_k - values_k[..., :1])
    tail = beyond * weights_k[..., -1:]
    total = weights_k.sum(-1, keepdims=True) + tail
    # Running sums from the smallest upwards: first the ties beyond k, then these.
    sums_k = (jnp.cumsum(weights_k[..., ::-1], axis=-1)[..., ::-1] + tail) / total
    removed_k = sums_k <= 1 - top_p
    removed_k = removed_k.at[..., 0].set(False)
    kept = jnp.sum(~removed_k, axis=-1, keepdims=True)
    cut = jnp.take_along_axis(values_k, kept - 1, axis=-1)
    # How many of the values that equal the cut are kept: of those among the k, and, where the cut
    # is the k-th value and all k stay, of those beyond.
    equal_kept = jnp.sum((values_k == cut) & ~removed_k, axis=-1, keepdims=True)
    share = weights_k[..., -1:] / total
    fitting = jnp.floor((1 - top_p) / jnp.maximum(share, jnp.finfo(share.dtype).tiny))
    beyond_kept = jnp.maximum(beyond - fitting.astype(jnp.int32), 0)
    equal_kept += jnp.where(kept == values_k.shape[-1], beyond_kept, 0)
    equal = logits == cut
    from_the_end = jnp.cumsum(equal[..., ::-1], axis=-1)[..., ::-1]
    return (logits > cut) | (equal & (from_the_end <= equal_kept))


def draw(keys_B: jax.Array, logits_BLV: jax.Array, top_k: int = 0, top_p: float = 0.0) -> jax.Array:
    """Draws one entry per position from the filtered softmax.

    Args:
      keys_B: one key per row, so that a row's draws do not depend on what else is in the batch.
      logits_BLV: scores.
      top_k, top_p: see `keep_likely`.

    Returns:
      int32 (B, L).
    """
    filtered = jnp.where(keep_likely(logits_BLV, top_k, top_p), logits_BLV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, filtered).astype(jnp.int32)
