"""Batches of conversations: deterministic, resumable, sharded by host, of a few static shapes.

    samples -> order of the epoch -> global batch -> ids of all -> rows -> bucket -> own pictures

All hosts compute the ids of a whole batch and so agree on its rows and on their length, one of few
buckets, for each of which the training step is compiled once; pictures are read by the host that
trains on them. A broken sample leaves its place empty (no loss), so that no other is trained twice
and no host waits for another.

A row is one conversation, or `pack` of them, none of which reads another: long ones share a row
with short ones, so that all rows are about as long and few tokens are padding.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from tokenflow_jax.data.chat import grouping, insertion
from tokenflow_jax.data.chat.mixed import MixedConversations
from tokenflow_jax.data.chat.opened import Conversations
from tokenflow_jax.data.dealing import NumberedBatches
from tokenflow_jax.data.examples import Guard
from tokenflow_jax.data.mixture import Plan
from tokenflow_jax.data.stream_order import threads_for

_MOST_EMPTY = 32  # batches in a row
_Data = Conversations | MixedConversations


def collate(
    data: _Data,
    places: list[int],
    shard: tuple[int, int] = (0, 1),
    *,
    pixels: bool = True,
    draws: Sequence[np.random.Generator] = (),  # of each sample, see `Conversations.row`
) -> dict[str, np.ndarray]:
    """Return the part of a batch of these samples (-1: none) for shard (this host, hosts).

    It has "ids", "labels", "places", "segments", int32 (R, L) with padding on the right and P =
    `pack` conversations in each of the R rows, and "image" uint8 (R, P, size, size, 3) or, without
    `pixels`, "image_index" int32 (R, P), the place in `data.images`. Of a mixture also "source",
    int32 (R, P), the data set of each conversation, -1 where there is none.
    """
    config, size = data.config, data.config.image_size
    found = [
        data.row(place, rng) if place >= 0 else None
        for place, rng in zip(places, draws or [None] * len(places), strict=True)
    ]
    lengths = [len(row[0]["ids"]) if row else 0 for row in found]
    members = _share_rows(lengths, config.pack)
    longest = max(sum(lengths[i] for i in row) for row in members)
    length = insertion.bucket_for(longest, config.row_lengths)
    own = len(members) // shard[1]
    members = members[shard[0] * own : (shard[0] + 1) * own]
    rows: list[dict[str, np.ndarray]] = []
    shape, dtype = ((size, size, 3), np.uint8) if pixels else ((), np.int32)
    images = np.zeros((own, config.pack, *shape), dtype)
    sources = np.full((own, config.pack), -1, np.int32)
    for r, row in enumerate(members):
        kept = []
        for p, i in enumerate(row):
            tokens, name = found[i] or ({}, "")
            if name and pixels:
                image = data.image(name, data.label(places[i]))
                images[r, p] = 0 if image is None else image
            elif name:
                images[r, p] = data.image_places[name]
            kept.append({} if data.is_broken(name) else tokens)
            if kept[-1] and isinstance(data, MixedConversations):
                sources[r, p] = data.source_of(places[i])
        codes = config.drawn.codes if config.drawn else 0
        rows.append(insertion.join_rows(kept, config.vectors, codes))
    batch = {**insertion.pad_rows(rows, length), "image" if pixels else "image_index": images}
    return {**batch, "source": sources} if isinstance(data, MixedConversations) else batch


def _share_rows(lengths: list[int], pack: int) -> list[list[int]]:
    """Deal conversations to rows of `pack` that are about as long."""
    if pack == 1:
        return [[i] for i in range(len(lengths))]
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return grouping.even_chunks(longest_first, lengths, len(lengths) // pack)


def train_batches(
    data: _Data,
    *,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    pixels: bool = True,
) -> NumberedBatches:
    """Return an endless iterator of this host's part of every batch; see `collate`.

    `batch_size` counts the conversations of a batch over all hosts.
    """
    pack = data.config.pack
    parts = shard_count * pack
    if batch_size < 1 or batch_size % parts or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"batch_size {batch_size} for host {shard_index} of {shard_count}, {pack} "
            f"conversations in a row: must be a positive multiple of {parts}"
        )
    check_usable(data)
    mixed = isinstance(data, MixedConversations)
    # Empty batches do train: momentum and decay go on.
    guard = Guard(data.skipped, "conversation", _MOST_EMPTY * batch_size // shard_count)

    def make(number: int, plan: Plan | None = None) -> dict[str, np.ndarray]:
        positions = range(number * batch_size, (number + 1) * batch_size)
        places = [data.sample_at(place, plan, seed, batch_size) for place in positions]
        draws = [np.random.default_rng((seed, place)) for place in positions]
        shard = shard_index, shard_count
        batch = collate(data, places, shard, pixels=pixels, draws=draws)
        guard.check(bool(batch["segments"].any()), batch_size // shard_count)
        return batch

    return NumberedBatches(
        make,
        identity={
            "data": data.name,
            "conversations": len(data),
            "batch_size": batch_size,
            "order": data.config.order,
            "seed": seed,
            **({"sources": data.counts} if mixed else {}),
        },
        threads=threads_for(data.config.threads, data.config.path, data.config.image_folder),
        plan=Plan(data.weights, seed) if mixed else None,
        per_batch=batch_size,
    )


def check_usable(data: _Data) -> None:
    """Raise ValueError when none of the first thousand conversations can be used."""
    tried = range(min(len(data), 1000))
    if not any(data.row(i) for i in tried):
        raise ValueError(
            f"no usable conversation among the first {len(tried)} of {data.name}: "
            f"{data.skipped_in()}; see python -m tokenflow_jax.data.validate"
        )


def eval_batches(
    data: Conversations, *, batch_size: int, pixels: bool = True
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every conversation once, in order; the last batch is filled up with empty rows."""
    any_usable = False
    for start in range(0, len(data), batch_size):
        places = list(range(start, min(start + batch_size, len(data))))
        batch = collate(data, places + [-1] * (batch_size - len(places)), pixels=pixels)
        any_usable |= bool(batch["segments"].any())
        yield batch
    if not any_usable:
        raise ValueError(data.skipped.nothing_usable("conversation"))
