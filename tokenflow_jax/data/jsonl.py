"""Pictures and their captions from a text file of JSON lines and a folder of images."""

import json
import os
import pathlib
from typing import Any

from tokenflow_jax.data.images import BrokenImage
from tokenflow_jax.data.lines import Described, Lines
from tokenflow_jax.data.splits import HELDOUT_NAMES, SPLITS

_IMAGE_KEYS = ("image", "file_name")
_CAPTION_KEYS = ("captions", "caption", "text", "label")
_USUAL_NAMES = ("captions.jsonl", "metadata.jsonl")


class JsonlSource:
    """One picture per line: {"image": "path", "caption": "text"}; UTF-8.

    `file_name` may stand for `image`, and `captions`, `text` or `label` for `caption`, which may be
    a list of texts; `tags` may hold words. See `Lines`.
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
        self._lines = Lines(file, "captions", _describe)
        self._places = self._lines.split("heldout" if split in HELDOUT_NAMES else split)
        if not len(self._lines):
            raise ValueError(f"{file} has no lines")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, example = _parse(self._lines.read(self._places[index]))
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


def _describe(line: bytes) -> Described:
    try:
        return Described(key=_parse(line)[0])
    except BrokenImage:  # skipped and named where the picture is wanted
        return Described()


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    """Returns the image's path and the example without its picture.

    Raises:
      BrokenImage: not such a line.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
