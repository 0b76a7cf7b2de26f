"""Questions and answers about the emoji inside the package, made from labels, tags and groups.

Every emoji has one conversation per question, or one with all of them: its kind, its name, words
that go with it, and whether it is something (half of the time something else); for models that draw
also its name, to be drawn, some tags, to be drawn, and the name with a question about the drawn
picture, its kind or name. Its splits are those of the tokenizer.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokenflow_jax.data import sources
from tokenflow_jax.data.chat.conversations import Sample
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IMAGE, Turn
from tokenflow_jax.data.examples import evenly_spaced

KIND_QUESTION, NAME_QUESTION = "Which kind of thing is this?", "What is this?"
KINDS = (  # in the order of `sources.GROUPS`
    "a face or feeling", "people or a body part", "an animal or plant", "food or drink",
    "travel or a place", "an activity", "an object", "a symbol",
)  # fmt: skip
_TAGS = 5
_ASKED_TAGS = 3


class EmojiConversations:
    """The emoji's conversations; small, so they stay in memory."""

    def __init__(self, split: str, questions: tuple[str, ...] = (), together: bool = False):
        """Make the conversations of a split, with some keys of QUESTIONS or all when empty.

        With `together`, one conversation per picture asks all of them, in an order that varies.
        Each of DRAWINGS is a conversation of its own.
        """
        unknown = set(questions) - {*QUESTIONS, *DRAWINGS}
        if unknown:
            known = [*QUESTIONS, *DRAWINGS]
            raise ValueError(f"questions {sorted(unknown)} are not among {known}")
        self.name = "emoji"
        self._examples = sources.EmojiSource(split)
        self._bytes = {e["name"]: e["bytes"] for e in self._examples}
        asked = tuple(name for name in questions or QUESTIONS if name in QUESTIONS)
        rounds = [asked] if together and asked else [(name,) for name in asked]
        rounds += [(name,) for name in questions if name in DRAWINGS]
        self._samples = [self._sample(e, names) for e in self._examples for names in rounds]

    def _sample(self, example: Any, names: Sequence[str]) -> tuple[str, Sample]:
        """Return the questions' names and their conversation, the picture with the first one."""
        if names[0] in DRAWINGS:
            return names[0], Sample(DRAWINGS[names[0]](example), example["name"], True)
        # In an order that depends on the picture alone.
        names = sorted(names, key=lambda name: zlib.crc32(f"{name} {example['name']}".encode()))
        turns = []
        for i, name in enumerate(names):
            question, answer = QUESTIONS[name](example, self._examples)
            turns += [(HUMAN, question if i else f"{IMAGE}\n{question}"), (GPT, answer)]
        return " ".join(names), Sample(tuple(turns), example["name"], True)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index][1]

    def label(self, index: int) -> str:
        name, sample = self._samples[index]
        return f"emoji {sample.image} {name}"

    def lengths(self) -> np.ndarray:
        return np.array([sample.length() for _, sample in self._samples])

    def image_bytes(self, image: str) -> bytes:
        return self._bytes[image]

    def limit(self, count: int) -> None:
        """Keep at most this many samples, evenly spaced."""
        self._samples = [self._samples[i] for i in evenly_spaced(len(self), count)]


def _check(example: Any, examples: Any) -> tuple[str, str]:
    """Ask about this emoji or, half of the time, another one; the name alone decides."""
    draw = zlib.crc32(f"check {example['name']}".encode())
    shown = example if draw % 2 else examples[draw // 2 % len(examples)]
    same = shown["caption"] == example["caption"]
    return f"Is this {shown['caption']}?", "yes" if same else "no"


# (example, all examples) -> question and answer.
QUESTIONS: dict[str, Callable[[Any, Any], tuple[str, str]]] = {
    "kind": lambda example, _: (KIND_QUESTION, KINDS[int(example["group"])]),
    "name": lambda example, _: (NAME_QUESTION, example["caption"]),
    "words": lambda example, _: (
        "Which words go with it?", ", ".join((example.get("tags") or [example["caption"]])[:_TAGS])
    ),
    "check": _check,
}  # fmt: skip


def _draw(example: Any) -> tuple[Turn, ...]:
    return (HUMAN, example["caption"]), (GPT, IMAGE)


def _draw_tags(example: Any) -> tuple[Turn, ...]:
    """Draw from some tags in an order that the name alone decides."""
    tags = example.get("tags") or [example["caption"]]
    tags = sorted(tags, key=lambda tag: zlib.crc32(f"{tag} {example['name']}".encode()))
    return (HUMAN, ", ".join(tags[:_ASKED_TAGS])), (GPT, IMAGE)


# example -> turns in which the picture is drawn.
DRAWINGS: dict[str, Callable[[Any], tuple[Turn, ...]]] = {
    "draw": _draw,
    "draw_tags": _draw_tags,
    "cycle": lambda example: (
        *_draw(example), (HUMAN, KIND_QUESTION), (GPT, KINDS[int(example["group"])])
    ),
    "cycle_name": lambda example: (
        *_draw(example), (HUMAN, NAME_QUESTION), (GPT, example["caption"])
    ),
}  # fmt: skip
