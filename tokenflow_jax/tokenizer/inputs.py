"""Pictures as people have them become batches of the model's input."""

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tokenflow_jax.data.pictures import Picture, each, fit, is_single, read_picture
from tokenflow_jax.log import Progress
from tokenflow_jax.nets.pixels import to_float

Range = tuple[float, float] | None
_RANGES = (None, (-1, 1), (0, 1))


def batches(
    pictures: Picture | Iterable[Picture],
    size: int,
    batch_size: int,
    value_range: Range = None,
    resize: bool = True,
) -> Iterator[np.ndarray]:
    """Yield float32 batches (B, size, size, 3) in [-1, 1] and log the progress; see `encode`.

    Only one batch is in memory. The last one may be shorter.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    single = is_single(pictures)
    items, count = each(pictures)
    if isinstance(items, np.ndarray) and items.dtype != np.uint8:
        value_range = _check_range(items, "images", value_range)  # of all: one may be bright

    def prepare(numbered: tuple[int, Picture]) -> np.ndarray:
        number, item = numbered
        name = "picture" if single else f"picture {number}"
        image_HWC = read_picture(item, name)
        if image_HWC.dtype == np.uint8:
            return to_float(fit(image_HWC, size, resize, name))
        if image_HWC.shape != (size, size, 3):
            raise ValueError(
                f"{name} of shape {image_HWC.shape} and dtype {image_HWC.dtype}: floats are not "
                f"resized; give ({size}, {size}, 3), or uint8"
            )
        used = _check_range(image_HWC, name, value_range)
        image_HWC = image_HWC.astype(np.float32)
        return 2 * image_HWC - 1 if used == (0, 1) else image_HWC

    line, done, numbered = Progress("encode", count), 0, enumerate(items)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, batch_size, 32)) as pool:
        while batch := list(itertools.islice(numbered, batch_size)):
            yield np.stack(list(pool.map(prepare, batch)))
            done += len(batch)
            line.update(done)
    if not done:
        raise ValueError("no images: there was nothing to iterate over")


def _check_range(pixels: np.ndarray, name: str, value_range: Range) -> tuple[float, float]:
    """Return the range that floats are in; ValueError if they are not, or it has to be named."""
    value_range = None if value_range is None else tuple(map(float, value_range))
    if value_range not in _RANGES:
        raise ValueError(f"value_range {value_range!r}: one of (-1, 1), (0, 1)")
    low, high = float(pixels.min()), float(pixels.max())
    least = 0 if value_range == (0, 1) else -1
    if not (low >= least - 1e-3 and high <= 1.001):  # also false for NaN
        raise ValueError(
            f"{name}: floats span {low:g} to {high:g}, not [{least}, 1]; for 0..255 give uint8, "
            "for 0..1 value_range=(0, 1)"
        )
    if value_range is None and low >= 0:
        raise ValueError(
            f"{name}: floats span {low:g} to {high:g}: say value_range=(0, 1), as ToTensor gives "
            "them, or (-1, 1)"
        )
    return value_range or (-1.0, 1.0)
