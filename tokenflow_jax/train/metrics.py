"""Measurements of a run: the finite check, averages, throughput and the progress line."""

import collections
import math
import time
from collections.abc import Mapping

import numpy as np

from tokenflow_jax.log import duration


class NonFiniteError(RuntimeError):
    """A loss or a part of the training state is NaN or infinite."""


def non_finite(scalars: Mapping[str, float]) -> list[str]:
    """Return the names of the losses that are NaN or infinite."""
    return [k for k, v in scalars.items() if k.startswith("loss/") and not math.isfinite(v)]


class Averages:
    """Means of scalars over the steps since the last `pop`."""

    def __init__(
        self, sums: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None
    ):
        """Start with what `sums` returned."""
        self._sums, self._counts = collections.Counter(sums), collections.Counter(counts)

    def sums(self) -> dict[str, dict[str, float]]:
        """Return what was added since the last `pop`, JSON-able."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def add(self, scalars: Mapping[str, float]) -> None:
        """Add one step's scalars; a key may be absent from some steps, or NaN for a source."""
        scalars = {k: v for k, v in scalars.items() if v == v or not k.startswith("source/")}
        self._sums.update(scalars)
        self._counts.update(scalars.keys())

    def pop(self) -> dict[str, float]:
        """Return the means and start over."""
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


class Stopwatch:
    """Steps per second without compilation, evaluation and saving; time to the end with them.

    Time between `start` and `pause` counts as training; the data wait is the part of it that the
    loop spent blocked on the next batch.
    """

    def __init__(self, total_steps: int, images_per_step: int) -> None:
        self._total_steps, self._images_per_step = total_steps, images_per_step
        self._running_since: float | None = None
        self._wall_since: float | None = None
        # Seconds of training, seconds of data wait, and steps: since the last `pop`, and before it.
        self._interval, self._earlier = np.zeros(3), np.zeros(3)

    def start(self) -> None:
        """Start (or go on) counting training time."""
        if self._running_since is None:
            self._running_since = time.perf_counter()
            self._wall_since = self._wall_since or self._running_since

    def pause(self) -> None:
        """Stop counting training time, for compilation, evaluation, images or saving."""
        self._count_running_time()
        self._running_since = None

    def waited(self, seconds: float) -> None:
        """Count time that was spent blocked on the next batch."""
        if self._running_since is not None:
            self._interval[1] += seconds

    def step(self) -> None:
        self._interval[2] += 1

    def pop(self, step: int) -> dict[str, float]:
        """Return the figures since the last `pop` and start a new interval; {} without a step.

        perf/data_wait_fraction is of the training time, from 0 to 1.
        """
        if not self._interval[2]:
            return {}
        self._count_running_time()
        figures = self._rates(self._interval)
        self._earlier += self._interval
        self._interval = np.zeros(3)
        wall_per_step = (time.perf_counter() - self._wall_since) / self._earlier[2]
        return figures | {"perf/eta_seconds": wall_per_step * (self._total_steps - step)}

    def summary(self) -> dict[str, float]:
        """Return throughput and data wait since this start of the run."""
        self._count_running_time()
        return self._rates(self._earlier + self._interval)

    def _count_running_time(self) -> None:
        if self._running_since is not None:
            now = time.perf_counter()
            self._interval[0] += now - self._running_since
            self._running_since = now

    def _rates(self, counted: np.ndarray) -> dict[str, float]:
        seconds, wait, steps = counted.tolist()
        if not steps:
            return {}
        seconds = max(seconds, 1e-9)
        return {
            "perf/steps_per_second": steps / seconds,
            "perf/images_per_second": steps / seconds * self._images_per_step,
            "perf/data_wait_fraction": wait / seconds,
        }


def progress_line(
    step: int, total_steps: int, scalars: Mapping[str, float], headline: tuple[str, ...] = ()
) -> str:
    """Format a log line such as `step 120/1000  total 0.412  l2 0.031  4.2 steps/s  eta 3m28s`.

    `headline` names what is shown, in this order; all losses, the total first, when empty.
    """
    losses = [name for name in scalars if name.startswith("loss/")]
    losses.sort(key=lambda name: name != "loss/total")
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name in headline or losses:
        if name in scalars:
            parts.append(f"{name.removeprefix('loss/')} {scalars[name]:.4g}")
    if "perf/steps_per_second" in scalars:
        parts.append(f"{scalars['perf/steps_per_second']:.3g} steps/s")
        parts.append(f"{scalars['perf/images_per_second']:.3g} images/s")
        parts.append(f"eta {duration(scalars['perf/eta_seconds'])}")
        parts.append(f"data wait {100 * scalars['perf/data_wait_fraction']:.1f}%")
    return "  ".join(parts)
