"""Deal one endless shuffled stream to the processes of a run; resume on any number of them.

    place    0, 1, 2, ... in the stream. The item there and every random draw made for it follow
             from (seed, place) alone: each epoch is a new order of all items.
    share    part of a batch. Batches of 12 in 3 shares: share 0 is dealt the places 0 to 3, 12 to
             15, 24 to 27, ..., share 1 4 to 7, 16 to 19, ...: joined in order, they make the very
             batch that a single share of 12 makes.

A share goes on with its next place after a broken item, so no process waits for another.

The position of a run is the number of places that each share has done. The same number of shares
continues with exactly the batches of an uninterrupted run. Another number is dealt the places that
are not done yet: no item is lost or seen twice, and where none was broken the batches are the same.
"""

# Grain's ElasticIterator also resumes on other numbers of processes. It is not used because it
# - deals single rows in turn, so the rows of a batch change their order with the number of shares;
# - refuses filters, which leave out broken pictures here;
# - saves one number for all shares, which cannot say that one has skipped more broken pictures than
#   another: after a restart some would be lost or seen twice.

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from tokenflow_jax.data import stream_order
from tokenflow_jax.data.mixture import Plan
from tokenflow_jax.messages import shown

Example = Mapping[str, np.ndarray]
States = Mapping[str, Any] | Sequence[Mapping[str, Any]]
_PLACE = "_place"
_BLOCKS = "shuffle_block"


class _Batches:
    """An iterator that reads ahead until it is closed or dropped."""

    _reader: grain.DatasetIterator | None = None

    def __iter__(self):
        return self

    def _read(self) -> Any:
        if self._reader is None:
            self._reader = iter(self._dataset())
        return next(self._reader)

    def close(self) -> None:
        """Stop reading ahead; the next `next` starts again."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def __del__(self):
        # Grain's own iterators refer to themselves, so that one dropped reads on until Python
        # happens to collect its garbage.
        self.close()


class DealtBatches(_Batches):
    """An endless iterator of the batches of one share."""

    def __init__(
        self,
        make: Callable[[int, np.random.Generator], Example | None],  # item -> arrays; None: broken
        count: int | Mapping[str, int],  # of items; of a mixture, of each source by name
        *,
        weights: Sequence[float] = (),  # of the sources of a mixture
        batch_size: int,  # examples of this share
        seed: int,  # of the order and of the generators
        shard_index: int = 0,
        shard_count: int = 1,
        identity: Mapping[str, Any] | None = None,  # JSON-able; positions in others are refused
        threads: int = 0,  # that call `make`; 0 takes one per core, at most 32
        buffer: int = 256,  # examples kept ready
        shuffle_block: int = 0,  # neighbours that stay close, see `block_order`; 0: none do
        shuffle_window: int = 1,  # items that are mixed at a time
        will_need: Callable[[np.ndarray], None] | None = None,  # told the items of a mix, sorted
    ):
        """Start at the beginning of the stream; nothing is made before the first `next`."""
        self._mixture = dict(count) if isinstance(count, Mapping) else None
        self._counts = list(count.values()) if isinstance(count, Mapping) else [count]
        check_share(shard_index, shard_count, sum(self._counts))
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        self._make, self._batch_size, self._seed = make, batch_size, seed
        self._share = shard_index
        self._blocks = [shuffle_block, shuffle_window] if shuffle_block else 0
        self._stream = {
            **(identity or {}), "pictures": sum(self._counts), "seed": seed, _BLOCKS: self._blocks,
            **({"sources": self._mixture} if self._mixture else {}),
        }  # fmt: skip
        self._plan = Plan(weights, seed) if self._mixture else None
        self._options = stream_order.read_options(threads, buffer)
        self._will_need = will_need or (lambda items: None)
        self._deal = _Deal(0, shard_count, batch_size)
        self._done = 0  # number of its places that this share has passed
        # Places beyond the origin that were done before the stream was dealt like this.
        self._ahead: frozenset[int] = frozenset()

    def __next__(self) -> dict[str, np.ndarray]:
        batch = dict(self._read())
        self._done = self._deal.owner(int(batch.pop(_PLACE)[-1]))[1] + 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the JSON-able position after the last batch taken."""
        return {
            "stream": self._stream,
            **dataclasses.asdict(self._deal),
            "share": self._share,
            "done": self._done,
            "ahead": sorted(self._ahead),
            **({"plan": self._plan.state()} if self._plan else {}),
        }

    def set_state(self, states: States) -> None:
        """Continue at a position: `get_state` of all shares, in any order, repeated or not.

        Where the number of shares is the same, that of this share is enough.
        """
        states = _checked(states, self._stream)
        by_share = {state["share"]: state for state in states}
        first = states[0]
        old = _Deal(first["origin"], first["shares"], first["block"])
        new = dataclasses.replace(old, shares=self._deal.shares, block=self._deal.block)
        mixed_anew = self._plan and self._plan.weights != first["plan"]["weights"]
        if new == old and self._share in by_share and not mixed_anew:
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
            if mixed_anew:
                # Another order begins at the first place that no share has passed; the few places
                # before it that some have not passed are left out.
                origin, self._ahead = max(map(old.place, range(old.shares), done)), frozenset()
            self._deal, self._done = dataclasses.replace(new, origin=origin), 0
        if self._plan:
            self._plan = self._plan.resumed(first["plan"], self._deal.origin)
        self.close()

    def _dataset(self) -> grain.IterDataset:
        # Not self: its readers must not keep it alive.
        ahead, make, deal, share = self._ahead, self._make, self._deal, self._share
        will_need, plan = self._will_need, self._plan
        firsts = np.concatenate([[0], np.cumsum(self._counts)])

        def example(place_and_item: tuple[int, int], rng: np.random.Generator):
            place, item = place_and_item
            made = None if place in ahead else make(int(item), rng)
            return None if made is None else {**made, _PLACE: np.int64(place)}

        def announce(source: int, first: int, items: np.ndarray) -> None:
            numbers = np.arange(len(items)) + first
            places = plan.places(source, first, len(items)) if plan else numbers
            blocks = (places - deal.origin) // deal.block
            own = (blocks >= 0) & (blocks % deal.shares == share)
            will_need(np.sort(items[own]) + firsts[source])

        numbered = stream_order.numbered_items(
            self._counts, self._seed, self._blocks, plan, announce
        )
        # random_map's generator follows from (seed, place): dealt out only behind it.
        stream = numbered.random_map(example)
        numbers = grain.MapDataset.range(self._done, sys.maxsize)
        mine = numbers.map(lambda number: stream[deal.place(share, number)])
        usable = mine.filter(lambda made: made is not None)
        return usable.to_iter_dataset(self._options).batch(self._batch_size)


