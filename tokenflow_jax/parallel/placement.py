"""Shardings of activations, and work on codebooks whose rows are split over devices.

Where the mesh in use (`mesh.use`) gives the logical axis "codes" more than one device, each of them
works on its own rows, and what crosses the network is as small as the tokens: no codebook is ever
gathered. Without a mesh everything here is the plain computation.

Shapes: N tokens, K codes, C channels; k are one device's rows.
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class Split(NamedTuple):
    """Mesh axes that the tokens and the rows of the codebooks are split over; () is no split."""

    tokens: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()

    def first_row(self, rows: int) -> jax.Array | int:
        """Return the index of this device's first row, where each device has `rows`."""
        return rows * jax.lax.axis_index(self.codes) if self.codes else 0


def platform() -> str:
    """Return the platform that the program being traced is for."""
    # It may be for another machine (preflight): then the mesh in use knows its devices.
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def fast_to_compile() -> dict[str, Any] | None:
    """Return compiler options that save time on CPUs; None elsewhere. What $XLA_FLAGS sets stays.

    They are for first states, which run once, and for drawing.
    """
    # CPU seconds of one core with and without, compiling included: a first drawing with the model
    # in the package 21 and 41 (16 more 1.45 and 1.65), a tokenizer's first state 17 and 44. A
    # tokenizer's step of training would take 15 % longer.
    if platform() != "cpu":
        return None
    options = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if f"--{name}=" not in flags} or None


def on_batch(x: jax.Array, *others: str | None) -> jax.Array:
    """Constrain an activation's sharding: the leading axis is the batch, `others` name the last.

    An axis that the mesh cannot split evenly stays whole; without a mesh nothing happens.
    """
    # Without such constraints between the layers XLA may split the work by a parameter's axes and
    # hold the whole batch on every device.
    if jax.sharding.get_abstract_mesh().empty:
        return x
    names = ("batch", *(None,) * (x.ndim - 1 - len(others)), *others)
    fitting = (
        name if name and axes_of(name, size) else None
        for name, size in zip(names, x.shape, strict=True)
    )
    return nn.with_logical_constraint(x, tuple(fitting))


def axes_of(name: str, size: int) -> tuple[str, ...]:
    """Return the axes of the mesh in use that split a dimension; () leaves it whole."""
    mesh = _mesh_in_use()
    if mesh is None:
        return ()
    axes = _axes(name, mesh)
    return axes if size % _count(axes, mesh) == 0 else ()


def _axes(name: str, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    rules = dict(nn.get_logical_axis_rules())
    return tuple(axis for axis in rules.get(name, ()) if mesh.shape[axis] > 1)


def _count(axes: tuple[str, ...], mesh: jax.sharding.AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _mesh_in_use() -> jax.sharding.AbstractMesh | None:
    # Inside a `shard_map` over the whole mesh all arrays are a device's own: none is in use.
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


def over_batch(function: Callable, arrays: tuple[jax.Array, ...], heads: tuple[int | None, ...]):
    """Run a kernel that XLA cannot split on every device's own rows and heads.

    `heads` is the axis of attention heads of each array; the result is split like the first array.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    pairs = list(zip(arrays, heads, strict=True))
    batch = axes_of("batch", arrays[0].shape[0]) or None
    split = axes_of("heads", math.gcd(*(x.shape[i] for x, i in pairs if i is not None))) or None
    specs = tuple(
        PartitionSpec(batch, *(split if i == axis else None for i in range(1, x.ndim)))
        for x, axis in pairs
    )
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def over_codes(function: Callable, tokens: int, size: int, always: bool = False) -> Callable:
    """Return a function of (codes_KC, *per-token arrays) that runs where the codes' rows are.

    Args:
      function: (split, codes_kC, *per-token arrays) -> outputs, with this device's rows and tokens;
        reduces over `split.codes` itself. Outputs of one dimension or more are per token; scalars
        have to be reduced over `split.tokens`, too.
      tokens, size: N and K.
      always: give each device its own tokens even where every device has all rows, as kernels need.
    """
    split = _split(tokens, size)
    if split is None or not (split.codes or always):
        return lambda *arrays: function(Split(), *arrays)

    def call(codes: jax.Array, *per_token: jax.Array):
        n, k = (PartitionSpec(axes or None) for axes in split)
        local = jax.eval_shape(lambda *arrays: function(Split(), *arrays), codes, *per_token)
        mapped = jax.shard_map(
            lambda *arrays: function(split, *arrays),
            in_specs=(k, *(n for _ in per_token)),
            out_specs=jax.tree.map(lambda x: n if x.ndim else PartitionSpec(), local),
            check_vma=False,
        )
        return mapped(codes, *per_token)

    return call


def _split(tokens: int, size: int) -> Split | None:
    mesh = _mesh_in_use()
    if mesh is None or mesh.size == 1:
        return None
    codes = _axes("codes", mesh)
    shards = _count(codes, mesh)
    if size % shards:
        raise ValueError(
            f"a codebook of {size} codes cannot be split over {shards} devices ({' x '.join(codes)}"
            "); choose a codebook_size or mesh axes that divide"
        )
    # Tokens that the code axes share out are gathered over them: each device has other rows.
    batch = tuple(axis for axis in _axes("batch", mesh) if axis not in codes)
    return Split(batch if tokens % _count(batch, mesh) == 0 else (), codes)


def take_rows(table_KC: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the rows of a table for int codes of any shape: (..., C)."""

    # Its gradient is a scatter into the rows of the device that owns them.
    def take(split: Split, table_kC: jax.Array, codes_N: jax.Array) -> jax.Array:
        if not split.codes:
            return table_kC[codes_N]
        rows = table_kC.shape[0]
        local_N = codes_N - split.first_row(rows)
        mine_N1 = ((local_N >= 0) & (local_N < rows))[:, None]
        rows_NC = jnp.where(mine_N1, table_kC[jnp.clip(local_N, 0, rows - 1)], 0)
        return jax.lax.psum(rows_NC, split.codes)

    flat_N = codes.reshape(-1)
    rows_NC = over_codes(take, flat_N.shape[0], table_KC.shape[0])(table_KC, flat_N)
    return rows_NC.reshape(*codes.shape, -1)
