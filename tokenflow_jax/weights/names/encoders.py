"""Loads a semantic encoder alone, from the files of CLIP, SigLIP and ViTamin themselves."""

import os
from collections.abc import Mapping
from typing import Any

from tokenflow_jax.weights import rules
from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.names.clip import CLIP_HUGGING_FACE, CLIP_VISUAL
from tokenflow_jax.weights.names.siglip import SIGLIP_VISION
from tokenflow_jax.weights.names.vitamin import vitamin_table


def encoder_table(kind: str, names: Mapping[str, Any]) -> rules.RuleTable:
    """Chooses the table for a file by the names in it.

    Args:
      kind: a key of `nets.encoders.ENCODERS`.
      names: the file's tensors by name.

    Raises:
      ValueError: an unknown kind.
    """
    if kind == "clip":
        hugging_face = any(name.startswith("vision_model.") for name in names)
        return CLIP_HUGGING_FACE if hugging_face else CLIP_VISUAL
    if kind == "siglip":
        return SIGLIP_VISION
    if kind == "vitamin":
        trunk = "visual.trunk."
        return vitamin_table(trunk if any(name.startswith(trunk) for name in names) else "")
    raise ValueError(f"no files of the encoder {kind!r} are known; one of clip, siglip, vitamin")


def load_encoder(kind: str, path: str | os.PathLike, template: Mapping[str, Any]) -> dict[str, Any]:
    """Loads an encoder's weights.

    Args:
      kind: a key of `nets.encoders.ENCODERS`.
      path: OpenAI's ViT-B-16.pt, a file of open_clip, timm or Hugging Face, sharded or not.
      template: shapes of the encoder's parameters.

    Returns:
      Parameters, nested NumPy arrays.

    Raises:
      CheckpointMismatch: names or shapes that do not fit, all of them.
      ValueError: a file that cannot be read.
    """
    state = open_state_dict(path)
    return rules.to_flax(state, encoder_table(kind, state), template)
