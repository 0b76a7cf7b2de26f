"""JSON lines: the lines of a large file, and pictures with captions listed in one.

Only the places and lengths of lines stay in memory. Going through ten million lines takes minutes,
so the index of a large file is kept beside it (FILE.index.npz) and used as long as the file's size
and modification time are the same.
"""

import array
import json
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tokenflow_jax.data import images
from tokenflow_jax.data.examples import HELDOUT_NAMES, MIN_TO_SPLIT, SPLITS, Broken, is_heldout
from tokenflow_jax.log import log

_KEEP_FROM = 100_000  # lines; smaller files are indexed at every start
_VERSION = 1  # of the index file; one of another version is replaced
_COLUMNS = {"offsets": np.int64, "numbers": np.int64, "lengths": np.int32, "held_out": np.bool_}
_IMAGE_KEYS = ("image", "file_name")
_CAPTION_KEYS = ("captions", "caption", "text", "label")
_USUAL_NAMES = ("captions.jsonl", "metadata.jsonl")


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line in UTF-8, or raise Broken."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Broken("not UTF-8", str(error)) from error
    except (ValueError, RecursionError) as error:  # ValueError: also too many digits
        raise Broken("invalid JSON", str(error)) from error
    if not isinstance(row, dict):
        raise Broken("no object", f"the line is a {type(row).__name__}")
    return row


class Described(NamedTuple):
    """The properties of a line."""

    length: int = 1  # for grouped sampling; may be negative
    key: str = ""  # decides on the split; a line without one stays in training


Describe = Callable[[bytes], Described]  # may raise Broken


class Lines:
    """The lines of a file that are not blank; any thread may read them.

    Arrays with one entry per line: `offsets` in bytes, `numbers` from 1, `lengths`, `held_out`.
    """

    def __init__(self, file: str | os.PathLike, kind: str, describe: Describe):
        """Index a file, or load its index if one of this `kind` of `describe` was kept."""
        self.file = pathlib.Path(file)
        self._open = self.file.open("rb")
        status = os.fstat(self._open.fileno())
        self._identity = f"{kind} {_VERSION} {status.st_size} {status.st_mtime_ns}"
        self._kept = self.file.with_name(self.file.name + ".index.npz")
        columns = self._load_index()
        if columns is None:
            columns = self._make_index(describe)
            if len(columns["offsets"]) >= _KEEP_FROM:
                self._keep(columns)
        self.offsets, self.numbers, self.lengths, self.held_out = (columns[n] for n in _COLUMNS)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> bytes:
        """Return a line without its end."""
        line, size, start = b"", 4096, int(self.offsets[index])
        while True:  # pread: threads do not share a position
            piece = os.pread(self._open.fileno(), size, start + len(line))
            end = piece.find(b"\n")
            line += piece if end < 0 else piece[:end]
            if end >= 0 or not piece:
                return line

    def split(self, name: str) -> np.ndarray:
        """Return the indices of "all", "train" or "heldout" lines; of a small file always all."""
        if name == "all" or len(self) < MIN_TO_SPLIT:
            if name == "heldout":
                log.warning(
                    "%s has %d lines, fewer than %d: none are held out, so the figures are on "
                    "training data", self.file, len(self), MIN_TO_SPLIT,
                )  # fmt: skip
            return np.arange(len(self))
        return np.flatnonzero(self.held_out == (name == "heldout"))

    def _make_index(self, describe: Describe) -> dict[str, np.ndarray]:
        rows, offset = {name: array.array("q") for name in _COLUMNS}, 0
        for number, line in enumerate(self._open, 1):
            if line.strip():
                try:
                    length, key = describe(line)
                except Broken:  # counted and named where the example is wanted
                    length, key = Described()
                values = (offset, number, length, bool(key) and is_heldout(key))
                for name, value in zip(_COLUMNS, values, strict=True):
                    rows[name].append(value)
            offset += len(line)
        return {name: np.array(rows[name], dtype) for name, dtype in _COLUMNS.items()}

    def _load_index(self) -> dict[str, np.ndarray] | None:
        try:
            with np.load(self._kept, allow_pickle=False) as kept:
                if str(kept["identity"]) != self._identity:
                    return None
                return {name: kept[name] for name in _COLUMNS}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be used (%s): indexing the lines again", self._kept, error)
            return None

    def _keep(self, columns: dict[str, np.ndarray]) -> None:
        # Not `files.write_atomically`: the processes of a run may all do this at once.
        partial = self._kept.with_name(f"{self._kept.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            with partial.open("wb") as out:
                np.savez(out, identity=np.array(self._identity), **columns)
            partial.replace(self._kept)
        except OSError as error:
            partial.unlink(missing_ok=True)
            log.warning(
                "%s cannot be written (%s): every start goes through the %d lines of %s again",
                self._kept, error, len(columns["offsets"]), self.file.name,
            )  # fmt: skip


class LineSource:
    """A split of the lines of a file, and the folder that paths of its images are relative to."""

    def __init__(self, file: pathlib.Path, kind: str, describe: Describe, split: str, folder: str):
        self._root = pathlib.Path(folder or file.parent)
        if not self._root.is_dir():
            raise ValueError(f"data.image_folder {folder!r} is not a folder")
        self._lines = Lines(file, kind, describe)
        self._places = self._lines.split(split)
        if not len(self._lines):
            raise ValueError(f"{file} has no lines")

    def __len__(self) -> int:
        return len(self._places)


class JsonlSource(LineSource):
    """One picture per line: {"image": "path", "caption": "text"}.

    `file_name` may stand for `image`, and `captions`, `text` or `label` for `caption`, which may be
    a list of texts; `tags` may hold words.
    """

    classes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    def __init__(self, path: str | os.PathLike, split: str = "all", image_folder: str = ""):
        if split not in (*SPLITS, *HELDOUT_NAMES):
            raise ValueError(f"a file of captions has no split {split!r}; one of {SPLITS}")
        file = pathlib.Path(path)
        if os.fspath(path) and file.is_dir():
            file = next((file / name for name in _USUAL_NAMES if (file / name).is_file()), file)
        if not file.is_file():
            raise ValueError(
                f"data.path {os.fspath(path)!r} is neither a .jsonl file nor a folder with one of "
                f"{_USUAL_NAMES}"
            )
        split = "heldout" if split in HELDOUT_NAMES else split
        super().__init__(file, "captions", _describe, split, image_folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = _parse(self._lines.read(self._places[index]))
        return {**example, "bytes": images.read_file(self._root, example["name"])}


def _describe(line: bytes) -> Described:
    return Described(key=_parse(line)["name"])


def _parse(line: bytes) -> dict[str, Any]:
    """Return the example of a line, without its picture, or raise Broken."""
    try:
        row = parse_object(line)
    except Broken as error:
        raise Broken("damaged line", f"{line[:60]!r}: {error}") from error
    name = next((row[key] for key in _IMAGE_KEYS if isinstance(row.get(key), str)), "")
    if not name:
        raise Broken("line without image", f"{line[:60]!r}")
    texts = next((row[key] for key in _CAPTION_KEYS if isinstance(row.get(key), str | list)), [])
    texts = [texts] if isinstance(texts, str) else [text for text in texts if isinstance(text, str)]
    example = {"name": name}
    if texts:
        example |= {"caption": texts[0], "captions": texts}
    if isinstance(row.get("tags"), list):
        example["tags"] = [str(tag) for tag in row["tags"]]
    return example
