"""Conversations in the rows of Parquet files and of data sets saved by `datasets`, and in tars.

A row, or a sample's .json, has `conversations`, turns with `from` and `value` as LLaVA writes them,
or `messages`, turns with `role` and `content`, and at most one picture; see `tables`.
"""

import functools
import os
from typing import Any

import numpy as np

from tokenflow_jax.data import arrow, parquet, tables
from tokenflow_jax.data.chat.conversations import Sample
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IMAGE, Turn
from tokenflow_jax.data.examples import Broken, check_text, evenly_spaced
from tokenflow_jax.data.webdataset import WebDatasetSource
from tokenflow_jax.messages import shown

_ROLES = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT}
_OPEN = {"parquet": parquet.open_rows, "arrow": arrow.open_rows}


class _RowConversations:
    """Conversations of numbered rows, which subclasses read."""

    name: str
    _places: np.ndarray  # rows of the split

    def _turns(self, row: int) -> tuple[Any, str, bool]:
        """Return a row's turns, the key that holds them, and whether there is a picture."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        row = int(self._places[index])
        turns, key, has_picture = self._turns(row)
        if not isinstance(turns, list) or not turns:
            raise Broken("no conversations", f"the row's turns are {shown(turns)}")
        turns = [_turn(turn) for turn in turns]
        texts = [text for _, text in turns]
        if has_picture and key == "messages" and not any(IMAGE in t for t in texts):
            first = next((i for i, turn in enumerate(turns) if turn[0] == HUMAN), 0)
            turns[first] = turns[first][0], f"{IMAGE}\n{texts[first]}"
        return Sample(tuple(turns), f"row {row}" if has_picture else "", has_picture)

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        lengths = np.ones(len(self), np.int32)
        for index in range(len(self)):
            try:
                lengths[index] = self[index].length()
            except Broken:  # counted where the sample is wanted
                continue
        return lengths

    def lengths(self) -> np.ndarray:
        return self._lengths

    def limit(self, count: int) -> None:
        """Keep at most this many samples, evenly spaced."""
        self._places = self._places[evenly_spaced(len(self), count)]


class TableConversations(_RowConversations):
    """A split of the rows of a table, each a conversation."""

    def __init__(self, kind: str, path: str, split: str = "all", image_column: str = ""):
        """Open a table of kind "parquet" or "arrow"."""
        self.name = os.path.basename(os.path.normpath(path))
        self._rows = _OPEN[kind](path, image_column, conversations=True)
        self._places = self._rows.of_split(split, path, "conversations")
        if not len(self):
            raise ValueError(f"{path} has no conversations in split {split!r}")

    def _turns(self, row: int) -> tuple[Any, str, bool]:
        key = self._rows.columns.turns
        # Without the pictures, which only the process that trains on them reads.
        return self._rows.read(row, [key])[key], key, self._rows.has_picture(row)

    def label(self, index: int) -> str:
        return self._rows.name_of(int(self._places[index]))

    def image_bytes(self, image: str) -> bytes:
        column = self._rows.columns.image
        return tables.picture_of(self._rows.read(int(image.split()[1]), [column])[column])


class TarConversations(_RowConversations):
    """Samples of tar shards whose .json holds a conversation about their picture."""

    def __init__(self, path: str, split: str = "all"):
        self.name = os.path.basename(os.path.normpath(path))
        self._source = WebDatasetSource(path, split)
        self._places = np.arange(len(self._source))
        if not len(self):
            raise ValueError(f"{path} has no conversations in split {split!r}")

    def _turns(self, row: int) -> tuple[Any, str, bool]:
        found = self._source.described(row)
        key = "conversations" if "conversations" in found else "messages"
        return found.get(key), key, True

    def label(self, index: int) -> str:
        return f"{self.name} sample {int(self._places[index])}"

    def image_bytes(self, image: str) -> bytes:
        return self._source[int(image.split()[1])]["bytes"]


def _turn(turn: Any) -> Turn:
    turn = turn if isinstance(turn, dict) else {}
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in _ROLES:
        raise Broken("bad role", f"a turn must be from one of {tuple(_ROLES)}: {shown(turn)}")
    if isinstance(text, list):  # parts, each a text or the place of a picture
        parts = [part if isinstance(part, dict) else {"text": part} for part in text]
        text = "".join(
            f"{IMAGE}\n" if part.get("type") == "image" else part.get("text") or ""
            for part in parts
        )
    return _ROLES[role], check_text(text, "a turn's text")
