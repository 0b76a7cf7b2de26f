"""What a data set leaves out, and why."""

import threading
from collections import Counter

from absl import logging

from tokenflow_jax.data.images import BrokenImage

_NAMED_AT_MOST = 20


class Skipped:
    """Counts the examples that were left out; safe to use from many threads."""

    def __init__(self, data: str):
        """Begins with none; `data` is what the log calls the data set."""
        self._data = data
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}

    def add(self, name: str, error: BrokenImage) -> None:
        """Notes an example, once; the first 20 are named in the log, then only doublings."""
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = error.reason
            count = len(self._reasons)
        if count <= _NAMED_AT_MOST:
            logging.warning("%s: skipped %s: %s", self._data, name, error)
        elif count.bit_count() == 1:  # 32, 64, 128, ...
            logging.warning("%s: skipped %d so far: %s", self._data, count, self.counts())

    def counts(self) -> dict[str, int]:
        """Number of distinct examples left out, by reason."""
        with self._lock:
            return dict(Counter(self._reasons.values()))

    def names(self) -> list[str]:
        """The examples left out, sorted."""
        with self._lock:
            return sorted(self._reasons)
