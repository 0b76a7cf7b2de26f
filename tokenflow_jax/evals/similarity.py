"""PSNR and SSIM of uint8 images, in the standard way and as the reference computes them.

The reference compares its rounded reconstruction, divided by 255, with the ground truth (x + 1) / 2
that was never rounded. That truth comes from uint8 / 127.5 - 1, so it is uint8 / 255 again, and the
reference's PSNR is the standard one. Its SSIM is not: it states a data range of 2 for values
between 0 and 1, which makes the stabilizing constants four times too large.
"""

import numpy as np
from skimage import metrics

from tokenflow_jax.nets.pixels import to_float

WINDOW = 7
PEAK = 255
REFERENCE_SSIM_RANGE = 2 * PEAK


def reference_png(images_BHWC: np.ndarray) -> np.ndarray:
    """Return uint8 images as the reference's ground-truth PNG: 63 of the 256 values less one."""
    # It takes them to [-1, 1] and back to 0..255 in float32, and truncates there.
    unit = (to_float(images_BHWC) + np.float32(1)) / np.float32(2)
    return (unit * np.float32(255)).astype(np.uint8)


def psnr(images_BHWC: np.ndarray, reconstructions_BHWC: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio (B,) of uint8 images, in dB; infinite where equal."""
    pairs = zip(images_BHWC, reconstructions_BHWC, strict=True)
    with np.errstate(divide="ignore"):
        return np.array([metrics.peak_signal_noise_ratio(*p, data_range=PEAK) for p in pairs])


def ssim(
    images_BHWC: np.ndarray, reconstructions_BHWC: np.ndarray, data_range: float = PEAK
) -> np.ndarray:
    """Return the structural similarity (B,) of uint8 images (Wang et al. 2004), at most 1.

    A uniform 7 x 7 window, sample covariance, windows inside the image only, mean over windows and
    channels. The reference's figure has the data range `REFERENCE_SSIM_RANGE`.
    """
    if min(images_BHWC.shape[1:3]) < WINDOW:
        raise ValueError(
            f"SSIM of images of shape {images_BHWC.shape}: it needs {WINDOW} px or more a side"
        )
    known = {"win_size": WINDOW, "channel_axis": -1, "data_range": data_range}
    pairs = zip(images_BHWC, reconstructions_BHWC, strict=True)
    return np.array([metrics.structural_similarity(*pair, **known) for pair in pairs])
