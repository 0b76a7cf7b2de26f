"""What goes wrong on disks: full ones, and folders that somebody still writes into."""

import errno
import os
import time

from etils import epath

_FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")
_STILL_WRITTEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.EBUSY)
_PATIENCE_S = 30.0
_PAUSE_S = 0.2


def full_disk(error: Exception) -> str | None:
    """The operating system's words for a full disk in an error, or None.

    TensorStore reports such errors as ValueError, in a page of text.
    """
    return next((text for text in _FULL_DISK if text in str(error)), None)


def remove(path: str | os.PathLike) -> None:
    """Removes a file or a directory, if there is one, and waits for writers that are ending.

    A save ends with its first refused write while TensorStore's threads finish the others, so a
    file can still appear in a directory that is being removed, or bring the directory back.

    Raises:
      OSError: it cannot be removed, or something has gone on writing there for half a minute.
    """
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
            raise OSError(errno.EBUSY, "something goes on writing there", str(path))
