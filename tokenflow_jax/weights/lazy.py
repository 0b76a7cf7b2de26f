"""Tensors that are read when they are needed, so that a whole model is never in memory."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tokenflow_jax.log import Progress
from tokenflow_jax.messages import shown

Index = tuple[slice, ...]  # one slice per axis, in steps of 1
MOST_TENSORS = 100_000  # of a file
_MOST_AXES = 32
_MOST_BYTES = 2**47  # what a process can address
_PIECE_BYTES = 16 * 2**20
_MEGABYTE = 10**6


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file: name, shape and NumPy (or ml_dtypes) dtype now, data on `read`.

    `tensor[index]` reads a part, so that a process never holds what its devices do not. A shape
    that no array can have is a ValueError.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    # Reads the data, anew at every call.
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)
    # Reads a part, whose slices have numbers; without it parts are cut out of the whole.
    read_part: Callable[[Index], np.ndarray] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    # Raises if a whole array, of this dtype and on any devices, is not what was saved: parts are
    # not checked when they are read. All processes call it together.
    check: Callable[[Any], None] | None = dataclasses.field(default=None, repr=False, compare=False)

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

    def __getitem__(self, index: Index) -> np.ndarray:
        """Read a part, one slice for each axis."""
        if self.read_part is None:
            # A copy: a view would keep the whole in memory.
            return np.array(self.read()[index])
        bounds = (part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
        return self.read_part(tuple(slice(*bound) for bound in bounds))


def whole(shape: Sequence[int]) -> Index:
    """Return the index of all of an array."""
    return tuple(slice(0, size) for size in shape)


def part_shape(index: Index) -> tuple[int, ...]:
    """Return the shape of a part."""
    return tuple(part.stop - part.start for part in index)


def watched(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the same tensors, which log how far writing them all has come when they are read."""
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    line = Progress("writing weights", total // _MEGABYTE, "MB")

    def read(tensor: LazyTensor) -> np.ndarray:
        nonlocal done
        array = tensor.read()
        done += tensor.nbytes
        line.update(done // _MEGABYTE)
        return array

    return {
        name: dataclasses.replace(tensor, read=functools.partial(read, tensor))
        for name, tensor in tensors.items()
    }


def in_memory(name: str, array: Any) -> LazyTensor:
    """Wrap an array (NumPy's or JAX's), unless it is lazy already."""
    if isinstance(array, LazyTensor):
        return array

    def read_part(index: Index) -> np.ndarray:
        return np.asarray(array[index])

    dtype = np.dtype(array.dtype)
    return LazyTensor(name, array.shape, dtype, lambda: np.asarray(array), read_part)


def transposed(tensor: LazyTensor) -> LazyTensor:
    """Return a matrix with its axes exchanged."""
    return dataclasses.replace(
        tensor,
        shape=tensor.shape[::-1],
        read=lambda: np.ascontiguousarray(tensor.read().T),
        read_part=lambda index: np.ascontiguousarray(tensor[index[::-1]].T),
        check=None,
    )


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


def read_file_part(
    path: str | os.PathLike, start: int, dtype: np.dtype, shape: Sequence[int], index: Index
) -> np.ndarray:
    """Read a part of an array in C order that begins at byte `start`; see `read_block`.

    The rows (of the first axis) that hold the part are read, a few megabytes at a time.
    """
    rows, inner = index[:1], index[1:]
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    first, last = (rows[0].start, rows[0].stop) if rows else (0, 1)
    complete = inner == whole(shape[1:])
    step = last - first if complete else max(1, _PIECE_BYTES // max(1, row_bytes))

    def block(begin: int) -> np.ndarray:
        count = min(step, last - begin)
        read = read_block(path, start + begin * row_bytes, count * row_bytes).view(dtype)
        return read.reshape(count, *shape[1:])

    if complete:
        return block(first).reshape(part_shape(index))
    out = np.empty(part_shape(index), dtype)
    for begin in range(first, last, step):
        out[begin - first : begin - first + step] = block(begin)[:, *inner]
    return out


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of an array in C order, a few megabytes at a time whatever its strides."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, 4 * 2**20 // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8).data
