"""Reads pickled data without ever running what a pickle asks for.

A pickle is a program: it names functions and calls them. Here a name becomes a harmless stand-in of
our own (for the functions that rebuild torch's and NumPy's arrays), otherwise an inert class, which
is never imported and only remembers what it was given. So an `argparse.Namespace` or an optimizer
beside the weights stops nothing. Calling an inert class is refused by name, except for a few data
types whose pickles always do so.
"""

import collections
import io
import math
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# What a damaged pickle may raise while it is read.
_DAMAGED = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError,
    pickle.UnpicklingError,
)  # fmt: skip


class UnsafeCheckpoint(ValueError):
    """A pickle asked to call something that is not known to be harmless data."""


# Types that pickle themselves as a call of the class. Calling their stand-in only stores the
# arguments, so the list decides what counts as ordinary data, not what is executed.
_DATA_TYPES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "argparse": ("Namespace",),
        "builtins": ("set", "frozenset", "complex", "bytearray", "slice", "range"),
        "collections": ("Counter", "defaultdict", "deque"),
        "copy_reg": ("_reconstructor",),
        "copyreg": ("_reconstructor",),
        "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
        "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
        "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
        "torch": ("device",),
        "uuid": ("UUID",),
    }.items()
    for name in names
)


class _InertType(type):
    """Metaclass of the stand-ins; a call is refused unless the name is plain data."""

    def __call__(cls, *args: Any, **kwargs: Any) -> "Inert":
        if cls.origin not in _DATA_TYPES:
            raise UnsafeCheckpoint(
                f"the file asks to call {cls.origin}, which is not part of any tensor; nothing was "
                "run. Do not trust this file; if it is your own, save only the state_dict, or "
                "convert it to .safetensors"
            )
        return Inert.__new__(cls, *args, **kwargs)

    def __setattr__(cls, name: str, value: Any) -> None:
        raise UnsafeCheckpoint(f"the file tries to change {cls.origin}; nothing was run")


class Inert(metaclass=_InertType):
    """A stand-in for an object of the class `origin`, with its attributes and mapping items."""

    __slots__ = ("entries", "state")
    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        instance = object.__new__(cls)
        instance.entries, instance.state = {}, None
        return instance

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: Any) -> None:
        """Drop an item of an unknown list or set: no tensor is looked for there."""

    extend = add = append


class Rebuilder:
    """One of our functions in place of a named one; a file cannot alter it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsafeCheckpoint("the file tries to change how tensors are rebuilt; nothing was run")


class _Dtype:
    __slots__ = ("dtype",)

    def __init__(self, code: Any = "", *_: Any):
        self.dtype = np.dtype(code) if isinstance(code, str) else np.dtype(object)
        if self.dtype.hasobject:
            raise UnsafeCheckpoint(f"a NumPy array of {code!r}: only plain numbers are read")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stand-in for numpy.ndarray, which receives its state later; `plain` unwraps it."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray | None = None):
        self.array = array

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not (isinstance(dtype, _Dtype) and isinstance(data, bytes | bytearray)):
        raise ValueError("a NumPy array that is not plain numbers")
    shape = tuple(int(size) for size in shape)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise ValueError(f"a NumPy array of shape {shape} {dtype.dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _encode(text: Any, encoding: Any) -> bytes:
    # Old pickle protocols write bytes as text in Latin-1.
    if not (isinstance(text, str) and encoding == "latin1"):
        raise UnsafeCheckpoint(f"the file asks to encode text as {encoding!r}; nothing was run")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    # Protocol 2 writes b"" as a call without arguments.
    if arguments:
        raise UnsafeCheckpoint("the file asks to call builtins.bytes on data; nothing was run")
    return b""


def _known() -> dict[str, Any]:
    """Return stand-ins for what NumPy arrays and plain containers need."""
    numpy = {
        "multiarray._reconstruct": lambda *_: _Array(),
        "multiarray.scalar": lambda dtype, data: _array(data, dtype, (), "C")[()],
        "numeric._frombuffer": lambda *args: _Array(_array(*args)),
    }
    functions = {f"numpy.{core}.{n}": f for core in ("core", "_core") for n, f in numpy.items()}
    functions |= {"_codecs.encode": _encode, "builtins.bytes": _no_bytes, "numpy.dtype": _Dtype}
    known = {name: Rebuilder(function) for name, function in functions.items()}
    return known | {"collections.OrderedDict": collections.OrderedDict}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, known: Mapping[str, Any], persistent: Callable | None):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._names = _known() | dict(known)
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        origin = f"{module}.{name}"
        if origin not in self._names:
            self._names[origin] = _InertType(
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
            f"{where}: not a readable pickle ({type(error).__name__}: {error}); the file is "
            "damaged or of an unknown kind: fetch it again"
        ) from error


def plain(value: Any) -> Any:
    """Unwrap dicts, lists and tuples of NumPy arrays and plain values from `load_pickle`."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in dict.items(value)}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, _Dtype):
        return value.dtype
    return value


def load_numpy_pickle(path: str | os.PathLike) -> Any:
    """Read a file of plain containers of NumPy arrays (read-only); raises as `load_pickle`."""
    with open(path, "rb") as file:
        value = load_pickle(file.read(), os.fspath(path))
    try:
        return plain(value)
    except RecursionError:
        raise ValueError(f"{path}: a pickle that contains itself; the file is damaged") from None
