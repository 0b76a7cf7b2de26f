"""Requests to stop: SIGTERM, Ctrl-C, and the preemption of any process of a run."""

import signal
from typing import Any

import jax
from orbax.checkpoint import multihost

from tokenflow_jax.log import log


class StopRequested(Exception):
    """Ends an evaluation, so that a run that was told to stop need not finish it."""


class StopSignals:
    """Turn SIGTERM and SIGINT into a request to stop after the running step.

    A second signal of the same kind ends the process at once. In a run of several processes JAX's
    preemption service sees SIGTERM instead and makes all of them stop at the same place.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, Any] = {}
        self._asked = 0

    def __enter__(self) -> "StopSignals":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    self._previous[number] = signal.signal(number, self._handle)
                except ValueError:  # not the main thread: whoever owns it handles signals
                    break
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        log.warning("%s: finishing the running step, then saving", self.name)

    def requested(self) -> bool:
        """Tell whether to stop; all processes must ask equally often and get the same answer."""
        self._asked += 1  # what the service agrees on is a number that only grows
        if jax.process_count() > 1 and multihost.reached_preemption(self._asked):
            self.name = signal.SIGTERM.name
        return self.name is not None

    def check(self) -> None:
        """Raise StopRequested if `requested`."""
        if self.requested():
            raise StopRequested
