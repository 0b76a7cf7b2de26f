"""The zip files of `torch.save` and `torch.jit.save`: a pickle that describes views of raw data."""

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tokenflow_jax.weights.formats import pickles
from tokenflow_jax.weights.formats.pickles import Inert, Rebuilder, UnsafeCheckpoint
from tokenflow_jax.weights.lazy import LazyTensor, read_block

TORCH_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
        "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
        "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
STORAGE_DTYPES = {
    "Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32",
    "Long": "int64", "Half": "float16", "BFloat16": "bfloat16", "Float": "float32",
    "Double": "float64", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip


# Named tuples, because a pickle cannot change them once they are made and checked.
class _Element(NamedTuple):
    """An element type, of a typed storage or torch.float32 and the like; None is untyped bytes."""

    dtype: np.dtype | None


class _Storage(NamedTuple):
    """A block of a file's data, as the pickle describes it."""

    member: str
    dtype: np.dtype | None
    nbytes: int


class _Tensor(NamedTuple):
    """A strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    # Of torch._utils._rebuild_tensor and _v2; rest: gradient flag, hooks, metadata.
    metadata = rest[2] if len(rest) > 2 else None
    return _tensor(storage, offset, shape, strides, storage.dtype, metadata)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    element: Any,
    *rest,
) -> _Tensor:
    # The storage of torch._utils._rebuild_tensor_v3 is untyped.
    return _tensor(storage, offset, shape, strides, element.dtype, rest[0] if rest else None)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any, metadata: Any
) -> _Tensor:
    """Check a tensor's extent against its storage: a view must never leave it."""
    if not isinstance(storage, _Storage) or dtype is None:
        raise ValueError("a tensor without a typed storage")
    if isinstance(metadata, dict) and any(metadata.values()):
        raise ValueError(f"a tensor with {sorted(metadata)}: save resolve_conj() and resolve_neg()")
    shape, strides = tuple(shape), tuple(strides)
    if not all(type(v) is int and v >= 0 for v in (offset, *shape, *strides)):
        raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape} with strides {strides}")
    available = storage.nbytes // dtype.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= available:
        raise ValueError(
            f"a tensor of shape {shape} that leaves its storage of {available} elements"
        )
    return _Tensor(storage, offset, shape, strides, dtype)


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    # Of torch._tensor._rebuild_from_type_v2: a tensor that carries attributes.
    if not isinstance(function, Rebuilder):
        raise UnsafeCheckpoint(f"the file rebuilds a tensor through {function!r}; nothing was run")
    return function(*arguments)


def _torch_names() -> dict[str, Any]:
    """Return stand-ins for what the pickle of a torch file may call or name."""
    first = Rebuilder(lambda value, *_: value)
    known = {
        "torch._utils._rebuild_tensor": Rebuilder(_rebuild_tensor),
        "torch._utils._rebuild_tensor_v2": Rebuilder(_rebuild_tensor),
        "torch._utils._rebuild_tensor_v3": Rebuilder(_rebuild_tensor_v3),
        "torch._utils._rebuild_parameter": first,
        "torch._utils._rebuild_parameter_with_state": first,
        "torch._tensor._rebuild_from_type_v2": Rebuilder(_rebuild_from_type),
        "torch.Size": Rebuilder(tuple),
        "torch.storage.UntypedStorage": _Element(None),
        "torch.UntypedStorage": _Element(None),
        "torch.jit._pickle.restore_type_tag": first,
    }
    for kind in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"):
        known[f"torch.jit._pickle.{kind}"] = first
    for name, dtype in TORCH_DTYPES.items():
        known[f"torch.{name}"] = _Element(dtype)
    for name, dtype in STORAGE_DTYPES.items():
        known[f"torch.{name}Storage"] = _Element(TORCH_DTYPES[dtype])
    return known


def _open_zip(path: str) -> tuple[dict[str, zipfile.ZipInfo], str, bytes, bytes]:
    """Return a torch file's members, the prefix of their names, its pickle and its byte order."""
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        roots = [name for name in infos if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"{path}: a zip file, but not one of torch.save (no single data.pkl)")
        prefix = roots[0].removesuffix("data.pkl")
        order = archive.read(prefix + "byteorder") if prefix + "byteorder" in infos else b"little"
        return infos, prefix, archive.read(roots[0]), order


def read_zip(path: str) -> Any:
    """Return a torch file's nested dicts of LazyTensor, two levels deep."""
    try:
        infos, prefix, pickled, order = _open_zip(path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged zip file ({error}); fetch it again") from error

    def persistent(pid: Any) -> _Storage:
        kind, element, name, _, numel = pid
        member = f"{prefix}data/{name}"
        if kind != "storage" or not isinstance(element, _Element) or type(numel) is not int:
            raise ValueError(f"an unknown reference {kind!r}")
        nbytes = numel * (element.dtype.itemsize if element.dtype else 1)
        if member not in infos or not 0 <= nbytes <= infos[member].file_size:
            raise ValueError(f"storage {name!r} of {nbytes} bytes is missing or cut short")
        return _Storage(member, element.dtype, nbytes)

    def load(tensor: _Tensor) -> np.ndarray:
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, tensor.dtype)
        itemsize = tensor.dtype.itemsize
        start = _data_start(path, infos[tensor.storage.member]) + tensor.offset * itemsize
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        block = read_block(path, start, (last + 1) * itemsize).view(tensor.dtype)
        if order.strip() == b"big":
            block = block.byteswap()
        strides = tuple(stride * itemsize for stride in tensor.strides)
        array = np.lib.stride_tricks.as_strided(block, tensor.shape, strides)
        return np.ascontiguousarray(array).reshape(tensor.shape)

    root = pickles.load_pickle(pickled, path, known=_torch_names(), persistent=persistent)
    return _lazy(root, load)


def _data_start(path: str, info: zipfile.ZipInfo) -> int:
    """Return the position of an uncompressed member's data."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: {info.filename} is compressed, which torch.save never does")
    # A local header has 30 bytes, then a name and extra data whose lengths are its last four bytes.
    lengths = read_block(path, info.header_offset + 26, 4).view("<u2")
    return info.header_offset + 30 + int(lengths.sum(dtype=np.int64))


def _lazy(root: Any, load: Callable[[_Tensor], np.ndarray]) -> Any:
    """Keep the tensors of a pickle's root, two levels deep; a scripted module becomes flat."""

    def tensors(items: Mapping[Any, Any]) -> dict[str, LazyTensor]:
        return {
            str(name): LazyTensor(str(name), t.shape, t.dtype, lambda t=t: load(t))
            for name, t in items.items()
            if isinstance(t, _Tensor)
        }

    items = _items(root)
    if isinstance(root, Inert) and not root.entries:
        return tensors(dict(_attributes(root, "", ())))
    return {
        **{str(name): tensors(_items(value)) for name, value in items.items() if _items(value)},
        **tensors(items),
    }


def _items(value: Any) -> dict[Any, Any]:
    """Return the items of a dict, or of an unknown class that looks like one; else none."""
    if isinstance(value, dict):
        return dict(dict.items(value))
    return value.entries if isinstance(value, Inert) else {}


def _attributes(
    module: Inert, prefix: str, above: tuple[int, ...]
) -> Iterator[tuple[str, _Tensor]]:
    """Yield a scripted module's parameters and buffers, those of its submodules included."""
    state = module.state if isinstance(module.state, dict) else {}
    for name, value in state.items():
        if isinstance(value, _Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Inert) and id(value) not in above and len(above) < 100:
            yield from _attributes(value, f"{prefix}{name}.", (*above, id(value)))
