"""A run's workdir: a path that checkpoints can have, and a lock against a second run in it."""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from typing import TextIO

import jax
from etils import epath

from tokenflow_jax import files, remote
from tokenflow_jax.log import log
from tokenflow_jax.messages import shown
from tokenflow_jax.train.checkpoint_info import CheckpointError

# Orbax takes the first for patterns of file names, TensorStore a backslash for a separator of
# folders, etils "gs:/" for a bucket: they would save into other places than they read from.
_MISREAD = re.compile(r"[\[\]*?\\\x00-\x1f\x7f]|:(?=/|$)")
_REMOTE = re.compile(r"\w+://")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def check_path(path: str | os.PathLike) -> None:
    """Raise CheckpointError unless checkpoints can be written to a path and found again there."""
    text = os.fspath(path)
    if not remote.is_remote(text):
        text = os.path.abspath(text)  # the current folder may have such a name
    elif not text.startswith("gs://"):
        raise CheckpointError(
            f"checkpoints cannot be kept in {shown(text)}: Orbax writes them to disks and gs://"
        )
    bad = _MISREAD.search(_REMOTE.sub("", text, count=1))
    try:
        text.encode()
        problem = bad and shown(bad.group())
    except UnicodeEncodeError:
        problem = "bytes that are not UTF-8"
    if problem:
        raise CheckpointError(
            f"checkpoints cannot be kept in {shown(text)}, because of {problem} in its name; "
            "choose another folder"
        )


class Lock:
    """A workdir that belongs to this run as long as its lock file is there."""

    def __init__(self, workdir: epath.Path, file: TextIO | None = None):
        self.workdir, self._file = workdir, file

    def check(self) -> None:
        """Raise CheckpointError if the workdir was removed, perhaps for another run, meanwhile."""
        if self._file is None:
            return
        try:
            same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._file.name))
        except FileNotFoundError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self.workdir} was removed or replaced while this run was "
                "going on; nothing more is written there. Begin another --workdir"
            )


@contextlib.contextmanager
def lock(workdir: str | epath.Path) -> Iterator[Lock]:
    """Keep two runs from writing to one workdir; the kernel drops the lock of a killed process."""
    # Object stores have no locks; of several processes of one run the first one locks.
    if remote.is_remote(workdir) or jax.process_index() != 0:
        yield Lock(epath.Path(workdir))
        return
    workdir = files.absolute(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run is writing to {workdir}; wait for it to end, or give "
                f"another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning(
                "the file system of %s has no locks (%s): make sure that no other run writes there",
                workdir, error.strerror,
            )  # fmt: skip
        held = Lock(workdir, file)
        held.check()  # another run may have removed the workdir between the two calls
        yield held
