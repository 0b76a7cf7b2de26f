"""Pictures and their captions from a text file of JSON lines and a folder of images."""

import array
import json
import os
import pathlib
from typing import Any

from absl import logging

from tokenflow_jax.data.images import BrokenImage
from tokenflow_jax.data.splits import HELDOUT_NAMES, MIN_TO_SPLIT, SPLITS, is_heldout

_IMAGE_KEYS = ("image", "file_name")
_CAPTION_KEYS = ("captions", "caption", "text", "label")
_USUAL_NAMES = ("captions.jsonl", "metadata.jsonl")


class JsonlSource:
    """One picture per line: {"image": "path", "caption": "text"}; UTF-8.

    `file_name` may stand for `image`, and `captions`, `text` or `label` for `caption`, which may be
    a list of texts; `tags` may hold words. Only the places of the lines stay in memory.
    """

    def __init__(self, path: str | os.PathLike, split: str = "all", image_folder: str = ""):
        """Finds the lines.

        "train" and "heldout" are the parts of `splits.is_heldout`, by the image's path; below 100
        pictures both are everything, and the log says so.

        Args:
          path: the file, or a folder that holds captions.jsonl or metadata.jsonl.
          split: "train", "heldout" (validation, val and test mean the same) or "all".
          image_folder: where the paths of images begin; the file's folder when empty.

        Raises:
          ValueError: no such file, folder or split, or an empty file.
        """
        if split not in (*SPLITS, *HELDOUT_NAMES):
            raise ValueError(f"a file of captions has no split {split!r}; one of {SPLITS}")
        file = _find(path)
        self._root = pathlib.Path(image_folder or file.parent)
        if not self._root.is_dir():
            raise ValueError(f"data.image_folder {image_folder!r} is not a folder")
        self.classes: list[str] = []
        self.numbers = ()
        self._file = file.open("rb")
        everything, parts = self._index(split)
        divide = split != "all" and len(everything) >= MIN_TO_SPLIT
        if split not in ("all", "train") and not divide:
            logging.warning(
                "%s has %d pictures, fewer than %d: none are held out, so the figures of split %r "
                "are on training pictures", file, len(everything), MIN_TO_SPLIT, split,
            )  # fmt: skip
        self._starts = parts if divide else everything
        if not everything:
            raise ValueError(f"{file} has no lines")

    def _index(self, split: str) -> tuple[array.array, array.array]:
        """Byte offsets of all lines, and of those of a split.

        Lines that cannot be read count as training lines, where they are skipped and named.
        """
        everything, part, offset = array.array("q"), array.array("q"), 0
        for line in self._file:
            if line.strip():
                everything.append(offset)
                try:
                    held_out = is_heldout(_parse(line)[0])
                except BrokenImage:
                    held_out = False
                if held_out == (split != "train"):
                    part.append(offset)
            offset += len(line)
        return everything, part

    def __len__(self) -> int:
        return len(self._starts)

    def _line(self, start: int) -> bytes:
        """Reads a line without moving a position that threads share."""
        line, size = b"", 4096
        while True:
            piece = os.pread(self._file.fileno(), size, start + len(line))
            end = piece.find(b"\n")
            line += piece if end < 0 else piece[:end]
            if end >= 0 or not piece:
                return line

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, example = _parse(self._line(self._starts[index]))
        try:
            example["bytes"] = (self._root / name).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise BrokenImage("cannot be read", f"{name}: {error}") from error
        return example


def _find(path: str | os.PathLike) -> pathlib.Path:
    file = pathlib.Path(path)
    if os.fspath(path) and file.is_dir():
        file = next((file / name for name in _USUAL_NAMES if (file / name).is_file()), file)
    if not os.fspath(path) or not file.is_file():
        raise ValueError(
            f"data.path {os.fspath(path)!r} is neither a .jsonl file nor a folder with one of "
            f"{_USUAL_NAMES}"
        )
    return file


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    """Returns the image's path and the example without its picture.

    Raises:
      BrokenImage: not such a line.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BrokenImage("damaged line", f"{line[:60]!r}: {error}") from error
    if not isinstance(row, dict):
        raise BrokenImage("damaged line", f"{line[:60]!r} is no object")
    name = next((row[key] for key in _IMAGE_KEYS if isinstance(row.get(key), str)), "")
    if not name:
        raise BrokenImage("line without image", f"{line[:60]!r}")
    texts = next((row[key] for key in _CAPTION_KEYS if isinstance(row.get(key), str | list)), [])
    texts = [texts] if isinstance(texts, str) else [text for text in texts if isinstance(text, str)]
    example = {"name": name}
    if texts:
        example |= {"caption": texts[0], "captions": texts}
    if isinstance(row.get("tags"), list):
        example["tags"] = [str(tag) for tag in row["tags"]]
    return name, example
