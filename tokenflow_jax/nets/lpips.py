"""LPIPS (arXiv 1801.03924): a distance between images in the features of a VGG16."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.convolve import convolve
from tokenflow_jax.parallel.placement import on_batch

# VGG16's stages: (channels, convolutions). LPIPS reads the end of each stage; a 2 x 2 max pool
# stands between two stages.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_DROPOUT = 0.5
_LEAST_SIZE = 2 ** (len(STAGES) - 1)


def lpips_template() -> dict[str, Any]:
    """Return the shapes of the parameters of `LPIPS`, a nested dict of jax.ShapeDtypeStruct."""
    image = jnp.zeros((1, _LEAST_SIZE, _LEAST_SIZE, 3))
    return jax.eval_shape(lambda: LPIPS().init(jax.random.key(0), image, image))["params"]


def _unit(features_BHWC: jax.Array) -> jax.Array:
    """Scale each cell's channels to length one, in float32; cells of zeros stay zero."""
    x = features_BHWC.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    # The inner where keeps the gradient of the root finite where all channels are zero.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-10)


class LPIPS(nn.Module):
    """The learned perceptual distance with a VGG16 trunk; its weights are meant to stay frozen.

    Each image goes through the trunk by itself, so that with `jax.lax.stop_gradient` around one
    image nothing is kept for a backward pass through it.
    """

    dtype: jnp.dtype = jnp.float32  # of the convolutions; everything else is float32

    def setup(self):
        widths = [channels for channels, count in STAGES for _ in range(count)]
        options = {"padding": 1, "dtype": self.dtype, "conv_general_dilated": convolve}
        self.conv = [nn.Conv(width, (3, 3), **options) for width in widths]
        self.heads = [
            self.param(f"head_{stage}", nn.initializers.uniform(1.0), (channels,))
            for stage, (channels, _) in enumerate(STAGES)
        ]

    def features(self, images_BHWC: jax.Array) -> list[jax.Array]:
        """Return the trunk's outputs after relu1_2, 2_2, 3_3, 4_3 and 5_3."""
        size = images_BHWC.shape[1:3]
        if min(size) < _LEAST_SIZE:
            raise ValueError(
                f"LPIPS of images of {size} pixels: the trunk halves four times, so it needs at "
                f"least {_LEAST_SIZE}; use larger images or switch the term off"
            )
        x = (images_BHWC.astype(jnp.float32) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
        x = x.astype(self.dtype)
        outputs, convolutions = [], iter(self.conv)
        for stage, (_, count) in enumerate(STAGES):
            x = nn.max_pool(x, (2, 2), strides=(2, 2)) if stage else x
            for _ in range(count):
                x = on_batch(nn.relu(next(convolutions)(x)))
            outputs.append(x)
        return outputs

    def layer_distances(
        self, x_BHWC: jax.Array, y_BHWC: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Return the five terms of the distance, (5, B) float32; see `__call__`."""
        parts = []
        for i, (x, y) in enumerate(zip(self.features(x_BHWC), self.features(y_BHWC), strict=True)):
            difference = jnp.square(_unit(x) - _unit(y))
            if dropout_rng is not None:
                key = jax.random.fold_in(dropout_rng, i)
                keep = jax.random.bernoulli(key, 1 - _DROPOUT, difference.shape)
                difference = jnp.where(keep, difference / (1 - _DROPOUT), 0.0)
            # The mean over cells first: the head is linear, so nothing of full size is multiplied.
            parts.append(difference.mean((1, 2)) @ self.heads[i].astype(jnp.float32))
        return jnp.stack(parts)

    def __call__(
        self, x_BHWC: jax.Array, y_BHWC: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Compute distances between images, (B,) float32: 0 for equal ones, never negative.

        Args:
          x_BHWC, y_BHWC: images in [-1, 1], at least 16 px wide.
          dropout_rng: brings back the dropout before the channel weights that the original leaves
            on in training by accident; None is LPIPS as it is meant.
        """
        return self.layer_distances(x_BHWC, y_BHWC, dropout_rng).sum(0)
