"""The lock of a workdir."""

import fcntl
from typing import Any

import jax
from etils import epath

from tokenflow_jax.train.checkpoint import CheckpointError


class WorkdirLock:
    """Keep two runs from writing to one workdir; the kernel drops the lock of a killed process."""

    def __init__(self, workdir: str | epath.Path):
        self._path = epath.Path(workdir) / ".lock"
        self._file = None

    def __enter__(self) -> "WorkdirLock":
        # Object stores have no locks; of several processes of one run the first one locks.
        if "://" in str(self._path) or jax.process_index() != 0:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise CheckpointError(
                f"another run is writing to {self._path.parent}; wait for it to end, or give "
                f"another --workdir"
            ) from error
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._file is not None:
            self._file.close()
