"""Shared by all data sets: the split that never trains, and the record of what is left out."""

import threading
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from tokenflow_jax.log import log

SPLITS = ("train", "heldout", "all")
# Other names of the split that never trains.
HELDOUT_NAMES = ("heldout", "validation", "val", "test")
# A tenth of fewer examples than this is too few to measure anything.
MIN_TO_SPLIT = 100
_MOST_THREADS = 32  # that read a data set at the same time
_LOGGED = 20  # skipped examples that the log names one by one


def is_heldout(name: str) -> bool:
    """Return True for the fixed tenth that never trains; depends on the name alone."""
    return zlib.crc32(name.encode()) % 10 == 0


def evenly_spaced(total: int, limit: int | None) -> np.ndarray:
    """Return at most `limit` of `total` indices; a few then still show all sorted classes."""
    count = min(limit or total, total)
    return np.arange(count) * total // count


class Broken(ValueError):
    """An example that cannot be used: a short `reason` to count, and a `detail` to log."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Skipped:
    """Thread-safe record of which of a data set's `total` examples are left out, and why."""

    def __init__(self, data: str, total: int, unit: str = "pictures"):
        self._data, self.total, self._unit = data, total, unit
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}

    def add(self, name: str, error: Broken) -> None:
        """Record an example once; the log names the first ones, then only doublings."""
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = error.reason
            count = len(self._reasons)
        if count <= _LOGGED:
            log.warning("%s: skipped %s: %s", self._data, name, error)
        elif count.bit_count() == 1:  # 32, 64, 128, ...
            log.warning("%s: skipped %d so far: %s", self._data, count, self.counts())

    def counts(self) -> dict[str, int]:
        """Return the number of examples left out, by reason."""
        with self._lock:
            return dict(Counter(self._reasons.values()))

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._reasons)

    def nothing_usable(self, wanted: str) -> str:
        return (
            f"no usable {wanted} among the {self.total} {self._unit} of {self._data}: "
            f"{self.counts()}, for example {', '.join(self.names()[:3])}"
        )

    def note(self) -> str:
        """Return one line on the number of examples left out, the reasons and the first names."""
        counts, names = sorted(self.counts().items()), self.names()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return (
            f"{self._data}: skipped {len(names)} of {self.total} {self._unit} ({reasons}): "
            f"{', '.join(names[:5])}{more}"
        )


def notes_on(records: Iterable[Skipped]) -> list[str]:
    """Return one line for each data set that left something out."""
    return [s.note() for s in {id(s): s for s in records}.values() if s.names()]


class Guard:
    """An error instead of endless skipping: as many failures as examples, and no success yet."""

    def __init__(self, skipped: Skipped, wanted: str):
        self._skipped, self._wanted = skipped, wanted
        self._lock = threading.Lock()
        self._failures, self._any_usable = 0, False

    def check(self, usable: bool) -> None:
        """Count a success or a failure; raise ValueError when the search is hopeless."""
        with self._lock:
            self._any_usable |= usable
            self._failures += not usable
            # Threads of the next pass may fail before the last of this one succeeds.
            enough = self._skipped.total + _MOST_THREADS
            hopeless = not self._any_usable and self._failures >= enough
        if hopeless:
            raise ValueError(self._skipped.nothing_usable(self._wanted))
