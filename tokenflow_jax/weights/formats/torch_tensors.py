"""Stand-ins for what the pickle of a torch file calls: its storages and tensors, checked."""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tokenflow_jax.messages import shown
from tokenflow_jax.weights.formats.pickle_names import Rebuilder, UnsafeCheckpoint, extent

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
_MOST_EXPANDED = 2**20  # elements of a view that repeats those of its storage


# Named tuples, because a pickle cannot change them once they are made and checked.
class Element(NamedTuple):
    dtype: np.dtype | None  # of a typed storage, or torch.float32 and the like; None: untyped bytes


class Storage(NamedTuple):  # a block of a file's data, as the pickle describes it
    member: str
    dtype: np.dtype | None
    nbytes: int


class Tensor(NamedTuple):  # a strided view of a storage, in elements
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


# The arguments come from the file and may be of any type.
def _rebuild_tensor(storage, offset, shape, strides, _grad=0, _hooks=0, metadata=0) -> Tensor:
    return _tensor(storage, offset, shape, strides, storage.dtype, metadata)


def _rebuild_tensor_v3(
    storage, offset, shape, strides, _grad, _hooks, element, metadata=0
) -> Tensor:  # whose storage is untyped
    return _tensor(storage, offset, shape, strides, element.dtype, metadata)


def _tensor(storage, offset, shape, strides, dtype, metadata) -> Tensor:
    """Check a tensor's extent against its storage: a view must not leave it.

    A view may repeat elements, as `expand` does, up to a million: the file's length says nothing
    about the memory that it would need.
    """
    if not isinstance(storage, Storage) or dtype is None:
        raise ValueError("a tensor without a typed storage")
    if isinstance(metadata, dict) and any(metadata.values()):
        raise ValueError(f"a tensor with {shown(metadata)}: save resolve_conj() and resolve_neg()")
    shape, strides = extent(shape), extent(strides)
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape} with strides {strides}")
    (offset,) = extent((offset,))
    available, count = storage.nbytes // dtype.itemsize, math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count and last >= available:
        raise ValueError(f"a tensor of shape {shape} beyond its storage of {available} elements")
    if count > max(available, _MOST_EXPANDED):
        raise ValueError(
            f"a tensor of shape {shape} that repeats a storage of {available} elements: save "
            "tensor.contiguous()"
        )
    return Tensor(storage, offset, shape, strides, dtype)


def _rebuild_from_type(function, _type, arguments, _state) -> Any:  # a tensor with attributes
    if not isinstance(function, Rebuilder):
        raise UnsafeCheckpoint(
            f"the file rebuilds a tensor through {shown(function)}; nothing was run"
        )
    tensor = function(*arguments)
    if not isinstance(tensor, Tensor):
        raise ValueError("a tensor that is rebuilt from something else")
    return tensor


def torch_names() -> dict[str, Any]:
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
        "torch.Size": Rebuilder(extent),
        "torch.storage.UntypedStorage": Element(None),
        "torch.UntypedStorage": Element(None),
        "torch.jit._pickle.restore_type_tag": first,
        **{f"torch.jit._pickle.build_{kind}": first for kind in kinds},
        **{f"torch.{name}": Element(dtype) for name, dtype in TORCH_DTYPES.items()},
        **{f"torch.{kind}Storage": Element(TORCH_DTYPES[n]) for kind, n in STORAGE_DTYPES.items()},
    }
