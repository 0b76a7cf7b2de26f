"""Cross entropy over a large vocabulary in pieces: logits of all tokens never exist at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tokenflow_jax.models.placement import on_batch


def project(hidden_BLC: jax.Array, kernel_CV: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """hidden @ kernel with operands of `dtype`; float32 (B, L, V)."""
    return jnp.einsum(
        "blc,cv->blv",
        hidden_BLC.astype(dtype),
        kernel_CV.astype(dtype),
        preferred_element_type=jnp.float32,
    )


def token_losses(
    hidden_BLC: jax.Array,
    kernel_CV: jax.Array,
    labels_BL: jax.Array,
    tokens: int = 4096,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of every token, without ever holding the logits of all of them.

    The tokens are worked off in pieces along L, forward and backward, so that the memory for logits
    is `tokens` x V, whatever the batch and the length.

    Args:
      hidden_BLC: after the final norm.
      kernel_CV: the head.
      labels_BL: int, the id that each position is to predict (already shifted); negative for none.
      tokens: of one piece, over the whole batch; at least one position of every row is taken.
      dtype: of the operands of the product.

    Returns:
      losses_BL: float32, 0 where there is no label.
      right_BL: bool, whether the label has the highest score; False where there is no label.
    """
    batch, length, _ = hidden_BLC.shape
    size = max(1, min(length, tokens // batch))
    count = -(-length // size)
    # Pieces of equal size cost at most a few positions more.
    size = -(-length // count)
    extra = count * size - length

    def pieces(x: jax.Array, value: int) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)], constant_values=value)
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(_, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        hidden_BlC, labels_Bl = inputs
        logits_BlV = on_batch(project(on_batch(hidden_BlC), kernel_CV, dtype), "vocabulary")
        labelled_Bl = labels_Bl >= 0
        own_BlV = jnp.arange(logits_BlV.shape[-1]) == labels_Bl[..., None]
        own_Bl = jnp.sum(jnp.where(own_BlV, logits_BlV, 0.0), axis=-1)  # no gather over a mesh
        losses_Bl = jax.nn.logsumexp(logits_BlV, axis=-1) - own_Bl
        right_Bl = jnp.argmax(logits_BlV, axis=-1) == labels_Bl
        return None, (jnp.where(labelled_Bl, losses_Bl, 0.0), right_Bl & labelled_Bl)

    _, out = jax.lax.scan(piece, None, (pieces(hidden_BLC, 0), pieces(labels_BL, -1)))
    losses_BL, right_BL = (
        jnp.moveaxis(x, 0, 1).reshape(batch, count * size)[:, :length] for x in out
    )
    return losses_BL, right_BL
