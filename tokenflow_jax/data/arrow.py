"""Rows of data sets that Hugging Face's `datasets` saved to disk, memory-mapped; see `tables`.

A folder of `save_to_disk` has a state.json that names its Arrow files; that of a DatasetDict has a
dataset_dict.json that names its folders, which are the splits.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenflow_jax import files, remote
from tokenflow_jax.data import tables
from tokenflow_jax.messages import printable, shown

STATE, SPLITS = "state.json", "dataset_dict.json"
_LONGEST_NAME = 255
_INDICES = ("_indices_files", "_indices_data_files")  # of today and of old versions


class ArrowSource(tables.TableSource):
    """Pictures in a folder of `save_to_disk`."""

    def __init__(self, path: str, split: str = "all", image_column: str = ""):
        super().__init__(open_rows(path, image_column), split, path)


@functools.lru_cache(2)
def open_rows(path: str, image_column: str = "", conversations: bool = False) -> "ArrowRows":
    """Return the rows of a folder, opened once for all splits."""
    return ArrowRows(path, image_column, conversations)


def is_saved(path: str | os.PathLike) -> bool:
    return any(remote.kind_of(remote.join(path, name)) == "file" for name in (STATE, SPLITS))


class ArrowRows(tables.Rows):
    """The rows of the data sets of a folder, each of which counts as a file."""

    def __init__(self, path: str, image_column: str, conversations: bool):
        if not path or not is_saved(path):
            raise ValueError(
                f"data.path {path!r} is not a folder that save_to_disk of the package datasets "
                f"wrote: neither {STATE} nor {SPLITS} is there"
            )
        # A remote folder is fetched once: only local files can be memory-mapped.
        root = pathlib.Path(remote.local_copy(path))
        self.files, self.splits = [str(root)], [""]
        if (about := root / SPLITS).is_file():
            self.splits = files.read_json(about, keys=("splits",))["splits"]
            if not isinstance(self.splits, list) or not self.splits:
                raise ValueError(f"{about}: its splits are {shown(self.splits)}")
            self.files = [str(root / _name(about, split)) for split in self.splits]
        self._tables = [_Table(pathlib.Path(folder)) for folder in self.files]
        found = []
        for table in self._tables:
            with tables.naming(table.first, "data set"):
                found.append(
                    tables.find_columns(
                        table.schema, str(table.first), image_column, conversations=conversations
                    )
                )
        self.columns = found[0]
        if odd := [file for file, other in zip(self.files, found, strict=True)
                   if other != self.columns]:  # fmt: skip
            raise ValueError(f"{odd[0]} has other columns than {self.files[0]}: name one as path")
        self.firsts = np.cumsum([0, *map(len, self._tables)])
        marks = []
        for file, table in zip(self.files, self._tables, strict=True):
            paths = table.values(self.columns.path) if self.columns.path else []
            marks.append(tables.held_out_rows(file, len(table), paths))
        self.named = [named for named, _ in marks]
        self.held_out = np.concatenate([held for _, held in marks])

    def has_picture(self, row: int) -> bool:
        name = self.columns.image  # reading the picture costs nothing
        return bool(name) and self.read(row, [name])[name] not in (None, b"", [])

    def _cells(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        file, number = self.place_of(row)
        return {name: self._tables[file].cell(number, name) for name in names}


def _name(about: pathlib.Path, name: Any) -> str:
    is_name = isinstance(name, str) and os.path.basename(name) == name == printable(name)
    if not is_name or name in ("", ".", "..") or len(name) > _LONGEST_NAME:
        raise ValueError(f"{about}: {shown(name)} is not a name in its folder")
    return name


class _Table:
    """The rows of one folder with a state.json."""

    def __init__(self, folder: pathlib.Path):
        about = folder / STATE
        state = files.read_json(about, keys=("_data_files",))
        self._batches: list[Any] = []
        for name in _names(about, state["_data_files"]):
            self._batches += _record_batches(folder / name)
        if not self._batches:
            raise ValueError(f"{folder} has no rows")
        self.first, self.schema = folder, self._batches[0].schema
        if any(batch.schema != self.schema for batch in self._batches):
            raise ValueError(f"{folder} holds files with different columns")
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._rows = None  # the order that shuffle and select of `datasets` leave behind
        if indices := [name for key in _INDICES for name in _names(about, state.get(key) or [])]:
            batches = [batch for name in indices for batch in _record_batches(folder / name)]
            with tables.naming(about, "index of rows"):
                columns = [batch.column("indices").to_numpy() for batch in batches]
                self._rows = np.concatenate(columns).astype(np.int64)
            if self._rows.min(initial=0) < 0 or self._rows.max(initial=0) >= self._firsts[-1]:
                raise ValueError(f"{folder / indices[0]} names rows beyond {self._firsts[-1]:,}")

    def __len__(self) -> int:
        return int(self._firsts[-1]) if self._rows is None else len(self._rows)

    def cell(self, number: int, name: str) -> Any:
        row = number if self._rows is None else int(self._rows[number])
        batch = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return _cell(_column(self._batches[batch], name), row - int(self._firsts[batch]))

    def values(self, name: str) -> list[Any]:
        """Return a whole column."""
        with tables.naming(self.first, "data set"):
            found: list[Any] = []
            for batch in self._batches:
                column = _column(batch, name)
                column.validate(full=True)
                found += column.to_pylist()
        return found if self._rows is None else [found[row] for row in self._rows]


def _record_batches(path: pathlib.Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; save the data set again")
    with tables.naming(path, "Arrow file"):
        arrow = tables.pyarrow()
        batches = list(arrow.ipc.open_stream(arrow.memory_map(str(path))))
        for batch in batches:
            batch.validate()  # that its parts are long enough
        return batches


def _column(batch: Any, name: str) -> Any:
    """Return a column, or by a name such as "image.path" a part of one, without what is null."""
    if name in batch.schema.names:
        return batch.column(name)
    column, _, field = name.rpartition(".")
    return batch.column(column).field(field)


def _cell(column: Any, row: int) -> Any:
    """Return a checked value: in a damaged file, places may lie outside."""
    if tables.pyarrow().types.is_struct(column.type):  # whose parts a slice would not cut
        parts = {f.name: column.field(i) for i, f in enumerate(column.type)}
        if column.slice(row, 1).null_count:
            return None
        return {name: _cell(part, row) for name, part in parts.items()}
    one = column.slice(row, 1)
    one.validate(full=True)
    return one[0].as_py()


def _names(about: pathlib.Path, entries: Any) -> list[str]:
    if not isinstance(entries, list):
        raise ValueError(f"{about}: its files are {shown(entries)}")
    return [_name(about, e.get("filename") if isinstance(e, dict) else None) for e in entries]
