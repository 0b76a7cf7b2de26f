"""Writes the zip files of `torch.save`: a pickle that describes tensors, and their raw data.

`torch.load(path, weights_only=True)` reads them, memory-mapped too: storages are uncompressed and
aligned to 64 bytes, as torch writes them.
"""

import math
import os
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from tokenflow_jax.weights.formats.torch_zip import STORAGE_DTYPES, TORCH_DTYPES
from tokenflow_jax.weights.lazy import LazyTensor, data, pieces

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
    """Write a `.pt` file for which torch.load returns `groups`; one lazy tensor is in memory.

    Raises:
      ValueError: a dtype for which torch has no typed storage.
    """
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
            out += [_text(name), _tensor(tensor, key)]
            key += 1
        out.append(_SET_ITEMS)
    return b"".join([*out, _SET_ITEMS, _STOP])


def _tensor(tensor: np.ndarray | LazyTensor, key: int) -> bytes:
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
