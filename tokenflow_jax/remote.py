"""Remote files, gs://, s3:// and whatever else fsspec opens: read in place, fetched, written."""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from tokenflow_jax import hub
from tokenflow_jax.log import log, progress
from tokenflow_jax.stores import is_remote, named_errors, store_of

_CHUNK = 16 * 2**20  # bytes of a range that is fetched at once
_CONNECTIONS = 8
_MOST_FILES = 10_000  # of a folder that is fetched


def join(folder: str | os.PathLike, *names: str) -> str:
    """Join a folder, local or remote, and names below it."""
    if is_remote(folder):
        return "/".join((os.fspath(folder).rstrip("/"), *names))
    return os.path.join(folder, *names)


def cache_folder() -> pathlib.Path:
    """Return the user's folder for what can be fetched or made again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache, "tokenflow_jax")


class RemoteFile:
    """A remote file, read in ranges by any thread. OSError if it is missing or has changed."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._store, self._name = store_of(path)
        with named_errors(path):
            about = self._store.info(self._name)
            if about["type"] != "file":
                raise OSError(errno.EISDIR, "not a file", self.path)
            self.size = int(about["size"])
            # What changes whenever it is written again.
            self.version = hashlib.sha256(self._store.ukey(self._name).encode()).hexdigest()[:16]

    def read(self, begin: int = 0, size: int | None = None) -> bytes:
        """Return bytes from `begin` on, fewer than `size` at the end of the file."""
        end = self.size if size is None else min(self.size, begin + size)
        if begin >= end:
            return b""
        with named_errors(self.path):
            return self._store.cat_file(self._name, begin, end)

    def open(self) -> BinaryIO:
        """Open it for reading from the beginning on, megabytes ahead."""
        with named_errors(self.path):
            return self._store.open(self._name, "rb", block_size=_CHUNK, cache_type="readahead")

    def fetch(self, target: pathlib.Path) -> None:
        """Copy it to a local file, several ranges at a time."""

        def copy(begin: int) -> None:
            data = self.read(begin, _CHUNK)
            if len(data) != min(_CHUNK, self.size - begin):
                raise OSError(errno.EIO, "became shorter while it was fetched", self.path)
            if os.pwrite(file.fileno(), data, begin) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        begins = range(0, self.size, _CHUNK)
        with open(target, "wb") as file, concurrent.futures.ThreadPoolExecutor(_CONNECTIONS) as do:
            for _ in progress(do.map(copy, begins), len(begins), f"fetching {self.path}", "parts"):
                pass
        if RemoteFile(self.path).version != self.version:
            raise OSError(errno.EIO, "was written again while it was fetched: try again", self.path)


def settled(path: str | os.PathLike) -> str:
    """Return a path; of a model on the hub, its copy in the hub's cache."""
    return hub.fetch(os.fspath(path)) if hub.is_model(path) else os.fspath(path)


def kind_of(path: str | os.PathLike) -> str:
    """Return what a path, local or remote, is: "file", "folder", "other", or "" for nothing."""
    path = settled(path)
    if not is_remote(path):
        if os.path.isdir(path):
            return "folder"
        return "file" if os.path.isfile(path) else "other" if os.path.exists(path) else ""
    store, name = store_of(path)
    with named_errors(path):
        try:
            kind = store.info(name)["type"]
        except FileNotFoundError:
            return ""
    return "file" if kind == "file" else "folder"


def names_in(folder: str | os.PathLike) -> list[str]:
    """Return the sorted names of what a folder, local or remote, holds."""
    folder = settled(folder)
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    store, name = store_of(folder)
    with named_errors(folder):
        found = store.ls(name, detail=False)
    # Some stores list an object of no bytes that stands for the folder itself.
    own = {path.rstrip("/") for path in found} - {name.rstrip("/")}
    return sorted(path.rpartition("/")[2] for path in own)


def files_below(folder: str | os.PathLike) -> list[str]:
    """Return the sorted paths of all files below a remote folder, relative to it."""
    store, name = store_of(folder)
    with named_errors(folder):
        found = store.find(name)
    return sorted(file[len(name.rstrip("/")) + 1 :] for file in found if not file.endswith("/"))


def matching(pattern: str) -> list[str]:
    """Return the sorted paths that match a remote pattern of file names."""
    store, name = store_of(pattern)
    with named_errors(pattern):
        return sorted(map(store.unstrip_protocol, store.glob(name)))


