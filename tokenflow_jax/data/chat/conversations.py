"""Conversations about pictures: where they come from, and how one becomes arrays.

A source has `len`, gives a `Sample` for an index (or raises BrokenSample), the bytes of a sample's
picture, and `lengths()` for grouped sampling. `prepare` turns a sample into a row of tokens.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from tokenflow_jax.data import images, sources
from tokenflow_jax.data.chat import insertion, templates
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IGNORE, IMAGE, Template, Turn
from tokenflow_jax.data.lines import Described, Lines

IMAGE_MODES = ("pad", "square")
_NO_IMAGE = ("", "None", "none", "nan")
_PAD_COLOUR = (127, 127, 127)


class BrokenSample(ValueError):
    """A conversation that cannot be used.

    Attributes:
      reason: a short category, the same for all samples with this defect; counted.
      detail: what exactly is wrong with this one; logged.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation as it stands in the data.

    Attributes:
      turns: (role, text), unchanged.
      image: names the picture; "" where there is none.
      has_image_key: whether the data mention a picture, even an empty one.
    """

    turns: tuple[Turn, ...]
    image: str = ""
    has_image_key: bool = False

    def length(self) -> int:
        """Words, at least 1; negative where the data mention no picture: for grouped sampling."""
        words = max(1, sum(len(text.split()) for _, text in self.turns))
        return words if self.has_image_key else -words


def parse_line(line: bytes) -> Sample:
    """Reads a line of a LLaVA-style file.

    Args:
      line: {"image": "path", "conversations": [{"from": "human", "value": "..."}, ...]} in UTF-8;
        an image of "", "None", "none", "nan" or null is none.

    Raises:
      BrokenSample: anything else.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BrokenSample("not UTF-8", str(error)) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BrokenSample("invalid JSON", str(error)) from error
    if not isinstance(row, dict):
        raise BrokenSample("no object", f"the line is a {type(row).__name__}")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BrokenSample("no conversations", "the key must hold a list of turns")
    image = row.get("image")
    if image is None or (isinstance(image, float) and image != image):
        image = ""  # NaN and null, as tables write them
    if not isinstance(image, str):
        raise BrokenSample("bad image", f"must be the path of one picture, not {image!r:.80}")
    return Sample(
        tuple(_turn(turn) for turn in turns),
        "" if image in _NO_IMAGE else image,
        "image" in row,
    )


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict) or turn.get("from") not in (HUMAN, GPT):
        raise BrokenSample("bad role", f"a turn must be from {HUMAN!r} or {GPT!r}: {turn!r:.80}")
    if not isinstance(turn.get("value"), str):
        raise BrokenSample("bad text", f"a turn's value must be text: {turn!r:.80}")
    return turn["from"], turn["value"]


def _describe(line: bytes) -> Described:
    try:
        sample = parse_line(line)
        return Described(sample.length(), sample.image or line.decode("utf-8-sig"))
    except BrokenSample:  # counted and named where the sample is wanted
        return Described()


