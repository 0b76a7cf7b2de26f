"""The frozen teacher whose patch features the semantic half learns to reconstruct."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy

from tokenflow_jax import files, remote
from tokenflow_jax.messages import one_line, shown
from tokenflow_jax.nets.encoders import ENCODERS, encoder_kind, normalize
from tokenflow_jax.nets.vit import ViT, ViTConfig
from tokenflow_jax.weights.formats.safetensors import read_metadata, read_safetensors
from tokenflow_jax.weights.names.encoders import open_encoder
from tokenflow_jax.weights.rules import flatten, unflatten
from tokenflow_jax.weights.start import check_fit

PyTree = Any
ASSET = pathlib.Path(__file__).parents[1] / "assets" / "teacher.safetensors"
SOURCES = (*ENCODERS, "shipped", "random", "none")  # random: for benchmarks
_KEY = "teacher"


class Teacher(NamedTuple):
    """A frozen teacher without its weights: module, and normalization of images in [0, 1]."""

    module: nn.Module
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def width(self) -> int:
        """Channels of its features."""
        return getattr(self.module.config, "projection", 0) or self.module.config.width

    @property
    def parameters(self) -> PyTree:
        """Shapes of its parameters."""
        return jax.eval_shape(self.random_params, jax.random.key(0))

    def random_params(self, key: jax.Array) -> PyTree:
        """Return random weights."""
        size = self.module.config.image_size
        return self.module.init(key, jnp.zeros((1, size, size, 3)))["params"]

    def features(self, params: PyTree, images_BHWC: jax.Array) -> jax.Array:
        """Return the patch features (B, N, D) of images in [-1, 1], float32, without gradient."""
        images_BHWC = normalize(images_BHWC, self.mean, self.std)
        features_BND = self.module.apply({"params": params}, images_BHWC)
        return jax.lax.stop_gradient(features_BND.astype(jnp.float32))


def make_teacher(
    config: ml_collections.ConfigDict, semantic_encoder: str, dtype: jnp.dtype
) -> Teacher | None:
    """Return the teacher that `config.teacher` names, without weights, or None.

    The config's `vit` has the hyper-parameters of a source that is an encoder; a random teacher is
    of the tokenizer's own kind, `semantic_encoder`.
    """
    source = config.source
    if source not in SOURCES:
        raise ValueError(f"teacher.source {source!r} is not one of {list(SOURCES)}")
    if source == "none":
        return None
    if source == "shipped":
        return _shipped(load_shipped()[0], dtype)
    kind = encoder_kind(semantic_encoder if source == "random" else source)
    return Teacher(kind.module(kind.config(**config.vit), dtype), kind.mean, kind.std)


def load_teacher(config: ml_collections.ConfigDict, teacher: Teacher) -> PyTree:
    """Return the weights of a teacher made from the same `config.teacher`."""
    if config.source == "shipped":
        params = load_shipped()[1]
        check_fit(flatten(params), str(ASSET), flatten(teacher.parameters))
        return params
    if config.source == "random":
        return jax.jit(teacher.random_params)(jax.random.key(0))
    if not config.weights:
        raise ValueError(
            f"this variant distils from {config.source}: say where its weights are with "
            "--config.teacher.weights=FILE (.pt, .bin or .safetensors, as published)"
        )
    return open_encoder(config.source, config.weights, teacher.parameters)


def load_shipped(path: str | os.PathLike | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the small ViT that teaches the quickstart, or another file of `save_shipped`.

    Returns:
      (about, params): `about["vit"]` are the arguments of `nets.vit.ViTConfig`, `about["mean"]` and
      `about["std"]` the normalization of pictures in 0..1, `about["knn"]` its measured k-NN
      accuracy; params are nested float32 arrays for `nets.vit.ViT`.
    """
    path = remote.local_copy(path or ASSET)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no teacher weights there; make them with tools/teacher/train.py")
    text, remedy = read_metadata(path).get(_KEY, ""), "; it is no file of tools/teacher/train.py"
    about = files.parse_json(text.encode(), f"{path}: its {_KEY!r}", remedy=remedy)
    tensors = read_safetensors(path)
    return about, unflatten({name: t.read().astype(np.float32) for name, t in tensors.items()})


def _shipped(about: Mapping[str, Any], dtype: jnp.dtype) -> Teacher:
    """Return the shipped teacher without weights; a wrong type or size is a ValueError."""
    usual = dataclasses.asdict(ViTConfig())
    try:
        for name, value in about["vit"].items():
            right = type(value) is type(usual.get(name))
            if not right or not (isinstance(value, str) or 0 <= value < 2**16):
                raise ValueError(f"vit.{one_line(name)} is {shown(value)}")
        mean, std = (tuple(map(float, about[name])) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("mean and std are not three numbers")
        return Teacher(ViT(ViTConfig(**about["vit"]), dtype), mean, std)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{ASSET}: its {_KEY!r} is damaged ({one_line(error)})") from None


def save_shipped(
    path: str | os.PathLike, params: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write a teacher for `load_shipped`: float16 arrays, and `about` as JSON metadata."""
    arrays = {
        name: np.ascontiguousarray(leaf, np.float16) for name, leaf in flatten(params).items()
    }
    with files.write_atomically(path, overwrite=True) as partial:
        partial.write_bytes(safetensors.numpy.save(arrays, {_KEY: json.dumps(dict(about))}))
