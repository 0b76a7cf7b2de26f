"""Conversations with an assistant: questions and pictures as turns."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tokenflow_jax.data import images
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IMAGE, Turn
from tokenflow_jax.data.examples import Broken
from tokenflow_jax.data.text import encodable
from tokenflow_jax.messages import shown

Picture = Any  # a path, a PIL image, or uint8 (H, W, 3)


class Chat:
    """A conversation, in which a question may bring a picture: `turns` and `pictures` so far."""

    def __init__(self, assistant: Any):  # an `Assistant`, whose `chat` makes this
        self.assistant = assistant
        self.turns: list[Turn] = []
        self.pictures: list[Picture] = []

    def stream(
        self,
        question: str,
        image: Picture | None = None,
        *,
        max_new: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; the turn counts once the answer is complete.

        Args:
          question, image: the text, and a picture to go with it.
          max_new, temperature, top_k, top_p, seed: see `Assistant.answer`.
        """
        new = as_list(image)
        turns = [*self.turns, human_turn(question, len(new))]
        pictures = [*self.pictures, *new]
        decoding = self.assistant.decoding(max_new, temperature, top_k, top_p)
        said = ""
        for piece in self.assistant.stream(turns, pictures, decoding, seed):
            said += piece
            yield piece
        self.turns, self.pictures = [*turns, (GPT, said)], pictures

    def ask(self, question: str, image: Picture | None = None, **options: Any) -> str:
        """Ask, and return the whole answer; see `stream`."""
        return "".join(self.stream(question, image, **options))


def as_list(image: Picture | Sequence[Picture] | None) -> list[Picture]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def human_turn(question: str, pictures: int) -> Turn:
    text = encodable(question).replace(IMAGE, "").strip()
    if not text and not pictures:
        raise ValueError("the question is empty")
    return HUMAN, f"{IMAGE}\n" * pictures + text


def read_picture(picture: Picture) -> np.ndarray:
    """Read a path, PIL image or array as uint8 (H, W, 3)."""
    try:
        if isinstance(picture, str | os.PathLike):
            return images.decode(images.read_file(picture))
        if isinstance(picture, Image.Image):
            return images.to_rgb(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError, Broken) as error:
        name = picture if isinstance(picture, Image.Image) else os.fspath(picture)
        raise ValueError(f"picture {shown(name)}: {error}") from error
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(
            f"a picture of shape {array.shape} and dtype {array.dtype}: give uint8 (H, W, 3)"
        )
    return array
