"""Rows of Parquet files, read at random places by row groups; see `tables`.

A row of a Parquet file cannot be read alone: its row group is read, only the columns in need, and
kept with others as long as there is room. Files named train-*, validation-* and test-* are splits.
"""

import collections
import concurrent.futures
import functools
import os
import re
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.data import file_names, folders, ranges, tables
from tokenflow_jax.data.kept import Columns, Kept
from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line, plain, shown

_MOST_KEPT, _KEPT_IN_ORDER = 2**31, 2**28  # bytes of row groups
_OPEN_FILES = 64
_KEEP_FROM = 1000  # rows; smaller files are indexed at every start
_ROWS_PER_BYTE = 8  # at most, of a file that is not damaged
_JUDGED = 64  # row groups, whose use is looked at together
_INDEX = {"groups": np.int64, "held_out": np.bool_, "named": np.bool_}
_VERSION = 1  # of kept indexes
_State = tuple[int, str]
_ENDINGS = (".parquet",)
_REMEDY = "name a .parquet, a folder of them, or a pattern such as 'DIR/train-*.parquet'"


class ParquetSource(tables.TableSource):
    """Pictures in Parquet files."""

    def __init__(self, path: str, split: str = "all", image_column: str = ""):
        super().__init__(open_rows(path, image_column), split, path)

    def read_in_order(self) -> None:
        """Keep less, for a reader of one row behind the other."""
        self._rows.cache.limit = _KEPT_IN_ORDER


def open_rows(path: str, image_column: str = "", conversations: bool = False) -> "ParquetRows":
    """Return the rows of files, opened once for all splits."""
    files = [path]
    if remote.kind_of(path) == "folder":  # with the files in data/, as on the hub
        below = remote.join(path, "data")
        found = file_names.in_folder(path, _ENDINGS)
        found = found or (remote.kind_of(below) and file_names.in_folder(below, _ENDINGS))
        files = found or files
    if files == [path]:
        files = file_names.expand(path, _ENDINGS, _REMEDY)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        states = list(pool.map(_state, files))
    return _opened(path, image_column, conversations, *zip(files, states, strict=True))


@functools.lru_cache(2)
def _opened(path: str, image: str, conversations: bool, *files: tuple[str, _State]) -> Any:
    return ParquetRows(path, image, conversations, files)


def _state(path: str) -> _State:
    """Return the size of a file, and what changes whenever it is written again."""
    file = ranges.open_ranges(path)
    return file.size, file.version


def _source(path: str) -> Any:
    return remote.RemoteFile(path).open() if remote.is_remote(path) else path


def _split_of(file: str) -> str:
    return folders.split_meant(re.split(r"[-_.]", os.path.basename(file))[0]) or ""


