"""Requests to draw: as the ids that codes follow, and those of a data set with their pictures."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tokenflow_jax.data import text
from tokenflow_jax.data.chat.opened import Conversations
from tokenflow_jax.data.chat.templates import (
    DRAWN,
    DRAWN_ID,
    GPT,
    HUMAN,
    IMAGE,
    Template,
    without_markers,
)


class DrawingPrompts(text.PromptEncoder):
    """An encoder of requests: the conversation up to the `<img>` of the answer."""

    def __init__(self, text_tokenizer: Any, budget: int, template: Template, image_start: int = 0):
        """Let codes begin at id `image_start`, or behind the text tokenizer's ids."""
        super().__init__(text_tokenizer, budget)
        self.template, self.image_start = template, max(image_start, self.image_start)

    def encode(self, prompt: str) -> np.ndarray:
        """Return the prefix of a request, int32 (prefix_length,); a long one loses its end."""
        prompt = without_markers(prompt)
        ids = self._ids(prompt)
        if len(ids) > self.budget:
            self._note_cut(prompt, len(ids))
        while len(ids) > self.budget:
            if not prompt:
                raise ValueError(f"a text budget of {self.budget} holds no request at all")
            prompt = prompt[: min(len(prompt) - 1, len(prompt) * self.budget // len(ids))]
            ids = self._ids(prompt)
        return np.array([*[self.pad_id] * (self.budget - len(ids)), *ids, *self.open_ids], np.int32)

    def _ids(self, prompt: str) -> list[int]:
        # Of a whole conversation, so that it begins as those of training do.
        turns = [(HUMAN, prompt), (GPT, DRAWN)]
        ids = self.template.tokenize(self.text_tokenizer, turns).ids_L.tolist()
        return ids[: ids.index(DRAWN_ID)]


def first_drawings(data: Conversations, most: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield request and picture of those of the first `most` that begin with a drawn picture."""
    for index in range(len(data))[:most]:
        if data.row(index) is None:
            continue
        sample = data.source[index]
        (_, request), (role, answer) = sample.turns[:2]
        if role == GPT and IMAGE in answer:
            yield request, sample.image
