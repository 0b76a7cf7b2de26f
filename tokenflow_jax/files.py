"""Files: atomic writing, and removing directories that are still being written."""

import contextlib
import errno
import os
import pathlib
import time
from collections.abc import Iterator

from etils import epath

_FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")
_STILL_WRITTEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.EBUSY)
_PATIENCE_S = 30.0
_PAUSE_S = 0.2


def full_disk(error: Exception) -> str | None:
    """Return the operating system's words for a full disk in an error, or None."""
    # By text: TensorStore reports it as a ValueError, in a page of text.
    return next((text for text in _FULL_DISK if text in str(error)), None)


def remove(path: str | os.PathLike) -> None:
    """Remove a file or a directory, if it exists, and wait for writers that are about to end.

    Raises:
      OSError: it cannot be removed, or something is still writing there after half a minute.
    """
    # A save ends with its first refused write while TensorStore's threads finish the others: a file
    # can still appear in a directory that is being removed, or bring the directory back.
    path = epath.Path(path)
    deadline = time.monotonic() + _PATIENCE_S
    while path.exists():
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        try:
            path.rmtree()
        except OSError as error:
            if error.errno not in _STILL_WRITTEN:
                raise
        time.sleep(_PAUSE_S)
        if time.monotonic() > deadline and path.exists():
            raise OSError(errno.EBUSY, "something keeps writing there", str(path))


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yield a partial name that becomes `path`, a local file or directory, if the block succeeds.

    `overwrite` replaces what exists, once the new one is complete.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false.
      OSError: it cannot be written; what existed is intact.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; give --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    remove(partial)  # left by a killed process
    try:
        yield partial
        if path.is_dir() or partial.is_dir():  # only a file can be replaced in one step
            old = path.with_name(f".old-{path.name}")
            remove(old)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            remove(old)
        else:
            os.replace(partial, path)
    except OSError as error:
        reason = full_disk(error)
        if reason is None:
            raise
        raise OSError(
            f"{path} could not be written ({reason}); free some space, run the same again"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the error that matters is raised; the next try cleans
            remove(partial)
