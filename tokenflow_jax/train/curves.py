"""The curves and grids of a run: metrics.jsonl, TensorBoard events and images/*.png."""

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from tokenflow_jax import files, remote
from tokenflow_jax.messages import shown

_MOST_BYTES = 2**30  # of a history
_GRID = re.compile(r"(.+)_([0-9]{7,19})\.png", re.DOTALL)


def read_history(path: str | epath.Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl: one dict with `step` and scalars per line, in order of writing.

    Last lines that a kill or a loss of power left damaged are dropped; an absent file is an empty
    history. ValueError names a damaged line before a good one, or what is no regular file.
    """
    path = files.as_path(path)
    if not path.exists():
        return []
    history, damaged = [], None
    for number, line in enumerate(files.read_bytes(path, _MOST_BYTES).split(b"\n"), 1):
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
    numbers = [value for value in point.values() if value is not None]
    if type(point["step"]) is not int or not all(
        type(value) in (int, float) and abs(value) < 1e300 for value in numbers
    ):
        raise ValueError(f"{where} is no step with finite numbers: {shown(point)}")
    return point


def grid_files(images: epath.Path) -> list[tuple[str, int, epath.Path]]:
    """Return name, step and path of the grids in a folder, sorted; others may lie there, too."""
    paths = sorted(images.iterdir()) if images.exists() else []
    found = [(path, _GRID.fullmatch(path.name)) for path in paths]
    return [(grid[1], int(grid[2]), path) for path, grid in found if grid and path.is_file()]


class Writer:
    """Writer of scalars and image grids: TensorBoard events, metrics.jsonl and images/*.png."""

    def __init__(
        self,
        workdir: str | epath.Path,
        resume_step: int = 0,
        enabled: bool = True,
        also: Sequence[Any] = (),
    ):
        """Open the files, dropping what a previous run wrote beyond the restored step.

        With resume_step 0 the files start empty. Only one process is `enabled`. `also` are further
        places, such as a `WandbRun`.
        """
        self._enabled = enabled
        workdir = epath.Path(workdir)
        self._history_path, self._images = workdir / "metrics.jsonl", workdir / "images"
        self.history: list[dict[str, Any]] = []
        self.drawn: set[int] = set()  # steps with grids of a run before
        if not enabled:
            return
        self._images.mkdir(parents=True, exist_ok=True)
        old = read_history(self._history_path)
        self.history = [line for line in old if 0 < line["step"] <= resume_step]
        self._rewrite()
        for _, step, path in grid_files(self._images):
            self.drawn.add(step)
            if step > resume_step:
                path.unlink()
                self.drawn.discard(step)
        # Object stores, where files cannot grow: there each flush rewrites the file. A run
        # continues from a checkpoint, so a kill loses no line that is not computed again.
        self._file = None if remote.is_remote(workdir) else self._history_path.open("a")
        self._events = _Events(workdir / "tensorboard", resume_step)
        self._places = [self._events, *also]

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
        for place in self._places:
            place.scalars(step, {key: float(value) for key, value in scalars.items()})

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts, Markdown, for TensorBoard."""
        if self._enabled:
            for name, text in texts.items():
                self._events.text(step, name, text)

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
            for place in self._places:
                place.image(step, name, grid_HWC)

    def flush(self) -> None:
        """Make everything written so far readable by others."""
        if not self._enabled:
            return
        if self._file is None:
            self._rewrite()
        for place in self._places:
            place.flush()

    def close(self) -> None:
        if not self._enabled:
            return
        self.flush()
        if self._file is not None:
            self._file.close()
        for place in self._places:
            place.close()

    def _rewrite(self) -> None:
        """Write the whole history beside and rename: a kill in between must not lose it."""
        text = "".join(json.dumps(line) + "\n" for line in self.history)
        if remote.is_remote(self._history_path):
            remote.write(os.fspath(self._history_path), text.encode())
            return
        rewritten = self._history_path.with_name("metrics.jsonl.new")
        rewritten.write_text(text)
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
        # Object stores get the whole file at every flush.
        self._folder = str(folder) if remote.is_remote(folder) else ""
        self._local = tempfile.TemporaryDirectory() if self._folder else None
        local = self._local.name if self._local else str(folder)
        record_writer.directory_check(local)
        # A name has the second of its start, in which a short run can be continued.
        self._file = event_file_writer.EventsWriter(f"{local}/events", f".{resume_step}")
        self._flushed = time.monotonic()
        if resume_step:  # TensorBoard hides what an earlier start logged from there on
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(resume_step + 1, session_log=start)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._write(step, summary=self._summary.scalar(name, value))

    def text(self, step: int, name: str, text: str) -> None:
        self._write(step, summary=self._summary.text(name, text))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._write(step, summary=self._summary.image(name, image_HWC, dataformats="HWC"))

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()
        if self._local:
            remote.upload(self._local.name, self._folder)

    def close(self) -> None:
        self._file.close()
        if self._local:
            remote.upload(self._local.name, self._folder)
            self._local.cleanup()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > 60.0:
            self.flush()