def local_copy(path: str | os.PathLike, without: tuple[str, ...] = ()) -> str:
    """Return a local path as it is; of a remote file or folder, a copy that is fetched only once.

    Copies are kept in `cache_folder()`; what has changed since is fetched again. Of a folder,
    files with the endings `without` are left out.
    """
    if hub.is_model(path):
        return hub.fetch(os.fspath(path), without)
    path = os.fspath(path)
    if not is_remote(path):
        return path
    kind = kind_of(path)
    if not kind:
        raise FileNotFoundError(errno.ENOENT, "no such file or bucket", path)
    below = files_below(path) if kind == "folder" else [""]
    names = [name for name in below if not name or not name.endswith(without)]
    if not 0 < len(names) <= _MOST_FILES:
        raise OSError(
            errno.E2BIG, f"{len(names):,} files to fetch, need 1 to {_MOST_FILES:,}", path
        )
    files = {name: RemoteFile(join(path, name) if name else path) for name in names}
    versions = "".join(f"{name}\0{file.version}\n" for name, file in files.items())
    key = hashlib.sha256(f"{path}\n{versions}".encode()).hexdigest()[:16]
    copy = cache_folder() / "files" / key / path.rstrip("/").rpartition("/")[2]
    if not copy.exists():
        try:
            with _alone(copy.parent) as alone:
                if not copy.exists():  # another process may have fetched it meanwhile
                    for left in copy.parent.glob(".partial-*") if alone else ():  # by a kill
                        shutil.rmtree(left, ignore_errors=True)
                    _fetch_all(path, files, copy)
        except OSError as error:
            if error.filename and is_remote(str(error.filename)):
                raise
            raise OSError(
                f"{path} cannot be copied into {copy.parent} ({error.strerror}): free some space "
                "or set XDG_CACHE_HOME to another folder"
            ) from error
    return str(copy)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[bool]:
    """Create a folder, wait for processes in here with it; False where there are no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked


def _fetch_all(path: str, files: Mapping[str, RemoteFile], copy: pathlib.Path) -> None:
    total = sum(file.size for file in files.values())
    log.info("fetching %s, %.1f MB, into %s", path, total / 1e6, copy)
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".partial-") as partial:
        for name, file in files.items():
            target = pathlib.Path(partial, "copy", name)
            if pathlib.Path(partial) not in target.resolve().parents:
                raise OSError(errno.EINVAL, f"{name!r} would be written outside", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.fetch(target)
        try:
            os.rename(pathlib.Path(partial, "copy"), copy)
        except OSError:  # without locks, the first one stays
            if not copy.exists():
                raise


def upload(source: str | os.PathLike, path: str) -> None:
    """Write a local file or folder to a remote path; what names the other files goes last."""
    source, (store, name) = pathlib.Path(source), store_of(path)
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    late = [p for p in files if p.suffix == ".json" or p.name == "metadata"]
    with named_errors(path):
        for file in sorted(set(files) - {*late}) + sorted(late):
            below = file.relative_to(source).as_posix()
            store.put_file(str(file), name if file == source else f"{name}/{below}")


def write(path: str, data: bytes) -> None:
    """Write a remote file in one step."""
    store, name = store_of(path)
    with named_errors(path):
        store.pipe_file(name, data)


def remove(path: str) -> None:
    """Remove a remote file or folder, if it exists."""
    store, name = store_of(path)
    if "/" not in name.strip("/"):
        raise ValueError(f"{path!r} is a whole bucket, which is not removed: name a path in it")
    # Not `rm`, which takes "*" and "[" for patterns.
    with named_errors(path), concurrent.futures.ThreadPoolExecutor(_CONNECTIONS) as do:
        for removed in [do.submit(store.rm_file, file) for file in store.find(name)]:
            with contextlib.suppress(FileNotFoundError):
                removed.result()


@contextlib.contextmanager
def staged(path: str) -> Iterator[pathlib.Path]:
    """Yield a local name; what the block writes there replaces `path` when it succeeds."""
    with tempfile.TemporaryDirectory(prefix="tokenflow_jax-") as folder:
        local = pathlib.Path(folder, path.rstrip("/").rpartition("/")[2])
        yield local
        if local.is_dir() or kind_of(path) == "folder":  # a file is replaced in one step
            remove(path)
        upload(local, path)
