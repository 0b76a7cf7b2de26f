"""The kinds of semantic encoder.

The tokenizer's own encoder and the frozen teacher are the same network, both selected by kind.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets.vit import ViT, ViTConfig
from tokenflow_jax.nets.vitamin import ViTamin, ViTaminConfig

EncoderConfig = ViTConfig | ViTaminConfig
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class EncoderKind(NamedTuple):
    """One kind of encoder, and the normalization of images in [0, 1] that it was trained with."""

    config: type[EncoderConfig]
    module: type[nn.Module]  # module(config, dtype, remat)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # Inside the tokenizer the reference feeds CLIP images in [-1, 1] as they are (but normalized
    # ones to the teacher).
    raw: bool = False


ENCODERS: dict[str, EncoderKind] = {
    "clip": EncoderKind(ViTConfig, ViT, CLIP_MEAN, CLIP_STD, raw=True),
    "siglip": EncoderKind(ViTConfig, ViT, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "vitamin": EncoderKind(ViTaminConfig, ViTamin, CLIP_MEAN, CLIP_STD),
}


def encoder_kind(name: str) -> EncoderKind:
    if name not in ENCODERS:
        raise ValueError(f"semantic encoder {name!r} is not one of {sorted(ENCODERS)}")
    return ENCODERS[name]


def normalize(
    images_BHWC: jax.Array, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> jax.Array:
    """Map images in [-1, 1] to an encoder's input, through clamped 0..255 as in the reference."""
    unit = jnp.clip((images_BHWC + 1) * 127.5, 0, 255) / 255
    return (unit - jnp.array(mean)) / jnp.array(std)
