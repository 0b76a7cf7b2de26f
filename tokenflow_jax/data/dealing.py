"""Deals one endless shuffled stream to the processes of a run, and takes it up with other ones.

    place    0, 1, 2, ... in the stream. Which item lies there, and every random draw made for it,
             follow from (seed, place) alone: each epoch is a new order of all items.
    share    part of a batch. Batches of 12 in 3 shares: share 0 is dealt the places 0 to 3, 12 to
             15, 24 to 27, ..., share 1 4 to 7, 16 to 19, ...: together, one after the other, they
             make the very batch that a single share of 12 makes.

Items that turn out broken are left out and their share goes on with its next place, so no process
waits for another.

The position of a run is how many places every share has done. With the same shares each goes on
where it was: exactly the batches of a run that never stopped. With other shares the places that are
not done yet are dealt anew: no item of the stream is left out or seen twice, and where nothing was
broken the batches are those of a run that never stopped, too.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

Example = Mapping[str, np.ndarray]
_PLACE = "_place"


class DealtBatches:
    """An endless iterator of batches of one share."""

    _batches: grain.DatasetIterator | None = None

    def __init__(
        self,
        make: Callable[[int, np.random.Generator], Example | None],
        count: int,
        *,
        batch_size: int,
        seed: int,
        share: int = 0,
        shares: int = 1,
        identity: Mapping[str, Any] | None = None,
        threads: int = 0,
        buffer: int = 256,
    ):
        """Begins at the start of the stream; nothing is made before the first `next`.

        Args:
          make: (item, generator) -> arrays of one example, or None for a broken item. Called from
            several threads.
          count: number of items.
          batch_size: examples per batch of this share.
          seed: of the order and of the generators.
          share: which share, from 0.
          shares: how many there are.
          identity: JSON-able facts about the items; a position of other ones is refused.
          threads: threads that call `make`; 0 takes one per core, at most 32.
          buffer: examples kept ready.

        Raises:
          ValueError: a bad share or batch size.
        """
        check_share(share, shares, count)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        self._make, self._count, self._batch_size, self._seed = make, count, batch_size, seed
        self._share = share
        self._stream = {**(identity or {}), "pictures": count, "seed": seed}
        self._reading = reading(threads, buffer)
        self._deal = _Deal(0, shares, batch_size)
        self._done = 0  # how many of its places this share has passed
        # Places beyond the origin that were done before the stream was dealt like this.
        self._ahead: frozenset[int] = frozenset()

    def __iter__(self) -> "DealtBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch: the arrays of `make`, stacked."""
        if self._batches is None:
            self._batches = iter(self._dataset())
        batch = dict(next(self._batches))
        self._done = self._deal.owner(int(batch.pop(_PLACE)[-1]))[1] + 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch taken, JSON-able."""
        return {
            "stream": self._stream,
            **dataclasses.asdict(self._deal),
            "share": self._share,
            "done": self._done,
            "ahead": sorted(self._ahead),
        }

    def set_state(self, states: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Continues at a position.

        Args:
          states: `get_state` of every share of the run that goes on, in any order, repeated or
            not; of this share alone where the number of shares is the same.

        Raises:
          ValueError: a position in another stream (other data or seed), or one that lacks shares.
        """
        states = _checked(states, self._stream)
        by_share = {state["share"]: state for state in states}
        first = states[0]
        old = _Deal(first["origin"], first["shares"], first["block"])
        new = dataclasses.replace(old, shares=self._deal.shares, block=self._deal.block)
        if new == old and self._share in by_share:
            self._deal, self._done = old, by_share[self._share]["done"]
            self._ahead = frozenset(first["ahead"])
        else:
            missing = sorted(set(range(old.shares)) - by_share.keys())
            if missing:
                raise ValueError(
                    f"the saved position in the training data lacks those of shares {missing} of "
                    f"{old.shares}; all are needed to go on with {new.shares}"
                )
            done = [by_share[share]["done"] for share in range(old.shares)]
            origin, self._ahead = _remaining(old, done, first["ahead"])
            self._deal, self._done = dataclasses.replace(new, origin=origin), 0
        self.close()

    def close(self) -> None:
        """Ends the reading ahead; a later `next` begins it again."""
        close_reader(self._batches)
        self._batches = None

    def __del__(self):
        # Grain's own iterators refer to themselves, so that one dropped reads on until Python
        # happens to collect its garbage.
        self.close()

    def _dataset(self) -> grain.IterDataset:
        ahead, make = self._ahead, self._make  # not self: its readers must not keep it alive

        def example(place_and_item: tuple[int, int], rng: np.random.Generator):
            place, item = place_and_item
            made = None if place in ahead else make(int(item), rng)
            return None if made is None else {**made, _PLACE: np.int64(place)}

        items = grain.MapDataset.source(np.arange(self._count)).seed(self._seed)
        stream = items.shuffle().repeat().map_with_index(lambda place, item: (place, item))
        # random_map's generator follows from (seed, place): dealt out only behind it.
        mine = _Share(stream.random_map(example), self._deal, self._share)[self._done :]
        usable = mine.filter(lambda made: made is not None)
        return usable.to_iter_dataset(self._reading).batch(self._batch_size)


