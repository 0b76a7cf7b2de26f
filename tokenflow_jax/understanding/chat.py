"""Conversations with an assistant: questions and pictures as turns."""

from collections.abc import Iterable, Iterator
from typing import Any

from tokenflow_jax.data.chat.templates import GPT, HUMAN, IMAGE, Turn, without_markers
from tokenflow_jax.data.pictures import Picture, is_single


class Chat:
    """A conversation, in which a question may bring a picture: `turns` and `pictures` so far."""

    def __init__(self, assistant: Any):  # an `Assistant`, whose `chat` makes this
        self.assistant = assistant
        self.turns: list[Turn] = []
        self.pictures: list[Picture] = []
        self._session = assistant.session()

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
        for piece in self.assistant.stream(turns, pictures, decoding, seed, self._session):
            said += piece
            yield piece
        self.turns, self.pictures = [*turns, (GPT, without_markers(said))], pictures

    def ask(self, question: str, image: Picture | None = None, **options: Any) -> str:
        """Ask, and return the whole answer; see `stream`."""
        return "".join(self.stream(question, image, **options))


def as_list(image: Picture | Iterable[Picture] | None) -> list[Picture]:
    if image is None:
        return []
    return list(image) if isinstance(image, Iterable) and not is_single(image) else [image]


def human_turn(question: str, pictures: int) -> Turn:
    text = without_markers(question).strip()
    if not text and not pictures:
        raise ValueError("the question is empty")
    return HUMAN, f"{IMAGE}\n" * pictures + text
