"""Load a language model together with the image tokenizer that it was trained on."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tokenflow_jax.data.captions.codes import check_tokenizer
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.part import Part
from tokenflow_jax.weights.rules import unflatten


class TrainedModel(NamedTuple):
    config: Any  # the model's hyper-parameters
    params: dict
    dtype: str  # of computation and parameters
    tokenizer: Tokenizer
    saved: Mapping[str, Any]  # the training run's whole config, or what else is known
    weights: str  # "ema" or "raw"
    device_mesh: mesh.Mesh | None  # holds the parameters; None if one device has all of them


def load_model(
    path: str,
    part: Part,
    config: Any = None,
    known: Mapping[str, Any] | None = None,
    *,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    tokenizer_variant: str | None = None,
    weights: str | None = None,
    step: int | None = None,
    dtype: str = "auto",
) -> TrainedModel:
    """Load a language model, spread over all devices of this process, and its image tokenizer.

    Args:
      part: the stage's, from its `names`.
      config: of the model, if `path` is a PyTorch checkpoint.
      known: "tokenizer" and "data", for a model whose checkpoint holds no training config.
      weights: "ema", "raw", or None for EMA if there is one. For the others see `Generator.load`.
    """
    dtype = resolve_dtype(dtype)
    source = conversion.open_source(path, part, config, weights=weights, step=step)
    saved = source.saved or known or {}
    tokenizer = find_tokenizer(path, saved.get("tokenizer", {}), tokenizer, tokenizer_variant)
    device_mesh, held = mesh.answering_mesh(), jnp.dtype(dtype)
    arrays = ((name, np.asarray(t.read(), held)) for name, t in source.arrays.items())
    params = unflatten(mesh.place_parameters(arrays, device_mesh))
    return TrainedModel(source.config, params, dtype, tokenizer, saved, source.weights, device_mesh)


def resolve_dtype(name: str) -> str:
    """Turn "auto" into bfloat16 on accelerators and float32 on CPU; check other names."""
    if name == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {name!r}: one of 'auto', 'float32', 'bfloat16'")
    return name


def find_tokenizer(
    model: str,
    known: Mapping[str, Any],  # its "path", "variant" and "fingerprint", as far as noted
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    variant: str | None = None,
) -> Tokenizer:
    """Load the image tokenizer that a model was trained with, and check its fingerprint."""
    if tokenizer is None:
        tokenizer, variant = known.get("path"), variant or known.get("variant")
        if not tokenizer:
            raise ValueError(
                f"{model} does not record where the image tokenizer is that it was trained with: "
                "give its path (--tokenizer=)"
            )
    if not isinstance(tokenizer, Tokenizer):
        if not epath.Path(tokenizer).exists():
            raise ValueError(
                f"the image tokenizer {os.fspath(tokenizer)!r} of {model} does not exist; give its "
                "path (--tokenizer=)"
            )
        tokenizer = Tokenizer.load(tokenizer, variant or None)
    if known.get("fingerprint"):
        check_tokenizer(model, known, tokenizer.identity)
    return tokenizer
