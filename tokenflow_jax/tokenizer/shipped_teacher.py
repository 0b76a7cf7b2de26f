"""The shipped semantic teacher: a small ViT, its weights in float16 and what it was made with."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from tokenflow_jax.weights.rules import flatten, unflatten

ASSET = pathlib.Path(__file__).parent.parent / "assets" / "teacher.safetensors"
_KEY = "teacher"


def load_teacher(path: str | os.PathLike | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads the quickstart's semantic teacher.

    Its input is an image in [-1, 1]; the meaning is in the patch tokens after the final norm and in
    their mean.

    Args:
      path: a file that `save_teacher` wrote; None takes the one shipped with the package.

    Returns:
      (about, params): `about["vit"]` holds the arguments of `nets.vit.ViTConfig`,
      `about["mean"]` and `about["std"]` the normalisation of pictures in 0..1, `about["knn"]` what
      it was measured to know; params are nested float32 arrays for `nets.vit.ViT`.

    Raises:
      ValueError: the file is missing or was not written by `save_teacher`.
    """
    path = pathlib.Path(path or ASSET)
    if not path.is_file():
        raise ValueError(f"{path}: no teacher weights there; make them with tools/teacher/train.py")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} has no {_KEY!r} metadata: not a file of tools/teacher/train.py")
    return about, unflatten({name: array.astype(np.float32) for name, array in arrays.items()})


def save_teacher(
    path: str | os.PathLike, params: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Writes a teacher for `load_teacher`.

    Args:
      path: the file; replaced when it is complete.
      params: nested parameters; stored as float16 under "/"-joined names.
      about: see `load_teacher`; must be JSON.
    """
    path = pathlib.Path(path)
    arrays = {
        name: np.ascontiguousarray(leaf, np.float16) for name, leaf in flatten(params).items()
    }
    partial = path.with_name(f".partial-{path.name}")
    partial.write_bytes(safetensors.numpy.save(arrays, {_KEY: json.dumps(dict(about))}))
    os.replace(partial, path)
