"""Curves of each data set of a mixture: sums on the device, means where there are any."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]  # source -> [sum, count]


def sums_by_source(
    values: jax.Array, sources: jax.Array, names: Sequence[str], counts: jax.Array | None = None
) -> Sums:
    """Add up values of one shape with `sources`, each one's place in `names`; negative: none.

    `counts` are what the values count for; 1 each by default.
    """
    counts = jnp.ones_like(values) if counts is None else counts

    def of(source: int) -> jax.Array:
        own = sources == source
        return jnp.stack([jnp.sum(values * own), jnp.sum(counts * own)])

    return {name: of(source) for source, name in enumerate(names)}


def means_by_source(what: str, sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return metrics "source/NAME/what"; NaN, which averages leave out, where there is none."""
    return {f"source/{name}/{what}": total / count for name, (total, count) in sums.items()}
