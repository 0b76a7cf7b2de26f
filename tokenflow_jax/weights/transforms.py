"""What turns a torch array into one of ours, and back."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenflow_jax.weights.lazy import Index


@dataclasses.dataclass(frozen=True)
class Transform:
    """Drops axes of length one from the torch layout, then permutes; exactly invertible."""

    squeeze: tuple[int, ...] = ()
    permutation: tuple[int, ...] | None = None  # None keeps the order

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        array = np.squeeze(array, self.squeeze) if self.squeeze else array
        return array if self.permutation is None else np.transpose(array, self.permutation)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        if self.permutation is not None:
            array = np.transpose(array, np.argsort(self.permutation))
        return np.expand_dims(array, self.squeeze) if self.squeeze else array

    def torch_index(self, index: Index) -> Index:
        """Return where a part of our array is in torch's."""
        found = list(index)
        for axis, part in zip(self.permutation or (), index, strict=False):
            found[axis] = part
        for axis in self.squeeze:
            found.insert(axis, slice(0, 1))
        return tuple(found)

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Return the torch shape for our `shape`; None if that has the wrong rank."""
        if self.permutation is not None and len(shape) != len(self.permutation):
            return None
        return self.to_torch(np.broadcast_to(np.zeros((), np.bool_), tuple(shape))).shape


COPY = Transform()
DENSE = Transform(permutation=(1, 0))  # (out, in) -> (in, out)
CONV = Transform(permutation=(2, 3, 1, 0))  # (out, in, h, w) -> (h, w, in, out)
CONV1X1_DENSE = Transform(squeeze=(2, 3), permutation=(1, 0))  # (out, in, 1, 1) -> (in, out)
