"""Pictures in Arrow tables: which columns hold what, and rows as examples.

A picture is Hugging Face's struct of `bytes` and `path`, or plain bytes. Captions and tags are in
columns named as `jsonl` names them, labels in a column of class numbers. `parquet` and `arrow`
read the rows.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from tokenflow_jax.data import jsonl
from tokenflow_jax.data.examples import (
    HELDOUT_NAMES,
    SPLITS,
    Broken,
    check_example,
    is_heldout,
    split_indices,
)  # fmt: skip
from tokenflow_jax.messages import one_line, plain, shown

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes", "images")
_URLS = ("url", "image_url", "img_url", "image_link", "link")
_LABELS = ("label", "cls", "class", "class_id")
_TURNS = ("conversations", "conversation", "messages")
_EMPTY = (None, b"", [])
_TEXTS = (*jsonl.CAPTION_KEYS, "tags")


class Columns(NamedTuple):
    """The columns of a table that are read; "" for those it lacks."""

    image: str
    path: str  # of the image's path, such as "image.path"
    label: str
    url: str
    turns: str  # conversations
    texts: tuple[str, ...]
    classes: tuple[str, ...]


def pyarrow() -> ModuleType:
    """Return the package, or raise ValueError."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "data.name 'parquet' and 'arrow' need the package pyarrow: pip install '.[parquet]'"
        ) from error
    return pyarrow


