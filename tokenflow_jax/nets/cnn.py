"""The pixel branch: a VQGAN-style convolutional encoder and decoder (arXiv 2012.09841).

Channels at level i are `channels * multipliers[i]`; each level but one changes the resolution by
two. Attention sits on the coarsest level and in the middle. Norms are GroupNorm, eps 1e-6.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.parallel.placement import on_batch


def _norm(groups: int, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(
        num_groups=groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name
    )


def _conv(features: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)


class ResBlock(nn.Module):
    """norm, swish, conv, twice, beside a shortcut (a 1x1 projection when the channels change)."""

    features: int
    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = nn.swish(_norm(self.groups, self.dtype, "norm1")(x_BHWC))
        h = _conv(self.features, self.dtype, "conv1")(h)
        h = nn.swish(_norm(self.groups, self.dtype, "norm2")(h))
        h = _conv(self.features, self.dtype, "conv2")(h)
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x_BHWC)
        return on_batch(x_BHWC + h)


class SpatialAttention(nn.Module):
    """Single-head attention over all cells of a map, with a residual."""

    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BHWC.shape
        h = _norm(self.groups, self.dtype, "norm")(x_BHWC)
        h = h.reshape(batch, height * width, 1, channels)
        q, k, v = (nn.Dense(channels, dtype=self.dtype, name=name)(h) for name in "qkv")
        out = jax.nn.dot_product_attention(q, k, v).reshape(x_BHWC.shape)
        return on_batch(x_BHWC + nn.Dense(channels, dtype=self.dtype, name="out")(out))


def _middle(x_BHWC: jax.Array, groups: int, dtype: jnp.dtype, block: type[nn.Module]) -> jax.Array:
    """Residual block, attention, residual block at the coarsest resolution."""
    channels = x_BHWC.shape[-1]
    x_BHWC = block(channels, groups, dtype, name="mid_block_0")(x_BHWC)
    x_BHWC = SpatialAttention(groups, dtype, name="mid_attn")(x_BHWC)
    return block(channels, groups, dtype, name="mid_block_1")(x_BHWC)


class PixelEncoder(nn.Module):
    """Images to a map of features, 2**(levels - 1) times smaller.

    Attributes:
      channels: at the finest level.
      multipliers: channel multiplier per level, finest first.
      blocks: residual blocks per level.
      features: output channels.
      groups: of every GroupNorm; must divide the channels of every level.
      dtype: computation dtype.
      remat: recompute each residual block in the backward pass.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    features: int = 256
    groups: int = 32
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Maps (B, H, W, 3) in [-1, 1] to (B, H / f, W / f, features), f = 2**(levels - 1)."""
        block = nn.remat(ResBlock) if self.remat else ResBlock
        last = len(self.multipliers) - 1
        h = _conv(self.channels, self.dtype, "conv_in")(images_BHWC)
        for i, multiplier in enumerate(self.multipliers):
            for j in range(self.blocks):
                name = f"level_{i}_block_{j}"
                h = block(self.channels * multiplier, self.groups, self.dtype, name=name)(h)
                if i == last:
                    h = SpatialAttention(self.groups, self.dtype, name=f"level_{i}_attn_{j}")(h)
            if i != last:
                # Padded on the right and bottom only, which is what SAME means for even sizes.
                h = nn.Conv(
                    h.shape[-1],
                    (3, 3),
                    strides=2,
                    padding=((0, 1), (0, 1)),
                    dtype=self.dtype,
                    name=f"level_{i}_down",
                )(h)
                h = on_batch(h)
        h = _middle(h, self.groups, self.dtype, block)
        return _conv(self.features, self.dtype, "conv_out")(
            nn.swish(_norm(self.groups, self.dtype, "norm_out")(h))
        )


class PixelDecoder(nn.Module):
    """A map of features to images; the mirror of `PixelEncoder` with one more block per level.

    Attributes:
      channels, multipliers, groups, dtype, remat: as in `PixelEncoder` (multipliers finest first).
      blocks: residual blocks per level (the enhanced decoder has 256 channels and 5 blocks).
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 3
    groups: int = 32
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, features_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decodes a map of features.

        Args:
          features_BHWC: (B, h, w, C).

        Returns:
          Images (B, H, W, 3), nominally in [-1, 1] but not clamped, and the input of the last
          convolution (B, H, W, channels), which the adaptive adversarial weight needs.
        """
        block = nn.remat(ResBlock) if self.remat else ResBlock
        h = _conv(self.channels * self.multipliers[-1], self.dtype, "conv_in")(features_BHWC)
        h = _middle(h, self.groups, self.dtype, block)
        for i, multiplier in enumerate(reversed(self.multipliers)):
            for j in range(self.blocks):
                name = f"level_{i}_block_{j}"
                h = block(self.channels * multiplier, self.groups, self.dtype, name=name)(h)
                if i == 0:
                    h = SpatialAttention(self.groups, self.dtype, name=f"level_{i}_attn_{j}")(h)
            if i != len(self.multipliers) - 1:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
                h = on_batch(_conv(h.shape[-1], self.dtype, f"level_{i}_up")(h))
        h = nn.swish(_norm(self.groups, self.dtype, "norm_out")(h))
        return on_batch(_conv(3, self.dtype, "conv_out")(h)), on_batch(h)
