"""Weights that a run of the generation or understanding stage begins with: what both check."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.stages import PARTS
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.language_model import read_config

_SAME = (
    "width", "layers", "heads", "kv_heads", "head_channels", "mlp_width", "rope_theta", "norm_eps",
    "qkv_bias",
)  # fmt: skip


def whole_model(
    part: str, path: str, config: Any, ours: Mapping[str, Any], places: Mapping[str, Any]
) -> tuple[dict[str, jax.Array], str]:
    """All weights of a model of the same stage.

    Args:
      part: "generation" or "understanding".
      path: a workdir or checkpoint of ours, or a PyTorch checkpoint with the released names.
      config: of the model.
      ours, places: shape and sharding by path.

    Returns:
      The weights by path, and a text of what was taken.

    Raises:
      ValueError: a model of another shape; everything that differs.
    """
    source = conversion.open_source(
        path, config if conversion.is_torch(path) else None, part=PARTS[part]
    )
    wrong = [
        f"{name}: {source.arrays[name].shape if name in source.arrays else None} there, "
        f"{array.shape} here"
        for name, array in ours.items()
        if name not in source.arrays or source.arrays[name].shape != array.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit this model:\n  " + "\n  ".join(wrong))
    taken = {
        name: jax.device_put(np.asarray(source.arrays[name].read(), array.dtype), places[name])
        for name, array in ours.items()
    }
    return taken, f"{source.weights} weights of {path}"


def check_language_model(path: str, lm: LMConfig, more: Sequence[str] = ()) -> None:
    """Raises where a language model's config.json does not go with ours.

    Args:
      path: the language model; a .gguf file, whose arrays are compared one by one, passes.
      lm: ours.
      more: fields that must be equal, too.

    Raises:
      ValueError: the fields that differ.
    """
    if path.endswith(".gguf"):
        return
    source = read_config(path)
    wrong = [
        f"{name} is {getattr(source, name)} there, {getattr(lm, name)} here"
        for name in (*_SAME, *more)
        if getattr(source, name) != getattr(lm, name)
    ]
    if wrong:
        raise ValueError(f"{path} does not fit config.model.lm: " + "; ".join(wrong))
