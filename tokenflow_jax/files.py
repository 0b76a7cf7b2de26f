"""Files: reading untrusted ones, atomic writing, removing directories still being written."""

import contextlib
import errno
import json
import os
import pathlib
import re
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from etils import epath

from tokenflow_jax import remote
from tokenflow_jax.messages import one_line, shown

_FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")
# In a bucket, etils takes "[" for a pattern, array_record "#" for a version.
_MISREAD = re.compile(r"[\[\]*?#]")
_STILL_WRITTEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.EBUSY)
_PATIENCE_S = 30.0
_PAUSE_S = 0.2
_REWRITE_S = 60.0
# Bytes of JSON read at once: as Python objects they take up to 25 times as many.
_MOST_JSON = 32 * 2**20


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
      ValueError: it is larger, or a device, a pipe or a folder; nothing was read.
      OSError: it is missing or cannot be read.
    """
    path = remote.settled(path)
    if remote.is_remote(path):
        file = remote.RemoteFile(path)
        if file.size > most:
            raise ValueError(f"{os.fspath(path)!r} has {file.size:,} bytes, the limit is {most:,}")
        return file.read()
    # Without waiting: a pipe that nobody writes to would block.
    with open(path, "rb", 0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{os.fspath(path)!r} is not a regular file")
        if status.st_size > most:
            raise ValueError(
                f"{os.fspath(path)!r} has {status.st_size:,} bytes, the limit is {most:,}"
            )
        return file.read()  # read(most) would allocate as much


def read_json(
    path: str | os.PathLike, kind: type = dict, keys: Collection[str] = (), remedy: str = ""
) -> Any:
    """Return the JSON value of a file; see `parse_json`. A missing file is a ValueError, too."""
    try:
        data = read_bytes(path, _MOST_JSON)
    except (OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read ({error}){remedy}") from None
    return parse_json(data, os.fspath(path), kind, keys, remedy)


def parse_json(
    data: bytes, where: str, kind: type = dict, keys: Collection[str] = (), remedy: str = ""
) -> Any:
    """Return the JSON value of bytes in UTF-8.

    Args:
      where: what the data are, for errors.
      kind: the type that the value must have.
      keys: of an object, those that it must have.
      remedy: ends every error, such as "; fetch it again".

    Raises:
      ValueError: the data are no JSON, too large or too deep, or not as `kind` and `keys` say.
    """
    if len(data) > _MOST_JSON:
        raise ValueError(
            f"{where}: JSON of {len(data):,} bytes, the limit is {_MOST_JSON:,}{remedy}"
        )
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({one_line(error)}){remedy}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # ValueError: also too many digits
        reason = "too deep" if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"{where} is not JSON ({reason}){remedy}") from None
    if not isinstance(value, kind):
        wanted = {dict: "object", list: "array"}.get(kind, kind.__name__)
        raise ValueError(f"{where} holds {shown(value)}, not a JSON {wanted}{remedy}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}{remedy}")
    return value


def absolute(path: str | os.PathLike) -> epath.Path:
    """Return an absolute path, local or remote."""
    # etils 1.15 makes a local folder "gs:" of a bucket.
    path = as_path(remote.settled(path))
    return path if remote.is_remote(path) else path.absolute()


def as_path(path: str | os.PathLike) -> epath.Path:
    """Return a path, local or remote; ValueError for a scheme that etils does not know."""
    remote.is_remote(path)  # ValueError for half of a scheme
    try:
        return epath.Path(path)
    except KeyError:
        raise ValueError(f"{os.fspath(path)!r}: use gs://, s3:// or a path here") from None


def writable_folder(path: str | os.PathLike) -> epath.Path:
    """Create a folder unless it exists, and write a test file there.

    Raises:
      OSError: one of these fails, as it would after the work whose result goes there.
      ValueError: it is in a bucket, and has a name that some library reads otherwise.
    """
    path = as_path(path)
    if remote.is_remote(path) and (bad := _MISREAD.search(os.fspath(path))):
        raise ValueError(
            f"{os.fspath(path)!r} cannot be written because of {bad.group()!r} in its name: choose "
            "another folder"
        )
    try:
        if remote.is_remote(path):
            test = remote.join(path, f".test-{os.uname().nodename}-{os.getpid()}")
            remote.write(test, b"")
            remote.remove(test)
            return path
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(
            f"cannot write into the folder {path} ({error.strerror}): choose another one"
        ) from error
    return path


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
def appended(path: str | os.PathLike) -> Iterator[Callable[[str], None]]:
    """Yield a function that appends text to a file; others see it at once, remote in a minute."""
    if not remote.is_remote(path):
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:

            def write(text: str) -> None:
                file.write(text)
                file.flush()

            yield write
        return
    # Remote files cannot grow: the whole is written again.
    path = os.fspath(path)
    parts = [remote.RemoteFile(path).read()] if remote.kind_of(path) else []
    written = time.monotonic()

    def keep(text: str) -> None:
        nonlocal written
        parts.append(text.encode("utf-8", "backslashreplace"))
        if time.monotonic() - written > _REWRITE_S:
            remote.write(path, b"".join(parts))
            written = time.monotonic()

    try:
        yield keep
    finally:
        remote.write(path, b"".join(parts))


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yield a local partial name that becomes `path`, file or directory, if the block succeeds.

    `overwrite` replaces what exists, once the new one is complete. A remote `path` is uploaded.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false.
      OSError: it cannot be written; what existed is intact.
      ValueError: it is nothing that can be replaced: empty, the current folder, a model of the hub.
    """
    if remote.hub.is_model(path):
        raise ValueError(f"{os.fspath(path)}: write a folder; push_to_hub uploads to the hub")
    here = pathlib.Path.cwd()
    full = pathlib.Path(os.path.abspath(path))
    if not remote.is_remote(path) and full in (here, *here.parents):
        raise ValueError(f"{os.fspath(path)!r} is the current folder or above it: name another one")
    if remote.kind_of(path) and not overwrite:
        raise FileExistsError(f"{os.fspath(path)} exists; give --overwrite to replace it")
    if remote.is_remote(path):
        with remote.staged(os.fspath(path)) as partial:
            yield partial
        return
    path = pathlib.Path(path).absolute()
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
