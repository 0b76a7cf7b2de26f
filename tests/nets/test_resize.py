"""Area and bicubic resizing against PyTorch's results."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from golden import weights
from golden.loading import GOLDEN

from tokenflow_jax.nets import resize, vit

VECTORS = np.load(GOLDEN / "resize.npz")
TOLERANCE = 2e-5


def _maps(name):
    return jnp.asarray(VECTORS[name].transpose(1, 2, 0)[None])


def _check(ours_BHWC, name):
    ours = np.asarray(ours_BHWC)[0].transpose(2, 0, 1)
    np.testing.assert_allclose(ours[: len(VECTORS[name])], VECTORS[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [n for n in VECTORS.files if re.fullmatch(r"area_\d+_to_\d+", n)])
def test_area(name):
    grid, size = re.findall(r"\d+", name)
    source = f"area_in_{grid}"
    if source in VECTORS.files:
        _check(resize.area_resize(_maps(source), int(size)), name)
    else:  # the 16 x 16 input itself is stored as its resize to 16
        _check(resize.area_resize(_maps("area_16_to_16"), int(size)), name)


@pytest.mark.parametrize("name", [n for n in VECTORS.files if n.startswith("bicubic_area_")])
def test_bicubic_up(name):
    grid, size, up = re.findall(r"\d+", name)
    _check(resize.bicubic_resize(_maps(f"area_{grid}_to_{size}"), int(up)), name)


@pytest.mark.parametrize("name", ["bicubic_24_to_27", "bicubic_27_to_24"])
def test_bicubic_between_pixel_grids(name):
    grid, size = re.findall(r"\d+", name)
    _check(resize.bicubic_resize(_maps(f"bicubic_in_{grid}"), int(size)), name)


def test_rows_sum_to_one_for_all_sizes():
    for size_in in (1, 3, 14, 27):
        for size_out in (1, 2, 5, 16, 27):
            for matrix in (resize.area_matrix, resize.bicubic_matrix):
                np.testing.assert_allclose(matrix(size_in, size_out).sum(1), 1, atol=1e-6)


def test_clip_positions_on_a_larger_grid():
    positions = weights.tensor("encoder_vqkd.positional_embedding", (197, 768))
    ours = vit.resize_positions(jnp.asarray(positions), 14, 16)
    np.testing.assert_allclose(ours[:, ::16], VECTORS["clip_pos_16"], rtol=0, atol=TOLERANCE)


def test_positions_of_the_trained_grid_are_untouched():
    positions = jnp.ones((10, 4))
    assert vit.resize_positions(positions, 3, 3) is positions
