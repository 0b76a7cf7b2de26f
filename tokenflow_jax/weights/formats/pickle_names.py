"""Harmless stand-ins for what a pickle names: plain data, NumPy's arrays, and any other class."""

import collections
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tokenflow_jax.messages import shown


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


class InertType(type):
    """Metaclass of the stand-ins; a call is refused unless the name is plain data."""

    def __call__(cls, *args: Any, **kwargs: Any) -> "Inert":
        if cls.origin not in _DATA_TYPES:
            raise UnsafeCheckpoint(
                f"the file asks to call {shown(cls.origin)}, which is not part of any tensor; "
                "nothing was run. Do not trust this file; if it is your own, save only the "
                "state_dict, or convert it to .safetensors"
            )
        return Inert.__new__(cls, *args, **kwargs)

    def __setattr__(cls, name: str, value: Any) -> None:
        raise UnsafeCheckpoint(f"the file tries to change {shown(cls.origin)}; nothing was run")


class Inert(metaclass=InertType):
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


class Dtype:
    __slots__ = ("dtype",)

    def __init__(self, code: Any = "", *_: Any):
        known = isinstance(code, str) and len(code) < 16
        self.dtype = np.dtype(code) if known else np.dtype(object)
        if self.dtype.kind not in "?biufcV":
            raise UnsafeCheckpoint(f"a NumPy array of {shown(code)}: only plain numbers are read")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stand-in for numpy.ndarray, which receives its state later; `plain` unwraps it."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray | None = None):
        self.array = array

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not (isinstance(dtype, Dtype) and isinstance(data, bytes | bytearray)):
        raise ValueError("a NumPy array that is not plain numbers")
    shape = extent(shape)
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise ValueError(f"a NumPy array of shape {shape} {dtype.dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def extent(sizes: Any) -> tuple[int, ...]:
    """Check a shape or strides from a file."""
    if not isinstance(sizes, tuple | list) or len(sizes) > 32:
        raise ValueError(f"a tensor of shape {shown(sizes)}")
    if not all(type(size) is int and 0 <= size < 2**47 for size in sizes):
        raise ValueError(f"a tensor of shape {shown(sizes)}")
    return tuple(sizes)


def _encode(text: Any, encoding: Any) -> bytes:
    # Old pickle protocols write bytes as text in Latin-1.
    if not (isinstance(text, str) and encoding == "latin1"):
        raise UnsafeCheckpoint(
            f"the file asks to encode text as {shown(encoding)}; nothing was run"
        )
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    # Protocol 2 writes b"" as a call without arguments.
    if arguments:
        raise UnsafeCheckpoint("the file asks to call builtins.bytes on data; nothing was run")
    return b""


def known_names() -> dict[str, Any]:
    """Return stand-ins for what NumPy arrays and plain containers need."""
    numpy = {
        "multiarray._reconstruct": lambda *_: Array(),
        "multiarray.scalar": lambda dtype, data: _array(data, dtype, (), "C")[()],
        "numeric._frombuffer": lambda *args: Array(_array(*args)),
    }
    functions = {f"numpy.{core}.{n}": f for core in ("core", "_core") for n, f in numpy.items()}
    functions |= {"_codecs.encode": _encode, "builtins.bytes": _no_bytes, "numpy.dtype": Dtype}
    known = {name: Rebuilder(function) for name, function in functions.items()}
    return known | {"collections.OrderedDict": collections.OrderedDict}
