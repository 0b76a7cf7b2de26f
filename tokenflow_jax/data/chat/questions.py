"""Questions as rows that a model answers, and its ids as text."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenflow_jax.data.chat import insertion, templates
from tokenflow_jax.data.chat.opened import Conversations
from tokenflow_jax.data.chat.templates import GPT, IMAGE, Template, Turn


class Question(NamedTuple):
    """A question of a data set, with the answer in the data."""

    row: dict[str, np.ndarray]  # of `insertion.merge_row`
    image: str  # names the picture; "" where there is none
    text: str
    answer: str


def question_row(
    template: Template,
    text_tokenizer: Any,
    turns: Sequence[Turn],
    vectors: int,
    max_length: int | None = None,
    drawn: insertion.Drawn | None = None,  # for models that draw
) -> dict[str, np.ndarray]:
    """Return the row of turns of `prepare_turns` whose last one waits for an answer.

    A row longer than `max_length` is refused with ValueError.
    """
    ids = template.prompt_ids(text_tokenizer, turns)
    row = insertion.merge_row(ids, None, vectors, drawn=drawn)
    if max_length is not None and len(row["ids"]) > max_length:
        raise ValueError(
            f"the conversation is {len(row['ids'])} tokens long, images included; there is room "
            f"for {max_length}"
        )
    return row


def answer_text(text_tokenizer: Any, ids_N: np.ndarray, stop_ids: Sequence[int]) -> str:
    """Return the text of an answer's ids, up to its first stop id."""
    ids = itertools.takewhile(lambda token: token not in stop_ids, np.asarray(ids_N).tolist())
    # A model's table may have more rows than the text tokenizer has ids.
    known = [token for token in ids if token < len(text_tokenizer)]
    return text_tokenizer.decode(known, skip_special_tokens=True).strip()


def first_questions(data: Conversations) -> Iterator[Question]:
    """Yield the first question of each usable conversation, unless a picture is the answer."""
    for index in range(len(data)):
        if data.row(index) is None:  # skipped, and counted there
            continue
        sample = data.source[index]
        turns = templates.prepare_turns(sample.turns, bool(sample.image))
        answer = next(text for role, text in turns if role == GPT)
        if data.config.drawn and IMAGE in answer:
            continue
        row = question_row(data.template, data.text_tokenizer, turns[:1], data.config.vectors)
        text = turns[0][1].replace(IMAGE, "").strip()
        yield Question(row, sample.image, text, answer)
