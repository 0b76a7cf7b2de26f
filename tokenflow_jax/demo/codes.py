"""A picture's codes as the page shows them; NumPy and PIL, nothing of the browser."""

import colorsys
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from tokenflow_jax.data import pipeline
from tokenflow_jax.data.captions.batches import Pictures
from tokenflow_jax.data.captions.texts import main_caption
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.pyramid import Scales

SIDE = 384  # pixels of every picture on the page
_BATCH = 32
_EMOJI = 512  # that are looked through, evenly spread


def enlarged(picture: Image.Image | np.ndarray) -> Image.Image:
    """Return a square picture at the page's size, its pixels visible."""
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def code_map(codes_L: np.ndarray, scales: Scales, scale: int) -> Image.Image:
    """Draw the codes of a scale as a grid of colors, the same color for the same code."""
    side, where = scales.sides[scale], scales.slices()[scale]
    colors = [_color(int(code)) for code in codes_L[where]]
    cells = Image.fromarray(np.array(colors, np.uint8).reshape(side, side, 3))
    return enlarged(cells)


def cell_at(scales: Scales, scale: int, x: int, y: int) -> int:
    """Return the place among all codes of the cell at a pixel of `code_map`."""
    side, where = scales.sides[scale], scales.slices()[scale]
    row, column = (min(max(int(v), 0) * side // SIDE, side - 1) for v in (y, x))
    return where.start + row * side + column


def change(before: Image.Image, after: Image.Image) -> Image.Image:
    """Draw where two pictures differ, black where they do not, bright from a tenth on."""
    pair = (np.asarray(picture, np.int16) for picture in (before, after))
    return Image.fromarray(np.minimum(10 * abs(np.subtract(*pair)), 255).astype(np.uint8))


def nearest_codes(tokenizer: Tokenizer, code: int, count: int = 5) -> dict[str, list[int]]:
    """Return the codes most like one, in meaning and in appearance, by the cosine."""
    found = {}
    books = tokenizer.codebooks
    for half, table_KC in (("semantic", books.semantic_KC), ("pixel", books.pixel_KC)):
        table_KC = np.asarray(table_KC, np.float32)
        table_KC = table_KC / np.linalg.norm(table_KC, axis=-1, keepdims=True)
        order = np.argsort(-table_KC @ table_KC[code], kind="stable")
        found[half] = [int(other) for other in order if other != code][:count]
    return found


class Neighbors:
    """The shipped emoji, sorted by how much a picture's codes mean what theirs do."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def of(self, codes_L: np.ndarray, count: int = 8) -> list[tuple[Image.Image, str]]:
        """Return the nearest pictures with their captions, by the cosine of mean features."""
        pictures, features_ND = self._known
        near = np.argsort(-(features_ND @ self._features(codes_L[None])[0]), kind="stable")
        return [(enlarged(pictures[i]["image"]), main_caption(pictures[i])) for i in near[:count]]

    @functools.cached_property
    def _known(self) -> tuple[list[Mapping[str, Any]], np.ndarray]:
        size = self._tokenizer.config.image_size
        data = pipeline.DataConfig("emoji", "", "train", size, "center", flip=False)
        examples = Pictures(data)
        chosen = np.linspace(0, len(examples) - 1, _EMOJI).astype(int)
        found = map(examples.__getitem__, chosen.tolist())
        pictures = [example for example in found if example is not None]
        codes = self._tokenizer.encode([one["image"] for one in pictures], batch_size=_BATCH)
        return pictures, self._features(np.asarray(codes))

    def _features(self, codes_BL: np.ndarray) -> np.ndarray:
        parts = range(0, len(codes_BL), _BATCH)
        maps = [np.asarray(self._tokenizer.semantics(codes_BL[i : i + _BATCH])) for i in parts]
        mean_BD = np.concatenate(maps).mean(axis=1)
        return mean_BD / np.linalg.norm(mean_BD, axis=-1, keepdims=True)


def _color(code: int) -> tuple[int, int, int]:
    # Steps of the golden ratio keep the hues of neighboring numbers apart.
    red, green, blue = colorsys.hsv_to_rgb(code * 0.61803398875 % 1, 0.55, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
