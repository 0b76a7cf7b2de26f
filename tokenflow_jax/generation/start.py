"""Where a generation run's weights come from: a language model, or another generation model."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.generation.model import GenerationConfig
from tokenflow_jax.weights import conversion, pretrained, rules
from tokenflow_jax.weights.language_model import load_language_model, read_config

PyTree = Any
_VOCABULARY = {"lm/embed/embedding": 0, "lm/head/kernel": 1}  # path -> axis of ids


def start_from(
    path: str, params: PyTree, config: GenerationConfig, shardings: PyTree
) -> tuple[PyTree, str]:
    """Weights to begin with.

    A language model (a Hugging Face folder or a .gguf file) gives all of the decoder but what it
    does not have: the rows of codes stay random, and the new row of padding becomes the mean of the
    others, as in the reference; norms of queries and keys, projector and tables stay as they are.

    Args:
      path: a language model, or a generation model: a workdir or checkpoint of ours, or a PyTorch
        checkpoint with the names of the released ones.
      params: the model's fresh weights; those that are replaced are given up.
      config: of the model.
      shardings: where they lie.

    Returns:
      The weights, and a text of what was taken.

    Raises:
      ValueError: a model of another shape; everything that differs.
    """
    ours, places = rules.flatten(params), rules.flatten(shardings)
    if _is_language_model(path):
        pretrained.check_language_model(path, config.lm)
        taken = _language_model(path, ours, places, config)
        text = f"language model {path} ({len(taken)} of {len(ours)} arrays), the rest from scratch"
    else:
        taken, text = pretrained.whole_model("generation", path, config, ours, places)
    return rules.unflatten({**ours, **taken}), text


def _is_language_model(path: str) -> bool:
    if path.endswith(".gguf"):
        return True
    try:
        read_config(path)
    except ValueError:
        # A language model of another kind is still one: loading it will say what is wrong.
        return os.path.isfile(os.path.join(path, "config.json")) and not conversion.is_torch(path)
    return True


def _language_model(
    path: str, ours: Mapping[str, Any], places: Mapping[str, Any], config: GenerationConfig
) -> dict[str, jax.Array]:
    """The arrays that a language model has, in the shape of ours."""
    taken: dict[str, jax.Array] = {}

    def place(name: str, array: np.ndarray) -> None:
        name = f"lm/{name}"
        if name not in ours:
            return  # such as the head of a model whose head is tied here
        if name in _VOCABULARY:
            axis = _VOCABULARY[name]
            array = _with_codes(ours[name], array, config.image_start, axis, places[name])
        if array.shape != ours[name].shape:
            raise ValueError(f"{path}: {name} is {array.shape} there, {ours[name].shape} here")
        taken[name] = jax.device_put(jnp.asarray(array, ours[name].dtype), places[name])

    found, _ = load_language_model(path, place=place)
    if found.tied_head and "lm/head/kernel" in ours:
        table = np.asarray(taken["lm/embed/embedding"][: found.vocabulary_size])
        place("head/kernel", np.ascontiguousarray(table.T))
    return taken


def _with_codes(
    fresh: jax.Array, known: np.ndarray, image_start: int, axis: int, sharding: Any
) -> jax.Array:
    """A table with the rows of a pretrained one, padding as their mean, and fresh rows of codes."""
    rows = min(known.shape[axis], image_start)
    known = np.take(known, np.arange(rows), axis=axis)
    mean = known.astype(np.float32).mean(axis=axis, keepdims=True)

    @functools.partial(jax.jit, out_shardings=sharding)
    def join(fresh, known, mean):
        index = jnp.arange(fresh.shape[axis])
        index = index[:, None] if axis == 0 else index[None]
        joined = jax.lax.dynamic_update_slice(fresh, known.astype(fresh.dtype), (0, 0))
        new = (index >= rows) & (index < image_start)
        return jnp.where(new, mean.astype(fresh.dtype), joined)

    return join(fresh, known, mean)
