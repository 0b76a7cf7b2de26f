"""Columns of numbers about a data file, kept beside it or in the user's cache folder.

They hold while the file has the same size and modification time. Anybody may have changed them:
whatever is not as expected is replaced.
"""

import contextlib
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line

Columns = dict[str, np.ndarray]
_ENDING = ".index.npz"
# Whatever NumPy's reader raises for a damaged file.
_DAMAGE = (
    OSError, ValueError, KeyError, EOFError, MemoryError, OverflowError, NotImplementedError,
    AttributeError, RuntimeError, SyntaxError, TypeError, zipfile.BadZipFile,
)  # fmt: skip


class Kept:
    """The place where the columns of one file are kept."""

    def __init__(self, file: pathlib.Path, kind: str, status: os.stat_result):
        """Describe columns of a `kind`, which names their version, of a file in some state."""
        self.identity = f"{kind} {status.st_size} {status.st_mtime_ns}"
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        name = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:32] + _ENDING
        self._beside = file.with_name(file.name + _ENDING)
        self._paths = (self._beside, pathlib.Path(cache, "tokenflow_jax", name))

    def load(self, types: Mapping[str, Any], valid: Callable[[Columns], bool]) -> Columns | None:
        """Return columns of these types for which `valid` is true, or None."""
        for path in self._paths:
            if not path.is_file():
                continue
            try:
                with np.load(path, allow_pickle=False) as kept:
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
            partial = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
            try:
                if path != self._beside:
                    path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as out:
                    np.savez(out, identity=np.array(self.identity), **columns)
                partial.replace(path)
            except OSError as error:
                problem = problem or f"{path} cannot be written ({one_line(error)})"
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
            else:
                return ""
        return problem
