"""Pictures and captions in WebDataset tars, read at random places without unpacking them.

`data.path` names shards: one .tar, a folder of them, a pattern, or braces as in
DIR/{00000..01023}.tar and DIR/{train,val}-{0..9}.tar. Beside a sample's picture lie, in any
combination, its caption in .txt, a .json object with a caption as `jsonl` names it, and an integer
label in .cls; so img2dataset writes them. `tar_index` says what a sample is.
"""

import contextlib
import functools
import glob
import itertools
import os
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from tokenflow_jax.data import images, jsonl, tar_index
from tokenflow_jax.data.examples import (
    HELDOUT_NAMES,
    SPLITS,
    Broken,
    check_example,
    split_indices,
)  # fmt: skip
from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line, plain

_OPEN_FILES = 64
_MOST_SHARDS = 1_000_000
_MOST_TEXT = 2**25  # bytes; `files.parse_json` refuses so many
_NEAR = 2**16  # bytes that a sample may have beside its picture to be read at once
_BRACES = re.compile(r"\{([^{}]*)\}")


class WebDatasetSource:
    """Samples of tar shards, in the order of the shards and of their members."""

    classes: tuple[str, ...] = ()

    def __init__(self, path: str, split: str = "all"):
        if split not in (*SPLITS, *HELDOUT_NAMES):
            raise ValueError(f"tar shards have no split {split!r}; one of {SPLITS}")
        paths = shard_paths(path)
        self._shards = _opened(path, *((file, _state(file)) for file in paths))
        self.numbers = ("label",) if self._shards.rows["cls_at"].any() else ()
        split = "heldout" if split in HELDOUT_NAMES else split
        self._places = split_indices(self._shards.rows["held_out"], split, path, "pictures")

    def __len__(self) -> int:
        return len(self._places)

    def will_need(self, indices: np.ndarray) -> None:
        """Ask the system to read ahead what some sorted indices need."""
        self._shards.will_need(self._places[indices])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._shards.sample(self._places[index])

    def url(self, index: int) -> str:
        """Return the address that a picture came from, "" if it is not known."""
        return self._shards.url(self._places[index])


def shard_paths(path: str) -> list[pathlib.Path]:
    """Return the shards that `data.path` names, sorted within each pattern; at least one."""
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(
            f"data.path {path!r}: shards are read from local and mounted folders only; mount the "
            "bucket or copy the shards"
        )
    remedy = "name a .tar, a folder of them, or a pattern such as 'DIR/{00000..01023}.tar'"
    found = []
    for name in [path] if os.path.exists(path) else _expand(path):
        if os.path.isdir(name):
            files = sorted(pathlib.Path(name).glob("*.tar"))
            if not files and (other := sorted(pathlib.Path(name).glob("*.t*gz"))):
                raise ValueError(
                    f"data.path {path!r} holds only compressed tars such as {other[0].name}: "
                    "gunzip them, so that members can be read one by one"
                )
            found += files
        elif os.path.exists(name) or not glob.has_magic(name):
            found.append(pathlib.Path(name))
        else:
            found += map(pathlib.Path, sorted(glob.glob(name)))
    if missing := [file for file in found if not file.exists()]:
        raise ValueError(
            f"data.path {path!r}: {plain(str(missing[0]))} is missing, {len(missing)} of "
            f"{len(found)} shards are; {remedy}"
        )
    if not found:
        raise ValueError(f"data.path {path!r} names no shards; {remedy}")
    return found


def _expand(path: str) -> list[str]:
    """Return the names that braces stand for, as a shell expands them."""
    parts = []
    for number, part in enumerate(_BRACES.split(path)):
        if number % 2 == 0:
            parts.append([part])
        elif ends := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", part):
            first, last = map(int, ends.groups())
            width = max(map(len, ends.groups())) if ends[1][0] == "0" or ends[2][0] == "0" else 0
            some = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            parts.append([f"{i:0{width}d}" for i in some[: _MOST_SHARDS + 1]])
        else:
            parts.append(part.split(",") if "," in part else [f"{{{part}}}"])
    if np.prod([float(len(part)) for part in parts]) > _MOST_SHARDS:
        raise ValueError(f"data.path {path!r} names more than {_MOST_SHARDS:,} shards")
    return ["".join(some) for some in itertools.product(*parts)]


def _state(path: pathlib.Path) -> tuple[int, int]:
    return tar_index.state_of(path.stat())


