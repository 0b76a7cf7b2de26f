"""ArrayRecord data sets written part by part, by any number of processes and hosts.

A part is a file of a fixed range of examples that appears under its name only when it is complete.
A killed command continues with the parts that are missing; hosts take every `shard_count`-th part
and need not communicate. Whoever finds all parts complete writes `dataset.json`.
"""

import concurrent.futures
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from etils import epath

from tokenflow_jax import files, remote
from tokenflow_jax.data import records
from tokenflow_jax.messages import shown

_READERS = 16
Part = tuple[str, range, epath.Path]  # split, examples, file


class PartWriter:
    """A writer of the parts of one data set that fall to one host."""

    plan_name: ClassVar[str] = "encoding.json"
    error: ClassVar[type[ValueError]] = ValueError
    taken: ClassVar[str] = "holds another data set"
    remedy: ClassVar[str] = "choose another folder"

    def __init__(
        self,
        folder: str | os.PathLike,
        plan: Mapping[str, Any],  # JSON-able facts; the same on all hosts and runs
        splits: Mapping[str, int],  # name -> number of pictures
        *,
        records_per_file: int = 10_000,
        shard_index: int = 0,
        shard_count: int = 1,
        overwrite: bool = False,
    ):
        """Start a data set, or continue one; `error` where it was started with another plan.

        `overwrite` starts anew where there is a complete data set, or one of another plan.
        """
        if not 0 <= shard_index < shard_count or records_per_file < 1:
            raise ValueError(
                f"shard_index {shard_index} of {shard_count} hosts, {records_per_file} records per "
                "file: need 0 <= shard_index < shard_count and at least one record"
            )
        self.folder = epath.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Through JSON, so that it can be compared with the one on disk.
        plan = json.loads(json.dumps({**plan, "splits": splits, "per_file": records_per_file}))
        self._plan, self._shard = plan, (shard_index, shard_count)
        path, manifest = self.folder / self.plan_name, self.folder / records.MANIFEST
        if overwrite and (manifest.exists() or self._changes(path)):
            self._clear()
        if manifest.exists() and not path.exists():
            raise self.error(f"{self.folder} {self.taken}; {self.remedy}")
        if not path.exists():
            records.write_json(path, plan)
        if changed := self._changes(path):
            raise self.error(
                f"{self.folder} was started with other settings: {'; '.join(changed)}. Restore "
                f"them, or {self.remedy}"
            )

    def _changes(self, path: epath.Path) -> list[str]:
        """Return a line for every fact in which the plan on disk, if any, differs."""
        if not path.exists():
            return []
        old, plan = files.read_json(path, remedy=f"; {self.remedy}"), self._plan
        return [
            f"{key} was {shown(old.get(key))} and is {shown(plan.get(key))}"
            for key in sorted(old.keys() | plan.keys())
            if old.get(key) != plan.get(key)
        ]

    def _clear(self) -> None:
        # The manifest goes first: from here on, the folder is visibly not a data set.
        (self.folder / records.MANIFEST).unlink(missing_ok=True)
        (self.folder / self.plan_name).unlink(missing_ok=True)
        for old in self.folder.glob("*-of-*.array_record"):
            old.unlink(missing_ok=True)

    def _parts(self) -> list[Part]:
        """Return the parts of all hosts."""
        parts, size = [], self._plan["per_file"]
        for split, count in self._plan["splits"].items():
            starts = range(0, count, size)
            for i, start in enumerate(starts):
                file = self.folder / records.file_name(split, i, len(starts))
                parts.append((split, range(start, min(count, start + size)), file))
        return parts

    def mine(self) -> list[Part]:
        """Return the missing parts of this host."""
        (index, count), there = self._shard, set(remote.names_in(self.folder))
        return [part for part in self._parts()[index::count] if part[2].name not in there]

    def write(self, file: epath.Path, examples: Iterable[Mapping[str, Any]]) -> int:
        """Write one part, a file of `mine`, and return the number of its examples."""
        return write_part(file, examples)

    def finish(self) -> bool:
        """Write `dataset.json` and return True if all parts of all hosts are there."""
        parts = self._parts()
        if not {file.name for _, _, file in parts} <= set(remote.names_in(self.folder)):
            return False
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            counts = list(pool.map(records.count_records, (file for _, _, file in parts)))
        splits: dict[str, dict[str, Any]] = {}
        for (split, _, file), count in zip(parts, counts, strict=True):
            if count:  # else all of its pictures were broken
                entry = splits.setdefault(split, {"records": 0, "files": []})
                entry["records"] += count
                entry["files"].append(file.name)
        about = {k: v for k, v in self._plan.items() if k not in ("splits", "per_file")}
        self._publish(splits, about)
        return True

    def _publish(self, splits: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        if not splits:
            raise self.error(f"{self.folder}: not one picture was usable")
        records.write_manifest(self.folder, splits, about)


def write_part(file: epath.Path, examples: Iterable[Mapping[str, Any]]) -> int:
    """Write a file, local or remote, that appears when it is complete; count its examples."""
    with records.record_file(file) as out:
        for example in examples:
            out.write(example)
    return out.count
