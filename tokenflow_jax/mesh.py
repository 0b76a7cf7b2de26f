"""The device mesh and the few shardings that every stage uses.

The mesh always has the three axes `data`, `fsdp` and `tensor`, in this order, so that a sharding
written for a pod also works on a laptop. A batch is split over `data` and `fsdp` together.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Arranges the devices in a (data, fsdp, tensor) mesh.

    Args:
      sizes: axis name -> number of devices along it; one size may be -1, "all that remain".
        Missing axes have size 1, except `data`, which is -1 when no other axis is.
      devices: the devices to use; all devices of all processes by default.

    Returns:
      A Mesh with Auto axis types (with Explicit ones, Linen's Dense and Conv gradients fail).

    Raises:
      ValueError: an unknown axis, a size that is not a positive integer or -1, more than one -1,
        sizes that do not multiply to the number of devices, or a sharded-parameter axis (`fsdp`,
        `tensor`) other than 1. Everything that is wrong with the sizes is reported at once.
    """
    sizes = dict(sizes or {})
    devices = list(jax.devices() if devices is None else devices)
    problems = [
        f"mesh.{axis} is not an axis; the axes are {', '.join(AXES)}"
        for axis in sizes
        if axis not in AXES
    ]
    for axis in AXES:
        size = sizes.setdefault(axis, 1 if axis != "data" or -1 in sizes.values() else -1)
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            problems.append(f"mesh.{axis}={size!r} must be a positive integer, or -1 for the rest")
        elif axis != "data" and size != 1:
            problems.append(
                f"mesh.{axis}={size} is not available yet: it comes with sharded training; use "
                f"mesh.data=-1 mesh.fsdp=1 mesh.tensor=1"
            )
    if list(sizes.values()).count(-1) > 1:
        problems.append("more than one mesh size is -1; only one can be inferred")
    if problems:
        raise ValueError("; ".join(problems))

    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if sizes[a] == -1 else sizes[a] for a in AXES)
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{a}={sizes[a]}" for a in AXES)
        raise ValueError(
            f"mesh {wanted} does not fill the {len(devices)} devices exactly; choose sizes whose "
            f"product is {len(devices)}, or give one of them as -1"
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if devices == jax.devices():  # lets JAX order the devices by their physical neighbourhood
        return jax.make_mesh(shape, AXES, axis_types=axis_types)
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=axis_types)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Splits the leading (batch) axis of an array over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Keeps a whole copy of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError unless a global batch can be split evenly over the mesh.

    Args:
      batch_size: images per optimiser step, over all processes.
      mesh: the mesh of make_mesh.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size={batch_size} cannot be split over {parts} devices (data x fsdp); "
            f"use a positive multiple of {parts}"
        )
