"""Puts the next batch on the device while the current step runs."""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


class DevicePrefetcher:
    """Iterates over device batches and knows the data position of those handed out.

    A thread draws host batches and starts their transfer ahead of the loop. The iterator's own
    position is therefore ahead of training, so the position after each batch travels with it, and
    `get_state` returns that of the last batch handed out: a checkpoint never skips the batches
    that were drawn but not trained on.
    """

    def __init__(self, iterator: Any, sharding: jax.sharding.NamedSharding, depth: int = 2):
        """Wraps an iterator; nothing is drawn before the first `next`.

        Args:
          iterator: infinite iterator over pytrees of host-local NumPy arrays with `get_state` and
            `set_state`, as Grain's.
          sharding: how a global batch lies on the devices.
          depth: how many batches may wait on the device.
        """
        self._iterator = iterator
        self._sharding = sharding
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._position = iterator.get_state()
        self.last_wait = 0.0  # seconds that the last `next` blocked

    def __iter__(self) -> "DevicePrefetcher":
        return self

    def __next__(self) -> Any:
        """Returns the next batch, pytree of global jax.Arrays.

        Raises:
          ValueError: the data ended; training data repeats for ever.
        """
        if self._thread is None:
            self.start()
        began = time.perf_counter()
        item = self._queue.get()
        self.last_wait = time.perf_counter() - began
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended: every later call must fail likewise
            raise item
        batch, self._position = item
        return batch

    def get_state(self) -> Any:
        """Returns the position after the last batch handed out, JSON-able."""
        return self._position

    def set_state(self, positions: Sequence[Any]) -> None:
        """Continues after the batch that `get_state` was called behind.

        Args:
          positions: what `get_state` returned in each of the processes of the run that goes on.

        Raises:
          ValueError: the positions do not belong to these data.
        """
        if self._thread is not None:
            raise ValueError("the position can only be set before the first batch is drawn")
        self._iterator.set_state(positions)
        self._position = self._iterator.get_state()

    def start(self) -> None:
        """Starts to read ahead; the first `next` does so too."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the thread; batches that wait are dropped."""
        self._ended.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)  # the thread may be blocked on a full queue
            except queue.Empty:
                continue
        if hasattr(self._iterator, "close"):
            self._iterator.close()

    def _fill(self) -> None:
        while not self._ended.is_set():
            try:
                batch = next(self._iterator)
                item = (self._to_device(batch), self._iterator.get_state())
            except StopIteration:
                item = ValueError("the training data ended; the pipeline must repeat it for ever")
            # Whatever a source raises belongs to the loop's thread, where it is raised again.
            except Exception as error:
                item = error
            self._queue.put(item)
            if isinstance(item, BaseException):
                return

    def _to_device(self, batch: Any) -> Any:
        def put(x: Any) -> jax.Array:
            x = np.asarray(x)
            if x.dtype.kind in "OSU":
                raise ValueError(
                    f"a batch may hold numbers only, not {x.dtype}; drop text in train_data"
                )
            return jax.make_array_from_process_local_data(self._sharding, x)

        return jax.tree.map(put, batch)
