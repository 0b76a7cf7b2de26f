"""The run's own log: progress on stdout, warnings and errors on stderr, nothing from libraries."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tokenflow_jax.messages import printable

log = logging.getLogger("tokenflow_jax")
Item = TypeVar("Item")
_PROGRESS_S = 5.0  # between progress lines


def hush_tensorstore() -> None:
    """Drop tracebacks of TensorStore's work that Orbax stopped waiting for; may be repeated.

    The failure that came first is raised as an error; the others would fail unobserved, with a
    traceback each.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    others = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    hook.hushes_tensorstore = True
    if not hasattr(others, "hushes_tensorstore"):
        sys.unraisablehook = hook


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Reject Orbax's records: it logs a page of tracebacks for an error that it raises as well."""
    return "orbax" not in record.pathname


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up(verbose: bool = True) -> None:
    """Send this project's log to the terminal, info lines if `verbose`; may be repeated."""
    out, err = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    out.addFilter(lambda record: record.levelno < logging.WARNING)
    err.setLevel(logging.WARNING)
    out.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    err.setFormatter(named := _Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    for handler in logging.getLogger().handlers:
        if type(handler).__module__.startswith("absl"):  # where libraries' warnings go
            handler.setFormatter(named)
    log.handlers[:] = [out, err]
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.propagate = False
    logging.getLogger("absl").addFilter(_is_not_orbax)
    # Its own handler would print what a folder's config.json says as it is.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    hush_tensorstore()


def compiling(what: str, seconds: int) -> str:
    """Say, before it takes long, that something compiles and how long that usually takes."""
    return f"{what} ... (usually {seconds} s, less from the second start on; large models: minutes)"


class Progress:
    """Log the rate of long work, and the remaining time if known, every few seconds."""

    def __init__(self, task: str, total: int | None, unit: str = "images"):
        self._task, self._total, self._unit = task, total, unit
        self._start = self._last = time.monotonic()
        self._offset = self._passed = 0

    def restart(self, done: int) -> None:
        """Leave the first `done` items, in which everything compiles, out of the rate."""
        self._start, self._offset = time.monotonic(), done

    def update(self, done: int) -> None:
        """Log a line if the last one is old enough; `done` counts all items so far."""
        now = time.monotonic()
        if now - self._last < _PROGRESS_S or done <= self._offset or done == self._total:
            return
        self._last = now
        rate = (done - self._offset) / (now - self._start)
        if self._total is None:
            log.info("%s: %d, %.1f %s/s", self._task, done, rate, self._unit)
            return
        eta = duration((self._total - done) / rate)
        log.info(
            "%s: %d of %d, %.1f %s/s, eta %s",
            self._task, done, self._total, rate, self._unit, eta,
        )  # fmt: skip

    def over(self, items: Iterable[Item], batch: int = 1) -> Iterator[Item]:
        """Yield items, which are made in batches, and count them; the first batch compiles."""
        for item in items:
            yield item
            self._passed += 1
            if self._passed % batch == 0:
                (self.update if self._passed > batch else self.restart)(self._passed)


def progress(items: Iterable[Item], total: int, task: str, unit: str = "images") -> Iterator[Item]:
    """Yield the items and log how many have passed."""
    return Progress(task, total, unit).over(items)


def duration(seconds: float) -> str:
    """Format seconds for people: 42s, 3m05s, 2h07m, 3d04h."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"
