"""Batches of conversations: deterministic, resumable, sharded by host, of a few static shapes.

    samples -> order of the epoch -> global batch -> ids of all -> rows -> bucket -> own pictures

All hosts compute the ids of a whole batch and so agree on its rows and on their length, one of few
buckets, for each of which the training step is compiled once; pictures are read by the host that
trains on them. A sample that is broken is counted and its place left empty (it carries no loss), so
no sample is trained twice in its place and no host waits for another.

A row is one conversation, or `pack` of them: long ones go with short ones, so that all rows of a
batch are about as long and few tokens are padding. What is learnt is the same: the batch has the
same conversations, none of which reads another.
"""

import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokenflow_jax.data import text
from tokenflow_jax.data.chat import conversations, grouping, insertion
from tokenflow_jax.data.chat.conversations import BrokenSample, Sample
from tokenflow_jax.data.chat.emoji import EmojiConversations
from tokenflow_jax.data.chat.templates import get_template
from tokenflow_jax.data.dealing import NumberedBatches
from tokenflow_jax.data.skipped import Skipped

ORDERS = ("random", "grouped")
_KEPT_ROWS = 50_000  # rows of data sets up to this size are kept for the next epoch
_TEXTLESS = "no usable conversation"


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """One data set of conversations and how they become arrays.

    Attributes:
      name: "emoji" or "jsonl".
      path: the file of conversations; not used by "emoji".
      image_folder: where the paths of images begin; the file's folder when empty.
      split: "train", "heldout" or "all".
      questions: of "emoji", which ones; all when empty.
      together: of "emoji": all questions about a picture in one conversation.
      template: one of `templates.TEMPLATES`.
      system: what conversations begin with instead of the template's own; None keeps that.
      text_tokenizer: see `text.load_text_tokenizer`.
      image_mode: "pad" or "square", see `conversations.fit_image`.
      image_size: side of the pictures in pixels.
      vectors: that the tokenizer makes of a picture.
      max_length: tokens of a conversation, vectors included; longer ones are cut.
      pack: conversations of a row.
      buckets: lengths of rows below the longest, `pack * max_length`; ascending.
      order: of an epoch: "random", or "grouped" by kind and length.
      threads: that prepare batches; 0 takes one per core, at most 32.
    """

    name: str
    path: str = ""
    image_folder: str = ""
    split: str = "train"
    questions: tuple[str, ...] = ()
    together: bool = False
    template: str = "vicuna_v1"
    system: str | None = None
    text_tokenizer: str = "bytes"
    image_mode: str = "pad"
    image_size: int = 64
    vectors: int = 64
    max_length: int = 2048
    pack: int = 1
    buckets: tuple[int, ...] = ()
    order: str = "random"
    threads: int = 0

    def __post_init__(self):
        problems = []
        for field, allowed in (
            ("name", ("emoji", "jsonl")),
            ("image_mode", conversations.IMAGE_MODES),
            ("order", ORDERS),
        ):
            if getattr(self, field) not in allowed:
                problems.append(f"{field} {getattr(self, field)!r} is not one of {allowed}")
        for field in ("image_size", "vectors", "max_length", "pack"):
            if getattr(self, field) < 1:
                problems.append(f"{field} is {getattr(self, field)}, must be at least 1")
        if list(self.buckets) != sorted({*self.buckets}) or min(self.buckets, default=1) < 1:
            problems.append(f"buckets {self.buckets} must be positive and ascend")
        try:
            get_template(self.template)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("data: " + "; ".join(problems))

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """All lengths that rows may have; larger buckets than the longest row are left out."""
        longest = self.pack * self.max_length
        return (*(length for length in self.buckets if length < longest), longest)


class _Some:
    """So many samples of a source, evenly spaced."""

    def __init__(self, source: Any, count: int):
        self._source, self.name = source, source.name
        self._places = np.arange(count) * len(source) // count
        self.image_bytes = source.image_bytes

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        return self._source[int(self._places[index])]

    def label(self, index: int) -> str:
        return self._source.label(int(self._places[index]))

    def lengths(self) -> np.ndarray:
        return self._source.lengths()[self._places]


class Conversations:
    """A data set of conversations, opened: rows, pictures, and what is broken."""

    def __init__(self, config: ConversationConfig, limit: int | None = None):
        """Opens the source and the text tokenizer.

        Args:
          config: the data set.
          limit: only so many conversations, evenly spaced.

        Raises:
          ValueError: see `JsonlConversations`, `EmojiConversations` and `load_text_tokenizer`.
        """
        self.config = config
        if config.name == "emoji":
            self.source: Any = EmojiConversations(config.split, config.questions, config.together)
        else:
            self.source = conversations.JsonlConversations(
                config.path, config.split, config.image_folder
            )
        if limit is not None and limit < len(self.source):
            self.source = _Some(self.source, limit)
        self.text_tokenizer = text.load_text_tokenizer(config.text_tokenizer)
        self.template = get_template(config.template, config.system)
        self.skipped = Skipped(f"{self.source.name} {config.split}")
        self.broken_images: set[str] = set()
        self._rows: dict[int, tuple[dict[str, np.ndarray], str]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int) -> tuple[dict[str, np.ndarray], str] | None:
        """The tokens of a sample and the name of its picture; None where it is broken."""
        if index in self._rows:
            return self._rows[index]
        try:
            sample: Sample = self.source[index]
            row = conversations.prepare(
                sample, self.template, self.text_tokenizer, self.config.vectors,
                self.config.max_length,
            )  # fmt: skip
        except BrokenSample as error:
            self.skipped.add(self.source.label(index), error)
            return None
        if len(self) <= _KEPT_ROWS:
            self._rows[index] = row, sample.image
        return row, sample.image

    def image(self, image: str, label: str = "") -> np.ndarray | None:
        """A picture, uint8 (size, size, 3); None where it is broken."""
        config = self.config
        try:
            data = self.source.image_bytes(image)
            return conversations.load_image(data, config.image_size, config.image_mode)
        except BrokenSample as error:
            self.skipped.add(label or image, error)
            self.broken_images.add(image)
            return None

    @functools.cached_property
    def images(self) -> list[str]:
        """The names of all pictures."""
        return conversations.distinct_images(self.source)

    @functools.cached_property
    def image_places(self) -> dict[str, int]:
        """The place of each picture in `images`."""
        return {name: place for place, name in enumerate(self.images)}

    def order(self, epoch: int, seed: int, batch_size: int) -> np.ndarray:
        """The samples of an epoch in the order in which they train."""
        permute = grouping.random_permutations([seed, epoch])
        if self.config.order == "random":
            return np.asarray(permute(len(self)))
        return grouping.grouped_order(self.source.lengths(), batch_size, 1, permute)

    def notes(self) -> list[str]:
        """A line on what was skipped, if anything was."""
        counts, names = self.skipped.counts(), self.skipped.names()
        if not counts:
            return []
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return [
            f"{self.source.name} {self.config.split}: skipped {len(names)} of {len(self)} "
            f"conversations ({reasons}): {', '.join(names[:5])}{more}"
        ]


