"""Which loss pulls how much: norms of the losses' gradients at tensors where they meet.

The pixel losses meet at the picture. Everything meets at the code vectors: the semantic half gets
the gradient of the distillation, the pixel half that of the pixel losses, both get the
commitment's. These gradients are made in a training step anyway; only their norms are new.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from tokenflow_jax.tokenizer.pyramid import Scales, map_of_vectors


def probes(batch: int, scales: Scales, channels: int) -> tuple[jax.Array, jax.Array]:
    """Return zeros to add to the quantized map and to the quantizer's inputs of all scales.

    What is differentiated with respect to them is the gradient that `at_codes` takes.
    """
    grid = scales.grid
    return jnp.zeros((batch, grid, grid, channels)), jnp.zeros((batch, scales.tokens, channels))


def at_picture(gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return each loss's share of the gradient norms at the reconstruction, by its name."""
    return _shares("gradient_share_picture", gradients)


def at_codes(
    map_BHWC: jax.Array,
    inputs_BLC: jax.Array,
    scales: Scales,
    keep_S: jax.Array,
    semantic_channels: int,
) -> dict[str, jax.Array]:
    """Return the shares of distillation, pixel losses and commitment at the code vectors.

    Args:
      map_BHWC: gradient of the decoders' losses at the quantized map, semantic channels first.
      inputs_BLC: gradient of commitment and entropy at the quantizer's inputs of all scales.
      scales: of the tokens L.
      keep_S: 0 of a scale that this step leaves out, otherwise 1.
      semantic_channels: of the C channels.
    """
    to_map = jax.linear_transpose(lambda v: map_of_vectors(v, scales, keep_S), inputs_BLC)
    (decoded_BLC,) = to_map(map_BHWC)
    gradients = {
        "distillation": decoded_BLC[..., :semantic_channels],
        "pixels": decoded_BLC[..., semantic_channels:],
        "commitment": inputs_BLC,
    }
    return _shares("gradient_share_codes", gradients)


def _shares(group: str, gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    norms = {name: optax.tree.norm(gradient) for name, gradient in gradients.items()}
    total = jnp.maximum(sum(norms.values()), jnp.finfo(jnp.float32).tiny)
    return {f"{group}/{name}": norm / total for name, norm in norms.items()}