@dataclasses.dataclass(frozen=True)
class _Deal:
    """How the stream is dealt.

    Attributes:
      origin: the first place.
      shares: how many there are.
      block: places in a row that a share gets, its part of a batch.
    """

    origin: int
    shares: int
    block: int

    def place(self, share: int, number: int) -> int:
        """Where in the stream the place lies that is the `number`-th of a share."""
        batch, within = divmod(number, self.block)
        return self.origin + (batch * self.shares + share) * self.block + within

    def owner(self, place: int) -> tuple[int, int]:
        """The inverse: (share, number)."""
        blocks, within = divmod(place - self.origin, self.block)
        batch, share = divmod(blocks, self.shares)
        return share, batch * self.block + within


class _Share(grain.MapDataset):
    """The places of a share, in order."""

    def __init__(self, stream: grain.MapDataset, deal: _Deal, share: int):
        super().__init__(stream)
        self._deal, self._share = deal, share

    def __len__(self) -> int:
        return len(self._parent) // self._deal.shares - self._deal.origin

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[self._deal.place(self._share, index)]


class NumberedBatches:
    """An endless iterator of batches each of which follows from its number alone."""

    _batches: grain.DatasetIterator | None = None

    def __init__(
        self,
        make: Callable[[int], Any],
        *,
        identity: Mapping[str, Any],
        threads: int = 0,
        buffer: int = 8,
    ):
        """Begins with batch 0; nothing is made before the first `next`.

        Args:
          make: number -> this process's part of that batch. Called from several threads.
          identity: JSON-able facts about the batches; a position in other ones is refused. What
            differs between processes, or may change when a run goes on, is not one of them.
          threads: threads that call `make`; 0 takes one per core, at most 32.
          buffer: batches kept ready.
        """
        self._make, self._stream = make, dict(identity)
        self._reading = reading(threads, buffer)
        self._next = 0

    def __iter__(self) -> "NumberedBatches":
        return self

    def __next__(self) -> Any:
        """The next batch."""
        if self._batches is None:
            numbers = grain.MapDataset.range(self._next, 2**31 - 1)
            self._batches = iter(numbers.map(self._make).to_iter_dataset(self._reading))
        batch = next(self._batches)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch taken, JSON-able; the same in all processes."""
        return {"stream": self._stream, "next": self._next}

    def set_state(self, states: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Continues at a position; see `DealtBatches.set_state`, any one state is enough."""
        self._next = _checked(states, self._stream)[0]["next"]
        self.close()

    def close(self) -> None:
        """Ends the reading ahead; a later `next` begins it again."""
        close_reader(self._batches)
        self._batches = None

    def __del__(self):  # see DealtBatches
        self.close()


def _checked(
    states: Mapping[str, Any] | Sequence[Mapping[str, Any]], stream: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The states as a list; ValueError if they are positions in another stream."""
    states = [states] if isinstance(states, Mapping) else list(states)
    saved = states[0].get("stream", {}) if states else {}
    changed = [
        f"{key} was {saved.get(key)!r} and is {value!r}"
        for key, value in stream.items()
        if saved.get(key) != value
    ]
    if changed:
        raise ValueError(
            "the saved position in the training data does not fit these data: "
            f"{'; '.join(changed)}. Restore these settings, or start in a new workdir "
            "(init_from takes over the weights)"
        )
    return states


def check_share(share: int, shares: int, count: int) -> None:
    """Raises ValueError unless `count` items can be dealt to `shares`, of which `share` is one."""
    if not 0 <= share < shares <= count:
        raise ValueError(
            f"shard_index {share} of shard_count {shares} with {count} pictures: need "
            "0 <= shard_index < shard_count <= pictures"
        )


def reading(threads: int, buffer: int) -> grain.ReadOptions:
    """Options of Grain: so many threads (0: one per core, at most 32) and examples kept ready."""
    return grain.ReadOptions(
        num_threads=threads or min(os.cpu_count() or 1, 32), prefetch_buffer_size=buffer
    )


def close_reader(reader: grain.DatasetIterator | None) -> None:
    """Ends the reading ahead of a Grain iterator; of older versions, which cannot, nothing."""
    if hasattr(reader, "close"):
        reader.close()


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
    check_share(shard_index, shard_count, examples)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size {batch_size} and limit {limit} must be at least 1")
    count = min(limit or examples, examples)
    places = (np.arange(count) * examples // count)[shard_index::shard_count]
    mine = np.full(-(-count // (shard_count * batch_size)) * batch_size, -1)
    mine[: len(places)] = places
    return mine


def _remaining(
    deal: _Deal, done: Sequence[int], ahead: Sequence[int]
) -> tuple[int, frozenset[int]]:
    """The first place that is not done, and the places beyond it that are.

    Args:
      deal: how the stream was dealt.
      done: how many places each share has passed.
      ahead: places that were done before that.
    """
    over = set(ahead)
    nexts = [deal.place(share, number) for share, number in enumerate(done)]
    first = min(nexts)
    for place in range(first, max(nexts)):
        share, number = deal.owner(place)
        if number < done[share]:
            over.add(place)
    while first in over:
        first += 1
    return first, frozenset(place for place in over if place > first)
