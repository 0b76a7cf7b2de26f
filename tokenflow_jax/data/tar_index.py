"""Indexes of tar shards: the places of every sample's picture and texts, 37 bytes per sample.

A sample is made of the members of one shard with the same key: the path up to the first dot of the
base name, as WebDataset defines it. Hidden files and all but regular files are no members.

    python -m tokenflow_jax.data.tar_index SHARD.tar ...

makes and keeps the indexes of some shards; `load_all` starts it where there is much to do.
"""

import array
import concurrent.futures
import contextlib
import io
import os
import pathlib
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from tokenflow_jax.data import ranges
from tokenflow_jax.data.examples import is_heldout
from tokenflow_jax.data.kept import Columns, Kept
from tokenflow_jax.log import progress
from tokenflow_jax.messages import one_line, shown

BLOCK = 512
TEXTS = ("txt", "json", "cls")
KINDS = ("picture", *TEXTS)
_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_KIND_OF = {**dict.fromkeys(_PICTURES, "picture"), **{text: text for text in TEXTS}}
# Places, and the place of the picture's header, are counted in blocks, so that four bytes reach
# 2 TiB; at 0 there is no such member. Sizes are in bytes.
ROWS = {
    "header": np.uint32, **{f"{kind}_at": np.uint32 for kind in KINDS},
    **{f"{kind}_size": np.uint32 for kind in KINDS}, "held_out": np.bool_,
}  # fmt: skip
_COLUMNS = {**ROWS, "left_out": np.int64, "notes": np.uint8}
_VERSION = 1  # of kept indexes
_MOST = 2**32 - 1
MOST_HEADER = 2**20  # bytes of a member's name and other properties
_MOST_DAMAGE = 100  # places; what follows in a shard is not read
_LARGE = 2**28  # bytes of shards that one process indexes in seconds
_SHARDS_AT_A_TIME = 8
_READERS = 16
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zX": "unxz",
    b"(\xb5/\xfd": "unzstd",
}
# Whatever tarfile raises for a damaged header.
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError, KeyError, IndexError)


class Index(NamedTuple):
    """The samples of a shard."""

    rows: Columns
    notes: list[str]  # on what is damaged
    left_out: int  # keys without a picture, and pictures behind the first of a key
    version: str  # of the shard, see `ranges`
    problem: str  # why the index is not kept; "" where it is


def open_shard(path: str) -> ranges.Ranges:
    """Open a regular file for reading at any place, or raise ValueError."""
    try:
        return ranges.open_ranges(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"shard {path} cannot be read ({one_line(error)})") from None


def load_all(paths: Sequence[str]) -> list[Index]:
    """Return the indexes of shards; those not kept yet are made, by all cores if they are large."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        shards = list(pool.map(open_shard, paths))
        kept = list(pool.map(lambda *shard: load(*shard, make=False), paths, shards))
    missing = [place for place, found in enumerate(kept) if found is None]
    if len(missing) > 1 and sum(shards[place].size for place in missing) > _LARGE:
        random.shuffle(missing)  # hosts that start together take different ones
        _make_apart([paths[place] for place in missing])
    everything = zip(paths, shards, kept, strict=True)
    return [found or load(path, shard) for path, shard, found in everything]


def _make_apart(paths: Sequence[str]) -> None:
    # Programs, not multiprocessing: that would import the main module again, which may hold a TPU.
    package = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tokenflow_jax.data.tar_index"]

    def run(first: int) -> None:
        some = paths[first : first + _SHARDS_AT_A_TIME]
        subprocess.run([*command, *some], env={**os.environ, "PYTHONPATH": path}, check=False)

    firsts = range(0, len(paths), _SHARDS_AT_A_TIME)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in progress(pool.map(run, firsts), len(firsts), "indexing shards"):
            pass


def load(path: str, shard: ranges.Ranges, make: bool = True) -> Index | None:
    """Return the index of a shard, kept or made; None if it is not kept and not to be made."""
    kept, problem = Kept(path, f"tar {_VERSION}", shard.version), ""
    columns = kept.load(_COLUMNS, lambda columns: _fit(columns, shard.size))
    if columns is None and not make:
        return None
    if columns is None:
        columns = _make(path, shard)
        problem = kept.keep(columns)
    notes = columns["notes"].tobytes().decode("utf-8", "replace").splitlines()
    rows = {name: columns[name] for name in ROWS}
    return Index(rows, notes, int(columns["left_out"].sum()), shard.version, problem)


def _fit(columns: Columns, size: int) -> bool:
    """Return True if columns describe members of a file of some size."""
    if len({len(columns[name]) for name in ROWS}) > 1:
        return False
    ends = (columns[f"{k}_at"].astype(np.int64) * BLOCK + columns[f"{k}_size"] for k in KINDS)
    return all((end <= size).all() for end in ends) and bool(
        (columns["header"] < columns["picture_at"]).all()
    )


def _make(path: str, shard: ranges.Ranges) -> Columns:
    start = shard.read(0, 8)
    if tool := next((t for magic, t in _COMPRESSED.items() if start.startswith(magic)), ""):
        raise ValueError(
            f"shard {path} is compressed, so its members cannot be read one by one: {tool} it"
        )
    try:
        scan = _Scan(shard)
    except DAMAGE as error:
        raise ValueError(
            f"shard {path} is no tar ({one_line(error)}): fetch it again or leave it out"
        ) from None
    rows = {name: array.array("I") for name in ROWS}
    row_of: dict[str, int] = {}
    left_out, compound = 0, set()
    for info in scan:
        key, ending = split_name(info.name)
        if not key:
            continue
        if (row := row_of.setdefault(key, len(row_of))) == len(rows["header"]):
            for column in rows.values():
                column.append(0)
        if (kind := _KIND_OF.get(ending.rpartition(".")[2])) is None:
            continue
        if rows[f"{kind}_at"][row]:  # a.jpg comes before a.mask.jpg, else the first one
            left_out += kind == "picture"
            if "." in ending or (row, kind) not in compound:
                continue
        (compound.add if "." in ending else compound.discard)((row, kind))
        if info.offset_data // BLOCK > _MOST:
            raise ValueError(f"shard {path} has more than 2 TiB: make smaller ones")
        rows[f"{kind}_at"][row] = info.offset_data // BLOCK
        rows[f"{kind}_size"][row] = min(info.size, _MOST)
        if kind == "picture":
            rows["header"][row] = info.offset // BLOCK
            rows["held_out"][row] = is_heldout(sample_name(path, info.name))
    whole = np.frombuffer(rows["picture_at"], np.uint32) > 0
    columns = {name: np.array(rows[name], ROWS[name])[whole] for name in ROWS}
    notes = np.frombuffer("\n".join(scan.notes()).encode("utf-8", "replace"), np.uint8)
    return {**columns, "left_out": np.array([left_out + np.sum(~whole)]), "notes": notes}


def split_name(name: str) -> tuple[str, str]:
    """Return key and lower-case ending of a member; "" for a hidden one."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or any(part.startswith(".") and part != ".." for part in parts):
        return "", ""
    stem, _, ending = parts[-1].partition(".")
    return "/".join((*parts[:-1], stem)), ending.lower()


