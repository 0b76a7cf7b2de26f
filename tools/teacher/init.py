"""An initialization for a small ViT that sees few images; the architecture is unchanged.

It replaces three parts of a random initialization:

  patch embedding     the principal components of the patches, whitened, in a random rotation:
                      neighboring pixels are so similar that training would spend long undoing it
  position embedding  two-dimensional sines and cosines
  attention           products that resemble trained ones (Trockman and Kolter 2023, "Mimetic
                      initialization of self-attention layers", arXiv 2305.09828): query times key
                      near the identity, value times output near its negative
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tokenflow_jax.nets.vit import ViTConfig


def whitening_kernel(
    images: np.ndarray, patch: int, width: int, components: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a patch embedding that maps patches to uncorrelated, whitened components.

    Args:
      images: uint8 (N, H, W, 3), a sample.
      components: principal components to use, at most `width` and 3 * patch**2.

    Returns:
      (patch, patch, 3, width) float32; the outputs' variance is near components / width.
    """
    count, height, _, channels = images.shape
    grid = height // patch
    cut = images[:, : grid * patch, : grid * patch].astype(np.float64) / 127.5 - 1
    cells = cut.reshape(count, grid, patch, grid, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    patches_NP = cells.reshape(-1, patch * patch * channels)
    variance, vectors = np.linalg.eigh(np.cov(patches_NP, rowvar=False))
    kept = np.argsort(variance)[::-1][:components]
    white_PC = vectors[:, kept] / np.sqrt(variance[kept] + 1e-4 * variance.max())
    rotation, _ = np.linalg.qr(rng.normal(size=(width, components)))
    return (white_PC @ rotation.T).reshape(patch, patch, channels, width).astype(np.float32)


def sine_positions(grid: int, width: int) -> np.ndarray:
    """Return float32 (grid * grid, width) sine and cosine positions, row by row.

    `width` is a multiple of 4: a quarter each for the sine and cosine of row and column.
    """
    frequencies = 1 / 10.0 ** np.linspace(0, 1, width // 4)
    angles = np.arange(grid)[:, None] * frequencies * np.pi / 2
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)  # (grid, width / 2)
    rows = np.repeat(waves[:, None], grid, axis=1)
    both = np.concatenate([rows, rows.transpose(1, 0, 2)], axis=-1)
    return both.reshape(grid * grid, width).astype(np.float32)


def _factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (D, rank) and (rank, D) whose product best approximates a (D, D) matrix."""
    left, values, right = np.linalg.svd(matrix)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def start_from_statistics(
    params: Mapping[str, Any],
    vit: ViTConfig,
    images: np.ndarray,
    *,
    components: int = 64,
    positions: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Return a ViT's parameters with the parts named above replaced.

    Args:
      params: from the ViT's init.
      images: uint8 sample of the training images, at `vit.image_size`.
      components: see `whitening_kernel`; at most the width is used.
      positions: amplitude of the position embedding.
      seed: of rotations and noise.
    """
    rng = np.random.default_rng(seed)
    params = jax.tree.map(np.array, dict(params))
    width, head = vit.width, vit.width // vit.heads
    params["patch_embed"]["kernel"] = whitening_kernel(
        images, vit.patch_size, width, min(components, width), rng
    )
    params["position_embedding"][1:] = positions * sine_positions(vit.grid, width)
    attention = params["blocks"]["attention"]
    for layer in range(vit.depth):
        qkv, out = attention["qkv"]["kernel"][layer], attention["out"]["kernel"][layer]
        for first in range(0, width, head):
            part = slice(first, first + head)
            noise = rng.normal(size=(2, width, width)) / np.sqrt(width)
            query, key = _factors(0.7 * noise[0] + 0.7 * np.eye(width), head)
            qkv[:, part], qkv[:, width + first : width + first + head] = query, key.T
        value, output = _factors(0.4 * noise[1] - 0.4 * np.eye(width), width)
        qkv[:, 2 * width :], out[:] = value, output
    return params
