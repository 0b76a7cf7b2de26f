"""Batches for evaluation: every item once, in order, what is broken or padding masked out."""

import itertools
from collections.abc import Callable, Iterator

import grain
import numpy as np

from tokenflow_jax.data.dealing import Example, check_share, read_options
from tokenflow_jax.data.examples import evenly_spaced


def eval_batches(
    make: Callable[[int], Example | None],
    count: int,
    *,
    blank: Example,
    batch_size: int,
    limit: int | None = None,
    share: int = 0,
    shares: int = 1,
    threads: int = 0,
    buffer: int = 256,
) -> Iterator[dict[str, np.ndarray]]:
    """Give every item once, in order, in equally many batches per host so that hosts stay in step.

    Args:
      make: item -> arrays of one example, or None for a broken item. Called from several threads.
      count: number of items.
      blank: the arrays that stand for a broken item, and fill the last batches.
      batch_size: examples per batch of this share.
      limit: takes at most this many items, evenly spaced.
      share: which of the `shares`, from 0; it gets every `shares`-th item.
      shares: number of shares.
      threads, buffer: as for `DealtBatches`.

    Yields:
      The arrays stacked, "mask" bool (B,), False at blanks, and "index" int32 (B,), the item or -1.
    """
    check_share(share, shares, count)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size {batch_size} and limit {limit} must be at least 1")
    places = evenly_spaced(count, limit)
    mine = np.full(-(-len(places) // (shares * batch_size)) * batch_size, -1)
    own = places[share::shares]
    mine[: len(own)] = own

    def example(item: int) -> Example:  # empty for a blank: Grain drops None
        made = make(int(item)) if item >= 0 else None
        return {} if made is None else {**made, "index": np.int32(item)}

    dataset = grain.MapDataset.source(mine).map(example)
    reader = iter(dataset.to_iter_dataset(read_options(threads, buffer)))
    return _masked(reader, batch_size, {**blank, "index": np.int32(-1)})


def _masked(
    reader: grain.DatasetIterator, batch_size: int, blank: Example
) -> Iterator[dict[str, np.ndarray]]:
    try:
        while batch := list(itertools.islice(reader, batch_size)):
            yield {
                **{key: np.stack([(row or blank)[key] for row in batch]) for key in blank},
                "mask": np.array([bool(row) for row in batch]),
            }
    finally:  # also when nobody asks for the rest
        reader.close()
