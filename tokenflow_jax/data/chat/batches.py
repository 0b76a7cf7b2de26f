"""Batches of conversations: deterministic, resumable, sharded by host, of a few static shapes.

    samples -> order of the epoch -> global batch -> ids of all -> rows -> bucket -> own pictures

All hosts compute the ids of a whole batch and so agree on its rows and on their length, one of few
buckets, for each of which the training step is compiled once; pictures are read by the host that
trains on them. A broken sample leaves its place empty (no loss), so that no other is trained twice
and no host waits for another.

A row is one conversation, or `pack` of them, none of which reads another: long ones share a row
with short ones, so that all rows are about as long and few tokens are padding.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokenflow_jax.data import text
from tokenflow_jax.data.chat import conversations, grouping, insertion
from tokenflow_jax.data.chat.conversations import JsonlConversations
from tokenflow_jax.data.chat.emoji import EmojiConversations
from tokenflow_jax.data.chat.tabular import TableConversations
from tokenflow_jax.data.chat.templates import TEMPLATES, get_template
from tokenflow_jax.data.dealing import NumberedBatches
from tokenflow_jax.data.examples import Broken, Guard, Skipped, notes_on

_MOST_EMPTY = 32  # batches in a row
_KEPT_ROWS = 50_000  # rows of data sets up to this size are kept for the next epoch


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """One data set of conversations and the way they become arrays."""

    name: str  # "emoji", "jsonl", "parquet" or "arrow"
    path: str = ""  # the file of conversations; not used by "emoji"
    image_folder: str = ""  # that paths of images are relative to; the file's folder when empty
    split: str = "train"  # or "heldout" or "all"
    questions: tuple[str, ...] = ()  # for "emoji": keys of `emoji.QUESTIONS`; all when empty
    together: bool = False  # for "emoji": all questions about a picture in one conversation
    template: str = "vicuna_v1"  # a key of `templates.TEMPLATES`
    system: str | None = None  # replaces the template's own system prompt
    text_tokenizer: str = "bytes"  # see `text.load_text_tokenizer`
    image_mode: str = "pad"  # or "square", see `conversations.fit_image`
    image_size: int = 64  # side of the pictures in pixels
    vectors: int = 64  # that the tokenizer makes of a picture
    max_length: int = 2048  # tokens of a conversation, vectors included; longer ones are cut
    pack: int = 1  # conversations per row
    buckets: tuple[int, ...] = ()  # row lengths below the longest, pack * max_length; ascending
    order: str = "random"  # of an epoch; or "grouped" by kind and length
    threads: int = 0  # for preparing batches; 0 takes one per core, at most 32
    allow_outside: bool = False  # read pictures outside the folder, by path or link
    image_column: str = ""  # of "parquet" and "arrow"; found by name and type when empty

    def __post_init__(self):
        problems = []
        choices = {
            "name": ("emoji", "jsonl", "parquet", "arrow"), "image_mode": conversations.IMAGE_MODES,
            "order": ("random", "grouped"), "template": tuple(TEMPLATES),
        }  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                problems.append(f"{field} {getattr(self, field)!r} is not one of {allowed}")
        for field in ("image_size", "vectors", "max_length", "pack"):
            if getattr(self, field) < 1:
                problems.append(f"{field} is {getattr(self, field)}, must be at least 1")
        if list(self.buckets) != sorted({*self.buckets}) or min(self.buckets, default=1) < 1:
            problems.append(f"buckets {self.buckets} must be positive and ascend")
        if problems:
            raise ValueError("data: " + "; ".join(problems))

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """The lengths that rows may have; buckets beyond the longest row are left out."""
        longest = self.pack * self.max_length
        return (*(length for length in self.buckets if length < longest), longest)


class Conversations:
    """An opened data set of conversations: rows, pictures, and the record of broken ones."""

    def __init__(self, config: ConversationConfig, limit: int | None = None):
        self.config = config
        self.source: Any
        if config.name == "emoji":
            self.source = EmojiConversations(config.split, config.questions, config.together)
        elif config.name != "jsonl":
            self.source = TableConversations(
                config.name, config.path, config.split, config.image_column
            )
        else:
            self.source = JsonlConversations(
                config.path, config.split, config.image_folder, config.allow_outside
            )
        if limit is not None:
            self.source.limit(limit)
        self.text_tokenizer = text.load_text_tokenizer(config.text_tokenizer)
        self.template = get_template(config.template, config.system)
        self.name = f"{self.source.name} {config.split}"
        self.skipped = Skipped(self.name, len(self), "conversations")
        self.broken_images: set[str] = set()
        self._rows: dict[int, tuple[dict[str, np.ndarray], str]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int) -> tuple[dict[str, np.ndarray], str] | None:
        """Return the tokens of a sample and the name of its picture; None where it is broken."""
        if index in self._rows:
            return self._rows[index]
        try:
            sample = self.source[index]
            row = conversations.prepare(
                sample, self.template, self.text_tokenizer, self.config.vectors,
                self.config.max_length,
            )  # fmt: skip
        except Broken as error:
            self.skipped.add(self.source.label(index), error)
            return None
        if len(self) <= _KEPT_ROWS:
            self._rows[index] = row, sample.image
        return row, sample.image

    def image(self, image: str, label: str = "") -> np.ndarray | None:
        """Return a picture, uint8 (size, size, 3); None where it is broken."""
        config = self.config
        try:
            data = self.source.image_bytes(image)
            return conversations.load_image(data, config.image_size, config.image_mode)
        except Broken as error:
            self.skipped.add(label or image, error)
            self.broken_images.add(image)
            return None

    @functools.cached_property
    def image_places(self) -> dict[str, int]:
        """The names of all pictures, in order of appearance, with their places in `images`."""
        names: dict[str, None] = {}
        for index in range(len(self)):
            with contextlib.suppress(Broken):  # counted where the sample is wanted
                names[self.source[index].image] = None
        return {name: place for place, name in enumerate(filter(None, names))}

    @property
    def images(self) -> list[str]:
        return list(self.image_places)

    def order(self, epoch: int, seed: int, batch_size: int) -> np.ndarray:
        """Return the samples of an epoch in the order in which they train."""
        permute = np.random.default_rng([seed, epoch]).permutation
        if self.config.order == "random":
            return np.asarray(permute(len(self)))
        return grouping.grouped_order(self.source.lengths(), batch_size, 1, permute)

    def notes(self) -> list[str]:
        """Return a line on what was skipped, if anything was."""
        return notes_on([self.skipped])


def collate(
    data: Conversations, places: list[int], shard: tuple[int, int] = (0, 1), *, pixels: bool = True
) -> dict[str, np.ndarray]:
    """Return the part of a batch of these samples (-1: none) for shard (this host, hosts).

    It has "ids", "labels", "places", "segments", int32 (R, L) with padding on the right and P =
    `pack` conversations in each of the R rows, and "image" uint8 (R, P, size, size, 3) or, without
    `pixels`, "image_index" int32 (R, P), the place in `data.images`.
    """
    config, size = data.config, data.config.image_size
    found = [data.row(place) if place >= 0 else None for place in places]
    lengths = [len(row[0]["ids"]) if row else 0 for row in found]
    members = _share_rows(lengths, config.pack)
    longest = max(sum(lengths[i] for i in row) for row in members)
    length = insertion.bucket_for(longest, config.row_lengths)
    own = len(members) // shard[1]
    members = members[shard[0] * own : (shard[0] + 1) * own]
    rows: list[dict[str, np.ndarray]] = []
    shape, dtype = ((size, size, 3), np.uint8) if pixels else ((), np.int32)
    images = np.zeros((own, config.pack, *shape), dtype)
    for r, row in enumerate(members):
        kept = []
        for p, i in enumerate(row):
            tokens, name = found[i] or ({}, "")
            if name and pixels:
                image = data.image(name, data.source.label(places[i]))
                images[r, p] = 0 if image is None else image
            elif name:
                images[r, p] = data.image_places[name]
            kept.append({} if name in data.broken_images else tokens)
        rows.append(insertion.join_rows(kept, config.vectors))
    return {**insertion.pad_rows(rows, length), "image" if pixels else "image_index": images}


def _share_rows(lengths: list[int], pack: int) -> list[list[int]]:
    """Deal conversations to rows of `pack` that are about as long."""
    if pack == 1:
        return [[i] for i in range(len(lengths))]
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return grouping.even_chunks(longest_first, lengths, len(lengths) // pack)


def train_batches(
    data: Conversations,
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
    # Threads work on neighboring batches: at most two epochs at a time.
    order = functools.lru_cache(maxsize=3)(lambda epoch: data.order(epoch, seed, batch_size))
    lock = threading.Lock()
    # Empty batches do train: momentum and decay go on.
    guard = Guard(data.skipped, "conversation", _MOST_EMPTY * batch_size // shard_count)

    def make(number: int) -> dict[str, np.ndarray]:
        places = []
        for position in range(number * batch_size, (number + 1) * batch_size):
            epoch, place = divmod(position, len(data))
            with lock:  # an order is made once
                places.append(int(order(epoch)[place]))
        batch = collate(data, places, (shard_index, shard_count), pixels=pixels)
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
        },
        threads=data.config.threads,
    )


def check_usable(data: Conversations) -> None:
    """Raise ValueError when none of the first thousand conversations can be used."""
    tried = range(min(len(data), 1000))
    if not any(data.row(i) for i in tried):
        raise ValueError(
            f"no usable conversation among the first {len(tried)} of {data.source.name}: "
            f"{data.skipped.counts()}; see python -m tokenflow_jax.data.validate"
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
