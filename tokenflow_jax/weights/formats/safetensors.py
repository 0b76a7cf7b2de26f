"""The `.safetensors` format: a length, a JSON header, and the data; nothing to execute."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tokenflow_jax.weights.lazy import LazyTensor, data, pieces, read_block

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_MAX_HEADER = 100 * 2**20


def looks_like_safetensors(path: str) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    return (
        len(start) == 9 and int.from_bytes(start[:8], "little") <= _MAX_HEADER and start[8:] == b"{"
    )


def read_safetensors(path: str) -> dict[str, LazyTensor]:
    """Parses the header and checks every tensor's extent."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path}: damaged .safetensors header; fetch the file again")
        try:
            header = dict(json.loads(file.read(length)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged .safetensors header ({error})") from None
    tensors, problems = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            tensors[name] = _tensor(name, entry, path, 8 + length, size)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{name}: {error!r}")
    if problems:
        raise ValueError(
            f"{path}: unreadable tensors, fetch the file again:\n  " + "\n  ".join(problems)
        )
    return tensors


def _tensor(name: str, entry: Mapping[str, Any], path: str, offset: int, size: int) -> LazyTensor:
    """Checks one entry of a header against the data: bytes `offset` to `size` of the file."""
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(type(value) is int and value >= 0 for value in (*shape, start, end)):
        raise ValueError(f"shape {shape}, bytes {start} to {end}")
    if not start <= end <= size - offset or math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(
            f"shape {shape} of {entry['dtype']} at bytes {start} to {end} of {size - offset}"
        )

    def load() -> np.ndarray:
        return read_block(path, offset + start, end - start).view(dtype).reshape(shape)

    return LazyTensor(name, tuple(shape), dtype, load)


def write_safetensors(
    path: str | os.PathLike, state: Mapping[str, np.ndarray | LazyTensor]
) -> None:
    """Writes a `.safetensors` file; of lazy tensors, one is in memory at a time.

    Args:
      path: the file to write.
      state: arrays or lazy tensors by name; any dtype that the format knows.

    Raises:
      ValueError: a dtype that the format does not know.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    unknown = [f"{n}: {tensor.dtype}" for n, tensor in state.items() if tensor.dtype not in codes]
    if unknown:
        raise ValueError(f"{path}: dtypes that .safetensors cannot hold: {unknown}; convert them")
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        extent = [offset, offset + tensor.nbytes]
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": extent,
        }
        offset = extent[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            file.writelines(pieces(data(tensor)))
