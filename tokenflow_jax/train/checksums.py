"""Checksums of arrays, whatever devices they are spread over.

    sum32 = sum over i of mix(word_i + i * golden)    mod 2^32

with the array's 32-bit words (narrower elements: one word each) in C order and murmur3's finalizer
as `mix`. A sum takes no order, so every device adds up what it holds; the position is hashed in, so
that exchanged elements show. mix is one to one: a change of one element is always found, any other
with a chance of 1 - 2^-32.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)
_CHUNK = 2**16  # words hashed at once on the host, few enough for the processor's cache


def sum32(array: np.ndarray) -> int:
    """Return the checksum of an array in this process's memory, in [0, 2^32)."""
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view(f"u{min(flat.itemsize, 4)}")
    position = np.arange(min(_CHUNK, words.size), dtype=np.uint32) * _GOLDEN
    total = np.uint32(0)
    with np.errstate(over="ignore"):
        for start in range(0, words.size, _CHUNK):
            hashed = words[start : start + _CHUNK].astype(np.uint32)
            hashed += position[: hashed.size]
            hashed += np.uint32(start % 2**32) * _GOLDEN
            total += _mix(hashed).sum(dtype=np.uint32)
    return int(total)


def _mix(hashed: Any) -> Any:
    """Return murmur3's finalizer of uint32 words, in place where they are NumPy's."""
    hashed ^= hashed >> np.uint32(16)
    hashed *= np.uint32(0x85EBCA6B)
    hashed ^= hashed >> np.uint32(13)
    hashed *= np.uint32(0xC2B2AE35)
    hashed ^= hashed >> np.uint32(16)
    return hashed


def sums_of(leaves: list[Any]) -> list[int]:
    """Return the checksum of each whole array, computed where it is.

    In a run of several processes all of them must call this with the same arrays.
    """
    # Small programs, one for each kind of array, compile in a fraction of the time of a large one.
    sums = [
        sum32(np.asarray(leaf)) if _in_host_memory(leaf) else _device_sum(leaf) for leaf in leaves
    ]
    return [int(value) for value in jax.device_get(sums)]


def _in_host_memory(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return False
    return leaf.is_fully_addressable and next(iter(leaf.sharding.device_set)).platform == "cpu"


def _device_sum(leaf: jax.Array) -> jax.Array:
    mesh = getattr(leaf.sharding, "mesh", None)
    everywhere = None
    if mesh is not None:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = _compiled(everywhere)(leaf)
    # Collectives of several programs in flight can wait for each other's threads on a CPU.
    return found.block_until_ready() if jax.default_backend() == "cpu" else found


@functools.cache
def _compiled(out_sharding: jax.sharding.NamedSharding | None):
    return jax.jit(_sum32, out_shardings=out_sharding)


def _sum32(x: jax.Array) -> jax.Array:
    """Compute `sum32` of a jax array: elementwise, then one sum."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    return _mix(words + position * _GOLDEN).sum(dtype=jnp.uint32)


def describe_arrays(tree: Any, with_sums: bool = False) -> dict[str, dict[str, Any]]:
    """Describe the arrays of a pytree: path -> shape, dtype and, if asked, "sum32".

    With `with_sums` the arrays are read; all processes must call this together.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    described = {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in named.items()
    }
    if with_sums:
        for entry, value in zip(described.values(), sums_of(list(named.values())), strict=True):
            entry["sum32"] = value
    return described


def compare_arrays(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return one line per array that is absent, left over, or of another shape or dtype."""

    def text(entry: Mapping[str, Any]) -> str:
        return f"{entry['dtype']}{entry['shape']}"

    problems = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            problems.append(f"{name} {text(saved[name])} is only in the checkpoint")
        elif name not in saved:
            problems.append(f"{name} {text(wanted[name])} is not in the checkpoint")
        elif text(saved[name]) != text(wanted[name]):
            problems.append(
                f"{name} is {text(saved[name])} in the checkpoint and {text(wanted[name])} here"
            )
    return problems
