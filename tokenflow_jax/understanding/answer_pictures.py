"""A grid of pictures with the model's answers, for TensorBoard and reports."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tokenflow_jax.evals.pictures import labelled_grid

_SIDE, _COLUMNS = 128, 4
_RIGHT, _WRONG = (0, 110, 0), (160, 0, 0)


def answer_grid(cells: Sequence[tuple[np.ndarray | None, str, str]]) -> np.ndarray:
    """Draw pictures with answers below, green where they equal the data's answer, else red."""
    pictures = np.full((max(len(cells), 1), _SIDE, _SIDE, 3), 255, np.uint8)
    captions = []
    for i, (image_HWC, said, truth) in enumerate(cells):
        if image_HWC is not None:
            picture = Image.fromarray(image_HWC).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            pictures[i] = picture
        captions.append((said or "(nothing)", _RIGHT if said == truth else _WRONG))
    starts = range(0, len(pictures), _COLUMNS)
    rows, texts = ([x[i : i + _COLUMNS] for i in starts] for x in (pictures, captions))
    return labelled_grid(rows, captions=texts)
