"""The zip files of `torch.save` and `torch.jit.save`: a pickle that describes views of raw data.

`torch.load(path, weights_only=True)` reads what is written here, memory-mapped too: storages are
uncompressed and aligned to 64 bytes, as torch writes them.
"""

import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tokenflow_jax.weights.formats import pickles
from tokenflow_jax.weights.formats.pickles import Inert, Rebuilder, UnsafeCheckpoint
from tokenflow_jax.weights.lazy import LazyTensor, data, pieces, read_block

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
    dtype: np.dtype | None  # of a typed storage, or torch.float32 and the like; None: untyped bytes


class _Storage(NamedTuple):  # a block of a file's data, as the pickle describes it
    member: str
    dtype: np.dtype | None
    nbytes: int


class _Tensor(NamedTuple):  # a strided view of a storage, in elements
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


# The arguments come from the file and may be of any type.
def _rebuild_tensor(storage, offset, shape, strides, _grad=0, _hooks=0, metadata=0) -> _Tensor:
    return _tensor(storage, offset, shape, strides, storage.dtype, metadata)


def _rebuild_tensor_v3(
    storage, offset, shape, strides, _grad, _hooks, element, metadata=0
) -> _Tensor:  # whose storage is untyped
    return _tensor(storage, offset, shape, strides, element.dtype, metadata)


def _tensor(storage, offset, shape, strides, dtype, metadata) -> _Tensor:
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
        raise ValueError(f"a tensor of shape {shape} beyond its storage of {available} elements")
    return _Tensor(storage, offset, shape, strides, dtype)


def _rebuild_from_type(function, _type, arguments, _state) -> Any:  # a tensor with attributes
    if not isinstance(function, Rebuilder):
        raise UnsafeCheckpoint(f"the file rebuilds a tensor through {function!r}; nothing was run")
    return function(*arguments)


def _torch_names() -> dict[str, Any]:
    """Return stand-ins for what the pickle of a torch file may call or name."""
    first = Rebuilder(lambda value, *_: value)
    kinds = ("intlist", "doublelist", "boollist", "tensorlist")
    return {
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
        **{f"torch.jit._pickle.build_{kind}": first for kind in kinds},
        **{f"torch.{name}": _Element(dtype) for name, dtype in TORCH_DTYPES.items()},
        **{f"torch.{kind}Storage": _Element(TORCH_DTYPES[n]) for kind, n in STORAGE_DTYPES.items()},
    }


def read_zip(path: str) -> Any:
    """Return a torch file's nested dicts of LazyTensor, two levels deep."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            roots = [name for name in infos if f"/{name}".endswith("/data.pkl")]
            if len(roots) != 1:
                raise ValueError(f"{path}: a zip file without a single data.pkl, not of torch.save")
            pickled, prefix = archive.read(roots[0]), roots[0].removesuffix("data.pkl")
            order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in infos else b""
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
        itemsize, info = tensor.dtype.itemsize, infos[tensor.storage.member]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: {info.filename} is compressed, which torch.save never does")
        # A local header has 30 bytes, then a name and extra data; its end holds their lengths.
        lengths = read_block(path, info.header_offset + 26, 4).view("<u2").sum(dtype=np.int64)
        start = info.header_offset + 30 + int(lengths) + tensor.offset * itemsize
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        block = read_block(path, start, (last + 1) * itemsize).view(tensor.dtype)
        if order.strip() == b"big":
            block = block.byteswap()
        strides = tuple(stride * itemsize for stride in tensor.strides)
        array = np.lib.stride_tricks.as_strided(block, tensor.shape, strides)
        return np.ascontiguousarray(array).reshape(tensor.shape)

    root = pickles.load_pickle(pickled, path, known=_torch_names(), persistent=persistent)
    return _lazy(root, load)


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


_ALIGNMENT = 64
_LARGE = 2**30  # from here on members get 64-bit sizes, well before they need them
_STORAGES = {TORCH_DTYPES[name]: kind for kind, name in STORAGE_DTYPES.items()}
# Pickle opcodes, protocol 2; see pickletools.
_PROTOCOL, _STOP, _MARK, _TUPLE, _REDUCE = b"\x80\x02", b".", b"(", b"t", b"R"
_EMPTY_DICT, _SET_ITEMS, _PERSISTENT_ID, _FALSE = b"}", b"u", b"Q", b"\x89"
_ORDERED_DICT = b"ccollections\nOrderedDict\n)" + _REDUCE


def write_torch_zip(
    path: str | os.PathLike, groups: Mapping[str, Mapping[str, np.ndarray | LazyTensor]]
) -> None:
    """Write a `.pt` file for which torch.load returns `groups`; one lazy tensor is in memory."""
    tensors = {f"{group}/{name}": t for group, g in groups.items() for name, t in g.items()}
    unknown = [f"{name}: {t.dtype}" for name, t in tensors.items() if t.dtype not in _STORAGES]
    if unknown:
        raise ValueError(f"{path}: dtypes that .pt files are not written with: {unknown}")
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle(groups))
        archive.writestr("archive/byteorder", "little")
        for key, tensor in enumerate(tensors.values()):
            large = tensor.nbytes > _LARGE
            info = zipfile.ZipInfo(f"archive/data/{key}")
            info.extra = _padding(file.tell() + 30 + len(info.filename) + (20 if large else 0))
            with archive.open(info, "w", force_zip64=large) as member:
                member.writelines(pieces(data(tensor)))
        archive.writestr("archive/version", "3\n")


def _padding(end: int) -> bytes:
    """Return an extra field for a header that would end at byte `end`, to align the data."""
    padding = -(end + 4) % _ALIGNMENT  # the field has a name and a length of two bytes each
    return b"FB" + struct.pack("<H", padding) + bytes(padding)


def _pickle(groups: Mapping[str, Mapping[str, np.ndarray | LazyTensor]]) -> bytes:
    """Pickle a dict of OrderedDicts of tensors, whose storages are numbered in their order."""
    out, key = [_PROTOCOL, _EMPTY_DICT, _MARK], 0
    for group, tensors in groups.items():
        out += [_text(group), _ORDERED_DICT, _MARK]
        for name, tensor in tensors.items():
            out += [_text(name), _tensor_pickle(tensor, key)]
            key += 1
        out.append(_SET_ITEMS)
    return b"".join([*out, _SET_ITEMS, _STOP])


def _tensor_pickle(tensor: np.ndarray | LazyTensor, key: int) -> bytes:
    # torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)
    shape = tensor.shape
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    storage = _tuple(
        _text("storage"),
        f"ctorch\n{_STORAGES[tensor.dtype]}Storage\n".encode(),
        _text(str(key)),
        _text("cpu"),
        _integer(math.prod(shape)),
    )
    arguments = _tuple(
        storage + _PERSISTENT_ID,
        _integer(0),
        _tuple(*map(_integer, shape)),
        _tuple(*map(_integer, strides)),
        _FALSE,
        _ORDERED_DICT,
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + _REDUCE


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(*items: bytes) -> bytes:
    return _MARK + b"".join(items) + _TUPLE
