"""Pairs of a caption and a picture, or a picture's codes, for the generation stage.

A caption is drawn for each place in the stream, see `captions.texts`. A picture that has all fields
of no template is skipped and counted, like a broken one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tokenflow_jax.data import images, pipeline
from tokenflow_jax.data.captions.texts import CaptionConfig, draw_caption, main_caption
from tokenflow_jax.data.dealing import DealtBatches
from tokenflow_jax.data.examples import Broken, Guard, Skipped, notes_on
from tokenflow_jax.data.masked import masked_batches
from tokenflow_jax.data.mixture import Mixed
from tokenflow_jax.data.text import PromptEncoder

_PAIR = "pair of picture and caption"


class Examples(Protocol):
    """Random access to captioned pictures or codes; None for a broken one."""

    name: str  # for messages and saved positions
    array: str  # key of the array in an example, "image" or "codes"
    blank: np.ndarray  # an array of that shape and type, for padding
    skipped: Skipped

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any] | None: ...


class Pictures:
    """A data set's pictures, center-cropped as the reference does."""

    array = "image"

    def __init__(self, config: pipeline.DataConfig):
        self.decoded = pipeline.opened(config)
        self.config = config
        self.name = f"{config.name} {config.split}"
        self.blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
        self.skipped = self.decoded.skipped
        self.will_need = self.decoded.will_need

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, index: int) -> Mapping[str, Any] | None:
        if (example := self.decoded[index]) is None:
            return None
        image = images.center_crop(example["image"], self.config.image_size)
        return {**example, "image": np.ascontiguousarray(image)}


def train_batches(
    examples: Examples, captions: CaptionConfig, prompts: PromptEncoder, **options: int
) -> DealtBatches:
    """Return an endless iterator of shuffled pairs; options are those of `DealtBatches`.

    A batch has "prefix", int32 (B, P), and "image", uint8 (B, size, size, 3), or "codes", int32
    (B, L).
    """
    return DealtBatches(
        _drawer(examples, captions, prompts),
        len(examples),
        identity={"data": examples.name},
        will_need=getattr(examples, "will_need", None),
        **options,
    )


def mixed_batches(
    sets: Mapping[str, tuple[Examples, CaptionConfig]],
    weights: Sequence[float],
    prompts: PromptEncoder,
    **options: int,
) -> DealtBatches:
    """Return batches of several data sets by name; "source", int32 (B,), is a pair's data set."""
    makes = [_drawer(examples, captions, prompts) for examples, captions in sets.values()]
    mixed = Mixed(makes, [len(examples) for examples, _ in sets.values()])
    tell = [getattr(examples, "will_need", None) for examples, _ in sets.values()]
    return DealtBatches(
        mixed.make,
        dict(zip(sets, mixed.counts, strict=True)),
        weights=weights,
        identity={"data": "mixture"},
        will_need=mixed.telling(tell),
        **options,
    )


def _drawer(
    examples: Examples, captions: CaptionConfig, prompts: PromptEncoder
) -> Callable[..., dict[str, np.ndarray] | None]:
    """Return the function that makes a pair with a caption drawn for it."""
    guard = Guard(examples.skipped, _PAIR)

    def draw(index: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        row = _pair(examples, prompts, index, lambda example: draw_caption(example, captions, rng))
        guard.check(row is not None)
        return row

    return draw


def eval_batches(
    examples: Examples, prompts: PromptEncoder, **options: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every pair once, in order, with its main caption; see `masked.masked_batches`.

    Broken pairs and padding have a blank array and an empty prompt.
    """

    def caption_of(example: Mapping[str, Any]) -> str:
        if not (caption := main_caption(example)):
            raise Broken("no caption", str(example.get("name", "")))
        return caption

    return masked_batches(
        lambda index: _pair(examples, prompts, index, caption_of),
        len(examples),
        blank={"prefix": prompts.encode(""), examples.array: examples.blank},
        skipped=examples.skipped,
        wanted=_PAIR,
        **options,
    )


def _pair(
    examples: Examples, prompts: PromptEncoder, index: int, caption_of: Callable[..., str]
) -> dict[str, np.ndarray] | None:
    """Return the arrays of an example with its caption; None where either is broken."""
    if (example := examples[index]) is None:
        return None
    try:
        caption = caption_of(example)
    except Broken as error:
        examples.skipped.add(str(example.get("name", index)), error)
        return None
    return {"prefix": prompts.encode(caption), examples.array: example[examples.array]}


def captions_of(examples: Examples, indices: Sequence[int]) -> list[str]:
    """Return the main captions at some indices; "" for a broken one."""
    return [main_caption(examples[int(index)] or {}) for index in indices]


def skipped_notes(*all_examples: Examples) -> list[str]:
    """Return one line per data set that left something out."""
    return notes_on(examples.skipped for examples in all_examples)