class JsonlConversations:
    """A file with one conversation per line, and a folder of images; UTF-8; see `Lines`."""

    def __init__(self, path: str | os.PathLike, split: str = "all", image_folder: str = ""):
        """Finds the lines.

        Args:
          path: the file.
          split: "train" or "heldout", the parts of `sources.is_heldout` by the image's path (by
            the line where there is none), or "all". Below 100 lines all of them are everything.
          image_folder: where the paths of images begin; the file's folder when empty.

        Raises:
          ValueError: no such file, folder or split, or an empty file.
        """
        if split not in sources.SPLITS:
            raise ValueError(f"a file of conversations has no split {split!r}: {sources.SPLITS}")
        file = pathlib.Path(path)
        if not os.fspath(path) or not file.is_file():
            raise ValueError(f"data.path {os.fspath(path)!r} is not a file of conversations")
        self._root = pathlib.Path(image_folder or file.parent)
        if not self._root.is_dir():
            raise ValueError(f"data.image_folder {image_folder!r} is not a folder")
        self.name = file.name
        self._lines = Lines(file, "conversations", _describe)
        self._places = self._lines.split(split)
        if not len(self):
            raise ValueError(f"{file} has no conversations in split {split!r}")

    def __len__(self) -> int:
        return len(self._places)

    def label(self, index: int) -> str:
        """How messages call a sample."""
        return f"{self.name} line {self._lines.numbers[self._places[index]]}"

    def lengths(self) -> np.ndarray:
        """Words of each sample, negative where the data mention no picture."""
        return self._lines.lengths[self._places]

    def __getitem__(self, index: int) -> Sample:
        return parse_line(self._lines.read(self._places[index]))

    def image_bytes(self, image: str) -> bytes:
        """Reads a picture's file; BrokenSample where there is none."""
        try:
            return (self._root / image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise BrokenSample("missing image", f"{image}: {error}") from error


def prepare(
    sample: Sample, template: Template, text_tokenizer: Any, vectors: int, max_length: int
) -> dict[str, np.ndarray]:
    """Turns a sample into a row of `insertion.merge_row`.

    Args:
      sample: of a source.
      template, text_tokenizer: how it becomes ids.
      vectors: of an image.
      max_length: of the row, images included; what is behind is cut off.

    Raises:
      BrokenSample: markers that do not go with the picture, turns in bad order or that the template
        cannot take, or nothing that carries loss.
    """
    marked = [IMAGE in text for _, text in sample.turns]
    if any(marked) and not sample.image:
        raise BrokenSample("marker without image", f"the text has an {IMAGE} and no picture")
    turns = templates.prepare_turns(sample.turns, bool(sample.image))
    try:
        templates.check_roles(turns)
    except ValueError as error:
        left_out = len(sample.turns) - len(turns)
        more = f" (before them {GPT}'s first turn is left out)" if left_out else ""
        raise BrokenSample("bad order of turns", f"{error}{more}") from error
    count = sum(IMAGE in text for _, text in turns)
    if sample.image and not count:
        raise BrokenSample("image without marker", f"no turn has an {IMAGE}")
    if count > 1:
        raise BrokenSample("several markers", f"{count} turns have an {IMAGE}, of one picture")
    try:
        tokens = template.tokenize(text_tokenizer, turns)
    except ValueError as error:
        raise BrokenSample("not for this template", str(error)) from error
    row = insertion.merge_row(tokens.ids_L, tokens.labels_L, vectors, max_length)
    if (row["labels"] == IGNORE).all():
        if (tokens.labels_L == IGNORE).all():
            raise BrokenSample("no labels", "the template finds no answer in this conversation")
        raise BrokenSample("no labels", f"the answers begin after the {max_length} that fit")
    return row


def fit_image(image_HWC: np.ndarray, size: int, mode: str) -> np.ndarray:
    """A whole picture as a square, as the reference prepares it.

    Args:
      image_HWC: uint8 (height, width, 3).
      size: side of the result.
      mode: "pad": centred on a grey square of the long side; "square": the aspect ratio changes.

    Returns:
      uint8 (size, size, 3).

    Raises:
      ValueError: another mode.
    """
    if mode not in IMAGE_MODES:
        raise ValueError(f"image mode {mode!r} is not one of {IMAGE_MODES}")
    image = Image.fromarray(image_HWC)
    width, height = image.size
    if mode == "pad" and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), _PAD_COLOUR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def load_image(data: bytes, size: int, mode: str) -> np.ndarray:
    """Decodes an untrusted picture file and fits it; see `fit_image`.

    Raises:
      BrokenSample: it is no picture.
    """
    try:
        return fit_image(images.decode(data), size, mode)
    except images.BrokenImage as error:
        raise BrokenSample(f"image {error.reason}", error.detail) from error


def distinct_images(source: Any) -> list[str]:
    """The names of all pictures of a source, in order of appearance."""
    names: Mapping[str, None] = {}
    for index in range(len(source)):
        try:
            names[source[index].image] = None
        except BrokenSample:  # counted and named where the sample is wanted
            continue
    return [name for name in names if name]
