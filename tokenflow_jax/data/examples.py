"""Shared by all data sets: the check of examples, the held-out split, what is left out."""

import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line, plain, shown

SPLITS = ("train", "heldout", "all")
# Other names of the split that never trains.
HELDOUT_NAMES = ("heldout", "validation", "val", "test")
# A tenth of fewer examples than this is too few to measure anything.
MIN_TO_SPLIT = 100
_MOST_THREADS = 32  # that read a data set at the same time
_LOGGED = 20  # skipped examples that the log names one by one


def is_heldout(name: str) -> bool:
    """Return True for the fixed tenth that never trains; depends on the name alone."""
    # Names of files that are not UTF-8 have lone surrogates.
    return zlib.crc32(name.encode(errors="surrogatepass")) % 10 == 0


def evenly_spaced(total: int, limit: int | None) -> np.ndarray:
    """Return at most `limit` of `total` indices; a few then still show all sorted classes."""
    count = min(limit or total, total)
    return np.arange(count) * total // count


def split_indices(held_out: np.ndarray, split: str, data: str, unit: str) -> np.ndarray:
    """Return the indices of split "all", "train" or "heldout"; of few examples always all."""
    if split == "all" or len(held_out) < MIN_TO_SPLIT:
        if split == "heldout":
            log.warning(
                "%s has %d %s, fewer than %d: none are held out, so the figures are on training "
                "data", data, len(held_out), unit, MIN_TO_SPLIT,
            )  # fmt: skip
        return np.arange(len(held_out))
    return np.flatnonzero(held_out == (split == "heldout"))


class Broken(ValueError):
    """An example that cannot be used: a short `reason` to count, and a `detail` to log."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def check_text(value: Any, what: str) -> str:
    """Return a value that is text and can be encoded, or raise Broken."""
    if not isinstance(value, str):
        raise Broken("not text", f"{what} is {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # which some text tokenizers refuse
        raise Broken("not text", f"{what} has half of a surrogate pair: {shown(value)}") from None
    return value


def check_example(example: dict[str, Any]) -> dict[str, Any]:
    """Return an example of any source if its name, numbers and texts are right, or raise Broken."""
    if not isinstance(name := example.get("name"), str) or not name:
        raise Broken("damaged record", f"its name is {shown(name)}")
    for key in ("label", "group"):
        number = example.get(key, -1)  # which stands for a missing one
        if type(number) is not int or not -1 <= number < 2**31:
            raise Broken("damaged record", f"its {key} is {shown(number)}")
    if "caption" in example:
        check_text(example["caption"], "its caption")
    for key in ("captions", "tags"):
        if not isinstance(texts := example.get(key, []), list):
            raise Broken("not text", f"its {key} are {shown(texts)}")
        for text in texts:
            check_text(text, f"one of its {key}")
    return example


def fitting_captions(example: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    """Return an example with those captions that have so many characters; Broken if none has.

    A `most` of 0 is no limit, and an example without captions stays as it is.
    """
    texts = example.get("captions") or [example[key] for key in ("caption",) if key in example]
    fitting = [text for text in texts if least <= len(text) <= (most or len(text))]
    if len(fitting) == len(texts):
        return example
    if not fitting:
        raise Broken(
            "caption length",
            f"{len(texts[0])} characters, the limits are {least} and {most} (min_caption, "
            "max_caption)",
        )
    return {**example, "caption": fitting[0], "captions": fitting}


class Skipped:
    """Thread-safe record of which of a data set's `total` examples are left out, and why."""

    def __init__(self, data: str, total: int, unit: str = "pictures"):
        self._data, self.total, self._unit = data, total, unit
        self._lock = threading.RLock()
        self._reasons: dict[str, str] = {}
        self._example = ""

    def add(self, name: str, error: Broken) -> None:
        """Record an example once; the log names the first ones, then only doublings."""
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = error.reason
            count, text = len(self._reasons), f"{plain(name)}: {one_line(error)}"
            self._example = self._example or text
            if count <= _LOGGED:  # within the lock: lines stand in the order of the counts
                log.warning("%s: skipped %s", self._data, text)
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
            f"{self.counts()}, for example {self._example}"
        )

    def note(self) -> str:
        """Return one line on the number of examples left out, the reasons and the first names."""
        counts, names = sorted(self.counts().items()), self.names()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return (
            f"{self._data}: skipped {len(names)} of {self.total} {self._unit} ({reasons}): "
            f"{', '.join(map(plain, names[:5]))}{more}"
        )


def notes_on(records: Iterable[Skipped]) -> list[str]:
    """Return one line for each data set that left something out."""
    return [s.note() for s in {id(s): s for s in records}.values() if s.names()]


class Guard:
    """An error instead of endless skipping: failures for two passes without a success."""

    def __init__(self, skipped: Skipped, wanted: str, most: int = sys.maxsize):
        """Allow failures in a row for two passes over the examples, at most `most`."""
        self._skipped, self._wanted, self._most = skipped, wanted, most
        self._lock = threading.Lock()
        self._failures = 0  # since the last success

    def check(self, usable: bool, count: int = 1) -> None:
        """Count a success or `count` failures; raise ValueError when the search is hopeless."""
        with self._lock:
            self._failures = 0 if usable else self._failures + count
            if usable:
                return
            # A lone usable example may come first in one shuffled pass and last in the next, and
            # threads run ahead of it.
            enough = min(2 * self._skipped.total + _MOST_THREADS * count, self._most)
            hopeless = self._failures >= enough
        if hopeless:
            raise ValueError(self._skipped.nothing_usable(self._wanted))
