"""The files that `data.path` names: one, a folder of them, a pattern, or braces; local or remote.

Braces are expanded as a shell does it: DIR/{00000..01023}.tar, DIR/{train,val}-{0..9}.tar.
"""

import glob
import itertools
import re

import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.messages import plain

_MOST_FILES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(path: str, endings: tuple[str, ...], remedy: str, what: str = "files") -> list[str]:
    """Return the files that `data.path` names, sorted within each pattern; at least one.

    Of a folder those whose names end in one of `endings`. `remedy` ends the ValueError if files are
    missing or there are none.
    """
    found: list[str] = []
    for name in [path] if remote.kind_of(path) else braces(path):
        if remote.is_remote(name) and name.endswith(endings) and not glob.has_magic(name):
            found.append(name)  # not one request for each: who opens it notices if it is missing
            continue
        kind = remote.kind_of(name)
        if kind == "folder":
            found += in_folder(name, endings)
        elif kind or not glob.has_magic(name):
            found.append(name)
        else:
            found += remote.matching(name) if remote.is_remote(name) else sorted(glob.glob(name))
    some = found[:1] if remote.is_remote(path) else found
    if path and (missing := [file for file in some if not remote.kind_of(file)]):
        raise ValueError(
            f"data.path {path!r}: {plain(missing[0])} is missing, {len(missing)} of "
            f"{len(found)} {what} are; {remedy}"
        )
    if not path or not found:
        raise ValueError(f"data.path {path!r} names no {what}; {remedy}")
    return found


def in_folder(folder: str, endings: tuple[str, ...]) -> list[str]:
    """Return the sorted paths of files in a folder, but not below, with one of some endings."""
    return [
        remote.join(folder, name)
        for name in remote.names_in(folder)
        if name.endswith(endings) and not name.startswith(".")
    ]


def braces(path: str) -> list[str]:
    """Return the names that braces stand for."""
    parts = []
    for number, part in enumerate(_BRACES.split(path)):
        if number % 2 == 0:
            parts.append([part])
        elif ends := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", part):
            first, last = map(int, ends.groups())
            width = max(map(len, ends.groups())) if ends[1][0] == "0" or ends[2][0] == "0" else 0
            some = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            parts.append([f"{i:0{width}d}" for i in some[: _MOST_FILES + 1]])
        else:
            parts.append(part.split(",") if "," in part else [f"{{{part}}}"])
    if np.prod([float(len(part)) for part in parts]) > _MOST_FILES:
        raise ValueError(f"data.path {path!r} names more than {_MOST_FILES:,} files")
    return ["".join(some) for some in itertools.product(*parts)]
