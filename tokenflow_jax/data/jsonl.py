"""JSON lines: the lines of a large file, and pictures with captions listed in one.

A file may also hold one JSON array, whose elements then count as its lines. Nothing but a line feed
ends a line.

Only the places and lengths of lines stay in memory. Going through ten million lines takes minutes,
so the index of a large file is kept, see `kept`.
"""

import array
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.data import images
from tokenflow_jax.data.examples import (
    HELDOUT_NAMES,
    SPLITS,
    Broken,
    check_example,
    is_heldout,
    split_indices,
)  # fmt: skip
from tokenflow_jax.data.kept import Columns, Kept
from tokenflow_jax.files import parse_json
from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line, shown

_KEEP_FROM = 100_000  # lines; smaller files are indexed at every start
_VERSION = 2  # of the index file; one of another version is replaced
_COLUMNS = {
    "offsets": np.int64, "sizes": np.int32, "numbers": np.int64, "lengths": np.int32,
    "held_out": np.bool_,
}  # fmt: skip
_LONGEST = 2**25 + 1  # bytes that are read of a line; `files.parse_json` refuses so many
_BLOCK = 2**20
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[(?=[ \t\r]*[\n{])")
_OUTSIDE, _INSIDE = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')  # of a JSON string
_IMAGE_KEYS = ("image", "file_name")
CAPTION_KEYS = ("captions", "caption", "text", "label")
_USUAL_NAMES = ("captions.jsonl", "metadata.jsonl")


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line in UTF-8, or raise Broken."""
    try:
        row = parse_json(line, "the line", object)
    except ValueError as error:
        reason = "not UTF-8" if "is not UTF-8" in str(error) else "invalid JSON"
        raise Broken(reason, str(error)) from None
    if not isinstance(row, dict):
        raise Broken("no object", f"the line is {shown(row)}")
    return row


def _array(file: BinaryIO) -> re.Match | None:
    """Return the match of an array's bracket at the beginning of a file, to which it returns."""
    head = _ARRAY.match(file.read(_BLOCK))
    file.seek(0)
    return head


def unit_of(file: BinaryIO) -> str:
    return "element" if _array(file) else "line"


def lines_of(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and text of all lines, or elements of an array, that are not blank.

    Of one that is too long for JSON, only the beginning.
    """
    number = offset = 0
    if head := _array(file):
        end = file.seek(head.end()) - 1
        for begin, end in _elements(file):
            number += 1
            file.seek(begin)
            element = file.read(min(end - begin, _LONGEST))
            if element.strip():
                yield number, begin + len(element) - len(element.lstrip()), element.strip()
        offset, number = file.seek(end + 1), max(number - 1, 0)  # the rest of the file, as lines
    while line := file.readline(_LONGEST):
        number += 1
        if line.strip():
            yield number, offset, line
        offset += len(line)
        while len(line) == _LONGEST and line[-1:] != b"\n":
            line = file.readline(_LONGEST)
            offset += len(line)


def _elements(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the elements of the array whose bracket was just read."""
    begin = offset = file.tell()
    depth, inside, at = 1, False, 0
    while depth and (block := file.read(_BLOCK)):
        while depth and (found := (_INSIDE if inside else _OUTSIDE).search(block, at)):
            at, sign = found.end(), found.group()
            if sign == b"\\":
                at += 1  # whatever it escapes
            elif sign == b'"':
                inside = not inside
            elif sign != b",":
                depth += 1 if sign in b"[{" else -1
            if not depth or (depth == 1 and sign == b","):
                yield begin, offset + found.start()
                begin = offset + at
        at = max(0, at - len(block))
        offset = file.seek(offset + len(block))  # whoever takes the elements reads them


class Described(NamedTuple):
    """The properties of a line."""

    length: int = 1  # for grouped sampling; may be negative
    key: str = ""  # decides on the split; a line without one stays in training


PathLike = str | os.PathLike
Describe = Callable[[bytes], Described]  # may raise Broken


class Lines:
    """The lines of a file that are not blank; any thread may read them.

    Arrays with one entry per line: `offsets` in bytes, `numbers` from 1, `lengths`, `held_out`.
    """

    def __init__(self, file: PathLike, kind: str, describe: Describe):
        """Index a file, or load its index if one of this `kind` of `describe` was kept."""
        self.file = pathlib.Path(file)
        self._open = self.file.open("rb")
        self.unit = unit_of(self._open)
        status = os.fstat(self._open.fileno())
        kept = Kept(self.file, f"{kind} {_VERSION}", f"{status.st_size} {status.st_mtime_ns}")
        columns = kept.load(_COLUMNS, lambda columns: _fit(columns, status.st_size))
        if columns is None:
            columns = self._make_index(describe)
            count = len(columns["offsets"])
            if count >= _KEEP_FROM and (problem := kept.keep(columns)):
                log.warning(
                    "%s: every start goes through the %d lines of %s again",
                    problem, count, self.file.name,
                )  # fmt: skip
        own = (columns[name] for name in _COLUMNS)
        self.offsets, self._sizes, self.numbers, self.lengths, self.held_out = own

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> bytes:
        """Return a line without its end."""
        size, offset = int(self._sizes[index]), int(self.offsets[index])
        # pread: threads do not share a position.
        return os.pread(self._open.fileno(), size, offset).removesuffix(b"\n")

    def split(self, name: str) -> np.ndarray:
        """Return the indices of "all", "train" or "heldout" lines; of a small file always all."""
        return split_indices(self.held_out, name, str(self.file), "lines")

    def _make_index(self, describe: Describe) -> Columns:
        rows = {name: array.array("q") for name in _COLUMNS}
        for number, offset, line in lines_of(self._open):
            try:
                length, key = describe(line)
            except Broken:  # counted and named where the example is wanted
                length, key = Described()
            values = (offset, len(line), number, length, bool(key) and is_heldout(key))
            for name, value in zip(_COLUMNS, values, strict=True):
                rows[name].append(value)
        return {name: np.array(rows[name], dtype) for name, dtype in _COLUMNS.items()}


def _fit(columns: Columns, size: int) -> bool:
    """Return True if columns describe lines, one behind the other, of a file of some size."""
    if len({len(column) for column in columns.values()}) > 1 or (columns["sizes"] < 0).any():
        return False
    places = np.stack([columns["offsets"], columns["offsets"] + columns["sizes"]], axis=1).ravel()
    return bool((np.diff(places, prepend=0, append=size) >= 0).all())


class LineSource:
    """A split of the lines of a file, and the folder that paths of its images are relative to."""

    def __init__(self, file: str, kind: str, describe: Describe, split: str, folder: str):
        self._root = folder or os.path.dirname(file) or "."
        if remote.kind_of(self._root) != "folder":
            raise ValueError(f"data.image_folder {self._root!r} is not a folder")
        self._lines = Lines(remote.local_copy(file), kind, describe)
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

    def __init__(
        self,
        path: PathLike,
        split: str = "all",
        image_folder: str = "",
        allow_outside: bool = False,
    ):
        if split not in (*SPLITS, *HELDOUT_NAMES):
            raise ValueError(f"a file of captions has no split {split!r}; one of {SPLITS}")
        file = os.fspath(path)
        if remote.kind_of(file) == "folder":
            inside = (remote.join(file, name) for name in _USUAL_NAMES)
            file = next((name for name in inside if remote.kind_of(name) == "file"), file)
        if remote.kind_of(file) != "file":
            raise ValueError(
                f"data.path {os.fspath(path)!r} is neither a .jsonl file nor a folder with one of "
                f"{_USUAL_NAMES}"
            )
        split = "heldout" if split in HELDOUT_NAMES else split
        super().__init__(file, "captions", _describe, split, image_folder)
        self._allow_outside = allow_outside

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = _parse(self._lines.read(self._places[index]))
        data = images.read_file(example["name"], self._root, self._allow_outside)
        return {**example, "bytes": data}

    def url(self, index: int) -> str:
        """Return the address that a picture came from, "" if it is not known."""
        return url_of(parse_object(self._lines.read(self._places[index])))


def url_of(row: dict[str, Any]) -> str:
    return row["url"] if isinstance(row.get("url"), str) else ""


def _describe(line: bytes) -> Described:
    return Described(key=_parse(line)["name"])


def _parse(line: bytes) -> dict[str, Any]:
    """Return the example of a line, without its picture, or raise Broken."""
    try:
        row = parse_object(line)
    except Broken as error:
        raise Broken("damaged line", f"{line[:60]!r}: {one_line(error)}") from error
    name = next((row[key] for key in _IMAGE_KEYS if isinstance(row.get(key), str)), "")
    if not name:
        raise Broken("line without image", f"{line[:60]!r}")
    return check_example({"name": name, **captions_of(row)})


def captions_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the "caption", "captions" and "tags" of an object, as far as it has them."""
    texts = next((row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str | list)), [])
    texts = [texts] if isinstance(texts, str) else [text for text in texts if isinstance(text, str)]
    found = {"caption": texts[0], "captions": texts} if texts else {}
    if isinstance(row.get("tags"), list):
        found["tags"] = [str(tag) for tag in row["tags"]]
    return found
