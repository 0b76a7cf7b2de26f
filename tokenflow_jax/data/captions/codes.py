"""Data sets of image codes, written by a frozen tokenizer, with their captions.

A data set of codes is an ArrayRecord data set (`data.records`) whose `dataset.json` also has the
fingerprint of the tokenizer that wrote it. Reading checks it: codes of another tokenizer look like
codes and mean something else.

`python -m tokenflow_jax.encode` writes one, part by part. A part is a file of a fixed range of
pictures that appears under its name only when it is complete. A killed command continues with the
first part that is missing; hosts take every `shard_count`-th part and need not communicate.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tokenflow_jax.data import records, sources
from tokenflow_jax.data.examples import Broken, Skipped
from tokenflow_jax.files import read_json
from tokenflow_jax.messages import shown

PLAN = "encoding.json"
_KNOWN = {"fingerprint", "codebook_size", "scales"}  # of a tokenizer


class CodesError(ValueError):
    """A data set of codes that does not fit a tokenizer, a plan or itself."""


class CodeRecords:
    """Codes read from an ArrayRecord data set."""

    array = "codes"

    def __init__(self, path: str, split: str, tokenizer: Mapping[str, Any]):
        """Open a data set; CodesError unless it is of this tokenizer, see `check_tokenizer`."""
        check_tokenizer(path, read_about(path), tokenizer)
        self._source = sources.RecordSource(path, split)
        self._size = tokenizer["codebook_size"]
        self._length = sum(side * side for side in tokenizer["scales"])
        self.name = f"codes {split}"
        self.blank = np.zeros(self._length, np.int32)
        self.skipped = Skipped(f"codes {path} {split}", len(self._source))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any] | None:
        name = f"{self.name} record {index}"
        try:
            example = self._source[index]
            name = example["name"]
            codes = example.get("codes")
            if codes is None or len(codes) != self._length:
                raise Broken("damaged record", f"not {self._length} codes")
            if codes.min() < 0 or codes.max() >= self._size:
                raise Broken("damaged record", f"codes beyond {self._size}")
        except Broken as error:
            self.skipped.add(name, error)
            return None
        return example


class CodesInMemory(list):
    """Codes of a small data set, computed once: examples with "codes", None for a broken one."""

    array = "codes"

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any] | None], skipped: Skipped):
        usable = next((row for row in rows if row is not None), None)
        if usable is None:
            raise ValueError(skipped.nothing_usable("picture"))
        super().__init__(rows)
        self.name, self.skipped = name, skipped
        self.blank = np.zeros_like(usable["codes"])


def read_about(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a finished data set of codes says about its tokenizer, or raise CodesError."""
    manifest = records.read_manifest(path)
    if manifest is None:
        plan = (pathlib.Path(path) / PLAN).is_file()
        remedy = "run the same encode command again to finish it" if plan else (
            "write one with python -m tokenflow_jax.encode"
        )  # fmt: skip
        raise CodesError(
            f"{os.fspath(path)!r} is not a {'finished ' if plan else ''}data set of codes; {remedy}"
        )
    about = manifest.get("tokenizer")
    if not isinstance(about, dict) or not about.keys() >= _KNOWN:
        raise CodesError(
            f"{os.fspath(path)!r} holds pictures, not codes; encode it with "
            "python -m tokenflow_jax.encode"
        )
    return about


def check_tokenizer(path: Any, written_by: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Raise CodesError unless the codes of `path` were written by the tokenizer in use.

    Both have a "fingerprint", and "codebook_size" and "scales" where these are known.
    """
    if written_by["fingerprint"] == used["fingerprint"]:
        return
    differences = [
        f"{key} {shown(written_by[key])} there, {used[key]} here"
        for key in ("codebook_size", "scales")
        if key in written_by and written_by[key] != used[key]
    ]
    raise CodesError(
        f"{path} belongs to codes made by another tokenizer: their fingerprint is "
        f"{written_by['fingerprint']!s:.80}, that of the tokenizer in use {used['fingerprint']}"
        + (f" ({'; '.join(differences)})" if differences else "")
        + ", whose codes mean something else; give the tokenizer that made them"
    )


class PartWriter:
    """A writer of the parts of one data set of codes that fall to one host."""

    def __init__(
        self,
        folder: str | os.PathLike,
        plan: Mapping[str, Any],  # JSON-able facts; the same on all hosts and runs
        splits: Mapping[str, int],  # name -> number of pictures
        *,
        records_per_file: int = 10_000,
        shard_index: int = 0,
        shard_count: int = 1,
    ):
        """Start a data set, or continue one; CodesError where it was started with another plan."""
        if not 0 <= shard_index < shard_count or records_per_file < 1:
            raise ValueError(
                f"shard_index {shard_index} of {shard_count} hosts, {records_per_file} records per "
                "file: need 0 <= shard_index < shard_count and at least one record"
            )
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Through JSON, so that it can be compared with the one on disk.
        plan = json.loads(json.dumps({**plan, "splits": splits, "per_file": records_per_file}))
        self._plan, self._shard = plan, (shard_index, shard_count)
        path = self.folder / PLAN
        if (self.folder / records.MANIFEST).exists() and not path.exists():
            raise CodesError(f"{self.folder} holds another data set; choose another folder")
        if not path.exists():
            records.write_json(path, plan)
        old = read_json(path, remedy="; choose another folder")
        changed = [
            f"{key} was {shown(old.get(key))} and is {shown(plan.get(key))}"
            for key in sorted(old.keys() | plan.keys())
            if old.get(key) != plan.get(key)
        ]
        if changed:
            raise CodesError(
                f"{self.folder} was started with other settings: {'; '.join(changed)}. Restore "
                "them, or choose another folder"
            )

    def _parts(self) -> list[tuple[str, range, pathlib.Path]]:
        """Return the parts of all hosts: split, pictures, file."""
        parts, size = [], self._plan["per_file"]
        for split, count in self._plan["splits"].items():
            starts = range(0, count, size)
            for i, start in enumerate(starts):
                file = self.folder / records.file_name(split, i, len(starts))
                parts.append((split, range(start, min(count, start + size)), file))
        return parts

    def mine(self) -> list[tuple[str, range, pathlib.Path]]:
        """Return the missing parts of this host: split, pictures, file."""
        index, count = self._shard
        return [part for part in self._parts()[index::count] if not part[2].exists()]

    def write(self, file: pathlib.Path, examples: Iterable[Mapping[str, Any]]) -> int:
        """Write one part, a file of `mine`, and return the number of its examples."""
        with records.record_file(file) as out:
            for example in examples:
                out.write(example)
        return out.count

    def finish(self) -> bool:
        """Write `dataset.json` and return True if all parts of all hosts are there."""
        parts = self._parts()
        if not all(file.exists() for _, _, file in parts):
            return False
        splits: dict[str, dict[str, Any]] = {}
        for split, _, file in parts:
            if count := records.count_records(file):  # else all of its pictures were broken
                entry = splits.setdefault(split, {"records": 0, "files": []})
                entry["records"] += count
                entry["files"].append(file.name)
        if not splits:
            raise CodesError(f"{self.folder}: not one picture was usable")
        about = {k: v for k, v in self._plan.items() if k not in ("splits", "per_file")}
        records.write_manifest(self.folder, splits, about)
        return True
