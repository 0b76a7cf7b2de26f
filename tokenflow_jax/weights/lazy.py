"""Tensors that are read when they are needed, so that a whole model never is in memory."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator

import numpy as np

_PIECE = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file: shape and dtype now, data when `read` is called.

    Attributes:
      name: its name in the file.
      shape: as it will be read.
      dtype: NumPy (or ml_dtypes) dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Returns the data, read anew at every call."""
        return self.load()


def data(tensor: LazyTensor | np.ndarray) -> np.ndarray:
    """The data of a tensor, lazy or not."""
    return tensor.read() if isinstance(tensor, LazyTensor) else np.asarray(tensor)


def read_block(path: str | os.PathLike, start: int, size: int) -> np.ndarray:
    """Reads bytes of a file into memory of their own: unlike a map, they go when the array goes.

    Args:
      path: the file.
      start, size: in bytes.

    Returns:
      uint8 (size,).

    Raises:
      ValueError: the file ends before that.
    """
    block = np.fromfile(path, np.uint8, size, offset=start)
    if len(block) != size:
        raise ValueError(f"{path}: cut short at byte {start + len(block)}; fetch the file again")
    return block


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order, a few megabytes at a time whatever its strides."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, _PIECE // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8).data
