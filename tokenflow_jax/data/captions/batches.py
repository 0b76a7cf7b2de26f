"""Pairs of a caption and a picture, or a picture's codes, for the generation stage.

A picture may have several texts: a caption or a list of them, tags, a group. Templates say which
captions can be made of them; one is drawn for each place in the stream, so the same picture comes
with different words in every epoch:

    "{caption}"            red apple
    "{caption}, {tags}"    red apple, fruit, food       up to two tags, drawn
    "{tags}"               fruit, red
    "{group}: {caption}"   food drink: red apple

A template that needs what a picture lacks is not used for it; a picture for which none is left is
skipped and counted, like a broken one. Order, shares and resuming are those of `data.dealing`.
"""

import dataclasses
import itertools
import string
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tokenflow_jax.data import images, pipeline, sources
from tokenflow_jax.data.dealing import DealtBatches, evaluation_places
from tokenflow_jax.data.images import BrokenImage
from tokenflow_jax.data.skipped import Skipped
from tokenflow_jax.data.text import PromptEncoder

FIELDS = ("caption", "tags", "group")
_TAGS = 2  # at most, in one caption


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """How texts become captions.

    Attributes:
      templates: see this module's docstring; one that stands twice is drawn twice as often.
      drop_rate: probability that a caption is left out, which trains the unconditional branch that
        classifier-free guidance wants (the reference sets such a rate and never uses it).
    """

    templates: tuple[str, ...] = ("{caption}",)
    drop_rate: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "templates", tuple(self.templates))
        problems = [] if self.templates else ["there is no template"]
        for template in self.templates:
            fields = _fields(template)
            if not fields or not fields <= set(FIELDS):
                problems.append(f"template {template!r} must name some of {FIELDS} in braces")
        if not 0 <= self.drop_rate <= 1:
            problems.append(f"drop_rate {self.drop_rate} is not a probability")
        if problems:
            raise ValueError("captions: " + "; ".join(problems))


def _fields(template: str) -> set[str]:
    """The names in braces; {""} for what is no template."""
    try:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError:
        return {""}


def main_caption(example: Mapping[str, Any]) -> str:
    """The caption that evaluation uses: the first one, or else the tags.

    Raises:
      BrokenImage: there is neither.
    """
    text = example.get("caption") or ", ".join(example.get("tags", ()))
    if not text:
        raise BrokenImage("no caption", str(example.get("name", "")))
    return text


def draw_caption(
    example: Mapping[str, Any], config: CaptionConfig, rng: np.random.Generator
) -> str:
    """One of the captions that can be made of an example, or "" where it is dropped.

    Args:
      example: with "caption" or "captions", "tags", "group", as far as known.
      config: templates and drop rate.
      rng: source of randomness, for one place in the stream.

    Raises:
      BrokenImage: no template fits the example.
    """
    captions = example.get("captions") or ([example["caption"]] if example.get("caption") else [])
    tags, group = example.get("tags") or [], example.get("group", -1)
    known = {"caption": bool(captions), "tags": bool(tags), "group": group >= 0}
    usable = [t for t in config.templates if all(known[field] for field in _fields(t))]
    if not usable:
        raise BrokenImage("no caption", f"{example.get('name', '')} for {config.templates}")
    if rng.random() < config.drop_rate:
        return ""
    texts = {}
    if captions:
        texts["caption"] = captions[rng.integers(len(captions))]
    if tags:
        drawn = rng.permutation(len(tags))[: rng.integers(1, _TAGS + 1)]
        texts["tags"] = ", ".join(tags[i] for i in drawn)
    if group >= 0:
        names = sources.GROUPS
        texts["group"] = names[group].replace("-", " ") if group < len(names) else str(group)
    return usable[rng.integers(len(usable))].format(**texts)


class Examples(Protocol):
    """Random access to captioned pictures or codes: what the functions below read.

    Attributes:
      name: what they are, for messages and saved positions.
      array: key of the array in an example, "image" or "codes".
      blank: an array of that shape and type, for padding.
      skipped: what was left out.
    """

    name: str
    array: str
    blank: np.ndarray
    skipped: Skipped

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any] | None: ...


class Pictures:
    """A data set's pictures, cropped in the centre as the reference prepares them."""

    array = "image"

    def __init__(self, config: pipeline.DataConfig):
        """Opens the data set."""
        self._decoded = pipeline.opened(config)
        self.config = config
        self.name = f"{config.name} {config.split}"
        self.blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
        self.skipped = self._decoded.skipped

    def __len__(self) -> int:
        return len(self._decoded)

    def __getitem__(self, index: int) -> Mapping[str, Any] | None:
        example = self._decoded[index]
        if example is None:
            return None
        image = images.center_crop(example["image"], self.config.image_size)
        return {**example, "image": np.ascontiguousarray(image)}


