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
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 0,
    buffer: int = 256,
    nothing_usable: Callable[[], str] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Give every item once, in order, in equally many batches per host so that hosts stay in step.

    Args:
      make, count, batch_size, shard_index, shard_count, threads, buffer: as for `DealtBatches`.
      blank: the arrays that stand for a broken item, and fill the last batches.
      limit: takes at most this many items, evenly spaced.
      nothing_usable: raises ValueError with this message if all items of the share are broken.

    Yields:
      The arrays stacked, "mask" bool (B,), False at blanks, and "index" int32 (B,), the item or -1.
    """
    check_share(shard_index, shard_count, count)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size {batch_size} and limit {limit} must be at least 1")
    places = evenly_spaced(count, limit)
    mine = np.full(-(-len(places) // (shard_count * batch_size)) * batch_size, -1)
    own = places[shard_index::shard_count]
    mine[: len(own)] = own

    def example(item: int) -> Example:  # empty for a blank: Grain drops None
        made = make(int(item)) if item >= 0 else None
        return {} if made is None else {**made, "index": np.int32(item)}

    dataset = grain.MapDataset.source(mine).map(example)
    reader = iter(dataset.to_iter_dataset(read_options(threads, buffer)))
    blank = {**blank, "index": np.int32(-1)}
    return _masked(reader, batch_size, blank, nothing_usable if len(own) else None)


def _masked(
    reader: grain.DatasetIterator,
    batch_size: int,
    blank: Example,
    nothing_usable: Callable[[], str] | None,
) -> Iterator[dict[str, np.ndarray]]:
    any_usable = False
    try:
        while batch := list(itertools.islice(reader, batch_size)):
            any_usable |= any(batch)
            yield {
                **{key: np.stack([(row or blank)[key] for row in batch]) for key in blank},
                "mask": np.array([bool(row) for row in batch]),
            }
    finally:  # also when nobody asks for the rest
        reader.close()
    if nothing_usable and not any_usable:
        raise ValueError(nothing_usable())
