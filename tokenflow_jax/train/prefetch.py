"""Read and transfer the next batches while the current step runs."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from grain.experimental import ThreadPrefetchDatasetIterator


class DevicePrefetcher:
    """Iterate over device batches, and know the data position of the last one handed out.

    A thread draws host batches and starts their transfer ahead of the loop. Each batch carries the
    position behind it: a checkpoint never skips batches that were drawn but not trained on.
    """

    def __init__(self, iterator: Any, sharding: jax.sharding.NamedSharding, depth: int = 2):
        """Wrap the iterator of `Stage.data`; `depth` batches may wait on the device."""
        self._source = _DeviceBatches(iterator, sharding)
        self._ahead = ThreadPrefetchDatasetIterator(self._source, depth)
        self._started = False
        self.last_wait = 0.0  # seconds that the last `next` blocked

    def __iter__(self) -> "DevicePrefetcher":
        return self

    def __next__(self) -> Any:
        """Return the next batch, a pytree of global jax.Arrays."""
        self._started = True
        began = time.perf_counter()
        batch = next(self._ahead)
        self.last_wait = time.perf_counter() - began
        return batch

    def get_state(self) -> Any:
        """Return the position after the last batch handed out, JSON-able."""
        return self._ahead.get_state()

    def set_state(self, positions: Sequence[Any]) -> None:
        """Continue after the batches handed out; `positions` holds `get_state` of each process.

        Raises ValueError for positions in other data.
        """
        if self._started:
            raise ValueError("the position can only be set before the first batch is drawn")
        self._ahead.set_state(positions)

    def close(self) -> None:
        """End the thread; batches that wait are dropped."""
        self._ahead.close()
        self._source.close()


class _DeviceBatches:
    """The iterator that the thread draws from."""

    def __init__(self, iterator: Any, sharding: jax.sharding.NamedSharding):
        self._iterator, self._sharding = iterator, sharding
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __next__(self) -> Any:
        try:
            return jax.tree.map(self._put, next(self._iterator))
        except StopIteration:
            raise ValueError(
                "the training data ended; the pipeline must repeat it forever"
            ) from None

    def _put(self, x: Any) -> jax.Array:
        x = np.asarray(x)
        if x.dtype.kind in "OSU":
            raise ValueError(f"a batch may hold numbers only, not {x.dtype}; drop text in `data`")
        return jax.make_array_from_process_local_data(self._sharding, x)

    def close(self) -> None:
        if hasattr(self._iterator, "close"):
            self._iterator.close()
