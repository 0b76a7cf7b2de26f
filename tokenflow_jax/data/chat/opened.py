"""Opened data sets of conversations: rows of tokens, pictures, and the record of broken ones."""

import contextlib
import dataclasses
import functools
import threading
from typing import Any

import numpy as np

from tokenflow_jax.data import text
from tokenflow_jax.data.captions.texts import CaptionConfig
from tokenflow_jax.data.chat import conversations, emoji, grouping
from tokenflow_jax.data.chat.captioned import CaptionedPictures
from tokenflow_jax.data.chat.conversations import JsonlConversations
from tokenflow_jax.data.chat.emoji import EmojiConversations
from tokenflow_jax.data.chat.insertion import Drawn
from tokenflow_jax.data.chat.tabular import TableConversations, TarConversations
from tokenflow_jax.data.chat.templates import TEMPLATES, get_template
from tokenflow_jax.data.examples import Broken, Skipped, notes_on

_KINDS = ("emoji", "jsonl", "parquet", "arrow", "webdataset")
_TASKS = ("chat", "draw")
_KEPT_ROWS = 50_000  # rows of data sets up to this size are kept for the next epoch


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """One data set of conversations and the way they become arrays."""

    name: str  # "emoji", "jsonl", "parquet", "arrow" or "webdataset"
    path: str = ""  # the file of conversations; not used by "emoji"
    image_folder: str = ""  # that paths of images are relative to; the file's folder when empty
    split: str = "train"  # or "heldout" or "all"
    questions: tuple[str, ...] = ()  # for "emoji": of its QUESTIONS, or DRAWINGS; () all questions
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
    drawn: Drawn | None = None  # what a picture in an answer becomes; None: the model only reads
    task: str = "chat"  # what the data are: conversations; "draw": captions to draw pictures of
    captions: tuple[str, ...] = ("{caption}",)  # of task "draw", see `captions.texts`
    drop_rate: float = 0.0  # probability that a drawn picture is not asked for, for guidance

    def __post_init__(self):
        CaptionConfig(self.captions)  # checks them
        problems = []
        choices = {
            "name": _KINDS, "image_mode": conversations.IMAGE_MODES,
            "order": ("random", "grouped"), "template": tuple(TEMPLATES), "task": _TASKS,
        }  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                problems.append(f"{field} {getattr(self, field)!r} is not one of {allowed}")
        for field in ("image_size", "vectors", "max_length", "pack"):
            if getattr(self, field) < 1:
                problems.append(f"{field} is {getattr(self, field)}, must be at least 1")
        if self.drawn is None and (self.task == "draw" or {*self.questions} & {*emoji.DRAWINGS}):
            problems.append("this model does not draw: no task=draw, and no such questions")
        if self.task == "draw" and self.order != "random":
            problems.append("task=draw has order=random: the lengths of captions are not known")
        if not 0 <= self.drop_rate <= 1:
            problems.append(f"drop_rate {self.drop_rate} is not a probability")
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
        if config.task == "draw":
            self.source = CaptionedPictures(
                CaptionConfig(config.captions), config.name, config.path, config.split,
                config.image_folder, config.allow_outside, config.image_column,
            )  # fmt: skip
        elif config.name == "emoji":
            self.source = EmojiConversations(config.split, config.questions, config.together)
        elif config.name == "webdataset":
            self.source = TarConversations(config.path, config.split)
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
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._ordering = threading.Lock()
        self._rows: dict[tuple[int, bool], tuple[dict[str, np.ndarray], str]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def row(
        self, index: int, rng: np.random.Generator | None = None
    ) -> tuple[dict[str, np.ndarray], str] | None:
        """Return the tokens of a sample and the name of its picture; None where it is broken.

        With an `rng`, captions of pictures to draw are sampled, and left out at the drop rate.
        """
        unasked = rng is not None and rng.random() < self.config.drop_rate
        varied = rng is not None and not unasked and self.config.task == "draw"
        key = index, unasked
        if not varied and key in self._rows:
            return self._rows[key]
        try:
            sample = self.source.varied(index, rng) if varied else self.source[index]
            row = conversations.prepare(
                sample.unasked() if unasked else sample, self.template, self.text_tokenizer,
                self.config.vectors, self.config.max_length, self.config.drawn,
            )  # fmt: skip
        except Broken as error:
            self.skipped.add(self.source.label(index), error)
            return None
        if not varied and len(self) <= _KEPT_ROWS:
            self._rows[key] = row, sample.image
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

    def sample_at(self, place: int, plan: None, seed: int, batch_size: int) -> int:
        """Return the sample at a place of the endless stream; a `plan` is for mixtures."""
        epoch, within = divmod(place, len(self))
        with self._ordering:  # an order is made once
            if (epoch, seed) not in self._orders:
                # Threads work on neighboring batches: at most two epochs at a time.
                self._orders = {k: o for k, o in self._orders.items() if k[0] >= epoch - 1}
                self._orders[epoch, seed] = self.order(epoch, seed, batch_size)
            return int(self._orders[epoch, seed][within])

    def label(self, index: int) -> str:
        return self.source.label(index)

    def is_broken(self, image: str) -> bool:
        return image in self.broken_images

    def skipped_in(self) -> str:
        """Return what was left out so far, in words."""
        return f"{self.source.name}: {self.skipped.counts()}"

    def notes(self) -> list[str]:
        """Return a line on what was skipped, if anything was."""
        return notes_on([self.skipped])
