"""Measurements of a run: the finite check, averages and the progress line."""

import collections
import math
from collections.abc import Mapping

from tokenflow_jax.log import duration

# Curves of what a batch may have none of, which is NaN then and not averaged.
_PARTS = ("source/", "kind/", "scale/", "accuracy/")


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
        """Add one step's scalars; a key may be absent from some steps, or NaN for a part."""
        scalars = {k: v for k, v in scalars.items() if v == v or not k.startswith(_PARTS)}
        self._sums.update(scalars)
        self._counts.update(scalars.keys())

    def pop(self) -> dict[str, float]:
        """Return the means and start over."""
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


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
    if "perf/tokens_per_second" in scalars:
        parts.append(f"{scalars['perf/tokens_per_second']:,.0f} tokens/s")
    if "perf/mfu" in scalars:
        parts.append(f"MFU {100 * scalars['perf/mfu']:.1f}%")
    if "perf/steps_per_second" in scalars:
        parts.append(f"eta {duration(scalars['perf/eta_seconds'])}")
        parts.append(f"data wait {100 * scalars['perf/data_wait_fraction']:.1f}%")
    return "  ".join(parts)
