"""Traces of some steps for xprof (TensorBoard's profile page, ui.perfetto.dev)."""

import os
import re
import tempfile
from typing import Any

import jax
from etils import epath

from tokenflow_jax import remote
from tokenflow_jax.log import log


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """Parse --profile_steps=START:COUNT, the first step (from 1) and how many; None without."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or 0 in (int(match[1]), int(match[2])):
        raise ValueError(f"--profile_steps={text!r}: give START:COUNT such as 100:5")
    return int(match[1]), int(match[2])


class Profiler:
    """Writes a trace of the steps that `parse_steps` gave to `<workdir>/profile`."""

    def __init__(self, steps: tuple[int, int] | None, workdir: epath.Path):
        start, count = steps or (0, 0)
        self._first, self._last = start, start + count - 1
        self._target = workdir / "profile"
        self._folder = ""  # of a trace under way

    def before(self, step: int) -> None:
        """Start the trace before the first of its steps."""
        if step != self._first:
            return
        self._folder = os.fspath(self._target)
        if remote.is_remote(self._target):
            self._folder = tempfile.mkdtemp()
        jax.profiler.start_trace(self._folder)

    def after(self, step: int, results: Any) -> None:
        """End the trace once the last of its steps is computed."""
        if not self._folder or step != self._last:
            return
        jax.block_until_ready(results)
        self.close()
        log.info("steps %d to %d are traced in %s", self._first, step, self._target)

    def close(self) -> None:
        """End a trace that is still under way."""
        if not self._folder:
            return
        jax.profiler.stop_trace()
        if self._folder != os.fspath(self._target):
            remote.upload(self._folder, os.fspath(self._target))
        self._folder = ""
