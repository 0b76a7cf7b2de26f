"""Files that any thread reads at any place, local or remote."""

import collections
import concurrent.futures
import contextlib
import os
import stat
import threading
from typing import BinaryIO

from tokenflow_jax import remote

_BUFFER = 4096  # bytes that a scan reads at once of a local file: it skips most of them
_AHEAD_BYTES = 2**30  # of remote files, read ahead and not yet asked for
_CONNECTIONS = 16


class LocalFile:
    """A local regular file. OSError if it cannot be read, ValueError if it is no regular file."""

    def __init__(self, path: str | os.PathLike):
        # Without waiting: a pipe that nobody writes to would block.
        self._file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", 0)
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{os.fspath(path)} is not a regular file")
        self.size, self.version = status.st_size, f"{status.st_size} {status.st_mtime_ns}"

    def read(self, begin: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, begin)  # threads do not share a position

    def open(self) -> BinaryIO:
        """Open it for reading from the beginning on; only one such reader at a time."""
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)
        return os.fdopen(os.dup(self._file.fileno()), "rb", _BUFFER)

    def will_need(self, begin: int, size: int) -> None:
        """Ask the system to read a range ahead."""
        if hasattr(os, "posix_fadvise"):  # Linux
            with contextlib.suppress(OSError):  # whoever reads will meet it
                os.posix_fadvise(self._file.fileno(), begin, size, os.POSIX_FADV_WILLNEED)


class RemoteFile(remote.RemoteFile):
    """A remote file that keeps ranges read ahead until they were asked for, or are too many."""

    def read(self, begin: int = 0, size: int | None = None) -> bytes:
        end = self.size if size is None else begin + size
        ahead = _AHEAD.take((self.path, self.version), begin, end)
        return super().read(begin, size) if ahead is None else ahead

    def will_need(self, begin: int, size: int) -> None:
        """Begin to read a range."""
        file = (self.path, self.version)
        _AHEAD.begin(file, begin, size, lambda: remote.RemoteFile.read(self, begin, size))


class _Ahead:
    """Ranges of all files that are being read ahead; the oldest give way to new ones."""

    def __init__(self):
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._runs: collections.OrderedDict = collections.OrderedDict()  # by file, begin and size
        self._bytes = 0

    def begin(self, file, begin, size, read) -> None:
        with self._lock:
            if (file, begin, size) in self._runs or size > _AHEAD_BYTES:
                return
            self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(_CONNECTIONS)
            self._runs[file, begin, size] = [self._pool.submit(read), size]
            self._bytes += size
            while self._bytes > _AHEAD_BYTES:
                (_, _, dropped), (future, _) = self._runs.popitem(last=False)
                future.cancel()
                self._bytes -= dropped

    def take(self, file, begin: int, end: int) -> bytes | None:
        """Return a part of a range that is read ahead; a range is dropped once it is used up."""
        with self._lock:
            fitting = (key for key in self._runs if _covers(key, file, begin, end))
            if (key := next(fitting, None)) is None:
                return None
            (_, first, size), run = key, self._runs[key]
            run[1] -= end - begin
            if run[1] <= 0:
                del self._runs[key]
                self._bytes -= size
        try:
            return run[0].result()[begin - first : end - first]
        except (OSError, concurrent.futures.CancelledError):
            return None  # reading it alone may succeed, or says why not


def _covers(run, file, begin: int, end: int) -> bool:
    other, first, size = run
    return other == file and first <= begin and end <= first + size


_AHEAD = _Ahead()
Ranges = LocalFile | RemoteFile


def open_ranges(path: str | os.PathLike) -> Ranges:
    return RemoteFile(path) if remote.is_remote(path) else LocalFile(path)
