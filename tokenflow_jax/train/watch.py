"""A watch that says where a run stands when nothing has moved for long."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable

import jax

from tokenflow_jax.log import duration, log

LEAST_SECONDS = 120.0  # nothing shorter is called hung
_TIMES = 20  # the usual time of a step


class Watch:
    """Warns, in a thread, when what a run does takes far longer than a step usually does.

    A collective for which one process does not come blocks all the others without a word: each of
    them names its step here, and shows where Python waits. Nothing is stopped.
    """

    def __init__(self, usual: Callable[[], float]):
        """Begin to watch; `usual` gives a step's usual seconds."""
        self._usual = usual
        self._doing, self._since, self._warned_s = "", 0.0, 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def doing(self, what: str) -> None:
        """Note what begins now, such as "step 12"; "" is nothing that can be late."""
        self._since, self._doing, self._warned_s = time.monotonic(), what, 0.0

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(min(5.0, LEAST_SECONDS / 4)):
            what, since, usual = self._doing, self._since, self._usual()
            taken = time.monotonic() - since
            # Again after twice the time.
            if not what or taken < max(LEAST_SECONDS, _TIMES * usual, 2 * self._warned_s):
                continue
            first, self._warned_s = not self._warned_s, taken
            others = ""
            if (count := jax.process_count()) > 1:
                others = f"; see which of the other {count - 1} processes are not at it"
            log.warning(
                "process %d: %s has taken %s (a step usually %.3g s): the data, a device or a "
                "collective may hang%s",
                *(jax.process_index(), what, duration(taken), usual, others),
            )
            if first:
                faulthandler.dump_traceback(sys.__stderr__)
