"""Evaluation on several devices and hosts: each computes its share, then the sums are added."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any
_GATHERED_BYTES = 64 * 2**20


def _local_sharding(*axes: str) -> NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("batch",))
    return NamedSharding(mesh, PartitionSpec(*axes))


def to_local_devices(tree: PyTree) -> PyTree:
    """Copy NumPy arrays, or jax arrays that are whole on every device, to all local devices."""
    whole = _local_sharding()

    def place(array):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            array = array.addressable_data(0)
        return jax.device_put(array, whole)

    return jax.tree.map(place, tree)


def over_local_devices(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Jit a function of (weights, *batches); the weights are those of `to_local_devices`."""
    split = _local_sharding("batch")
    compiled = jax.jit(function)

    def call(weights: PyTree, *arrays: np.ndarray) -> PyTree:
        count = len(arrays[0])
        missing = -count % split.mesh.size
        if missing:  # pad with the last element, and cut the results again
            arrays = tuple(np.concatenate([x, np.repeat(x[-1:], missing, 0)]) for x in arrays)
        outputs = compiled(weights, *jax.device_put(arrays, split))
        return jax.tree.map(lambda x: x[:count], outputs) if missing else outputs

    return call


def of_first_process(value: int) -> int:
    """Return the first process's value in all processes; every process must call this."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def sum_over_processes(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the arrays of all processes in their own precision; every process must call this."""
    if jax.process_count() == 1:
        return dict(sums)
    return {name: _sum(np.asarray(array)) for name, array in sums.items()}


def _sum(array: np.ndarray) -> np.ndarray:
    # jax has no float64 unless it is switched on for everything, so the bytes are gathered, a part
    # at a time, and added on the host.
    flat = np.ascontiguousarray(array).reshape(-1)
    step = max(1, _GATHERED_BYTES // (jax.process_count() * flat.itemsize))
    parts = []
    for start in range(0, flat.size, step):
        part = np.asarray(multihost_utils.process_allgather(flat[start : start + step].view("u1")))
        parts.append(part.view(flat.dtype).sum(axis=0, dtype=flat.dtype))
    return np.concatenate(parts).reshape(array.shape)
