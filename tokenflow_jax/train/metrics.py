"""Measurements of a run: the finite check, averages, throughput, and the writers of curves."""

import collections
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from tokenflow_jax import files
from tokenflow_jax.log import duration
from tokenflow_jax.messages import shown

_GRID = re.compile(r".+_([0-9]{7,19})\.png", re.DOTALL)


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
        """Add one step's scalars; a key may be absent from some steps."""
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


def is_remote(path: str | epath.Path) -> bool:
    """Tell whether a path is in an object store (gs://...), where files cannot grow."""
    return "://" in str(path)


def read_history(path: str | epath.Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl: one dict with `step` and scalars per line, in order of writing.

    Last lines that a kill or a loss of power left damaged are dropped; an absent file is an empty
    history. ValueError names a damaged line before a good one.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    history, damaged = [], None
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            history.append(_point(line, f"{path}, line {number}"))
        except ValueError as error:
            damaged = damaged or error
        else:
            if damaged is not None:
                raise ValueError(f"{damaged}; correct or remove the line") from damaged
    return history


def _point(line: bytes, where: str) -> dict[str, Any]:
    point = files.parse_json(line, where, keys=("step",))
    if type(point["step"]) is not int or not all(
        value is None or type(value) in (int, float) for value in point.values()
    ):
        raise ValueError(f"{where} is no step with numbers: {shown(point)}")
    return point


class Writer:
    """Writer of scalars and image grids: TensorBoard events, metrics.jsonl and images/*.png."""

    def __init__(self, workdir: str | epath.Path, resume_step: int = 0, enabled: bool = True):
        """Open the files, dropping what a previous run wrote beyond the restored step.

        With resume_step 0 the files start empty. Only one process is `enabled`.
        """
        self._enabled = enabled
        workdir = epath.Path(workdir)
        self._history_path, self._images = workdir / "metrics.jsonl", workdir / "images"
        self.history: list[dict[str, Any]] = []
        if not enabled:
            return
        self._images.mkdir(parents=True, exist_ok=True)
        old = read_history(self._history_path)
        self.history = [line for line in old if 0 < line["step"] <= resume_step]
        self._rewrite()
        for path in self._images.iterdir():
            grid = _GRID.fullmatch(path.name)  # others may keep pictures of their own there
            if grid and int(grid[1]) > resume_step:
                path.unlink()
        # Object stores cannot append: there each flush rewrites the file. A run
        # continues from a checkpoint, so a kill loses no line that is not computed again.
        self._file = None if is_remote(workdir) else self._history_path.open("a")
        self._events = _Events(workdir / "tensorboard", resume_step)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one line of scalars; a non-finite value is written as null."""
        if not self._enabled or not scalars:
            return
        finite = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
        line = {"step": step, **finite}
        self.history.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for key, value in scalars.items():
            self._events.scalar(step, key, float(value))

    def images(self, step: int, grids: Mapping[str, np.ndarray]) -> None:
        """Write grids, uint8 (height, width, 3), as PNG files and TensorBoard images."""
        if not self._enabled:
            return
        for name, grid_HWC in grids.items():
            grid_HWC = np.asarray(grid_HWC)
            if grid_HWC.dtype != np.uint8 or grid_HWC.ndim != 3 or grid_HWC.shape[-1] != 3:
                raise ValueError(
                    f"grid {name!r} is {grid_HWC.dtype}{list(grid_HWC.shape)}; a grid must be "
                    f"uint8 (height, width, 3)"
                )
            path = self._images / f"{name.replace('/', '-')}_{step:07d}.png"
            with path.open("wb") as file:
                Image.fromarray(grid_HWC).save(file, format="PNG", optimize=True)
            self._events.image(step, name, grid_HWC)

    def flush(self) -> None:
        """Make everything written so far readable by others."""
        if not self._enabled:
            return
        if self._file is None:
            self._rewrite()
        self._events.flush()

    def close(self) -> None:
        if not self._enabled:
            return
        self.flush()
        if self._file is not None:
            self._file.close()
        self._events.close()

    def _rewrite(self) -> None:
        """Write the whole history beside and rename: a kill in between must not lose it."""
        rewritten = self._history_path.with_name("metrics.jsonl.new")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        rewritten.replace(self._history_path)


class _Events:
    """TensorBoard's event file, written by the calling thread.

    tensorboardX's SummaryWriter writes from a thread of its own: a full disk ends that thread with
    a traceback, and the training then blocks forever on its queue.
    """

    def __init__(self, folder: epath.Path, resume_step: int):
        # Here, so that importing this module stays fast.
        from tensorboardX import event_file_writer, record_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._summary = event_pb2.Event, summary
        record_writer.directory_check(str(folder))
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        if resume_step:  # TensorBoard hides what an earlier start logged from there on
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(resume_step + 1, session_log=start)

    def scalar(self, step: int, name: str, value: float) -> None:
        self._write(step, summary=self._summary.scalar(name, value))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._write(step, summary=self._summary.image(name, image_HWC, dataformats="HWC"))

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > 60.0:
            self.flush()
