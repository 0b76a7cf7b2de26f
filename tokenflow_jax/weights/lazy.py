"""Tensors that are read when they are needed, so that a whole model is never in memory."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file: name, shape and NumPy (or ml_dtypes) dtype now, data on `read`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    # Reads the data, anew at every call.
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def in_memory(name: str, array: Any) -> LazyTensor:
    """Wrap an array (NumPy's or JAX's), unless it is lazy already."""
    if isinstance(array, LazyTensor):
        return array
    return LazyTensor(name, array.shape, np.dtype(array.dtype), lambda: np.asarray(array))


def data(tensor: LazyTensor | np.ndarray) -> np.ndarray:
    """Return the data of a tensor, lazy or not."""
    return tensor.read() if isinstance(tensor, LazyTensor) else np.asarray(tensor)


def read_block(path: str | os.PathLike, start: int, size: int) -> np.ndarray:
    """Read `size` bytes of a file as uint8; ValueError if the file ends before that.

    The memory is the array's own: unlike a map, it is freed with the array.
    """
    block = np.fromfile(path, np.uint8, size, offset=start)
    if len(block) != size:
        raise ValueError(f"{path}: cut short at byte {start + len(block)}; fetch the file again")
    return block


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of an array in C order, a few megabytes at a time whatever its strides."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, 4 * 2**20 // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8).data
