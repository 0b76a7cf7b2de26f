"""The `.safetensors` format: a length, a JSON header, and the data; nothing to execute.

The safetensors package validates a file; reading one tensor at a time into memory of its own, and
writing without holding all of them, is done here.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from tokenflow_jax import files
from tokenflow_jax.messages import bullets, one_line
from tokenflow_jax.weights.lazy import (
    MOST_TENSORS,
    Index,
    LazyTensor,
    data,
    pieces,
    read_file_part,
    whole,
)

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "UI" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def read_safetensors(path: str) -> dict[str, LazyTensor]:
    """Validate a file and return its tensors, in the file's order."""
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise ValueError(f"{path}: {len(header):,} tensors, the limit is {MOST_TENSORS:,}")
    if unknown := [f"{n}: {e['dtype']}" for n, e in header.items() if e["dtype"] not in _DTYPES]:
        raise ValueError(f"{path}: types that are not read; convert them:\n{bullets(unknown)}")
    try:
        return {name: _tensor(name, entry, path, start) for name, entry in header.items()}
    except ValueError as error:
        raise ValueError(f"{path}: damaged .safetensors file ({error}); fetch it again") from None


def read_metadata(path: str) -> dict[str, str]:
    """Return the texts that a file holds beside its tensors."""
    return _read_header(path)[0].get("__metadata__") or {}


def _read_header(path: str) -> tuple[dict[str, Any], int]:
    """Return the header of a valid file, and where the data starts."""
    try:
        # Refuses wrong sizes, holes, overlaps, duplicate names and trailing bytes.
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        reason = one_line(error)
        raise ValueError(f"{path}: damaged .safetensors file ({reason}); fetch it again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    return files.parse_json(header, f"{path}: the header", remedy="; fetch it again"), 8 + length


def _tensor(name: str, entry: Mapping[str, Any], path: str, offset: int) -> LazyTensor:
    dtype, shape, (start, _) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]

    def load(index: Index) -> np.ndarray:
        return read_file_part(path, offset + start, dtype, shape, index)

    return LazyTensor(name, tuple(shape), dtype, lambda: load(whole(shape)), load)


def write_safetensors(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray | LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays or lazy tensors by name, and texts; one lazy tensor is in memory at a time."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    unknown = [f"{n}: {tensor.dtype}" for n, tensor in state.items() if tensor.dtype not in codes]
    if unknown:
        raise ValueError(f"{path}: convert dtypes that .safetensors lacks:\n{bullets(unknown)}")
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, tensor in state.items():
        start, offset = offset, offset + tensor.nbytes
        extent = {"shape": list(tensor.shape), "data_offsets": [start, offset]}
        header[name] = {"dtype": codes[tensor.dtype], **extent}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            file.writelines(pieces(data(tensor)))