class _Batches:
    """Random access to the endless stream of batches."""

    def __init__(
        self, data: Conversations, batch_size: int, seed: int, shard: tuple[int, int], pixels: bool
    ):
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._shard, self._pixels = shard, pixels
        # Threads work on neighbouring batches: at most two epochs at a time.
        self._order = functools.lru_cache(maxsize=3)(
            lambda epoch: data.order(epoch, seed, batch_size)
        )
        self._lock = threading.Lock()

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        count, places = len(self._data), []
        for position in range(number * self._batch_size, (number + 1) * self._batch_size):
            with self._lock:
                order = self._order(position // count)
            places.append(int(order[position % count]))
        return collate(self._data, places, self._shard, pixels=self._pixels)


def collate(
    data: Conversations,
    places: list[int],
    shard: tuple[int, int] = (0, 1),
    *,
    pixels: bool = True,
) -> dict[str, np.ndarray]:
    """One host's part of a batch.

    Args:
      data: opened.
      places: samples of the whole batch, a multiple of `pack` and hosts; -1 for none.
      shard: (this host, number of hosts).
      pixels: whether pictures themselves are wanted, or their places in `data.images`.

    Returns:
      {"ids", "labels", "places", "segments"}, int32 (R, L) with padding on the right and P = `pack`
      conversations in each of the R rows, and either "image" uint8 (R, P, size, size, 3) or
      "image_index" int32 (R, P). Broken conversations are left out of their rows.
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
    images = np.zeros((own, config.pack, size, size, 3) if pixels else (0,), np.uint8)
    numbers = np.zeros((own, config.pack), np.int32)
    for r, row in enumerate(members):
        kept = []
        for p, i in enumerate(row):
            tokens, name = found[i] or ({}, "")
            if name and pixels:
                image = data.image(name, data.source.label(places[i]))
                images[r, p] = 0 if image is None else image
            elif name:
                numbers[r, p] = data.image_places[name]
            kept.append({} if name in data.broken_images else tokens)
        rows.append(insertion.join_rows(kept, config.vectors))
    batch = insertion.pad_rows(rows, length)
    return {**batch, "image": images} if pixels else {**batch, "image_index": numbers}


def _share_rows(lengths: list[int], pack: int) -> list[list[int]]:
    """Deals conversations of these lengths to rows of `pack`; for each row their places."""
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
    """An endless iterator of this host's part of every batch.

    Args:
      data: opened.
      batch_size: conversations of a batch over all hosts.
      seed: of the order.
      shard_index, shard_count: this host, and how many there are.
      pixels: see `collate`.

    Returns:
      An iterator (`get_state`, `set_state`) of what `collate` returns.

    Raises:
      ValueError: a batch that cannot be shared out, or not one usable conversation.
    """
    pack = data.config.pack
    parts = shard_count * pack
    if batch_size < 1 or batch_size % parts or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"batch_size {batch_size} for host {shard_index} of {shard_count}, {pack} "
            f"conversations in a row: must be a positive multiple of {parts}"
        )
    check_usable(data)
    make = _Batches(data, batch_size, seed, (shard_index, shard_count), pixels)
    return NumberedBatches(
        make,
        identity={
            "data": f"{data.source.name} {data.config.split}",
            "conversations": len(data),
            "batch_size": batch_size,
            "order": data.config.order,
            "seed": seed,
        },
        threads=data.config.threads,
    )


def check_usable(data: Conversations) -> None:
    """Raises ValueError when none of the first thousand conversations can be used."""
    tried = range(min(len(data), 1000))
    if not any(data.row(i) for i in tried):
        raise ValueError(
            f"{_TEXTLESS} among the first {len(tried)} of {data.source.name}: "
            f"{data.skipped.counts()}; see python -m tokenflow_jax.data.validate"
        )


def eval_batches(
    data: Conversations, *, batch_size: int, pixels: bool = True
) -> Iterator[dict[str, np.ndarray]]:
    """Every conversation once, in order; the last batch is filled up with empty rows.

    Args:
      data: opened.
      batch_size: conversations of a batch.
      pixels: see `collate`.

    Yields:
      What `collate` returns.
    """
    for start in range(0, len(data), batch_size):
        places = list(range(start, min(start + batch_size, len(data))))
        yield collate(data, places + [-1] * (batch_size - len(places)), pixels=pixels)
