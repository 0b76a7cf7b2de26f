"""The smallest tokenizers that have every part; tests vary them with dataclasses.replace."""

import dataclasses
import math

import jax
import numpy as np

from tokenflow_jax.nets.vit import SIGLIP_SO400M, ViTConfig
from tokenflow_jax.nets.vitamin import ViTaminConfig
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.formats import orbax as orbax_files
from tokenflow_jax.weights.lazy import LazyTensor

TINY = TokenizerConfig(
    image_size=16,
    scales=(1, 2, 4),
    codebook_size=32,
    semantic_channels=6,
    pixel_channels=3,
    vit=ViTConfig(image_size=16, patch_size=4, width=12, depth=1, heads=2),
    semantic_decoder_depth=1,
    semantic_decoder_heads=2,
    teacher_width=10,
    channels=4,
    multipliers=(1, 1, 2),
    blocks=1,
    latent_channels=8,
    decoder_channels=4,
    decoder_blocks=1,
    norm_groups=2,
)

# The same with ViTamin; three of its stages' halvings and the stem's make 16 px of one cell.
TINY_L = dataclasses.replace(
    TINY,
    image_size=64,
    semantic_encoder="vitamin",
    vit=ViTaminConfig(
        image_size=64,
        stem_width=4,
        stage_widths=(4, 6),
        stage_depths=(1, 2),
        width=12,
        depth=2,
        heads=2,
    ),
    multipliers=(1, 1, 1, 1, 2),
)

# The same with SigLIP: patches of 14 that leave pixels over, and the detour of the pixel branch.
TINY_XL = dataclasses.replace(
    TINY_L,
    image_size=60,
    semantic_encoder="siglip",
    vit=dataclasses.replace(SIGLIP_SO400M, image_size=60, width=12, depth=2, heads=2, mlp_width=44),
    pixel_image_size=64,
)

# By the kind of semantic encoder.
KINDS = {"clip": TINY, "vitamin": TINY_L, "siglip": TINY_XL}


def narrow(config: TokenizerConfig, shrink: int) -> TokenizerConfig:
    """Divide every wide axis of a model by `shrink`; depths and sizes stay.

    The number of heads drops where the width would not divide.
    """
    vit = {
        name: getattr(config.vit, name) // shrink
        for name in ("width", "mlp_width", "stem_width")
        if getattr(config.vit, name, 0)
    }
    if isinstance(config.vit, ViTaminConfig):
        vit["stage_widths"] = tuple(width // shrink for width in config.vit.stage_widths)
    width = vit["width"]
    vit["heads"] = math.gcd(config.vit.heads, width)
    names = ("codebook_size", "teacher_width", "channels", "latent_channels", "norm_groups")
    return dataclasses.replace(
        config,
        vit=dataclasses.replace(config.vit, **vit),
        semantic_decoder_heads=math.gcd(config.semantic_decoder_heads, width),
        **{name: getattr(config, name) // shrink for name in (*names, "decoder_channels")},
    )


def random_params(config: TokenizerConfig, seed: int):
    """Return random weights of a tokenizer as NumPy arrays, without compiling its initializers."""
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), np.float32)
    shapes = jax.eval_shape(TokenFlow(config).init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def write_tokenizer(path, config: TokenizerConfig = TINY, seed: int = 0):
    """Write a checkpoint of random weights like the conversion tool does; return its path."""
    params = rules.flatten(random_params(config, seed))
    tensors = {
        f"params/{name}": LazyTensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in params.items()
    }
    about = {"model": dataclasses.asdict(config), "stage": "tokenizer"}
    orbax_files.save_weights(path, tensors, about, {"weights": "raw"})
    return path
