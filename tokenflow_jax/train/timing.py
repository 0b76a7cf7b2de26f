"""Where a run's time goes: throughput, step times, and what is beside training."""

import collections
import contextlib
import time
from collections.abc import Iterator

import numpy as np

from tokenflow_jax.log import duration

_PERCENTILES = (50, 90, 99)


class Stopwatch:
    """Steps per second without compilation, evaluation and saving; time to the end with them.

    Time between `start` and `pause` counts as training; the data wait is the part of it that the
    loop spent blocked on the next batch. What `beside` measures is everything else.
    """

    def __init__(self, total_steps: int, images_per_step: int, peak_rate: float = 0.0) -> None:
        """Set what figures refer to; `peak_rate` is of operations per second, 0 if unknown."""
        self._total_steps, self._images_per_step = total_steps, images_per_step
        self._peak_rate = peak_rate
        self._running_since: float | None = None
        self._wall_since: float | None = None
        self._last_step = 0.0
        # Seconds of training, of data wait, steps, tokens and operations: since the last `pop`, and
        # before it.
        self._interval, self._earlier = np.zeros(5), np.zeros(5)
        self._steps: list[float] = []  # seconds of each step since the last `pop`
        self._all_steps = np.zeros(0, np.float32)
        self._beside: collections.Counter[str] = collections.Counter()

    def start(self) -> None:
        """Start (or go on) counting training time."""
        if self._running_since is None:
            self._running_since = self._last_step = time.perf_counter()
            self._wall_since = self._wall_since or self._running_since

    def pause(self) -> None:
        """Stop counting training time, for compilation, evaluation, images or saving."""
        self._count_running_time()
        self._running_since = None

    @contextlib.contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Count the time of a block as `what`, and not as training."""
        was_running, began = self._running_since is not None, time.perf_counter()
        self.pause()
        try:
            yield
        finally:
            self.count(what, time.perf_counter() - began)
            if was_running:
                self.start()

    def count(self, what: str, seconds: float) -> None:
        """Count time that was no training as `what`."""
        self._beside[what] += seconds

    def waited(self, seconds: float) -> None:
        """Count time that was spent blocked on the next batch."""
        if self._running_since is not None:
            self._interval[1] += seconds

    def step(self, tokens: float = 0.0, operations: float = 0.0) -> None:
        """Count a finished step, the tokens of its batch and the operations that it needed."""
        now = time.perf_counter()
        self._interval[2:] += 1, tokens, operations
        self._steps.append(now - self._last_step)
        self._last_step = now

    @property
    def usual_step(self) -> float:
        """Median seconds of a step so far; 0 without one."""
        steps = [*self._all_steps[-1000:], *self._steps]
        return float(np.median(steps)) if steps else 0.0

    def pop(self, step: int) -> dict[str, float]:
        """Return the figures since the last `pop` and start a new interval; {} without a step.

        perf/data_wait_fraction is of the training time, perf/mfu (operations that the model needs,
        without recomputation) of what the devices could do in it, both from 0 to 1.
        """
        if not self._interval[2]:
            return {}
        self._count_running_time()
        figures = self._rates(self._interval, self._steps)
        self._earlier += self._interval
        self._interval = np.zeros(5)
        self._all_steps = np.concatenate([self._all_steps, np.float32(self._steps)])
        self._steps = []
        wall_per_step = (time.perf_counter() - self._wall_since) / self._earlier[2]
        return figures | {"perf/eta_seconds": wall_per_step * (self._total_steps - step)}

    def summary(self) -> dict[str, float]:
        """Return throughput, step times and data wait since this start of the run."""
        self._count_running_time()
        steps = [*self._all_steps, *self._steps]
        return self._rates(self._earlier + self._interval, steps)

    def goodput(self) -> str:
        """Say which share of the time went into training since this start, and what took the rest.

        Steps are training, without what they waited for data; so is nothing else.
        """
        self._count_running_time()
        seconds, wait, *_ = (self._earlier + self._interval).tolist()
        rest = {**self._beside, "waiting for data": wait}
        total = seconds + sum(self._beside.values())
        if not total:
            return "unknown"
        parts = [
            f"{what} {100 * spent / total:.1f}%"
            for what, spent in sorted(rest.items(), key=lambda item: -item[1])
            if spent >= 0.001 * total
        ]
        text = f"{100 * (seconds - wait) / total:.1f}% of {duration(total)}"
        return f"{text} ({', '.join(parts)})" if parts else text

    def _count_running_time(self) -> None:
        if self._running_since is not None:
            now = time.perf_counter()
            self._interval[0] += now - self._running_since
            self._running_since = now

    def _rates(self, counted: np.ndarray, step_seconds: list[float]) -> dict[str, float]:
        seconds, wait, steps, tokens, operations = counted.tolist()
        if not steps:
            return {}
        seconds = max(seconds, 1e-9)
        times = np.percentile(step_seconds, _PERCENTILES)
        return {
            "perf/steps_per_second": steps / seconds,
            "perf/images_per_second": steps / seconds * self._images_per_step,
            **({"perf/tokens_per_second": tokens / seconds} if tokens else {}),
            **({"perf/mfu": operations / seconds / self._peak_rate} if self._peak_rate else {}),
            **{
                f"perf/step_seconds_p{p}": float(t)
                for p, t in zip(_PERCENTILES, times, strict=True)
            },
            "perf/data_wait_fraction": wait / seconds,
        }
