"""The pixel branch: a VQGAN-style convolutional encoder and decoder (arXiv 2012.09841).

Channels at level i are `channels * multipliers[i]`, finest level first; each level but one changes
the resolution by two. Attention sits on the coarsest level and in the middle.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.layers import conv3x3
from tokenflow_jax.nets.norm_swish import NormSwish
from tokenflow_jax.parallel.placement import on_batch


class ResBlock(nn.Module):
    """norm, swish, conv, twice, beside a shortcut (a 1x1 projection when the channels change)."""

    features: int
    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = NormSwish(self.groups, self.dtype, name="norm1")(x_BHWC)
        h = conv3x3(self.features, self.dtype, "conv1")(h)
        h = NormSwish(self.groups, self.dtype, name="norm2")(h)
        h = conv3x3(self.features, self.dtype, "conv2")(h)
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
        norm = functools.partial(nn.GroupNorm, epsilon=1e-6, use_fast_variance=False)
        h = norm(self.groups, dtype=self.dtype, name="norm")(x_BHWC)
        h = h.reshape(batch, height * width, 1, channels)
        q, k, v = (nn.Dense(channels, dtype=self.dtype, name=name)(h) for name in "qkv")
        out = jax.nn.dot_product_attention(q, k, v).reshape(x_BHWC.shape)
        return on_batch(x_BHWC + nn.Dense(channels, dtype=self.dtype, name="out")(out))


class PixelEncoder(nn.Module):
    """Maps images (B, H, W, 3) in [-1, 1] to features, 2**(levels - 1) times smaller."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2  # residual blocks per level
    features: int = 256  # output channels
    groups: int = 32  # of every GroupNorm; divides the channels of every level
    dtype: jnp.dtype = jnp.float32
    remat: bool = False  # recompute each residual block in the backward pass

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        last = len(self.multipliers) - 1
        h = conv3x3(self.channels, self.dtype, "conv_in")(images_BHWC)
        for i, multiplier in enumerate(self.multipliers):
            h = _level(self, h, i, self.channels * multiplier, attend=i == last)
            if i != last:
                # Padded on the right and bottom only, which is what SAME means for even sizes.
                pad = ((0, 1), (0, 1))
                name = f"level_{i}_down"
                h = nn.Conv(h.shape[-1], (3, 3), 2, pad, dtype=self.dtype, name=name)(h)
                h = on_batch(h)
        h = _middle(self, h)
        h = NormSwish(self.groups, self.dtype, name="norm_out")(h)
        return conv3x3(self.features, self.dtype, "conv_out")(h)


class PixelDecoder(nn.Module):
    """Maps features to images; the mirror of `PixelEncoder` with one more block per level."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # finest level first, as in the encoder
    blocks: int = 3  # the enhanced decoder has 5, and 256 channels
    groups: int = 32
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, features_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return images, nominally in [-1, 1] but not clamped, and the last convolution's input.

        The input (B, H, W, channels) is what the adaptive adversarial weight needs.
        """
        coarsest_first = [self.channels * multiplier for multiplier in self.multipliers[::-1]]
        h = conv3x3(coarsest_first[0], self.dtype, "conv_in")(features_BHWC)
        h = _middle(self, h)
        for i, channels in enumerate(coarsest_first):
            h = _level(self, h, i, channels, attend=i == 0)
            if i != len(coarsest_first) - 1:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
                h = on_batch(conv3x3(h.shape[-1], self.dtype, f"level_{i}_up")(h))
        h = NormSwish(self.groups, self.dtype, name="norm_out")(h)
        return on_batch(conv3x3(3, self.dtype, "conv_out")(h)), on_batch(h)


def _block(parent: PixelEncoder | PixelDecoder, channels: int, name: str) -> nn.Module:
    block = nn.remat(ResBlock) if parent.remat else ResBlock
    return block(channels, parent.groups, parent.dtype, name=name)


def _level(
    parent: PixelEncoder | PixelDecoder, h: jax.Array, i: int, channels: int, attend: bool
) -> jax.Array:
    for j in range(parent.blocks):
        h = _block(parent, channels, f"level_{i}_block_{j}")(h)
        if attend:
            h = SpatialAttention(parent.groups, parent.dtype, name=f"level_{i}_attn_{j}")(h)
    return h


def _middle(parent: PixelEncoder | PixelDecoder, h: jax.Array) -> jax.Array:
    channels = h.shape[-1]
    h = _block(parent, channels, "mid_block_0")(h)
    h = SpatialAttention(parent.groups, parent.dtype, name="mid_attn")(h)
    return _block(parent, channels, "mid_block_1")(h)
