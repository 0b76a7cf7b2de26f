"""Gradient accumulation: one function over microbatches, scanned on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Step = Callable[[PyTree, PyTree, jax.Array | None], tuple[PyTree, PyTree, PyTree]]


def accumulate(
    function: Step, batch: PyTree, count: int, carry: PyTree = None, key: jax.Array | None = None
) -> tuple[PyTree, PyTree, PyTree]:
    """Call a function on `count` microbatches; return the last carry, the sums and the rows.

    Args:
      function: (carry, microbatch, key) -> (carry, sums, rows). `sums` are added up; `rows` have
        one entry per row of the microbatch and come back in the order of the batch.
      batch: arrays whose leading axis is split.
      count: number of microbatches; with 1 the function is called as it is.
      carry: passed from one microbatch to the next.
      key: split into one key per microbatch.

    Raises:
      ValueError: the batch does not split evenly.
    """
    if count == 1:
        return function(carry, batch, key)
    size = len(jax.tree.leaves(batch)[0])
    if size % count:
        raise ValueError(f"a batch of {size} rows does not split by accumulate={count}")
    # Microbatch m takes every count-th row, so that each device keeps the rows it holds.
    split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = None if key is None else jax.random.split(key, count)
    first = jax.tree.map(lambda x: x[0], (split, keys))
    shapes = jax.eval_shape(function, carry, *first)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(carried, inputs):
        carry, sums = carried
        carry, new, rows = function(carry, *inputs)
        return (carry, jax.tree.map(jnp.add, sums, new)), rows

    (carry, sums), rows = jax.lax.scan(body, (carry, zeros), (split, keys))
    rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)
    return carry, sums, rows
