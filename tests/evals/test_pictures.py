"""Grids of pictures with texts."""

import numpy as np

from tokenflow_jax.evals import pictures
from tokenflow_jax.understanding.answer_pictures import answer_grid

RNG = np.random.default_rng(0)
ROWS = RNG.integers(0, 256, (2, 3, 60, 60, 3), dtype=np.uint8)


def find(sheet, picture):
    """Rows and columns at which a picture lies in a sheet."""
    height, width, _ = picture.shape
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:, :, 0], (height, width))
    corners = np.argwhere(windows[:, :, 0, 0] == picture[0, 0, 0])
    return [(y, x) for y, x in corners if (sheet[y : y + height, x : x + width] == picture).all()]


def test_small_pictures_are_enlarged_without_blur_and_rows_are_labelled():
    plain = pictures.labelled_grid(ROWS)
    sheet = pictures.labelled_grid(ROWS, ["original", "a reconstruction"])
    for rows, images in zip((0, 1), ROWS, strict=True):
        for image in images:
            large = image.repeat(3, axis=0).repeat(3, axis=1)  # 60 -> 180 >= 128
            ((y, x),), ((_, before),) = find(sheet, large), find(plain, large)
            assert y == 2 + rows * 182 and x > before
            left = sheet[y : y + 180, : x - 2]
            assert (left < 128).any(), "no label"
            assert (left[:, :2] == 255).all(), "a label begins outside"
    assert plain.shape[1] == 3 * 182 + 2 and (plain[:, :2] == 255).all()


def test_large_pictures_stay_as_they_are():
    image = RNG.integers(0, 256, (1, 200, 200, 3), dtype=np.uint8)
    assert find(pictures.labelled_grid([image]), image[0]) == [(2, 2)]


def test_captions_stand_below_their_row_and_are_cut_to_some_lines():
    captions = [[], [("red apple", (200, 0, 0)), ("word " * 99, (0, 0, 200)), ("猫", (0, 99, 0))]]
    sheet = pictures.labelled_grid(ROWS, captions=captions).astype(int)
    below = sheet[2 * 182 :]
    for column, own in enumerate([(0, 1), (2, 1), (1, 0)]):
        cell = below[:, 2 + column * 182 : 182 + column * 182]
        ink = 255 - cell.min(axis=(0, 1))
        assert ink[own[0]] < ink[own[1]], "another color"
    assert len(below) < 5 * 20
    assert (below[:, -2:] == 255).all() and (below[-1] == 255).all()


def test_answers_are_green_or_red():
    cells = [(ROWS[0, 0], "a face", "a face"), (None, "", "a heart")]
    sheet = answer_grid(cells).astype(int)
    assert sheet.shape[1] == 2 * 130 + 2
    right, wrong = sheet[130:, :130], sheet[130:, 132:]
    assert (right[..., 1] - right[..., 0]).max() > 80 > (right[..., 0] - right[..., 1]).max()
    assert (wrong[..., 0] - wrong[..., 1]).max() > 80