def damage() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for damaged files."""
    library = pyarrow().lib.ArrowException
    return (library, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError,
            MemoryError, NotImplementedError)  # fmt: skip


@contextlib.contextmanager
def naming(path: str | os.PathLike, what: str = "Parquet file") -> Iterator[None]:
    """Turn errors of pyarrow into a ValueError that names the file."""
    try:
        yield
    except damage() as error:
        if str(path) in str(error) and isinstance(error, ValueError):
            raise
        reason = one_line(error) or type(error).__name__
        raise ValueError(
            f"{os.fspath(path)} is no {what}, or damaged ({reason}): fetch it again"
        ) from None


def _is_list(kind: Any) -> bool:
    return pyarrow().types.is_list(kind) or pyarrow().types.is_large_list(kind)


def _holds_pictures(kind: Any) -> bool:
    is_ = pyarrow().types
    if _is_list(kind):
        return _holds_pictures(kind.value_type)
    if is_.is_struct(kind):
        return any(field.name == "bytes" and _holds_pictures(field.type) for field in kind)
    if is_.is_dictionary(kind):
        kind = kind.value_type
    return is_.is_binary(kind) or is_.is_large_binary(kind) or is_.is_binary_view(kind)


def _holds_text(kind: Any) -> bool:
    is_ = pyarrow().types
    if _is_list(kind):
        return _holds_text(kind.value_type)
    if is_.is_dictionary(kind):
        kind = kind.value_type
    # Of a file without any text in a column, pandas writes the type null.
    views = is_.is_string_view(kind) or is_.is_null(kind)
    return is_.is_string(kind) or is_.is_large_string(kind) or views


def _features(schema: Any) -> dict[str, Mapping[str, Any]]:
    """Return what Hugging Face's `datasets` wrote about the columns of a table."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about["info"]["features"]
        return {name: f for name, f in features.items() if isinstance(f, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def find_columns(
    schema: Any, where: str, image_column: str = "", conversations: bool = False
) -> Columns:
    """Find the columns by their names and types, or raise ValueError that says what to do.

    Args:
      where: the file, for errors.
      image_column: the column of the pictures, if the user names it.
      conversations: a column of conversations is necessary, pictures are not.
    """
    types = {field.name: field.type for field in schema}
    lower = {name.lower(): name for name in reversed(types)}
    features, is_ = _features(schema), pyarrow().types
    usual = lambda names: next((lower[n] for n in names if n in lower), "")  # noqa: E731
    pictures = [name for name, kind in types.items() if _holds_pictures(kind)]
    named = [lower[name] for name in _IMAGES if lower.get(name) in pictures]
    marked = [name for name in pictures if features.get(name, {}).get("_type") == "Image"]
    found = [name for name in (image_column,) if name] or named[:1]
    found = found or (marked if len(marked) == 1 else pictures)
    listed = f"{where} has the columns {shown(sorted(types))}"
    turns = next((name for name in map(lower.get, _TURNS) if name and _is_list(types[name])), "")
    if image_column and image_column not in pictures:
        raise ValueError(f"{listed}: {image_column!r} (data.image_column) holds no pictures")
    if conversations and not turns:
        raise ValueError(f"{listed}: none of {_TURNS} is there, as a list of turns")
    if len(found) > 1:
        raise ValueError(
            f"{listed}: {shown(found)} may hold pictures; choose with data.image_column"
        )
    if not found and not conversations:
        if url := usual(_URLS):
            caption = usual(("caption", "text"))
            more = f" --caption_col={caption}" if caption else ""
            raise ValueError(
                f"{where} holds addresses of pictures (column {url!r}), not pictures; download "
                f"them as tars: img2dataset --url_list={os.path.dirname(where) or '.'} "
                f"--input_format=parquet --url_col={url}{more} --output_format=webdataset "
                "--output_folder=DIR, and read these with data.name=webdataset"
            )
        raise ValueError(
            f"{listed}: none holds pictures, as bytes or as Hugging Face's struct of bytes and path"
        )
    image = found[0] if found else ""
    labels = [name for name in types if features.get(name, {}).get("_type") == "ClassLabel"]
    label = next((name for name in labels if name.lower() in _LABELS), labels[:1] and labels[0])
    label = label or usual(_LABELS)
    label = label if label and is_.is_integer(types[label]) else ""
    names = features.get(label, {}).get("names") or []
    is_struct = bool(image) and is_.is_struct(types[image])
    has_path = is_struct and any(f.name == "path" and _holds_text(f.type) for f in types[image])
    return Columns(
        image=image,
        path=f"{image}.path" if has_path else "",
        label=label,
        url=usual(_URLS),
        turns=turns,
        texts=tuple(sorted(n for n in types if n.lower() in _TEXTS and _holds_text(types[n]))),
        classes=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def picture_of(value: Any) -> bytes:
    """Return the bytes of a picture's cell, or raise Broken."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    path = value.get("path") if isinstance(value, dict) else None
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        return data
    if isinstance(value, list) and value:
        raise Broken("several pictures", f"{len(value)} in one row")
    inside = f"only its path {shown(path)} is stored" if path else "the cell is empty"
    raise Broken("no picture", inside)


class Rows:
    """The rows of some files, numbered from 0; any thread may read them."""

    columns: Columns
    files: Sequence[str]
    splits: Sequence[str]  # that each file belongs to; "" unless files or folders are splits
    firsts: np.ndarray  # the number of each file's first row, and that of all rows
    held_out: np.ndarray  # bool, per row: the split that `is_heldout` gives its name
    named: Sequence[bool]  # per file: paths of pictures name the rows

    def _cells(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        """Return the values of a row in some columns, or raise Broken."""
        try:
            return self._cells(row, names)
        except damage() as error:
            file = self.files[self.place_of(row)[0]]
            raise Broken("damaged record", f"{file}: {one_line(error)}") from None

    def has_picture(self, row: int) -> bool:
        """Return True unless the cell is empty; where it can be, without reading the picture."""
        name = self.columns.image
        return bool(name) and self.read(row, [self.columns.path or name])[name] not in _EMPTY

    def place_of(self, row: int) -> tuple[int, int]:
        """Return the file of a row, and its number in it."""
        file = int(np.searchsorted(self.firsts, row, side="right")) - 1
        return file, row - int(self.firsts[file])

    def name_of(self, row: int) -> str:
        file, number = self.place_of(row)
        return _row_name(self.files[file], number)

    def divided_into(self) -> list[str]:
        """Return the splits that files or folders are, if there are several."""
        names = list(dict.fromkeys(self.splits))
        return names if len(names) > 1 and all(names) else []

    def of_split(self, split: str, path: str, unit: str) -> np.ndarray:
        """Return the rows of a split: that of the files, else the one that names decide on."""
        names = self.divided_into()
        if not names or split == "all":
            if split not in (*SPLITS, *HELDOUT_NAMES):
                raise ValueError(f"{path} has no split {split!r}; one of {SPLITS}")
            meant = "heldout" if split in HELDOUT_NAMES else split
            return split_indices(self.held_out, meant, path, unit)
        usual = [split, *(HELDOUT_NAMES if split in HELDOUT_NAMES else ())]
        part = next((name for name in usual if name in names), None)
        if part is None:
            raise ValueError(f"{path} has the splits {shown(names)}, none of which is {split!r}")
        spans = zip(self.splits, self.firsts, self.firsts[1:], strict=False)
        return np.concatenate([np.arange(a, b) for name, a, b in spans if name == part])


def _row_name(file: str, row: int) -> str:
    return f"{os.path.basename(file)} row {row}"


def held_out_rows(file: str, count: int, paths: Sequence[Any]) -> tuple[bool, np.ndarray]:
    """Return whether a file's rows are named by these paths, and which of them are held out."""
    # Paths that repeat, such as image.png everywhere, would all fall into the same split.
    named = 0 < count == len({path for path in paths if isinstance(path, str) and path})
    names = paths if named else (_row_name(file, row) for row in range(count))
    return named, np.fromiter(map(is_heldout, names), bool, count)


class TableSource:
    """Pictures, captions and labels in the rows of a table."""

    def __init__(self, rows: Rows, split: str, path: str):
        self._rows, columns = rows, rows.columns
        self.classes = list(columns.classes)
        self.numbers = ("label",) if columns.label else ()
        self.splits = rows.divided_into()
        self._places = rows.of_split(split, path, "pictures")
        self._wanted = [n for n in (columns.image, columns.label, *columns.texts) if n]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns, row = self._rows.columns, int(self._places[index])
        name = self._rows.name_of(row)
        try:
            values = self._rows.read(row, self._wanted)
            data = picture_of(image := values[columns.image])
            if self._rows.named[self._rows.place_of(row)[0]]:
                name = image["path"]
            texts = {key.lower(): values[key] for key in columns.texts}
            example = {"name": name, **jsonl.captions_of(texts)}
            if columns.label:
                label = values[columns.label]
                example["label"] = -1 if label is None else label
            return {**check_example(example), "bytes": data}
        except Broken as error:
            raise Broken(error.reason, f"{plain(name)}: {error.detail}") from None

    def url(self, index: int) -> str:
        """Return the address that a picture came from, "" if it is not known."""
        name = self._rows.columns.url
        url = self._rows.read(int(self._places[index]), [name])[name] if name else ""
        return url if isinstance(url, str) else ""
