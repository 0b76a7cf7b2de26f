"""Every item once, in order, in batches of one shape: for evaluation and encoding."""

import itertools
from collections.abc import Callable, Iterator

import grain
import numpy as np

from tokenflow_jax.data.dealing import Example, check_share
from tokenflow_jax.data.examples import Skipped, evenly_spaced
from tokenflow_jax.data.stream_order import read_options


def masked_batches(
    make: Callable[[int], Example | None],  # item -> arrays; None: broken
    count: int,  # of items
    *,
    blank: Example,  # the arrays that stand for a broken item, and fill the last batches
    batch_size: int,  # examples of this share
    limit: int | None = None,  # takes at most this many items, evenly spaced
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 0,  # that call `make`; 0 takes one per core, at most 32
    buffer: int = 256,  # examples kept ready
    skipped: Skipped,  # names the data when all items of the share are broken, which is an error
    wanted: str = "picture",
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every item once, in order, in equally many batches per host so that hosts stay in step.

    A batch has the arrays stacked, "mask", False at blanks, and "index", the item or -1.
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

    def batches() -> Iterator[dict[str, np.ndarray]]:
        any_usable = not len(own)
        try:
            while batch := list(itertools.islice(reader, batch_size)):
                any_usable |= any(batch)
                yield {
                    **{key: np.stack([(row or blank)[key] for row in batch]) for key in blank},
                    "mask": np.array([bool(row) for row in batch]),
                }
        finally:  # also when the rest is never asked for
            reader.close()
        if not any_usable:
            raise ValueError(skipped.nothing_usable(wanted))

    return batches()
