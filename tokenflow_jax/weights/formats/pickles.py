"""Reads pickled data without ever running what a pickle asks for.

A pickle is a program: it names functions and calls them. Here a name becomes a harmless stand-in of
our own (for the functions that rebuild torch's and NumPy's arrays), otherwise an inert class, which
is never imported and only remembers what it was given. So an `argparse.Namespace` or an optimizer
beside the weights stops nothing. Calling an inert class is refused by name, except for a few data
types whose pickles always do so.

A pickle can also ask for more memory or time than any machine has. So the unpickler in Python reads
it, opcode by opcode, and it is refused where it goes beyond what its bytes can honestly need.
"""

import functools
import io
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

from tokenflow_jax import files
from tokenflow_jax.messages import one_line
from tokenflow_jax.weights.formats.pickle_names import (
    Array,
    Dtype,
    Inert,
    InertType,
    UnsafeCheckpoint,
    known_names,
)

# What a damaged pickle may raise while it is read.
_DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError,
    RecursionError, TypeError, ValueError, pickle.UnpicklingError, struct.error,
)  # fmt: skip
_MOST_OPCODES = 4_000_000  # a checkpoint has 25 for each of its tensors
_MOST_NAMES = 10_000  # of classes and functions
_MOST_NODES = 100_000  # of the tree that a pickle unfolds to
_DEEPEST, _LONGEST_KEY = 8, 256  # of that tree
_MOST_BYTES = 4 * 2**30  # of a file that is read as a whole
# What of the stack an opcode hashes, and what it hands to a function that may copy it.
_ALL, _LAST, _KEYS = slice(None), slice(-1, None), slice(None, None, 2)
_HASHED = {
    pickle.SETITEM: slice(-2, -1), pickle.SETITEMS: _KEYS, pickle.DICT: _KEYS,
    pickle.ADDITEMS: _ALL, pickle.FROZENSET: _ALL,
}  # fmt: skip
_COPIED = {
    pickle.REDUCE: _LAST, pickle.BUILD: _LAST, pickle.NEWOBJ: _LAST,
    pickle.NEWOBJ_EX: slice(-2, None), pickle.OBJ: _ALL, pickle.INST: _ALL,
}  # fmt: skip


def _flat(key: Any, deepest: int = 2) -> bool:
    """Return False for a key whose hash could take forever, or equals that of many others."""
    if isinstance(key, tuple | frozenset):
        return deepest > 0 and len(key) <= 32 and all(_flat(part, deepest - 1) for part in key)
    return not isinstance(key, int) or abs(key) < 2**60


def _size(value: Any, deepest: int = 2) -> int:
    """Return the length of a value, and of the members of a tuple."""
    inner = value if isinstance(value, tuple) and deepest else ()
    own = len(value) if isinstance(value, tuple | list | dict | str | bytes | bytearray) else 0
    return own + sum(_size(part, deepest - 1) for part in inner)


class _Opcodes(dict):
    """The unpickler's methods by opcode, handed out a bounded number of times."""

    left = _MOST_OPCODES

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {_MOST_OPCODES:,} operations")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):
    # The one in C takes the memory that a pickle declares before it looks for the data.
    def __init__(self, data: bytes, known: Mapping[str, Any], persistent: Callable | None):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._names = known_names() | dict(known)
        self._persistent = persistent
        self._copies_left = 2 * len(data) + 10_000
        self.dispatch = _Opcodes(self.dispatch)
        self.dispatch[pickle.BYTEARRAY8[0]] = self._read_bytearray
        checks = (_Unpickler._check_keys, _HASHED), (_Unpickler._count_copies, _COPIED)
        for check, parts in checks:
            for code, part in parts.items():
                own = self.dispatch[code[0]]
                self.dispatch[code[0]] = functools.partial(self._checked, check, part, own)

    @staticmethod
    def _checked(check: Callable, part: slice, own: Callable, self: "_Unpickler") -> None:
        check(self, self.stack[part])
        own(self)

    @staticmethod
    def _read_bytearray(self: "_Unpickler") -> None:
        # The module's own takes what is declared first.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _check_keys(self, keys: list[Any]) -> None:
        if not all(map(_flat, keys)):
            raise ValueError("a key of nested tuples or of a huge number")

    def _count_copies(self, values: list[Any]) -> None:
        self._copies_left -= sum(map(_size, values))
        if self._copies_left < 0:
            raise ValueError("data that is used more often than it is stored")

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        origin = f"{module}.{name}"
        if origin not in self._names:
            if len(self._names) > _MOST_NAMES:
                raise ValueError(f"more than {_MOST_NAMES:,} names of classes")
            self._names[origin] = InertType(
                name.rpartition(".")[2] or "unnamed", (Inert,), {"origin": origin, "__slots__": ()}
            )
        return self._names[origin]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise ValueError("the pickle refers to data outside itself")
        return self._persistent(pid)


def load_pickle(
    data: bytes,
    where: str,
    *,
    known: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read one pickle, called `where` in errors, without running anything that it names.

    `known` are further stand-ins by "module.name"; `persistent` resolves the pickle's persistent
    ids. The result is plain containers and values, NumPy arrays behind `plain`, and `Inert`.

    Raises:
      UnsafeCheckpoint: the pickle wants to call something that is not plain data.
      ValueError: the pickle is damaged.
    """
    try:
        return _Unpickler(data, known or {}, persistent).load()
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{where}: {error}") from None
    except _DAMAGED as error:
        raise ValueError(
            f"{where}: not a readable pickle ({type(error).__name__}: {one_line(error)}); the file "
            "is damaged or of an unknown kind: fetch it again"
        ) from None


def plain(value: Any) -> Any:
    """Unwrap dicts, lists and tuples of NumPy arrays and plain values from `load_pickle`.

    Raises ValueError for more than 100,000 of them, counting one that is in several places each
    time, for more than eight levels and for long keys.
    """
    left = _MOST_NODES

    def unwrap(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise ValueError("a pickle that contains itself, or too large or too deep a tree")
        if isinstance(value, dict):
            if any(isinstance(key, str) and len(key) > _LONGEST_KEY for key in dict.keys(value)):
                raise ValueError(f"a name longer than {_LONGEST_KEY} characters")
            return {key: unwrap(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, list | tuple):
            return type(value)([unwrap(item, depth + 1) for item in value])
        if isinstance(value, Array):
            return value.array
        return value.dtype if isinstance(value, Dtype) else value

    return unwrap(value, 0)


def load_numpy_pickle(path: str | os.PathLike) -> Any:
    """Read a file of plain containers of NumPy arrays (read-only); raises as `load_pickle`."""
    value = load_pickle(files.read_bytes(path, _MOST_BYTES), os.fspath(path))
    try:
        return plain(value)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}; the file is damaged") from None
