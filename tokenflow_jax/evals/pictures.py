"""Grids of pictures and PNG files."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from tokenflow_jax import files
from tokenflow_jax.nets.pixels import to_uint8

_to_uint8 = jax.jit(to_uint8)


def grid(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Lay out rows of uint8 images (N, H, W, 3) on white, `gap` pixels apart, as one image."""
    widths = ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0))
    padded = np.pad(np.stack(rows), widths, constant_values=255)
    count, columns, height, width, _ = padded.shape
    flat = padded.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, 3)
    return np.pad(flat, ((0, gap), (0, gap), (0, 0)), constant_values=255)


def write_png(image_HWC: np.ndarray, path: str | os.PathLike) -> None:
    """Write a uint8 picture that appears when it is complete, replacing what exists."""
    with files.write_atomically(path, overwrite=True) as partial:
        Image.fromarray(image_HWC).save(partial, format="PNG")


def to_pil(pixels_BHWC: np.ndarray | jax.Array) -> list[Image.Image]:
    """Turn uint8 pixels, or those that a decoder returns, nominally in [-1, 1], into PIL images."""
    if pixels_BHWC.dtype != np.uint8:
        pixels_BHWC = _to_uint8(pixels_BHWC)
    return [Image.fromarray(pixels_HWC) for pixels_HWC in np.asarray(pixels_BHWC)]
