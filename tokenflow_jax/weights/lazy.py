"""Tensors that are read when they are needed, so that a whole model is never in memory."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tokenflow_jax.messages import shown

MOST_TENSORS = 100_000  # of a file
_MOST_AXES = 32
_MOST_BYTES = 2**47  # what a process can address


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file: name, shape and NumPy (or ml_dtypes) dtype now, data on `read`.

    A shape that no array can have is a ValueError.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    # Reads the data, anew at every call.
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    def __post_init__(self):
        right = len(self.shape) <= _MOST_AXES and all(isinstance(n, int) for n in self.shape)
        # Also of an empty array NumPy multiplies the other axes.
        if not right or min(self.shape, default=0) < 0 or self._extent() > _MOST_BYTES:
            raise ValueError(f"{shown(self.name)} of the impossible shape {shown(self.shape)}")

    def _extent(self) -> int:
        return math.prod(max(1, size) for size in self.shape) * self.dtype.itemsize

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
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if not 0 <= start <= start + size <= length:  # before the memory is taken
            raise ValueError(f"{path}: cut short at byte {length:,}; fetch the file again")
        return np.fromfile(file, np.uint8, size, offset=start)


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of an array in C order, a few megabytes at a time whatever its strides."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, 4 * 2**20 // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8).data