class _Guard:
    """Turns endless skipping into an error: as many failures as examples, and none was usable."""

    def __init__(self, examples: Examples):
        self._examples, self._lock = examples, threading.Lock()
        self._failures, self._any_usable = 0, False

    def usable(self) -> None:
        self._any_usable = True

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            hopeless = not self._any_usable and self._failures >= len(self._examples)
        if hopeless:
            raise ValueError(
                f"no usable pair of picture and caption among the {len(self._examples)} of "
                f"{self._examples.name}: {self._examples.skipped.counts()}, for example "
                f"{', '.join(self._examples.skipped.names()[:3])}"
            )


def train_batches(
    examples: Examples,
    captions: CaptionConfig,
    prompts: PromptEncoder,
    *,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 0,
) -> DealtBatches:
    """An endless iterator of shuffled pairs; see `dealing` for its order and position.

    Args:
      examples: `Pictures`, or codes of `data.captions.codes`.
      captions: how captions are made.
      prompts: turns them into ids.
      batch_size: pairs per batch of this host.
      seed: of order and captions.
      shard_index: this host, from 0.
      shard_count: number of hosts.
      threads: drawing threads; 0 takes one per core, at most 32.

    Returns:
      An iterator of {"prefix": int32 (B, P), and "image": uint8 (B, size, size, 3) or "codes":
      int32 (B, L)}.

    Raises:
      ValueError: a bad shard; from the iterator: no example is usable.
    """
    guard = _Guard(examples)

    def draw(index: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        example = examples[int(index)]
        if example is None:
            guard.failed()
            return None
        try:
            caption = draw_caption(example, captions, rng)
        except BrokenImage as error:
            examples.skipped.add(str(example.get("name", index)), error)
            guard.failed()
            return None
        guard.usable()
        return {"prefix": prompts.encode(caption), examples.array: example[examples.array]}

    return DealtBatches(
        draw,
        len(examples),
        batch_size=batch_size,
        seed=seed,
        share=shard_index,
        shares=shard_count,
        identity={"data": examples.name},
        threads=threads,
    )


def eval_batches(
    examples: Examples,
    prompts: PromptEncoder,
    *,
    batch_size: int,
    limit: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every usable pair once, with its main caption, in a fixed order.

    Args:
      examples, prompts: as for `train_batches`.
      batch_size: pairs per batch of this host.
      limit: uses only so many, evenly spaced.
      shard_index, shard_count: this host, and how many there are; all get as many batches.

    Yields:
      The arrays of `train_batches`, "mask" bool (B,) and "index" int32 (B,). Where the mask is
      False, at broken pairs and at padding, arrays are blank, the prompt is empty and the index -1.
    """
    places = evaluation_places(len(examples), batch_size, limit, shard_index, shard_count)
    empty = {"prefix": prompts.encode(""), examples.array: examples.blank}
    rows = (_pair(examples, prompts, index) for index in places.tolist())
    while batch := list(itertools.islice(rows, batch_size)):
        yield {
            **{key: np.stack([(row or empty)[key] for row in batch]) for key in empty},
            "mask": np.array([row is not None for row in batch]),
            "index": np.array([row["index"] if row else -1 for row in batch], np.int32),
        }


def _pair(examples: Examples, prompts: PromptEncoder, index: int) -> dict[str, Any] | None:
    example = examples[index] if index >= 0 else None
    if example is None:
        return None
    try:
        prefix = prompts.encode(main_caption(example))
    except BrokenImage as error:
        examples.skipped.add(str(example.get("name", index)), error)
        return None
    return {"prefix": prefix, examples.array: example[examples.array], "index": index}


def captions_of(examples: Examples, indices: Sequence[int]) -> list[str]:
    """The main captions at some indices; "" for a broken one."""
    found = []
    for index in indices:
        example = examples[int(index)]
        try:
            found.append("" if example is None else main_caption(example))
        except BrokenImage:  # counted where its pair is wanted
            found.append("")
    return found


def skipped_notes(*all_examples: Examples) -> list[str]:
    """One line per data set that left something out: how many, why, and the first names."""
    notes = []
    for examples in {id(e.skipped): e for e in all_examples}.values():
        counts, names = examples.skipped.counts(), examples.skipped.names()
        if counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            notes.append(
                f"{examples.name}: skipped {len(names)} of {len(examples)} ({reasons}): "
                f"{', '.join(names[:5])}{more}"
            )
    return notes
