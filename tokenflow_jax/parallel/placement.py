"""Where activations lie, and codebooks whose rows are split over devices.

Where the mesh in use (`mesh.use`) gives the logical axis "codes" more than one device, each of them
works on its own rows, and what crosses the network is as small as the tokens: no codebook is ever
gathered. Without a mesh everything here is the plain computation.

Shapes as in `quantizers`: N tokens, K codes, C channels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class Split(NamedTuple):
    """Mesh axes that the tokens and the rows of the codebooks are split over; () is not at all."""

    tokens: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()

    def first_row(self, rows: int) -> jax.Array | int:
        """Number of this device's first row, each having `rows` of them."""
        return rows * jax.lax.axis_index(self.codes) if self.codes else 0


def on_batch(x: jax.Array, *others: str | None) -> jax.Array:
    """Says that an activation's leading axis is the batch, and how its last axes are called.

    Without such words between the layers, XLA may well split the work by a parameter's axes and
    hold the whole batch on every device. Does nothing where no mesh is in use.

    Args:
      x: (B, ...).
      *others: logical names of the last axes; one that the mesh cannot split evenly stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    names = ("batch", *(None,) * (x.ndim - 1 - len(others)), *others)
    fitting = (
        name if name and axes_of(name, size) else None
        for name, size in zip(names, x.shape, strict=True)
    )
    return nn.with_logical_constraint(x, tuple(fitting))


def axes_of(name: str, size: int) -> tuple[str, ...]:
    """Axes of the mesh in use that a dimension is split over.

    Args:
      name: logical name of the dimension.
      size: of it.

    Returns:
      Names of mesh axes; () where it stays whole, for want of a mesh or because it cannot be split
      evenly. Inside a `shard_map` over the whole mesh all arrays are a device's own: (), too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return ()
    axes = _axes(name, mesh)
    return axes if size % _count(axes, mesh) == 0 else ()


def over_batch(function: Callable, arrays: tuple[jax.Array, ...], heads: tuple[int | None, ...]):
    """Runs a kernel that XLA cannot split on every device's own rows and heads.

    Args:
      function: of the arrays; returns one array that is split as the first one is.
      arrays: each (B, ...).
      heads: for each array, its axis of attention heads, or None.

    Returns:
      What the function returns, whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays)
    batch = axes_of("batch", arrays[0].shape[0])
    sizes = [x.shape[axis] for x, axis in zip(arrays, heads, strict=True) if axis is not None]
    split = axes_of("heads", math.gcd(*sizes))

    def spec(x: jax.Array, axis: int | None) -> PartitionSpec:
        return PartitionSpec(
            batch or None, *((split or None) if i == axis else None for i in range(1, x.ndim))
        )

    specs = tuple(spec(x, axis) for x, axis in zip(arrays, heads, strict=True))
    mapped = jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*arrays)


def over_codes(function: Callable, tokens: int, size: int, always: bool = False) -> Callable:
    """Runs a function of tokens and codes where the rows of the codebook are.

    Args:
      function: (split, codes (k, ...), *per-token arrays) -> outputs, with this device's rows and
        tokens; reduces over `split.codes` itself. Outputs of one dimension or more are per token;
        scalars are to be reduced over `split.tokens` too.
      tokens: N, the length of the per-token arrays.
      size: K.
      always: gives each device of the mesh in use its own tokens also where every device has all
        the rows; kernels need that, for XLA cannot split them.

    Returns:
      A function of (codes, *per-token arrays), whole ones.

    Raises:
      ValueError: K rows cannot be split evenly.
    """
    split = _split(tokens, size)
    if split is None or not (split.codes or always):
        return lambda *arrays: function(Split(), *arrays)

    def call(codes: jax.Array, *per_token: jax.Array):
        n, k = (PartitionSpec(axes or None) for axes in split)
        local = jax.eval_shape(lambda *arrays: function(Split(), *arrays), codes, *per_token)
        out = jax.tree.map(lambda x: n if x.ndim else PartitionSpec(), local)
        mapped = jax.shard_map(
            lambda *arrays: function(split, *arrays),
            in_specs=(k, *(n for _ in per_token)),
            out_specs=out,
            check_vma=False,
        )
        return mapped(codes, *per_token)

    return call


def _split(tokens: int, size: int) -> Split | None:
    """What the mesh in use makes of the logical axes "batch" and "codes"; None without a mesh.

    Inside a `shard_map` over the whole mesh all arrays are a device's own: there is none, either.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
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


def _axes(name: str, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    rules = dict(nn.get_logical_axis_rules())
    return tuple(axis for axis in rules.get(name, ()) if mesh.shape[axis] > 1)


def _count(axes: tuple[str, ...], mesh: jax.sharding.AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def take_rows(table_KC: jax.Array, codes: jax.Array) -> jax.Array:
    """Rows of a table for int codes of any shape: (..., C).

    The gradient is a scatter into the rows of the device that owns them.
    """

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