@dataclasses.dataclass(frozen=True)
class _Deal:
    """The stream is dealt from place `origin` on, in blocks of `block` places per share."""

    origin: int
    shares: int
    block: int

    def place(self, share: int, number: int) -> int:
        batch, within = divmod(number, self.block)
        return self.origin + (batch * self.shares + share) * self.block + within

    def owner(self, place: int) -> tuple[int, int]:
        """Return the inverse: (share, number)."""
        blocks, within = divmod(place - self.origin, self.block)
        batch, share = divmod(blocks, self.shares)
        return share, batch * self.block + within


class NumberedBatches(_Batches):
    """An endless iterator of batches each of which follows from its number alone.

    `identity` must hold nothing that differs between processes or may change when a run goes on.
    """

    def __init__(
        self,
        make: Callable[..., Any],  # of a number and, for a mixture, `plan`
        *,
        identity: Mapping[str, Any],
        threads: int = 0,
        buffer: int = 8,
        plan: Plan | None = None,  # of a mixture
        per_batch: int = 1,  # places of the plan in a batch
    ):
        self._make, self._stream = make, dict(identity)
        self._plan, self._per_batch = plan, per_batch
        self._options = stream_order.read_options(threads, buffer)
        self._next = 0

    def __next__(self) -> Any:
        batch = self._read()
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the JSON-able position, the same in all processes."""
        plan = {"plan": self._plan.state()} if self._plan else {}
        return {"stream": self._stream, "next": self._next, **plan}

    def set_state(self, states: States) -> None:
        """Continue at a position; see `DealtBatches.set_state`, any one state is enough."""
        state = _checked(states, self._stream)[0]
        self._next = state["next"]
        if self._plan:
            self._plan = self._plan.resumed(state["plan"], self._next * self._per_batch)
        self.close()

    def _dataset(self) -> grain.IterDataset:
        numbers = grain.MapDataset.range(self._next, sys.maxsize)
        make = functools.partial(self._make, plan=self._plan) if self._plan else self._make
        return numbers.map(make).to_iter_dataset(self._options)


def _checked(states: States, stream: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    states = [states] if isinstance(states, Mapping) else list(states)
    # Positions from before there were blocks lack them.
    saved = {_BLOCKS: 0, **states[0].get("stream", {})} if states else {}
    changed = [
        f"{key} was {shown(saved.get(key))} and is {value!r}"
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
    """Raise ValueError unless `count` items can be dealt to `shares`, of which `share` is one."""
    if not 0 <= share < shares <= count:
        raise ValueError(
            f"shard_index {share} of shard_count {shares} with {count} pictures: need "
            "0 <= shard_index < shard_count <= pictures"
        )


def _remaining(
    deal: _Deal, done: Sequence[int], ahead: Sequence[int]
) -> tuple[int, frozenset[int]]:
    """Return the first place that is not done, and the places beyond it that are."""
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
