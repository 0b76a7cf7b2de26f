"""The frozen teacher that the semantic half learns from."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from tokenflow_jax.nets.encoders import ENCODERS, EncoderConfig, encoder_kind
from tokenflow_jax.nets.vit import ViT, ViTConfig
from tokenflow_jax.tokenizer.shipped_teacher import load_teacher
from tokenflow_jax.weights.names.encoders import load_encoder

PyTree = Any
_OTHERS = ("shipped", "random", "none")


class TeacherSpec(NamedTuple):
    """A frozen teacher without its weights: module, and normalisation of images in [0, 1]."""

    module: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def width(self) -> int:
        """Channels of its features."""
        config: EncoderConfig = self.module.config
        return getattr(config, "projection", 0) or config.width

    @property
    def image_size(self) -> int:
        """Side of the images that it was trained with."""
        return self.module.config.image_size


def teacher_spec(
    config: ml_collections.ConfigDict, semantic_encoder: str, dtype: jnp.dtype
) -> TeacherSpec | None:
    """The teacher that `config.teacher` asks for, as far as no weights are needed.

    Args:
      config: `config.teacher`: source "shipped", a kind of encoder, "random" (benchmarks only) or
        "none"; `vit`, its hyper-parameters.
      semantic_encoder: the tokenizer's kind of encoder, which a random teacher takes too.
      dtype: computation dtype.

    Returns:
      The teacher, or None.

    Raises:
      ValueError: unknown source.
    """
    source = config.source
    if source not in (*ENCODERS, *_OTHERS):
        raise ValueError(f"teacher.source {source!r} is not one of {[*ENCODERS, *_OTHERS]}")
    if source == "none":
        return None
    if source == "shipped":
        about, _ = load_teacher()
        module = ViT(ViTConfig(**about["vit"]), dtype)
        return TeacherSpec(module, tuple(about["mean"]), tuple(about["std"]))
    kind = encoder_kind(semantic_encoder if source == "random" else source)
    return TeacherSpec(kind.module(kind.config(**config.vit), dtype), kind.mean, kind.std)


def teacher_params(config: ml_collections.ConfigDict, spec: TeacherSpec) -> PyTree:
    """The teacher's weights.

    Args:
      config: `config.teacher`, see `teacher_spec`; a kind of encoder needs `weights`.
      spec: of `teacher_spec`.

    Raises:
      ValueError: missing or unfitting weights.
    """
    source = config.source
    if source == "shipped":
        return load_teacher()[1]
    image = jnp.zeros((1, spec.image_size, spec.image_size, 3))
    if source == "random":
        return jax.jit(spec.module.init)(jax.random.key(0), image)["params"]
    if not config.weights:
        raise ValueError(
            f"this variant distils from {source}: say where its weights are with "
            "--config.teacher.weights=FILE (.pt, .bin or .safetensors, as published)"
        )
    template = jax.eval_shape(spec.module.init, jax.random.key(0), image)["params"]
    return load_encoder(source, config.weights, template)
