"""ViTamin (arXiv 2404.02132): a semantic encoder of inverted bottlenecks, then a transformer.

    stem: 3x3 convolutions, stride 2      128 x 128      (for 256 px)
    stage 0, 1: bottlenecks, stride 2     64, 32
    pool: norm, 3x3 convolution           16
    transformer with gated MLPs           256 tokens, no positions, no final norm

The convolutions tell the transformer where it is, so it has no position embeddings and takes any
size.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.layers import conv3x3, exact_gelu, layer_norm, transformer
from tokenflow_jax.parallel.placement import on_batch

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ViTaminConfig:
    """Hyper-parameters of ViTamin; the defaults are ViTamin-XL at 256 px."""

    image_size: int = 256
    stem_width: int = 192
    stage_widths: tuple[int, ...] = (192, 384)
    stage_depths: tuple[int, ...] = (2, 4)
    width: int = 1152  # of the transformer, like the next three
    depth: int = 32
    heads: int = 16
    mlp_width: int = 0  # of gate and value; 0: twice the width
    expansion: int = 4  # hidden channels of a bottleneck per output channel

    def __post_init__(self):
        object.__setattr__(self, "stage_widths", tuple(self.stage_widths))
        object.__setattr__(self, "stage_depths", tuple(self.stage_depths))
        problems = []
        if len(self.stage_widths) != len(self.stage_depths):
            problems.append(
                f"stage_widths {self.stage_widths} and stage_depths {self.stage_depths} differ in "
                "length"
            )
        if self.image_size % self.patch_size:
            problems.append(
                f"image_size {self.image_size} is not a multiple of {self.patch_size}, the side "
                "in pixels that the stages turn into one token"
            )
        if self.width % self.heads:
            problems.append(f"width {self.width} is not a multiple of heads {self.heads}")
        if problems:
            raise ValueError("ViTamin: " + "; ".join(problems))

    @property
    def patch_size(self) -> int:
        """Pixels along one side that become one token."""
        return 4 * 2 ** len(self.stage_widths)

    @property
    def grid(self) -> int:
        """Tokens along one side of an image of `image_size`."""
        return self.image_size // self.patch_size


class Bottleneck(nn.Module):
    """norm, widen, depthwise 3x3, narrow, beside a shortcut."""

    features: int
    stride: int = 1  # 2 halves the resolution
    expansion: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        hidden, shortcut = self.features * self.expansion, x_BHWC
        if self.stride == 2:
            pad = ((1, 1), (1, 1))  # left out of the average
            shortcut = nn.avg_pool(x_BHWC, (3, 3), (2, 2), pad, count_include_pad=False)
            if x_BHWC.shape[-1] != self.features:
                shortcut = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(shortcut)
        h = layer_norm(_EPSILON, self.dtype, "norm")(x_BHWC)
        h = exact_gelu(nn.Dense(hidden, dtype=self.dtype, name="widen")(h))
        h = exact_gelu(conv3x3(hidden, self.dtype, "depthwise", self.stride, hidden)(h))
        return on_batch(shortcut + nn.Dense(self.features, dtype=self.dtype, name="narrow")(h))


class ViTamin(nn.Module):
    """The image encoder, returning the transformer's tokens as they leave the last block."""

    config: ViTaminConfig
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    remat: bool = False  # recompute blocks in the backward pass

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Encode images (B, H, H, 3), CLIP-normalized, as tokens (B, (H / patch)**2, width)."""
        cfg = self.config
        batch, height, width, _ = images_BHWC.shape
        if height != width or height % cfg.patch_size:
            raise ValueError(
                f"images of {height} x {width} pixels: the encoder takes square images whose side "
                f"is a multiple of {cfg.patch_size}"
            )
        h = conv3x3(cfg.stem_width, self.dtype, "stem_conv1", stride=2)(images_BHWC)
        h = exact_gelu(layer_norm(_EPSILON, self.dtype, "stem_norm")(h))
        h = conv3x3(cfg.stem_width, self.dtype, "stem_conv2")(h)
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for i, (features, depth) in enumerate(zip(cfg.stage_widths, cfg.stage_depths, strict=True)):
            for j in range(depth):
                stride = 2 if j == 0 else 1
                name = f"stage_{i}_block_{j}"
                h = block(features, stride, cfg.expansion, self.dtype, name=name)(h)
        h = layer_norm(_EPSILON, self.dtype, "pool_norm")(h)
        h = conv3x3(cfg.width, self.dtype, "pool_conv", stride=2)(h)
        return transformer(
            h.reshape(batch, -1, cfg.width),
            cfg.depth,
            self.remat,
            heads=cfg.heads,
            epsilon=_EPSILON,
            mlp_width=cfg.mlp_width,
            gated=True,
            dtype=self.dtype,
        )