def sample_name(path: str, member: str) -> str:
    """Return the name of a sample, unlike that of any other shard's."""
    return f"{path.rpartition('/')[2]}/{member.removeprefix('./')}"


def name_in(header: bytes) -> str:
    """Return a member's name as its headers state it; raises one of DAMAGE."""
    last = header[-BLOCK:]
    if len(header) == BLOCK or (header[156:157] == tarfile.XHDTYPE and b"path=" not in header):
        # As tarfile does, which takes as long as all else about a sample.
        name, prefix = (last[a:b].split(b"\0")[0] for a, b in ((0, 100), (345, 500)))
        return (prefix + b"/" * bool(prefix) + name).decode("utf-8", "surrogateescape")
    with tarfile.TarFile(fileobj=_Headers(io.BytesIO(header)), errors="surrogateescape") as tar:
        return tar.next().name


class _Headers:
    """A file as tarfile needs it; refuses to read as much as only a damaged header declares."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class _Scan:
    """The regular members of a tar that are whole; damaged ones are left out and noted."""

    def __init__(self, shard: ranges.Ranges):
        self._shard, self._size, file = shard, shard.size, shard.open()
        if (first := file.read(BLOCK)).strip(b"\0") or not first:
            tarfile.TarInfo.frombuf(first, "utf-8", "replace")
        # It takes the first member at once and would fail: so it begins at the end.
        file.seek(shard.size)
        self._tar = tarfile.TarFile(
            fileobj=_Headers(file), encoding="utf-8", errors="surrogateescape", ignore_zeros=True
        )
        self._tar.offset = file.seek(0)
        self._end = 0  # of the last whole member
        self._damage: list[int] = []
        self._cut = ""  # a member that would end beyond the file

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        tar, size, failures = self._tar, self._size, 0
        while tar.offset < size and failures < _MOST_DAMAGE:
            before = tar.offset
            try:
                info = tar.next()
            except DAMAGE:
                after = tar.offset if before <= tar.offset <= size else before
                tar.offset, failures = after + BLOCK, failures + 1
                continue
            if info is None:
                break
            tar.members.clear()  # which would grow
            sparse = info.issparse()
            data_end = tar.offset if sparse or not info.isreg() else info.offset_data + info.size
            if not info.offset_data <= data_end <= size:
                self._cut, tar.offset = info.name, info.offset_data
                continue
            if info.offset > self._end and not self._is_filler(self._end):
                self._damage.append(self._end)
                failures += 1
            self._end, self._cut = tar.offset, ""
            if info.isreg() and not sparse:
                yield info

    def _is_filler(self, place: int) -> bool:
        """Return True for an end mark, and for properties of all members."""
        block = self._shard.read(place, BLOCK)
        if len(block) == BLOCK and not block.strip(b"\0"):
            return True
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "replace").type == tarfile.XGLTYPE
        except DAMAGE:
            return False

    def notes(self) -> list[str]:
        """Return lines on what was damaged, once all members were taken."""
        notes = []
        if self._damage:
            more = f" and at {len(self._damage) - 1} more places" if self._damage[1:] else ""
            notes.append(f"damaged at byte {self._damage[0]:,}{more}, the members there are lost")
        if not self._is_filler(self._end):
            member = f" in the middle of {shown(self._cut)}" if self._cut else ""
            notes.append(
                f"truncated{member}: nothing behind byte {self._end:,} of {self._size:,} is a "
                "whole member, and there is no end mark"
            )
        return notes


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        with contextlib.suppress(ValueError):  # whoever started this will meet it, too
            load(argument, open_shard(argument))