class _Shards:
    """The samples of some shards; any thread may read them."""

    def __init__(self, data: str, paths: Sequence[pathlib.Path]):
        self._paths = paths
        indexes = tar_index.load_all(paths)
        self._states = [index.state for index in indexes]
        counts = [len(index.rows["header"]) for index in indexes]
        self._firsts = np.concatenate([[0], np.cumsum(counts)])
        self.rows = {
            name: np.concatenate([index.rows[name] for index in indexes]) for name in tar_index.ROWS
        }
        for path, index, count in zip(paths, indexes, counts, strict=True):
            for note in index.notes:
                log.warning("shard %s is %s; fetch it again", path, one_line(note))
            if not count:
                log.warning("shard %s holds no pictures", path)
        if left_out := sum(index.left_out for index in indexes):
            log.warning(
                "%s: %d keys without a picture, or further pictures of one key, are left out; a "
                "key ends at the first dot of a name", data, left_out,
            )  # fmt: skip
        if problems := [index.problem for index in indexes if index.problem]:
            log.warning(
                "%s: every start goes through this and %d more shards again",
                problems[0], len(problems) - 1,
            )  # fmt: skip
        # A file that no thread reads any more closes when it drops out.
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)
        self._lock = threading.Lock()

    def _open(self, shard: int) -> BinaryIO:
        file = tar_index.open_shard(self._paths[shard])
        if tar_index.state_of(os.fstat(file.fileno())) != self._states[shard]:
            raise ValueError(f"shard {self._paths[shard]} has changed since the start")
        return file

    def _handle(self, shard: int) -> BinaryIO:
        with self._lock:  # else two threads would open it
            return self._file(shard)

    def _read(self, shard: int, begin: int, size: int) -> bytes:
        try:
            file = self._handle(shard)
            data = os.pread(file.fileno(), size, begin)  # threads do not share a position
        except (OSError, ValueError) as error:
            raise Broken("cannot be read", one_line(error)) from None
        if len(data) < size:
            raise Broken("cannot be read", f"shard {self._paths[shard]} has become shorter")
        return data

    def will_need(self, rows: np.ndarray) -> None:
        """Ask the system to read sorted rows ahead, neighbours at once."""
        at = {name: column[rows].astype(np.int64) for name, column in self.rows.items()}
        begins = at["header"] * tar_index.BLOCK
        ends = begins
        for kind in tar_index.KINDS:
            place, size = at[f"{kind}_at"] * tar_index.BLOCK, at[f"{kind}_size"]
            ends = np.maximum(
                ends, np.where(place <= begins + at["picture_size"] + _NEAR, place + size, 0)
            )
        shards = np.searchsorted(self._firsts, rows, side="right") - 1
        gaps = begins[1:] - ends[:-1]
        apart = (np.diff(shards) != 0) | (gaps < 0) | (gaps > _NEAR)
        for run in np.split(np.arange(len(rows)), np.flatnonzero(apart) + 1):
            if len(run) and hasattr(os, "posix_fadvise"):  # Linux
                begin, end = int(begins[run[0]]), int(ends[run[-1]])
                with contextlib.suppress(OSError, ValueError):  # whoever reads will meet it
                    file = self._handle(int(shards[run[0]]))
                    os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def url(self, row: int) -> str:
        """Return what a sample's .json says of its address, or raise Broken."""
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        place, size = (int(self.rows[f"json_{name}"][row]) for name in ("at", "size"))
        if not place or size > _MOST_TEXT:
            return ""
        return jsonl.url_of(jsonl.parse_object(self._read(shard, place * tar_index.BLOCK, size)))

    def sample(self, row: int) -> dict[str, Any]:
        """Return an example, or raise Broken."""
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        at = {name: int(column[row]) for name, column in self.rows.items()}
        places = {"header": at["header"] * tar_index.BLOCK}
        sizes = {"header": at["picture_at"] * tar_index.BLOCK - places["header"]}
        for kind in tar_index.KINDS:
            if at[f"{kind}_at"]:
                places[kind] = at[f"{kind}_at"] * tar_index.BLOCK
                sizes[kind] = at[f"{kind}_size"]
        for kind, size in sizes.items():
            if size > (images.MAX_BYTES if kind == "picture" else _MOST_TEXT):
                raise Broken("too large", f"a {kind} of {size:,} bytes")
        first = min(places.values())
        size = max(places[kind] + sizes[kind] for kind in places) - first
        if size <= sizes["picture"] + _NEAR:  # neighbours, as usual: one read
            data = self._read(shard, first, size)
            parts = {k: data[places[k] - first : places[k] - first + sizes[k]] for k in places}
        else:
            parts = {k: self._read(shard, places[k], sizes[k]) for k in places}
        try:
            member = tar_index.name_in(parts.pop("header"))
        except tar_index.DAMAGE as error:
            raise Broken("damaged header", one_line(error)) from None
        picture = parts.pop("picture")
        name = tar_index.sample_name(self._paths[shard], member)
        return {**check_example({"name": name, **_described(**parts)}), "bytes": picture}


def _described(txt: bytes = b"", json: bytes = b"", cls: bytes = b"") -> dict[str, Any]:
    """Return caption, tags and label of a sample's texts, or raise Broken."""
    found = jsonl.captions_of(jsonl.parse_object(json)) if json else {}
    try:
        caption = txt.decode("utf-8-sig").strip()
        if caption:
            others = [text for text in found.get("captions", ()) if text != caption]
            found |= {"caption": caption, "captions": [caption, *others]}
        if cls:
            found["label"] = int(cls.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Broken("not UTF-8", one_line(error)) from None
    except ValueError:
        raise Broken("damaged label", f"{cls[:60]!r} is no integer") from None
    return found


@functools.lru_cache(2)
def _opened(data: str, *files: tuple[pathlib.Path, tuple[int, int]]) -> _Shards:
    """Return shards in their present state, shared by all splits."""
    return _Shards(data, [path for path, _ in files])
