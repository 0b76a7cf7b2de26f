"""A grid of pictures with the model's answers, for TensorBoard and reports."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_SIDE, _TEXT, _COLUMNS, _LETTERS = 128, 56, 4, 21
_RIGHT, _WRONG = (0, 110, 0), (160, 0, 0)


def answer_grid(cells: Sequence[tuple[np.ndarray | None, str, str]]) -> np.ndarray:
    """Draw pictures with answers below, green where they equal the data's answer, else red."""
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
        color = _RIGHT if said == truth else _WRONG
        draw.multiline_text((left + 3, top + _SIDE + 2), text, fill=color)
    return np.asarray(sheet)
