"""The teacher's training targets: features of the FID Inception network, computed once.

Small images are enlarged to 112 px only, not to 299: the network is convolutional, and its blocks
up to Mixed_7a keep most of their accuracy (figures in config.py) at a tenth of the cost. Each image
has two targets:

  pooled   the means of Mixed_6e (768) and Mixed_7a (1280), 2048 numbers: what the image shows
  spatial  Mixed_6e on its 5 x 5 grid, projected to its first principal components: what is where
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
from tokenflow_jax.nets.pixels import to_float

Features = dict[str, np.ndarray]
FeatureFn = Callable[[np.ndarray], Features]

_LOCAL, _GLOBAL = "Mixed_6e", "Mixed_7a"
BATCH = 8  # small enough for the caches: twice as fast as 100 on two CPU cores
_FIT_PICTURES = 2000


def inception_features(params: Mapping[str, Any], size: int) -> FeatureFn:
    """Return a function from uint8 (B, H, W, 3) to {"pooled": (B, 2048), "local": (B, g, g, 768)}.

    Args:
      params: of `nets.inception.Inception`.
      size: side in pixels to which images are resized for Inception.
    """
    network = Inception(resize=size, last=_GLOBAL)

    @jax.jit
    def compute(params, images_BHWC):
        maps = network.apply({"params": params}, to_float(images_BHWC))
        pooled = [maps[name].mean((1, 2)) for name in (_LOCAL, _GLOBAL)]
        return {"pooled": jnp.concatenate(pooled, axis=-1), "local": maps[_LOCAL]}

    params = jax.device_put(params)
    return lambda images_BHWC: compute(params, images_BHWC)


def grid_interpolation(size: int, tokens: int) -> np.ndarray:
    """Return linear weights from Mixed_6e's grid to the centers of a token grid.

    The network's unpadded convolutions put the centers of its cells at 21.5 + 16 i pixels. Tokens
    outside the outermost centers take the nearest cell.

    Args:
      size: side in pixels of the image that Inception saw.
      tokens: tokens along one side.

    Returns:
      (tokens, cells) float32; each row sums to one.
    """
    cells = (size - 43) // 16 + 1
    centers = 21.5 + 16 * np.arange(cells)
    wanted = (np.arange(tokens) + 0.5) * size / tokens
    rows = [np.interp(wanted, centers, column) for column in np.eye(cells)]
    return np.stack(rows, axis=1).astype(np.float32)


def standardization(pooled_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard deviation of every channel, from every fifth image."""
    sample = pooled_NP[::5].astype(np.float32)
    return sample.mean(0), sample.std(0) + 1e-3


def fit_components(local_BHWC: np.ndarray, count: int) -> Features:
    """Return the first `count` principal components of local features.

    Returns:
      {"mean": (C,), "components": (C, count)}, columns in order of falling variance, scaled so that
      the projections' variance is one per column on average.
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
    features: FeatureFn,
    folder: str | os.PathLike,
    name: str,
    components: int,
) -> Features:
    """Compute the targets of an image set, or read them from an earlier run.

    The first set computed in a folder fits the principal components; later sets reuse them.

    Args:
      images: uint8 (N, H, W, 3).
      features: from `inception_features`.
      folder: the cache; about 5 KB (pooled) and 6 KB (spatial) per image.
      name: of the set.
      components: channels of the spatial target.

    Returns:
      {"pooled": (N, 2048), "spatial": (N, g, g, components)}, float16, memory-mapped.

    Raises:
      ValueError: the cache has other images or another number of components.
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


def _basis(images: np.ndarray, features: FeatureFn, path: pathlib.Path, count: int) -> Features:
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
