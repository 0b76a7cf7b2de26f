"""PSNR and SSIM of uint8 images, in the standard way and as the reference computes them.

The reference compares its rounded reconstruction, divided by 255, with the ground truth (x + 1) / 2
that was never rounded. That truth comes from uint8 / 127.5 - 1, so it is uint8 / 255 again, and the
reference's PSNR is the standard one. Its SSIM is not: it states a data range of 2 for values
between 0 and 1, which makes the stabilising constants four times too large.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 7
PEAK = 255
REFERENCE_SSIM_RANGE = 2 * PEAK


def reference_png(images_BHWC: np.ndarray) -> np.ndarray:
    """What the reference's ground-truth PNG holds of uint8 images: 63 of the 256 values less one.

    It takes them to [-1, 1] and back to 0..255 in float32, and truncates there.
    """
    x = images_BHWC.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return ((x + np.float32(1)) / np.float32(2) * np.float32(255)).astype(np.uint8)


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
        return 10 * np.log10(PEAK**2 / mean_square_B)


def ssim(
    images_BHWC: jax.Array, reconstructions_BHWC: jax.Array, data_range: float = PEAK
) -> jax.Array:
    """Structural similarity of each image (Wang et al. 2004), as scikit-image's defaults have it.

    A uniform 7 x 7 window, sample covariance, windows inside the image only, mean over windows and
    channels. Sums over windows are exact integers.

    Args:
      images_BHWC, reconstructions_BHWC: uint8, each side 7 px or more.
      data_range: 255 is the standard; the reference's figure has `REFERENCE_SSIM_RANGE`.

    Returns:
      float32 (B,), at most 1.

    Raises:
      ValueError: the images are smaller than the window.
    """
    if min(images_BHWC.shape[1:3]) < WINDOW:
        raise ValueError(
            f"SSIM of images of shape {images_BHWC.shape}: it needs {WINDOW} px or more a side"
        )
    return _ssim(images_BHWC, reconstructions_BHWC, data_range)


@functools.partial(jax.jit, static_argnames="data_range")
def _ssim(x_BHWC, y_BHWC, data_range):
    x, y = x_BHWC.astype(jnp.int32), y_BHWC.astype(jnp.int32)
    count = WINDOW * WINDOW
    sum_x, sum_y, sum_xx, sum_yy, sum_xy = (_window_sums(v) for v in (x, y, x * x, y * y, x * y))
    mean_x, mean_y = sum_x / count, sum_y / count

    def covariance(sum_uv, sum_u, sum_v):  # 49 * 49 * 255^2 fits an int32
        return (count * sum_uv - sum_u * sum_v) / (count * (count - 1))

    variances = covariance(sum_xx, sum_x, sum_x) + covariance(sum_yy, sum_y, sum_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance(sum_xy, sum_x, sum_y) + c2) / (variances + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _window_sums(x_BHWC: jax.Array) -> jax.Array:
    """Integer sums over all windows inside the image."""
    for window in ((1, WINDOW, 1, 1), (1, 1, WINDOW, 1)):
        x_BHWC = jax.lax.reduce_window(x_BHWC, 0, jax.lax.add, window, (1, 1, 1, 1), "VALID")
    return x_BHWC
