"""Where an understanding run's weights come from: a language model, or an understanding model."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.understanding.model import UnderstandingConfig
from tokenflow_jax.weights import conversion, pretrained, rules
from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.language_model import load_language_model

PyTree = Any


def start_from(
    path: str, params: PyTree, config: UnderstandingConfig, shardings: PyTree
) -> tuple[PyTree, str]:
    """Weights to begin with.

    Args:
      path: a language model (a Hugging Face folder or a .gguf file), which leaves the projector as
        it is; or an understanding model: a workdir or checkpoint of ours, or a PyTorch checkpoint
        with the names of the released one.
      params: the model's fresh weights; those that are replaced are given up.
      config: of the model.
      shardings: where they lie.

    Returns:
      The weights, and a text of what was taken.

    Raises:
      ValueError: a model of another shape; everything that differs.
    """
    ours, places = rules.flatten(params), rules.flatten(shardings)
    if is_language_model(path):
        taken = _language_model(path, ours, places, config)
        text = f"language model {path}, the projector from scratch"
    else:
        taken, text = pretrained.whole_model("understanding", path, config, ours, places)
    return rules.unflatten({**ours, **taken}), text


def is_language_model(path: str) -> bool:
    """Whether a path holds a language model alone: no projector."""
    if path.endswith(".gguf"):
        return True
    if not conversion.is_torch(path):
        return os.path.isfile(os.path.join(path, "config.json"))
    try:
        names = open_state_dict(path)
    except ValueError:
        return False  # whatever it is, opening it as an understanding model says what is wrong
    return not any(name.startswith("model.mm_projector") for name in names)


def _language_model(
    path: str, ours: Mapping[str, Any], places: Mapping[str, Any], config: UnderstandingConfig
) -> dict[str, jax.Array]:
    """The language model's arrays at our paths."""
    pretrained.check_language_model(path, config.lm, ("tied_head",))
    taken: dict[str, jax.Array] = {}

    def place(name: str, array: np.ndarray) -> None:
        name = f"lm/{name}"
        if name not in ours or array.shape != ours[name].shape:
            shape = ours[name].shape if name in ours else None
            raise ValueError(f"{path}: {name} is {array.shape} there, {shape} in config.model.lm")
        taken[name] = jax.device_put(jnp.asarray(array, ours[name].dtype), places[name])

    load_language_model(path, place=place)
    missing = [name for name in ours if name.startswith("lm/") and name not in taken]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which config.model.lm has")
    return taken
