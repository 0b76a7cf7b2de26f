"""Pictures and captions in WebDataset tars, read at random places without unpacking them.

`data.path` names shards, local or remote, as `file_names` says. Beside a sample's picture lie, in
any combination, its caption in .txt, a .json object with a caption as `jsonl` names it, and an
integer label in .cls; so img2dataset writes them. `tar_index` says what a sample is.
"""

import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.data import file_names, images, jsonl, ranges, tar_index
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
_TARS = (".tar", ".tgz", ".tar.gz")
_READERS = 16  # of shards, at the start
_MOST_TEXT = 2**25  # bytes; `files.parse_json` refuses so many
_NEAR = 2**16  # bytes that a sample may have beside its picture to be read at once


class WebDatasetSource:
    """Samples of tar shards, in the order of the shards and of their members."""

    classes: tuple[str, ...] = ()

    def __init__(self, path: str, split: str = "all"):
        if split not in (*SPLITS, *HELDOUT_NAMES):
            raise ValueError(f"tar shards have no split {split!r}; one of {SPLITS}")
        paths = shard_paths(path)
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            versions = pool.map(lambda shard: tar_index.open_shard(shard).version, paths)
            self._shards = _opened(path, *zip(paths, versions, strict=True))
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

    def described(self, index: int) -> dict[str, Any]:
        """Return the .json of a sample, {} if it has none, or raise Broken."""
        return self._shards.described(self._places[index])

    def url(self, index: int) -> str:
        """Return the address that a picture came from, "" if it is not known."""
        return jsonl.url_of(self.described(index))


def shard_paths(path: str) -> list[str]:
    """Return the shards that `data.path` names, sorted within each pattern; at least one."""
    remedy = "name a .tar, a folder of them, or a pattern such as 'DIR/{00000..01023}.tar'"
    if path.startswith("pipe:"):
        raise ValueError(f"data.path {path!r}: programs are not run; {remedy}")
    found = file_names.in_folder(path, _TARS) if remote.kind_of(path) == "folder" else []
    if found and not any(name.endswith(".tar") for name in found):
        other = plain(os.path.basename(found[0]))
        raise ValueError(
            f"data.path {path!r} holds only compressed tars such as {other}: gunzip them, so that "
            "members can be read one by one"
        )
    return file_names.expand(path, (".tar",), remedy, "shards")


class _Shards:
    """The samples of some shards; any thread may read them."""

    def __init__(self, data: str, paths: Sequence[str]):
        self._paths = paths
        indexes = tar_index.load_all(paths)
        self._versions = [index.version for index in indexes]
        counts = [len(index.rows["header"]) for index in indexes]
        self._firsts = np.concatenate([[0], np.cumsum(counts)])
        # One record per sample: as Python numbers it is had in one call.
        self.rows = np.empty(self._firsts[-1], list(tar_index.ROWS.items()))
        for name in tar_index.ROWS:
            self.rows[name] = np.concatenate([index.rows[name] for index in indexes])
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

    def _open(self, shard: int) -> ranges.Ranges:
        file = tar_index.open_shard(self._paths[shard])
        if file.version != self._versions[shard]:
            raise ValueError(f"shard {self._paths[shard]} has changed since the start")
        return file

    def _handle(self, shard: int) -> ranges.Ranges:
        with self._lock:  # else two threads would open it
            return self._file(shard)

    def _read(self, shard: int, begin: int, size: int) -> bytes:
        try:
            data = self._handle(shard).read(begin, size)
        except (OSError, ValueError) as error:
            raise Broken("cannot be read", one_line(error)) from None
        if len(data) < size:
            raise Broken("cannot be read", f"shard {self._paths[shard]} has become shorter")
        return data

    def will_need(self, rows: np.ndarray) -> None:
        """Ask the system to read sorted rows ahead, neighbours at once."""
        at = {name: self.rows[name][rows].astype(np.int64) for name in tar_index.ROWS}
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
            if len(run):
                begin, end = int(begins[run[0]]), int(ends[run[-1]])
                with contextlib.suppress(OSError, ValueError):  # whoever reads will meet it
                    self._handle(int(shards[run[0]])).will_need(begin, end - begin)

    def described(self, row: int) -> dict[str, Any]:
        """Return a sample's .json, {} if it has none, or raise Broken."""
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        place, size = (int(self.rows[f"json_{name}"][row]) for name in ("at", "size"))
        if not place or size > _MOST_TEXT:
            return {}
        return jsonl.parse_object(self._read(shard, place * tar_index.BLOCK, size))

    def sample(self, row: int) -> dict[str, Any]:
        """Return an example, or raise Broken."""
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        at = dict(zip(tar_index.ROWS, self.rows[row].item(), strict=True))
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
def _opened(data: str, *files: tuple[str, str]) -> _Shards:
    """Return shards in their present state, shared by all splits."""
    return _Shards(data, [path for path, _ in files])
