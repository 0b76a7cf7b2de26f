"""The one way in which training data are shuffled, sharded by host and resumed.

    indices -> seed -> shuffle -> repeat -> draw an example -> [host :: hosts] -> drop broken ones
    -> batch

A batch is a function of (config, seed, host) and of how many batches came before. All hosts deal
from one shuffled stream, each its own cards: in every epoch each example is seen by exactly one
host, with randomness for its place in the stream, so the global batch does not depend on the number
of hosts. A broken example is left out after it was drawn and its host goes on with its next one, so
no host waits for another.
"""

import os
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

# (index, generator for this place in the stream) -> arrays, or None for a broken example.
Draw = Callable[[int, np.random.Generator], dict[str, np.ndarray] | None]


class TrainIterator(grain.DatasetIterator):
    """A Grain iterator whose state also says which stream it is a position in."""

    def __init__(self, batches: grain.DatasetIterator, stream: dict[str, Any]):
        """Wraps an iterator.

        Args:
          batches: the iterator.
          stream: JSON-able facts on which a position depends; a state with others is refused.
        """
        super().__init__(batches)
        self._stream = stream

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch taken, JSON-able."""
        return {"stream": self._stream, "position": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position.

        Args:
          state: of `get_state`, of an iterator over the same stream.

        Raises:
          ValueError: the state belongs to another stream: other data, seed or number of hosts.
        """
        saved = state.get("stream", {})
        changed = [
            f"{key} was {saved.get(key)!r} and is {value!r}"
            for key, value in self._stream.items()
            if saved.get(key) != value
        ]
        if changed:
            raise ValueError(
                "the saved position in the training data does not fit these data: "
                f"{'; '.join(changed)}. Restore these settings, or start in a new workdir "
                "(init_from takes over the weights)"
            )
        self._parent.set_state(state["position"])


def read_options(threads: int = 0, buffer: int = 256) -> grain.ReadOptions:
    """How many threads draw examples ahead.

    Args:
      threads: 0 takes one per core, at most 32.
      buffer: examples kept ready.
    """
    threads = threads or min(os.cpu_count() or 1, 32)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)


def check_shard(index: int, count: int, examples: int) -> None:
    """Raises ValueError unless host `index` of `count` has something of so many examples."""
    if not 0 <= index < count <= examples:
        raise ValueError(
            f"shard_index {index} of shard_count {count} with {examples} pictures: "
            "need 0 <= shard_index < shard_count <= pictures"
        )


def shuffled_batches(
    draw: Draw,
    examples: int,
    *,
    data: str,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    options: grain.ReadOptions | None = None,
) -> TrainIterator:
    """An endless iterator of shuffled batches; see this module's docstring.

    Args:
      draw: makes the example of an index at one place in the stream; called from many threads.
      examples: how many indices there are.
      data: what they are, kept with a saved position.
      batch_size: examples per batch of this host.
      seed: of the order and of `draw`'s generators.
      shard_index: this host, from 0.
      shard_count: number of hosts; this one gets every shard_count-th example of the stream.
      options: of `read_options`.

    Returns:
      A Grain iterator (`get_state`, `set_state`).

    Raises:
      ValueError: a bad shard or batch size.
    """
    check_shard(shard_index, shard_count, examples)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    stream = grain.MapDataset.source(np.arange(examples)).seed(seed).shuffle().repeat()
    # random_map derives its generator from (seed, place in the stream): any one can be redrawn.
    drawn = stream.random_map(draw)[shard_index::shard_count]
    usable = drawn.filter(lambda example: example is not None)
    batches = usable.to_iter_dataset(options or read_options()).batch(batch_size)
    return TrainIterator(
        iter(batches),
        {
            "data": data,
            "pictures": examples,
            "seed": seed,
            "shard_index": shard_index,
            "shard_count": shard_count,
        },
    )


def evaluation_places(
    examples: int, batch_size: int, limit: int | None, shard_index: int, shard_count: int
) -> np.ndarray:
    """The indices of one host's evaluation, in order, -1 where its last batches are padding.

    All hosts get the same number of batches, so that computations across hosts stay in step.

    Args:
      examples: how many there are.
      batch_size: per batch of this host.
      limit: uses only so many, evenly spaced, so that a few of a data set sorted by class still
        show all classes; None all.
      shard_index, shard_count: this host, and how many there are.

    Returns:
      int (n,), n a multiple of batch_size.

    Raises:
      ValueError: a bad shard, batch size or limit.
    """
    check_shard(shard_index, shard_count, examples)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size {batch_size} and limit {limit} must be at least 1")
    count = min(limit or examples, examples)
    places = (np.arange(count) * examples // count)[shard_index::shard_count]
    mine = np.full(-(-count // (shard_count * batch_size)) * batch_size, -1)
    mine[: len(places)] = places
    return mine
