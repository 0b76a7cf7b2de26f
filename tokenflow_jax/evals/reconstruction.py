"""How well images come back from their codes: PSNR, codes in use, and pictures to look at."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, np.ndarray]


def to_uint8(images_BHWC: jax.Array) -> jax.Array:
    """Model output to pixels as the reference does: clip(127.5 x + 128, 0, 255), truncated."""
    return jnp.clip(127.5 * images_BHWC + 128.0, 0.0, 255.0).astype(jnp.uint8)


def psnr(images_BHWC: np.ndarray, reconstructions_BHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, in dB.

    Args:
      images_BHWC, reconstructions_BHWC: uint8.

    Returns:
      float64 (B,); infinite for identical images.
    """
    error = images_BHWC.astype(np.float64) - reconstructions_BHWC.astype(np.float64)
    mean_square_B = np.mean(error**2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / mean_square_B)


def evaluate(
    reconstruct: Callable[[np.ndarray], tuple[jax.Array, jax.Array]],
    batches: Iterable[Batch],
    codebook_size: int,
) -> dict[str, float]:
    """Reconstructs a data set.

    Args:
      reconstruct: uint8 images (B, H, W, 3) to (codes (B, L), uint8 reconstructions).
      batches: {"image": uint8, "mask": bool, True for real images (the last batch is padded)}.
      codebook_size: number of codes.

    Returns:
      "psnr" (mean over images, dB), "codes_used" (fraction of the codebook that these images use)
      and "images".

    Raises:
      ValueError: when there are no images.
    """
    values, used = [], np.zeros(codebook_size, bool)
    for batch in batches:
        mask = batch.get("mask", np.ones(len(batch["image"]), bool))
        codes, images = jax.device_get(reconstruct(batch["image"]))
        values.append(psnr(batch["image"], images)[mask])
        used[codes[mask].ravel()] = True
    values = np.concatenate(values) if values else np.zeros(0)
    if not values.size:
        raise ValueError("no images to evaluate: the held-out split is empty")
    return {
        "psnr": float(values.mean()),
        "codes_used": float(used.mean()),
        "images": float(values.size),
    }


def grid(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Lays out images in rows on white.

    Args:
      rows: each uint8 (N, H, W, 3), the same N everywhere.
      gap: pixels between images.

    Returns:
      uint8 (height, width, 3).
    """
    images_RNHWC = np.stack(rows)
    padded = np.pad(images_RNHWC, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    count, columns, height, width, _ = padded.shape
    flat = padded.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, 3)
    return np.pad(flat, ((0, gap), (0, gap), (0, 0)), constant_values=255)
