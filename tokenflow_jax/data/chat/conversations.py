"""Conversations about pictures: their sources, and one of them as arrays.

A source has `len`, gives a `Sample` for an index (or raises Broken), the bytes of a sample's
picture, and `lengths()` for grouped sampling. `prepare` turns a sample into a row of tokens.
"""

import dataclasses
import os
from typing import Any

import numpy as np
from PIL import Image

from tokenflow_jax import remote
from tokenflow_jax.data import images
from tokenflow_jax.data.chat import insertion, templates
from tokenflow_jax.data.chat.insertion import Drawn
from tokenflow_jax.data.chat.templates import (
    DRAWN,
    DRAWN_ID,
    GPT,
    HUMAN,
    IGNORE,
    IMAGE,
    Template,
    Turn,
)
from tokenflow_jax.data.examples import SPLITS, Broken, check_text, evenly_spaced
from tokenflow_jax.data.jsonl import Described, LineSource, PathLike, parse_object
from tokenflow_jax.messages import shown

IMAGE_MODES = ("pad", "square")
_PAD_COLOR = (127, 127, 127)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation as it stands in the data."""

    turns: tuple[Turn, ...]  # (role, text), unchanged
    image: str = ""  # names the picture; "" where there is none
    has_image_key: bool = False  # the data mention a picture, even an empty one

    def length(self) -> int:
        """Return the number of words, at least 1; negative where the data mention no picture."""
        words = max(1, sum(len(text.split()) for _, text in self.turns))
        return words if self.has_image_key else -words

    def unasked(self) -> "Sample":
        """Return the conversation without the texts that ask for a picture to be drawn."""
        answers = (*self.turns[1:], (HUMAN, ""))
        turns = zip(self.turns, answers, strict=True)
        drawn = [(role, "" if IMAGE in a and by == GPT else t) for (role, t), (by, a) in turns]
        return dataclasses.replace(self, turns=tuple(drawn))


def parse_line(line: bytes) -> Sample:
    """Parse a LLaVA-style line, or raise Broken.

    {"image": "path", "conversations": [{"from": "human", "value": "..."}, ...]}
    """
    row = parse_object(line)
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise Broken("no conversations", "the key must hold a list of turns")
    image = row.get("image")
    if image is None or image != image or image in ("", "None", "none", "nan"):  # also NaN
        image = ""
    if not isinstance(image, str):
        raise Broken("bad image", f"must be the path of one picture, not {shown(image)}")
    return Sample(tuple(map(_turn, turns)), image, "image" in row)


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict) or turn.get("from") not in (HUMAN, GPT):
        raise Broken("bad role", f"a turn must be from {HUMAN!r} or {GPT!r}: {shown(turn)}")
    return turn["from"], check_text(turn.get("value"), "a turn's value")


def _describe(line: bytes) -> Described:
    sample = parse_line(line)
    # Without a picture, the line itself decides on the split.
    return Described(sample.length(), sample.image or line.decode("utf-8-sig"))


class JsonlConversations(LineSource):
    """A file with one conversation per line, and a folder of images."""

    def __init__(
        self,
        path: PathLike,
        split: str = "all",
        image_folder: str = "",
        allow_outside: bool = False,
    ):
        if split not in SPLITS:
            raise ValueError(f"a file of conversations has no split {split!r}: {SPLITS}")
        file = os.fspath(path)
        if remote.kind_of(file) != "file":
            raise ValueError(f"data.path {os.fspath(path)!r} is not a file of conversations")
        self.name, self._allow_outside = os.path.basename(file), allow_outside
        super().__init__(file, "conversations", _describe, split, image_folder)
        if not len(self):
            raise ValueError(f"{file} has no conversations in split {split!r}")

    def label(self, index: int) -> str:
        return f"{self.name} {self._lines.unit} {self._lines.numbers[self._places[index]]}"

    def lengths(self) -> np.ndarray:
        return self._lines.lengths[self._places]

    def __getitem__(self, index: int) -> Sample:
        return parse_line(self._lines.read(self._places[index]))

    def image_bytes(self, image: str) -> bytes:
        return read_image(image, self._root, self._allow_outside)

    def limit(self, count: int) -> None:
        """Keep at most this many samples, evenly spaced."""
        self._places = self._places[evenly_spaced(len(self), count)]


def prepare(
    sample: Sample,
    template: Template,
    text_tokenizer: Any,
    vectors: int,
    max_length: int,
    drawn: Drawn | None = None,  # for models that draw
) -> dict[str, np.ndarray]:
    """Turn a sample into a row of `insertion.merge_row`, cut to `max_length`, or raise Broken."""
    marked = [IMAGE in text for _, text in sample.turns]
    if any(marked) and not sample.image:
        raise Broken("marker without image", f"the text has an {IMAGE} and no picture")
    turns = templates.prepare_turns(sample.turns, bool(sample.image), drawn is not None)
    try:
        templates.check_roles(turns)
    except ValueError as error:
        left_out = len(sample.turns) - len(turns)
        more = f" (before them {GPT}'s first turn is left out)" if left_out else ""
        raise Broken("bad order of turns", f"{error}{more}") from error
    count = sum(IMAGE in text.replace(DRAWN + IMAGE, DRAWN) for _, text in turns)
    count += sum(text.count(DRAWN) for _, text in turns)
    if sample.image and not count:
        raise Broken("image without marker", f"no turn has an {IMAGE}")
    if count > 1:
        raise Broken("several markers", f"{count} turns have an {IMAGE}, of one picture")
    try:
        tokens = template.tokenize(text_tokenizer, turns)
    except ValueError as error:
        raise Broken("not for this template", str(error)) from error
    row = insertion.merge_row(tokens.ids_L, tokens.labels_L, vectors, max_length, drawn)
    codes = drawn.ids.count(DRAWN_ID) if drawn and DRAWN_ID in tokens.ids_L else 0
    if (row["places"] < insertion.TEXT).sum() < codes:
        raise Broken("picture beyond the end", f"its {codes} codes end after {max_length} tokens")
    if (row["labels"] == IGNORE).all():
        if (tokens.labels_L == IGNORE).all():
            raise Broken("no labels", "the template finds no answer in this conversation")
        raise Broken("no labels", f"the answers begin after the {max_length} that fit")
    return row


def fit_image(image_HWC: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Make a square of a whole picture, uint8, as the reference prepares it.

    Mode "pad" centers it on a gray square of the long side; "square" changes the aspect ratio.
    """
    if mode not in IMAGE_MODES:
        raise ValueError(f"image mode {mode!r} is not one of {IMAGE_MODES}")
    image = Image.fromarray(image_HWC)
    width, height = image.size
    if mode == "pad" and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), _PAD_COLOR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def read_image(name: str, root: str | os.PathLike, allow_outside: bool) -> bytes:
    """Return a picture's file, or raise Broken; see `images.read_file`."""
    try:
        return images.read_file(name, root, allow_outside)
    except Broken as error:
        missing = error.reason == "cannot be read"
        raise Broken("missing image" if missing else error.reason, error.detail) from None


def load_image(data: bytes, size: int, mode: str) -> np.ndarray:
    """Decode an untrusted picture file and fit it; see `fit_image`."""
    try:
        return fit_image(images.decode(data), size, mode)
    except Broken as error:
        raise Broken(f"image {error.reason}", error.detail) from error
