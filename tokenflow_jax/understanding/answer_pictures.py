"""Pictures with what a model says about them, as one image for curves and reports."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_SIDE, _TEXT, _COLUMNS, _LETTERS = 128, 56, 4, 21
_RIGHT, _WRONG = (0, 110, 0), (160, 0, 0)


def answer_grid(cells: Sequence[tuple[np.ndarray | None, str, str]]) -> np.ndarray:
    """Draws pictures with answers below, green where they equal the data's and else red.

    Args:
      cells: (uint8 (H, W, 3) or None, answer, the data's answer) of each.

    Returns:
      uint8 (height, width, 3).
    """
    columns = min(_COLUMNS, max(len(cells), 1))
    rows = -(-max(len(cells), 1) // columns)
    sheet = Image.new("RGB", (columns * _SIDE, rows * (_SIDE + _TEXT)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (image_HWC, said, truth) in enumerate(cells):
        left, top = i % columns * _SIDE, i // columns * (_SIDE + _TEXT)
        if image_HWC is not None:
            picture = Image.fromarray(image_HWC).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, top))
        lines = textwrap.wrap(said, _LETTERS)[:4] or ["(nothing)"]
        # The built-in font knows Latin letters only.
        text = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")
        colour = _RIGHT if said == truth else _WRONG
        draw.multiline_text((left + 3, top + _SIDE + 2), text, fill=colour)
    return np.asarray(sheet)
