"""The frozen teacher that the semantic half learns from."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from tokenflow_jax.convert.encoders import load_encoder
from tokenflow_jax.convert.teacher import load_teacher
from tokenflow_jax.models.encoders import ENCODERS, EncoderConfig, encoder_kind
from tokenflow_jax.models.vit import ViT, ViTConfig

PyTree = Any
_OTHERS = ("shipped", "random", "none")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen teacher: module, weights, and normalisation of its input (images in [0, 1])."""

    module: nn.Module
    params: PyTree
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def width(self) -> int:
        """Channels of its features."""
        config: EncoderConfig = self.module.config
        return getattr(config, "projection", 0) or config.width

    def normalisation(self) -> dict[str, tuple[float, float, float]]:
        """Mean and deviation, as `train.tokenizer.Trainer` names them."""
        return {"teacher_mean": self.mean, "teacher_std": self.std}


def make_teacher(
    config: ml_collections.ConfigDict, semantic_encoder: str, dtype: jnp.dtype
) -> Teacher | None:
    """Loads the teacher that `config.teacher` asks for.

    Args:
      config: `config.teacher`: source "shipped", a kind of encoder (with `weights`), "random"
        (benchmarks only) or "none"; `vit`, its hyper-parameters.
      semantic_encoder: the tokenizer's kind of encoder, which a random teacher takes too.
      dtype: computation dtype.

    Returns:
      The teacher, or None.

    Raises:
      ValueError: unknown source, missing or unfitting weights.
    """
    source = config.source
    if source not in (*ENCODERS, *_OTHERS):
        raise ValueError(f"teacher.source {source!r} is not one of {[*ENCODERS, *_OTHERS]}")
    if source == "none":
        return None
    if source == "shipped":
        metadata, params = load_teacher()
        vit = ViTConfig(**metadata["vit"])
        return Teacher(ViT(vit, dtype), params, tuple(metadata["mean"]), tuple(metadata["std"]))
    kind = encoder_kind(semantic_encoder if source == "random" else source)
    vit = kind.config(**config.vit)
    module = kind.module(vit, dtype)
    image = jnp.zeros((1, vit.image_size, vit.image_size, 3))
    if source == "random":
        params = jax.jit(module.init)(jax.random.key(0), image)["params"]
    elif not config.weights:
        raise ValueError(
            f"this variant distils from {source}: say where its weights are with "
            "--config.teacher.weights=FILE (.pt, .bin or .safetensors, as published)"
        )
    else:
        template = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
        params = load_encoder(source, config.weights, template)
    return Teacher(module, params, kind.mean, kind.std)
