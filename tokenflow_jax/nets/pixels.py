"""The one scaling between uint8 pixels and the [-1, 1] floats that the models see."""

import jax
import jax.numpy as jnp
import numpy as np


def to_float(images: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Scale uint8 pixels to float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: jax.Array) -> jax.Array:
    """Turn model output into pixels as the reference does: clip(127.5 x + 128), truncated."""
    return jnp.clip(127.5 * images + 128.0, 0.0, 255.0).astype(jnp.uint8)