class ParquetRows(tables.Rows):
    """The rows of some files, in their order."""

    def __init__(
        self,
        path: str,
        image_column: str,
        conversations: bool,
        files: Sequence[tuple[str, _State]],
    ):
        self.files = [file for file, _ in files]
        self._states = [state for _, state in files]
        self.splits = [_split_of(file) for file in self.files]
        self._find = functools.partial(
            tables.find_columns, image_column=image_column, conversations=conversations
        )
        with tables.naming(self.files[0]):
            schema = tables.pyarrow().parquet.read_schema(_source(self.files[0]))
            self.columns = self._find(schema, self.files[0])
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            indexes = list(pool.map(self._index, self.files, self._states))
        groups = [index["groups"] for index in indexes]
        self.named = [bool(index["named"].all()) for index in indexes]
        self.held_out = np.concatenate([index["held_out"] for index in indexes])
        self.firsts = np.cumsum([0, *(sum(some) for some in groups)])
        self._group_firsts = np.cumsum([0, *np.concatenate(groups)])
        self._file_groups = np.cumsum([0, *map(len, groups)])  # the first group of each file
        self._footer = functools.lru_cache(_OPEN_FILES)(self._read_footer)
        self.cache = _RowGroups(path, self._read_group)

    def _cells(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        group = int(np.searchsorted(self._group_firsts, row, side="right")) - 1
        table = self.cache.get(group, tuple(names))
        first, end = map(int, self._group_firsts[group : group + 2])
        if table.num_rows != end - first:
            raise ValueError(f"row group {group} has {table.num_rows} rows")
        cells = zip(table.column_names, table.columns, strict=True)
        return {name: column[row - first].as_py() for name, column in cells}

    def _read_footer(self, file: int) -> Any:
        return tables.pyarrow().parquet.read_metadata(_source(self.files[file]))

    def _read_group(self, group: int, names: Sequence[str]) -> Any:
        file = int(np.searchsorted(self._file_groups, group, side="right")) - 1
        path = self.files[file]
        if _state(path) != self._states[file]:
            raise ValueError(f"{path} has changed since the start")
        reader = tables.pyarrow().parquet.ParquetFile(
            _source(path), metadata=self._footer(file), pre_buffer=True
        )
        number = group - int(self._file_groups[file])
        # The loader has threads of its own.
        return reader.read_row_group(number, columns=list(names), use_threads=False)

    def _index(self, path: str, state: _State) -> Columns:
        """Return the rows per row group of a file and what decides on splits, kept or made."""
        columns = zlib.crc32(repr(self.columns).encode(errors="surrogatepass"))
        kept = Kept(path, f"parquet {_VERSION} {columns}", state[1])
        if found := kept.load(_INDEX, _fit):
            return found
        with tables.naming(path):
            reader = tables.pyarrow().parquet.ParquetFile(_source(path))
            columns = self._find(reader.schema_arrow, path)
            if columns != self.columns:
                pairs = zip(columns._fields, columns, self.columns, strict=True)
                other = [f"{key} {a!r}, not {b!r}" for key, a, b in pairs if a != b]
                raise ValueError(
                    f"{path} has other columns than {self.files[0]} ({shown('; '.join(other))}): "
                    "leave it out, or rewrite it"
                )
            footer = reader.metadata
            groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
            rows = sum(groups)
            if min(groups, default=0) < 0 or rows > _ROWS_PER_BYTE * state[0]:
                raise ValueError(f"{path} is damaged (row groups of {shown(groups)} rows)")
            paths = self._paths(path, reader)
        named, held_out = tables.held_out_rows(path, rows, paths)
        index = {"groups": np.array(groups, np.int64), "held_out": held_out,
                 "named": np.array([named])}  # fmt: skip
        if rows >= _KEEP_FROM and (problem := kept.keep(index)):
            log.warning("%s: every start goes through %s again", problem, path)
        return index

    def _paths(self, path: str, reader: Any) -> list[Any]:
        """Return the paths of a file's pictures, none if there are none or they are damaged."""
        column, found = self.columns.path, []
        try:
            for group in range(reader.num_row_groups) if column else ():
                cells = reader.read_row_group(group, columns=[column], use_threads=False).column(0)
                found += [cell and cell.get("path") for cell in cells.to_pylist()]
        except tables.damage() as error:
            log.warning(
                "%s: its column %s is damaged (%s), so row numbers decide on the split; fetch the "
                "file again", path, plain(column), one_line(error),
            )  # fmt: skip
            return []
        return found


def _fit(index: Columns) -> bool:
    groups = index["groups"]
    return bool((groups >= 0).all()) and sum(map(int, groups)) == len(index["held_out"])


class _RowGroups:
    """Row groups read last, of at most `limit` bytes; any thread may use them."""

    def __init__(self, path: str, read: Any):
        self._path, self._read, self.limit = path, read, _MOST_KEPT
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[Any, concurrent.futures.Future] = (
            collections.OrderedDict()
        )
        self._sizes: dict[Any, int] = {}
        self._bytes = 0
        self._known: set[Any] = set()  # all that were ever read
        self._told = False
        self._reads = self._again = self._rows_read = self._rows_used = 0

    def get(self, group: int, names: tuple[str, ...]) -> Any:
        """Return the table of some columns of a row group."""
        key = (group, names)
        with self._lock:
            self._rows_used += 1
            future = self._kept.get(key)
            if is_new := future is None:
                future = self._kept[key] = concurrent.futures.Future()
            self._kept.move_to_end(key)
        if is_new:
            try:
                table = self._read(group, names)
            except BaseException as error:  # whoever waits for it meets it
                future.set_exception(error)
                with self._lock:  # a store that did not answer may do so later
                    del self._kept[key]
            else:
                future.set_result(table)
                self._make_room(key, table)
        return future.result()

    def _make_room(self, key: Any, table: Any) -> None:
        with self._lock:
            self._sizes[key] = table.nbytes
            self._bytes += table.nbytes
            while self._bytes > self.limit and len(self._sizes) > 1:
                old = next(other for other in self._kept if other in self._sizes)
                self._bytes -= self._sizes.pop(old)
                del self._kept[old]
            self._reads, self._again = self._reads + 1, self._again + (key in self._known)
            self._known.add(key)
            self._rows_read += table.num_rows
            if self._reads == _JUDGED:
                # Blocks use about half of the rows that are read, what is held out a tenth.
                wasted = self._again > _JUDGED // 2 and 16 * self._rows_used < self._rows_read
                if wasted and not self._told:
                    self._told = True
                    rows, size = self._rows_read // _JUDGED, table.nbytes // max(table.num_rows, 1)
                    log.warning(
                        "%s: row groups of about %d rows are read for every %.1f pictures; train "
                        "with --config.data.shuffle_block=%d --config.data.shuffle_window=%d, "
                        "or write ArrayRecord with python -m tokenflow_jax.data.prepare parquet",
                        self._path, rows, self._rows_used / _JUDGED, rows,
                        max(rows, self.limit // (3 * max(size, 1))),
                    )  # fmt: skip
                self._reads = self._again = self._rows_read = self._rows_used = 0
