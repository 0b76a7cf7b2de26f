"""What the small teacher learns from: features of the FID Inception network, computed once.

Small pictures are enlarged to 112 px only, not to 299: the network is convolutional, and its blocks
up to Mixed_7a keep most of what they know (see `configs/teacher.py` for the figures) at a tenth of
the cost. Two targets per picture:

  pooled   mean of Mixed_6e (768) and of Mixed_7a (1280), 2048 numbers: what the picture shows
  spatial  Mixed_6e on its 5 x 5 grid, on its first principal components: what is where
"""

import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.nets.inception import Inception

Features = dict[str, np.ndarray]

_LOCAL, _GLOBAL = "Mixed_6e", "Mixed_7a"
BATCH = 8  # small enough for the caches: twice as fast as 100 on two CPU cores
_FIT_PICTURES = 2000


def inception_features(params: Mapping[str, Any], size: int) -> Callable[[np.ndarray], Features]:
    """Makes the function that computes both targets.

    Args:
      params: of `nets.inception.Inception`.
      size: side in pixels at which Inception looks at the pictures.

    Returns:
      A function from uint8 pictures (B, H, W, 3) to {"pooled": (B, 2048), "local": (B, g, g, 768)}.
    """
    network = Inception(resize=size, last=_GLOBAL)

    @jax.jit
    def compute(params, images_BHWC):
        maps = network.apply({"params": params}, images_BHWC.astype(jnp.float32) / 127.5 - 1)
        pooled = [maps[name].mean((1, 2)) for name in (_LOCAL, _GLOBAL)]
        return {"pooled": jnp.concatenate(pooled, axis=-1), "local": maps[_LOCAL]}

    params = jax.device_put(params)
    return lambda images_BHWC: compute(params, images_BHWC)


def grid_interpolation(size: int, tokens: int) -> np.ndarray:
    """Interpolates Mixed_6e's grid linearly to the centres of a token grid over the whole picture.

    The network's unpadded convolutions put the centres of its cells at 21.5 + 16 i pixels. Tokens
    outside the outermost centres take the nearest cell.

    Args:
      size: side in pixels at which Inception looked at the picture.
      tokens: tokens along one side.

    Returns:
      (tokens, cells) float32; each row sums to one.
    """
    cells = (size - 43) // 16 + 1
    centres = 21.5 + 16 * np.arange(cells)
    wanted = (np.arange(tokens) + 0.5) * size / tokens
    rows = [np.interp(wanted, centres, column) for column in np.eye(cells)]
    return np.stack(rows, axis=1).astype(np.float32)


def standardisation(pooled_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel, from every fifth picture."""
    sample = pooled_NP[::5].astype(np.float32)
    return sample.mean(0), sample.std(0) + 1e-3


def fit_components(local_BHWC: np.ndarray, count: int) -> Features:
    """Principal components of local features.

    Args:
      local_BHWC: (B, g, g, C).
      count: components to keep.

    Returns:
      {"mean": (C,), "components": (C, count)}, columns in order of falling variance, each scaled so
      that all projections together have variance one per column on average.
    """
    tokens_NC = local_BHWC.reshape(-1, local_BHWC.shape[-1]).astype(np.float64)
    mean_C = tokens_NC.mean(0)
    variance, vectors = np.linalg.eigh(np.cov(tokens_NC - mean_C, rowvar=False))
    kept = np.argsort(variance)[::-1][:count]
    scale = np.sqrt(variance[kept].mean())
    return {
        "mean": mean_C.astype(np.float32),
        "components": (vectors[:, kept] / scale).astype(np.float32),
    }


def compute_targets(
    images: np.ndarray,
    features: Callable[[np.ndarray], Features],
    folder: str | os.PathLike,
    name: str,
    components: int,
) -> Features:
    """Computes the targets of one set of pictures, or reads them from an earlier run.

    The principal components are fitted on the first set that is computed in a folder and kept
    there, so all sets of a folder share them.

    Args:
      images: uint8 (N, H, W, 3).
      features: from `inception_features`.
      folder: of the cache, 5 KB (pooled) and some 6 KB (spatial) per picture.
      name: of the set.
      components: channels of the spatial target.

    Returns:
      {"pooled": (N, 2048), "spatial": (N, g, g, components)}, float16, memory-mapped.

    Raises:
      ValueError: the cache is of other pictures or another number of components.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{name}-{kind}.npy" for kind in ("pooled", "spatial")}
    if all(path.exists() for path in paths.values()):
        cached = {kind: np.load(path, mmap_mode="r") for kind, path in paths.items()}
        shape = cached["spatial"].shape
        if shape[0] != len(images) or shape[-1] != components:
            raise ValueError(
                f"{paths['spatial']} holds {shape[0]} pictures with {shape[-1]} components, the "
                f"config asks for {len(images)} and {components}: remove {folder}"
            )
        return cached
    basis = _basis(images, features, folder / "components.npz", components)
    partial = {kind: path.with_suffix(".partial.npy") for kind, path in paths.items()}
    arrays: Features = {}
    start = time.monotonic()
    for first in range(0, len(images), BATCH):
        batch = images[first : first + BATCH]
        padded = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
        out = {key: np.asarray(value) for key, value in features(padded).items()}
        local = (out.pop("local") - basis["mean"]) @ basis["components"]
        for kind, value in (("pooled", out["pooled"]), ("spatial", local)):
            if not first:
                arrays[kind] = np.lib.format.open_memmap(
                    partial[kind], "w+", np.float16, (len(images), *value.shape[1:])
                )
            arrays[kind][first : first + len(batch)] = value[: len(batch)]
        if first // BATCH % 250 == 0:
            done = first + len(batch)
            rate = done / (time.monotonic() - start)
            logging.info("targets of %s: %d of %d, %.0f/s", name, done, len(images), rate)
    for kind, path in paths.items():
        arrays[kind].flush()
        os.replace(partial[kind], path)
    return {kind: np.load(path, mmap_mode="r") for kind, path in paths.items()}


def _basis(images, features, path: pathlib.Path, count: int) -> Features:
    if not path.exists():
        sample = images[:_FIT_PICTURES]
        parts = [
            np.asarray(features(sample[i : i + BATCH])["local"])
            for i in range(0, len(sample), BATCH)
        ]
        np.savez(path, **fit_components(np.concatenate(parts), count))
    with np.load(path) as file:
        basis = dict(file)
    if basis["components"].shape[1] != count:
        raise ValueError(
            f"{path} has {basis['components'].shape[1]} components, the config asks for {count}: "
            f"remove {path.parent}"
        )
    return basis
