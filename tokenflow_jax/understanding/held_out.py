"""Held-out questions of a run: the model's answers, how many are right, and a picture of some."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from tokenflow_jax.data.chat import insertion, questions
from tokenflow_jax.data.chat.opened import Conversations
from tokenflow_jax.evals.vqa_text import normalize
from tokenflow_jax.understanding.answer_pictures import answer_grid

PyTree = Any
_ROUND = 32  # prompts are padded to a multiple of this, so that few programs are compiled


class HeldOutQuestions:
    """The first question of each held-out conversation, and the answers of the last evaluation."""

    def __init__(
        self, data: Conversations, features: np.ndarray, among: Collection[str] | None = None
    ):
        """Take the questions whose picture can be read, or is `among` others.

        `features` are those of `data.images`.
        """
        self.stop_ids = data.template.stop_ids(data.text_tokenizer)
        self._data, self._features = data, features
        asked = questions.first_questions(data)
        self._asked = [
            question
            for question in asked
            if question.image not in data.broken_images
            and (among is None or question.image in among)
        ]
        self.answers: list[str] = []

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def images(self) -> set[str]:
        """The pictures that are asked about."""
        return {question.image for question in self._asked}

    def answer(
        self, decode: Callable[[dict[str, np.ndarray]], np.ndarray], rows: int, other: int = 0
    ) -> list[str]:
        """Answer all questions.

        Args:
          decode: prompt, see `understanding.answer.start`, -> ids (B, max_new).
          rows: of a prompt.
          other: above 0, a seed: shows each another question's picture.
        """
        return list(self._answer(decode, rows, other))

    def _answer(self, decode: Callable, rows: int, other: int) -> Iterator[str]:
        asked, places = self._asked, self._data.image_places
        shown = np.arange(len(asked))
        if other:
            shown = np.random.default_rng(other).permutation(len(asked))
        longest = max(len(question.row["ids"]) for question in asked)
        length = -(-longest // _ROUND) * _ROUND
        for first in range(0, len(asked), rows):
            part = asked[first : first + rows]
            padding = rows - len(part)
            prompt = insertion.pad_rows([a.row for a in part] + [{}] * padding, length, "left")
            del prompt["labels"]
            index = [places.get(asked[i].image, 0) for i in shown[first : first + rows]]
            index += [0] * padding
            prompt["features"] = self._features[index][:, None]
            for ids_N in decode(prompt)[: len(part)]:
                yield questions.answer_text(self._data.text_tokenizer, ids_N, self.stop_ids)

    def exact(self, answers: list[str]) -> float:
        """Return the share of answers that are those of the data."""
        pairs = zip(self._asked, answers, strict=True)
        return float(np.mean([normalize(a.answer) == normalize(text) for a, text in pairs]))

    def most_common(self) -> float:
        """Return the share of the most common answer of the data."""
        counts = Counter(normalize(question.answer) for question in self._asked)
        return counts.most_common(1)[0][1] / len(self._asked)

    def notes(self, most: int = 10) -> list[str]:
        """Return lines about some questions."""
        return [
            f"{self._asked[i].text} {self.answers[i]} (in the data: {self._asked[i].answer})"
            for i in (self._spread(most) if self.answers else [])
        ]

    def grid(self, most: int) -> np.ndarray:
        """Return pictures with the model's answers: uint8 (height, width, 3)."""
        cells = []
        for i in self._spread(most):
            image = self._data.image(self._asked[i].image) if self._asked[i].image else None
            cells.append((image, self.answers[i], self._asked[i].answer))
        return answer_grid(cells)

    def _spread(self, most: int) -> list[int]:
        """Return the places of at most `most` questions, evenly spread over the data."""
        count = min(most, len(self._asked))
        return [i * len(self._asked) // count for i in range(count)]
