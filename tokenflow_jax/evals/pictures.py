"""Grids of pictures and PNG files."""

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenflow_jax import files

_VISIBLE = 128  # pixels of a picture's side at least
_MOST_LINES = 4  # of a caption
_GAP = 2
INK = (40, 40, 40)
Caption = tuple[str, tuple[int, int, int]]  # text and its color


def grid(rows: Sequence[np.ndarray], gap: int = _GAP) -> np.ndarray:
    """Lay out rows of uint8 images (N, H, W, 3) on white, `gap` pixels apart, as one image."""
    widths = ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0))
    padded = np.pad(np.stack(rows), widths, constant_values=255)
    count, columns, height, width, _ = padded.shape
    flat = padded.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, 3)
    return np.pad(flat, ((0, gap), (0, gap), (0, 0)), constant_values=255)


def labelled_grid(
    rows: Sequence[np.ndarray],
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[Caption]] = (),
) -> np.ndarray:
    """Lay out rows of uint8 images (N, H, W, 3) as `grid` does, large enough to see, with texts.

    Args:
      labels: to the left of the rows, one each.
      captions: below the pictures of a row, for each row; a row may have none.
    """
    zoom = -(-_VISIBLE // rows[0].shape[1])
    rows = [np.asarray(row).repeat(zoom, axis=1).repeat(zoom, axis=2) for row in rows]
    _, height, width, _ = rows[0].shape
    font = ImageFont.load_default(size := max(12, height // 12))
    left = round(max(map(font.getlength, labels), default=-3 * _GAP)) + 3 * _GAP
    letters = int(width / font.getlength("n"))
    wrapped = [
        [("\n".join(textwrap.wrap(_latin(t), letters)[:_MOST_LINES]), ink) for t, ink in some]
        for some in captions or [[]] * len(rows)
    ]
    below = [
        max((text.count("\n") + 1 for text, _ in some), default=0) * (size + 4) for some in wrapped
    ]
    total = sum(below) + len(rows) * (height + _GAP) + _GAP
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (left + columns * (width + _GAP) + _GAP, total), (255, 255, 255))
    draw, top = ImageDraw.Draw(sheet), _GAP
    for i, row in enumerate(rows):
        for label in labels[i : i + 1]:
            draw.text((_GAP, top + height // 2), _latin(label), INK, font, anchor="lm")
        for column, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (left + _GAP + column * (width + _GAP), top))
        for column, (text, ink) in enumerate(wrapped[i]):
            where = (left + 2 * _GAP + column * (width + _GAP), top + height)
            draw.multiline_text(where, text, ink, font, spacing=2)
        top += height + _GAP + below[i]
    return np.asarray(sheet)


def _latin(text: str) -> str:
    """Replace what the built-in font does not know."""
    return text.encode("latin-1", "replace").decode("latin-1")


def write_png(image_HWC: np.ndarray, path: str | os.PathLike) -> None:
    """Write a uint8 picture that appears when it is complete, replacing what exists."""
    with files.write_atomically(path, overwrite=True) as partial:
        Image.fromarray(image_HWC).save(partial, format="PNG")
