"""Columns of numbers about a data file, kept beside it or in the user's cache folder.

They hold while the file is in the same state. Anybody may have changed them: whatever is not as
expected is replaced.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tokenflow_jax import files, remote
from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line

Columns = dict[str, np.ndarray]
_ENDING = ".index.npz"
_MOST_REMOTE = 2**31  # bytes of columns beside a remote file
# Whatever NumPy's reader raises for a damaged file.
_DAMAGE = (
    OSError, ValueError, KeyError, EOFError, MemoryError, OverflowError, NotImplementedError,
    AttributeError, RuntimeError, SyntaxError, TypeError, zipfile.BadZipFile,
)  # fmt: skip


class Kept:
    """The place where the columns of one file are kept."""

    def __init__(self, file: str | os.PathLike, kind: str, state: str):
        """Describe columns of a `kind`, which names their version, of a file in some state."""
        self.identity = f"{kind} {state}"
        file = os.fspath(file) if remote.is_remote(file) else os.path.abspath(file)
        name = hashlib.sha256(os.fsencode(file)).hexdigest()[:32] + _ENDING
        self._beside = file + _ENDING
        self._paths = (self._beside, str(remote.cache_folder() / name))

    def load(self, types: Mapping[str, Any], valid: Callable[[Columns], bool]) -> Columns | None:
        """Return columns of these types for which `valid` is true, or None."""
        for path in self._paths:
            try:
                if remote.kind_of(path) != "file":
                    continue
                local = not remote.is_remote(path)
                content = path if local else io.BytesIO(files.read_bytes(path, _MOST_REMOTE))
                with np.load(content, allow_pickle=False) as kept:
                    # Only stored as they are do columns take no more memory than their file.
                    packed = any(part.compress_type for part in kept.zip.infolist())
                    if packed or str(kept["identity"]) != self.identity:
                        continue
                    columns = {name: kept[name] for name in types}
                if not all(columns[name].dtype == types[name] for name in types):
                    raise ValueError("columns of other types")
                if not all(column.ndim == 1 for column in columns.values()) or not valid(columns):
                    raise ValueError("columns that do not fit the file")
                return columns
            except _DAMAGE as error:
                log.warning("%s cannot be used (%s): made again", path, one_line(error))
        return None

    def keep(self, columns: Mapping[str, np.ndarray]) -> str:
        """Write the columns; return "", or in words why that is not possible."""
        # Not `files.write_atomically`: the processes of a run may all do this at once.
        problem = ""
        for path in self._paths:
            try:
                self._write(path, columns)
            except OSError as error:
                problem = problem or f"{path} cannot be written ({one_line(error)})"
            else:
                return ""
        return problem

    def _write(self, path: str, columns: Mapping[str, np.ndarray]) -> None:
        columns = {"identity": np.array(self.identity), **columns}
        if remote.is_remote(path):
            np.savez(content := io.BytesIO(), **columns)
            remote.write(path, content.getvalue())
            return
        if path != self._beside:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = pathlib.Path(f"{path}.{os.uname().nodename}.{os.getpid()}")
        try:
            with partial.open("wb") as out:
                np.savez(out, **columns)
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
