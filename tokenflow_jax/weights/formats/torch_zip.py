"""The zip files of `torch.save` and `torch.jit.save`: a pickle that describes views of raw data.

`torch.load(path, weights_only=True)` reads what is written here, memory-mapped too: storages are
uncompressed and aligned to 64 bytes, as torch writes them.
"""

import functools
import itertools
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tokenflow_jax.messages import bullets, one_line, shown
from tokenflow_jax.weights.formats import pickles
from tokenflow_jax.weights.formats.pickle_names import Inert, extent
from tokenflow_jax.weights.formats.torch_tensors import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    Element,
    Storage,
    Tensor,
    torch_names,
)
from tokenflow_jax.weights.lazy import (
    Index,
    LazyTensor,
    data,
    pieces,
    read_block,
    read_file_part,
)

# What the zipfile module raises for damaged files, encrypted and unknown ones.
_BROKEN_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ArithmeticError, LookupError,
    NotImplementedError, RuntimeError, UnicodeError,
)  # fmt: skip
_MOST_DICTS = 1000  # that are looked into for tensors
_DEEPEST = 5  # of those
_LONGEST_NAME = 1000
_MOST_CHARACTERS = 2**26  # of all names of a scripted module


def read_zip(path: str) -> dict[str, dict[str, LazyTensor]]:
    """Return the tensors of a torch file: those of each dict in it, by the dict's dotted key.

    The key of the outermost dict is "". A scripted module has that one alone, with all its names.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            roots = [name for name in infos if f"/{name}".endswith("/data.pkl")]
            if len(roots) != 1:
                raise ValueError(f"{path}: a zip file without a single data.pkl, not of torch.save")
            prefix = roots[0].removesuffix("data.pkl")
            _check_plain(path, [infos[roots[0]]])
            pickled, order = archive.read(roots[0]), b""
            if f"{prefix}byteorder" in infos:
                _check_plain(path, [infos[f"{prefix}byteorder"]])
                order = archive.read(f"{prefix}byteorder").strip()
    except _BROKEN_ZIP as error:
        raise ValueError(f"{path}: damaged zip file ({one_line(error)}); fetch it again") from None
    used: list[zipfile.ZipInfo] = []

    def persistent(pid: Any) -> Storage:
        kind, element, name, _, numel = pid
        if not (kind == "storage" and isinstance(element, Element) and isinstance(name, str)):
            raise ValueError(f"an unknown reference {shown(kind)}")
        (numel,), info = extent((numel,)), infos.get(f"{prefix}data/{name}")
        nbytes = numel * (element.dtype.itemsize if element.dtype else 1)
        if info is None or nbytes > info.file_size:
            raise ValueError(f"storage {shown(name)} of {nbytes} bytes is missing or cut short")
        used.append(info)
        return Storage(info.filename, element.dtype, nbytes)

    def begin(tensor: Tensor) -> int:
        # A local header has 30 bytes, then a name and extra data; its end holds their lengths.
        info = infos[tensor.storage.member]
        lengths = read_block(path, info.header_offset + 26, 4).view("<u2").sum(dtype=np.int64)
        return info.header_offset + 30 + int(lengths) + tensor.offset * tensor.dtype.itemsize

    def load_part(tensor: Tensor, index: Index) -> np.ndarray:
        plain = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        if list(tensor.strides) == plain and order != b"big" and math.prod(tensor.shape):
            return read_file_part(path, begin(tensor), tensor.dtype, tensor.shape, index)
        return np.array(load(tensor)[index])

    def load(tensor: Tensor) -> np.ndarray:
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, tensor.dtype)
        itemsize, start = tensor.dtype.itemsize, begin(tensor)
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        block = read_block(path, start, (last + 1) * itemsize).view(tensor.dtype)
        if order == b"big":
            block = block.byteswap()
        strides = tuple(stride * itemsize for stride in tensor.strides)
        array = np.lib.stride_tricks.as_strided(block, tensor.shape, strides)
        return np.ascontiguousarray(array).reshape(tensor.shape)

    root = pickles.load_pickle(pickled, path, known=torch_names(), persistent=persistent)
    _check_plain(path, used)
    try:
        return _groups(root, load, load_part)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the file is damaged") from None


def _check_plain(path: str, infos: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse compressed members: a few bytes of them can become gigabytes."""
    size = os.path.getsize(path)
    for info in infos:
        name, encrypted = shown(info.filename), info.flag_bits & 1
        if info.compress_type != zipfile.ZIP_STORED or encrypted:
            raise ValueError(
                f"{path}: {name} is compressed or encrypted, which torch.save never does; unpack "
                "the zip file, and pack it with zip -0"
            )
        if info.file_size != info.compress_size or info.file_size > size:
            raise ValueError(f"{path}: damaged zip file ({name} is cut short); fetch it again")


def _groups(root: Any, *load: Callable[..., np.ndarray]) -> dict[str, dict[str, LazyTensor]]:
    """Return the tensors of nested dicts, the outermost first, see `read_zip`."""

    def lazy(items: Mapping[str, Any]) -> dict[str, LazyTensor]:
        return {
            name: LazyTensor(name, t.shape, t.dtype, *(functools.partial(f, t) for f in load))
            for name, t in items.items()
            if isinstance(t, Tensor)
        }

    if isinstance(root, Inert) and not root.entries:
        return {"": lazy(_attributes(root))}
    groups, known, level = {}, {}, [("", root)]
    for _ in range(_DEEPEST):
        below = []
        for path, value in level:
            if id(value) not in known:  # one dict may be in many places
                items = _items(value)
                known[id(value)] = lazy(items)
                inner = (name for name in items if _is_dict(items[name]))
                names = itertools.islice(inner, _MOST_DICTS - len(below))
                below += [(f"{path}.{name}".removeprefix("."), items[name]) for name in names]
            if known[id(value)]:
                groups[path] = known[id(value)]
        level = below
    return groups


def _is_dict(value: Any) -> bool:
    return bool(value.entries if isinstance(value, Inert) else isinstance(value, dict) and value)


def _items(value: Any) -> dict[str, Any]:
    """Return what a dict, or an unknown class that looks like one, holds by name."""
    items = value.entries if isinstance(value, Inert) else value
    items = dict.items(items) if isinstance(items, dict) else ()
    return {k: v for k, v in items if isinstance(k, str) and len(k) <= _LONGEST_NAME}


def _attributes(root: Inert) -> dict[str, Tensor]:
    """Return a scripted module's parameters and buffers, those of its submodules included."""
    found, left = {}, _MOST_CHARACTERS

    def collect(module: Inert, prefix: str, above: tuple[int, ...]) -> None:
        nonlocal left
        for name, value in (module.state if isinstance(module.state, dict) else {}).items():
            left -= len(prefix) + 100
            if left < 0 or not isinstance(name, str) or len(name) > _LONGEST_NAME:
                raise ValueError("a scripted module that contains itself, or with impossible names")
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, Inert) and id(value) not in above and len(above) < 100:
                collect(value, f"{prefix}{name}.", (*above, id(value)))

    collect(root, "", (id(root),))
    return found


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
        raise ValueError(f"{path}: dtypes that .pt files are not written with:\n{bullets(unknown)}")
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
