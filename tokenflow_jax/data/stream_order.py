"""The endless stream of places and items, before it is dealt: every epoch in another order."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from tokenflow_jax.data.block_order import block_order
from tokenflow_jax.data.mixture import Plan
from tokenflow_jax.remote import is_remote

_MOST_THREADS = 32
_SEEDS_APART = 1_000_003  # sources of a mixture have orders of their own
Announce = Callable[[int, int, np.ndarray], None]


def numbered_items(
    counts: Sequence[int],
    seed: int,
    blocks: Sequence[int] | int,
    plan: Plan | None,
    announce: Announce,
) -> grain.MapDataset:
    """Return the stream of (place, item), which is random access.

    Args:
      counts: items of each source; an item counts from the first one of the first source.
      blocks: block and window of `block_order`, or 0.
      plan: the sources of a mixture; None for the only one.
      announce: told source, first number and items of every mix of `block_order`.
    """
    places = grain.MapDataset.range(0, sys.maxsize).seed(seed)
    if plan is None and not blocks:
        items = grain.MapDataset.source(np.arange(*counts)).seed(seed).shuffle().repeat()
        return items.map_with_index(lambda place, item: (place, item))
    firsts, orders = np.concatenate([[0], np.cumsum(counts)]), []
    for source, count in enumerate(counts):
        own = seed + source * _SEEDS_APART
        if blocks:
            orders.append(block_order(count, *blocks, own, functools.partial(announce, source)))
        else:
            items = grain.MapDataset.source(np.arange(count)).seed(own).shuffle().repeat()
            orders.append(items.__getitem__)

    def at(place: int) -> tuple[int, int]:
        source, number = plan.at(int(place)) if plan else (0, int(place))
        return place, int(firsts[source] + orders[source](number))

    return places.map(at)


def threads_for(threads: int, *paths: str) -> int:
    """Return the number of threads for data at some paths: many wait for a remote store at once."""
    return threads or (_MOST_THREADS if any(map(is_remote, paths)) else 0)


def read_options(threads: int, buffer: int) -> grain.ReadOptions:
    return grain.ReadOptions(
        num_threads=threads or min(os.cpu_count() or 1, _MOST_THREADS), prefetch_buffer_size=buffer
    )
