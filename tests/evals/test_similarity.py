"""PSNR and SSIM against the reference's figures, and against a plain computation."""

import numpy as np
import pytest
from golden.loading import GOLDEN, images_uint8

from tokenflow_jax.evals import similarity
from tokenflow_jax.nets.pixels import to_uint8

VECTORS = np.load(GOLDEN / "evals.npz")


@pytest.fixture(scope="module")
def pairs():
    """Original and uint8 reconstruction (1, H, W, 3) of the golden cases."""
    images = images_uint8("astronaut_256", "coffee_256")[:, None]
    first, second = images.astype(np.float32) / 127.5 - 1
    return {
        "0_1": (images[0], np.asarray(to_uint8(second))),
        "0_mix": (images[0], np.asarray(to_uint8(0.9 * first + 0.1 * second))),
    }


@pytest.mark.parametrize("case", ["0_1", "0_mix"])
def test_equals_the_reference(pairs, case):
    image, reconstruction = pairs[case]
    psnr = similarity.psnr(image, reconstruction)
    np.testing.assert_allclose(psnr, VECTORS[f"psnr_{case}"], rtol=0, atol=1e-4)
    ssim = similarity.ssim(image, reconstruction, similarity.REFERENCE_SSIM_RANGE)
    np.testing.assert_allclose(ssim, VECTORS[f"ssim_{case}"], rtol=0, atol=1e-5)


def test_ssim_equals_a_plain_computation():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 9, 8, 3), np.uint8)
    y = np.clip(x + rng.normal(0, 40, x.shape), 0, 255).astype(np.uint8)
    x[1], y[1] = 200, 200 + (y[1] > 128)  # nearly flat: where rounding would show
    expected = []
    for a, b in zip(x / 255, y / 255, strict=True):
        values = []
        for i, j, c in np.ndindex(3, 2, 3):
            u, v = a[i : i + 7, j : j + 7, c].ravel(), b[i : i + 7, j : j + 7, c].ravel()
            (uu, uv), (_, vv) = np.cov(u, v)
            contrast = (2 * uv + 0.03**2) / (uu + vv + 0.03**2)
            means = (2 * u.mean() * v.mean() + 0.01**2) / (u.mean() ** 2 + v.mean() ** 2 + 0.01**2)
            values.append(contrast * means)
        expected.append(np.mean(values))
    np.testing.assert_allclose(similarity.ssim(x, y), expected, rtol=0, atol=1e-6)


def test_identical_images():
    images = images_uint8("coffee_224")
    assert similarity.psnr(images, images) == np.inf
    np.testing.assert_allclose(similarity.ssim(images, images), 1, atol=1e-6)


def test_ssim_says_what_it_needs():
    with pytest.raises(ValueError, match="7 px or more"):
        similarity.ssim(*np.zeros((2, 1, 6, 9, 3), np.uint8))


def test_pixels_as_the_reference_writes_them():
    out = to_uint8(VECTORS["to_uint8_in"])
    np.testing.assert_array_equal(out, VECTORS["to_uint8_out"])
    values = np.arange(256, dtype=np.uint8)
    png = similarity.reference_png(values)
    np.testing.assert_array_equal(png, VECTORS["gt_png_of_0_to_255"])
    assert (values - png).sum() == 63
