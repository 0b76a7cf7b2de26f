"""A matrix of runs, configs by seeds, that may be killed and started again; and its table."""

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Run:
    """A config with settings of its own."""

    name: str
    config: str  # as --config takes it
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def with_settings(self, settings: Mapping[str, Any], name: str = "") -> "Run":
        """Return the run with more settings, under its name or another."""
        return Run(name or self.name, self.config, {**self.settings, **settings})

    def train(self, seed: int, out: Path) -> Path:
        """Train in `out/NAME_SEED`, or go on there, unless it is finished; return the folder."""
        workdir = out / f"{self.name}_{seed}"
        settings = {**self.settings, "seed": seed}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "tokenflow_jax.main", f"--config={self.config}", *flags]
        with open(out / f"{self.name}_{seed}.log", "a", encoding="utf-8") as log:
            done = subprocess.run(
                [*command, f"--workdir={workdir}"],
                stdout=log,
                stderr=log,
                env=os.environ | {"TOKENFLOW_SIGTERM_CODE": "143"},  # stopped is not finished
            )
        if done.returncode:
            raise SystemExit(f"{self.name}, seed {seed}, failed: see {log.name}")
        return workdir


@contextlib.contextmanager
def claimed(path: str | os.PathLike) -> Iterator[bool]:
    """Tell whether this process may do what the file stands for: no other is at it."""
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def history(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """Return the lines of a run's curves."""
    lines = Path(workdir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def figures(workdir: str | os.PathLike) -> dict[str, float]:
    """Return the last value of each curve of a run; held-out figures by their bare names."""
    found = {}
    for line in history(workdir):
        found |= {name.removeprefix("eval/"): value for name, value in line.items()}
    return found


def spread(values: list[float], form: str = "{:.1f}", times: float = 100.0) -> str:
    """Return "mean ± standard deviation" of the same figure of several seeds."""
    values = times * np.asarray([value for value in values if value is not None], float)
    if not len(values):
        return ""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(values.mean())} ± {form.format(values.std(ddof=1))}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
