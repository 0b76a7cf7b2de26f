"""A tensor of a file that is read when it is needed."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file: shape and dtype now, data when `read` is called.

    Attributes:
      name: its name in the state_dict.
      shape: in PyTorch's layout.
      dtype: NumPy (or ml_dtypes) dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    def read(self) -> np.ndarray:
        """Returns the data, read-only and backed by the file; copy it to keep it."""
        return self.load()
