"""The device mesh, and the table of how everything is sharded over it.

The mesh always has the four axes `slice`, `data`, `fsdp` and `tensor`, in this order, so that a
sharding written for a pod also works on a laptop:

    slice    slices of a multi-slice job; only gradients cross the slow network between them
    data     copies of the model; a batch is split over slice, data and fsdp together
    fsdp     parameters, their average and the optimizer's state are split; gathered where used
    tensor   hidden layers and the rows of the codebooks are split

Models name the axes of their activations (`placement.on_batch`), `PARAMETER_AXES` those of the
parameters, and `logical_axes` maps the names to mesh axes.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any
AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")
# With Explicit axes the gradients of Linen's Dense and Conv fail.
_AXIS_TYPES = (jax.sharding.AxisType.Auto,) * len(AXES)
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# End of a parameter's path -> logical axes of its last dimensions (a scanned module's layers come
# before them and stay whole). Optimizer state and averages end in their parameter's path. What no
# line matches is split over fsdp along its largest dimension that divides.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("(semantic|pixel)_codebook", ("codes", None)),
    ("codebook/sum_KC", ("codes", None)),
    ("codebook/count_K", ("codes",)),
    ("mlp/(fc1|gate|value|up)/kernel", ("embed", "mlp")),
    ("mlp/(fc1|gate|value)/bias", ("mlp",)),
    ("mlp/(fc2|out|down)/kernel", ("mlp", "embed")),
    ("attention/(q|k|v)/kernel", ("embed", "heads")),
    ("attention/(q|k|v)/bias", ("heads",)),
    ("blocks/attention/out/kernel", ("heads", "embed")),
    ("embed/embedding", ("vocabulary", "embed")),
    ("head/kernel", ("embed", "vocabulary")),
)
# A quantized kernel's integers and scales are split as the kernel is.
_QUANTIZED = re.compile("/array/(qvalue|scale)$")
# Smaller arrays stay whole: gathering one costs more than a copy on every device.
LEAST_SPLIT = 2**12


def logical_axes(mesh: Mesh) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the mesh axes that each logical axis is split over, for `nn.logical_axis_rules`."""
    return (
        ("batch", BATCH_AXES),
        ("embed", ("fsdp",)),
        ("mlp", ("tensor",)),
        ("heads", ("tensor",)),
        ("vocabulary", ("tensor",)),
        ("codes", ("tensor",) if mesh.shape["tensor"] > 1 else ("fsdp",)),
    )


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Arrange devices, by default all of all processes, in a (slice, data, fsdp, tensor) mesh.

    `sizes` are numbers of devices by axis; one may be -1, all that remain. Missing axes have size
    1, except `data`, which is -1 when no other axis is.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    return jax.sharding.Mesh(_arrange(devices, shape), AXES, axis_types=_AXIS_TYPES)


def make_abstract_mesh(sizes: Mapping[str, int] | None, count: int) -> jax.sharding.AbstractMesh:
    """Return the mesh of `count` devices that need not exist; see `make_mesh`."""
    return jax.sharding.AbstractMesh(mesh_shape(sizes, count), AXES, axis_types=_AXIS_TYPES)


