"""ViTamin (arXiv 2404.02132): a semantic encoder of inverted bottlenecks, then a transformer.

    stem: 3x3 convolutions, stride 2      128 x 128      (for 256 px)
    stage 0, 1: bottlenecks, stride 2     64, 32
    pool: norm, 3x3 convolution           16
    transformer with gated MLPs           256 tokens, no positions, no final norm

The convolutions tell the transformer where it is, so it has no position embeddings and takes any
size. Norms are LayerNorm over channels, eps 1e-6; activations are exact GELU.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets import layers
from tokenflow_jax.nets.vit import transformer
from tokenflow_jax.parallel.placement import on_batch

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ViTaminConfig:
    """Hyper-parameters of ViTamin; the defaults are ViTamin-XL at 256 px.

    Attributes:
      image_size: side in pixels.
      stem_width: channels of the stem.
      stage_widths, stage_depths: channels and blocks of the convolutional stages.
      width, depth, heads: of the transformer.
      mlp_width: of gate and value in its MLPs; 0 takes twice the width.
      expansion: of the bottlenecks' hidden channels over their output channels.
    """

    image_size: int = 256
    stem_width: int = 192
    stage_widths: tuple[int, ...] = (192, 384)
    stage_depths: tuple[int, ...] = (2, 4)
    width: int = 1152
    depth: int = 32
    heads: int = 16
    mlp_width: int = 0
    expansion: int = 4

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
                f"image_size {self.image_size} is not a multiple of {self.patch_size}, which the "
                "stages make of one token"
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


def _conv(features: int, stride: int, dtype: jnp.dtype, name: str, groups: int = 1) -> nn.Conv:
    """A 3x3 convolution, padded by one on every side whatever the stride."""
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=1,
        feature_group_count=groups,
        dtype=dtype,
        name=name,
    )


class Bottleneck(nn.Module):
    """norm, widen, depthwise 3x3, narrow, beside a shortcut.

    Attributes:
      features: output channels.
      stride: 2 halves the resolution; the shortcut then averages and, if channels change, projects.
      expansion: hidden channels per output channel.
      dtype: computation dtype.
    """

    features: int
    stride: int = 1
    expansion: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        hidden, shortcut = self.features * self.expansion, x_BHWC
        if self.stride == 2:
            # Padding is left out of the average.
            shortcut = nn.avg_pool(
                x_BHWC, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=False
            )
            if x_BHWC.shape[-1] != self.features:
                shortcut = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(shortcut)
        h = layers.layer_norm(_EPSILON, self.dtype, "norm")(x_BHWC)
        h = layers.exact_gelu(nn.Dense(hidden, dtype=self.dtype, name="widen")(h))
        h = layers.exact_gelu(_conv(hidden, self.stride, self.dtype, "depthwise", hidden)(h))
        return on_batch(shortcut + nn.Dense(self.features, dtype=self.dtype, name="narrow")(h))


class ViTamin(nn.Module):
    """The image encoder, returning the transformer's tokens as they leave the last block.

    Attributes:
      config: hyper-parameters.
      dtype: computation dtype; parameters are float32.
      remat: recompute blocks in the backward pass.
    """

    config: ViTaminConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          images_BHWC: (B, H, H, 3) with CLIP's normalisation; H a multiple of config.patch_size.

        Returns:
          Tokens (B, (H / patch)**2, width), row by row.
        """
        cfg = self.config
        batch, height, width, _ = images_BHWC.shape
        if height != width or height % cfg.patch_size:
            raise ValueError(
                f"images of {height} x {width} pixels: the encoder takes square images whose side "
                f"is a multiple of {cfg.patch_size}"
            )
        h = _conv(cfg.stem_width, 2, self.dtype, "stem_conv1")(images_BHWC)
        h = layers.exact_gelu(layers.layer_norm(_EPSILON, self.dtype, "stem_norm")(h))
        h = _conv(cfg.stem_width, 1, self.dtype, "stem_conv2")(h)
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for i, (features, depth) in enumerate(zip(cfg.stage_widths, cfg.stage_depths, strict=True)):
            for j in range(depth):
                stride = 2 if j == 0 else 1
                name = f"stage_{i}_block_{j}"
                h = block(features, stride, cfg.expansion, self.dtype, name=name)(h)
        h = layers.layer_norm(_EPSILON, self.dtype, "pool_norm")(h)
        tokens = _conv(cfg.width, 2, self.dtype, "pool_conv")(h).reshape(batch, -1, cfg.width)
        return transformer(
            tokens,
            depth=cfg.depth,
            heads=cfg.heads,
            activation="gelu",
            epsilon=_EPSILON,
            mlp_width=cfg.mlp_width,
            gated=True,
            dtype=self.dtype,
            remat=self.remat,
        )