def mesh_shape(sizes: Mapping[str, int] | None, count: int) -> tuple[int, ...]:
    """Return the size of every axis of AXES for `count` devices; see `make_mesh`."""
    sizes = dict(sizes or {})
    unknown = [axis for axis in sizes if axis not in AXES]
    problems = [f"mesh.{axis} is not an axis; the axes are {', '.join(AXES)}" for axis in unknown]
    for axis in AXES:
        size = sizes.setdefault(axis, 1 if axis != "data" or -1 in sizes.values() else -1)
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            problems.append(f"mesh.{axis}={size!r} must be a positive integer, or -1 for the rest")
    if list(sizes.values()).count(-1) > 1:
        problems.append("more than one mesh size is -1; only one can be inferred")
    if problems:
        raise ValueError("; ".join(problems))
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(count // known if sizes[a] == -1 else sizes[a] for a in AXES)
    if math.prod(shape) != count:
        wanted = " x ".join(f"{a}={sizes[a]}" for a in AXES)
        raise ValueError(
            f"mesh {wanted} does not fill the {count} devices exactly; choose sizes whose "
            f"product is {count}, or give one of them as -1"
        )
    return shape


def _arrange(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Order devices so that the inner axes are physical neighbors."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise ValueError(
                f"mesh.slice={shape[0]}, but the devices are in {len(slices)} slices; set "
                f"--config.mesh.slice={len(slices)}"
            )
        inner = (shape[0] // len(slices), *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(inner, (len(slices), 1, 1, 1), devices)
    if getattr(devices[0], "platform", "") == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Put a mesh and its table of logical axes in use; an abstract mesh is for tracing only."""
    abstract = isinstance(mesh, jax.sharding.AbstractMesh)
    enter = jax.sharding.use_abstract_mesh if abstract else jax.set_mesh
    with enter(mesh), nn.logical_axis_rules(logical_axes(mesh)):
        yield


def bind(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """Wrap a function so that it is always called, and traced, with the mesh in use."""
    return use(mesh)(function)  # context managers of contextlib are decorators, too


def partition(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return the split of a parameter at "a/b/c", or of its optimizer state or average."""
    table = dict(logical_axes(mesh))

    def mesh_axes(name: str | None, size: int) -> tuple[str, ...] | None:
        axes = tuple(a for a in table.get(name, ()) if mesh.shape[a] > 1)
        even = size % math.prod(mesh.shape[a] for a in axes) == 0
        return axes if axes and even else None

    path = _QUANTIZED.sub("", path)
    for pattern, names in PARAMETER_AXES:
        layers = len(shape) - len(names)
        if layers >= 0 and re.search(f"(^|/){pattern}$", path):
            return PartitionSpec(*[None] * layers, *map(mesh_axes, names, shape[layers:]))
    fsdp = mesh.shape["fsdp"]
    fitting = [i for i, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not fitting or math.prod(shape) < LEAST_SPLIT:
        return PartitionSpec()
    largest = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*(("fsdp",) if i == largest else None for i in range(len(shape))))


def _partitions(tree: PyTree, mesh: Mesh) -> Iterator[tuple[str, Any, PartitionSpec]]:
    """Yield the path, the leaf and the split of every array of a tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield name, leaf, partition(name, leaf.shape, mesh)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the sharding of every array of a state or of parameters (anything with `shape`)."""
    found = [NamedSharding(mesh, spec) for _, _, spec in _partitions(tree, mesh)]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def placed(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the shapes and dtypes of a tree, each with its sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def answering_mesh() -> jax.sharding.Mesh | None:
    """Return this process's devices along `tensor`, for inference; None if there is only one."""
    devices = jax.local_devices()
    return make_mesh({"tensor": -1}, devices) if len(devices) > 1 else None


def place(array: Any, where: jax.sharding.Sharding, dtype: Any = None) -> jax.Array:
    """Put an array, NumPy's or one that is read in parts, where it belongs.

    Each process reads only what its own devices hold. `jax.device_put` of a whole array would
    gather it from all processes on every device, and hold it on the first device before that.

    Args:
      array: has `shape` and `dtype`, gives a part for an index, and may `check` the whole, see
        `weights.lazy.LazyTensor`; all processes give the same one.
      dtype: to convert to; None keeps the array's.
    """
    dtype, check = dtype or array.dtype, getattr(array, "check", None)
    if hasattr(array, "read_part") and array.read_part is None:
        array = array.read()  # once, not for every part
    parts: dict[str, np.ndarray] = {}  # copies of the model read it once

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = np.asarray(array[index], None if check else dtype)
        return parts[str(index)]

    placed = jax.make_array_from_callback(tuple(array.shape), where, read)
    if check:
        check(placed)
    return placed if placed.dtype == dtype else _converter(where, jnp.dtype(dtype))(placed)


@functools.cache
def _converter(where: jax.sharding.Sharding, dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.astype(dtype), out_shardings=where)


def stayed_whole(tree: PyTree, mesh: Mesh) -> list[tuple[str, int]]:
    """Return path and bytes of arrays that `fsdp` or `tensor` leave whole, largest first."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []
    whole = [
        (path, math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize)
        for path, leaf, spec in _partitions(tree, mesh)
        if not any(spec)
    ]
    return sorted(whole, key=lambda array: -array[1])


def describe_whole(tree: PyTree, mesh: Mesh, shown: int = 8) -> list[str]:
    """Return report lines about what `stayed_whole`."""
    whole = stayed_whole(tree, mesh)
    if not whole:
        return []
    total = sum(nbytes for _, nbytes in whole)
    lines = [f"whole on every device: {len(whole)} arrays, {total / 2**20:.2f} MiB"]
    lines += [f"  {path}: {nbytes / 2**20:.3f} MiB" for path, nbytes in whole[:shown]]
    return lines + (["  ..."] if len(whole) > shown else [])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are split along their leading axis, the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device has a whole copy of."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh) -> int:
    """Return the number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, pack: int = 1) -> None:
    """Raise ValueError unless a global batch, `pack` samples per row, divides over the mesh."""
    parts = batch_parts(mesh)
    if pack < 1:
        raise ValueError(f"pack={pack}: a row holds at least one conversation")
    if batch_size < 1 or batch_size % (parts * pack):
        rows, remedy = (f" in rows of {pack}", ", or a smaller pack") if pack > 1 else ("", "")
        raise ValueError(
            f"batch_size={batch_size}{rows} cannot be split over {parts} devices (slice x data x "
            f"fsdp); use a positive multiple of {parts * pack}{remedy}"
        )


def batch_share(mesh: jax.sharding.Mesh, batch_size: int) -> tuple[int, int]:
    """Return the share of every global batch that this process reads: (index, number of shares).

    Processes that split only `tensor` among them hold the same rows and read the same share: 16
    devices in 4 processes as data=2, tensor=8 have 2 shares.
    """
    rows: dict[int, set[int]] = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).add(part.start or 0)
    shares = sorted({frozenset(starts) for starts in rows.values()}, key=min)
    if sum(map(len, shares)) != batch_parts(mesh) or len(set(map(len, shares))) != 1:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} splits a batch across processes unevenly: process "
            "boundaries must not cut through `tensor`; make tensor a multiple or a divisor of the "
            "devices per process"
        )
    mine = frozenset(rows[jax.process_index()])
    return shares.index(mine), len(shares)
