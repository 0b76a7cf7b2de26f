"""Data sets of codes: what a frozen tokenizer made of pictures, with their captions.

A data set of codes is an ArrayRecord data set (`data.records`) whose `dataset.json` also says which
tokenizer wrote it, by fingerprint. Reading checks it: codes of another tokenizer look like codes
and mean something else.

`python -m tokenflow_jax.encode` writes one, part by part. A part is a file of a fixed range of
pictures that appears under its name only when it is complete; a killed command goes on with the
first part that is missing, and hosts take every `shard_count`-th part, with no word between them.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from tokenflow_jax.data import records, sources
from tokenflow_jax.data.images import BrokenImage
from tokenflow_jax.data.skipped import Skipped

PLAN = "encoding.json"
_KEPT = ("name", "label", "group", "caption", "captions", "tags")
_ABOUT = ("fingerprint", "codebook_size", "scales")


class CodesError(ValueError):
    """A data set of codes that does not go with a tokenizer, a plan or itself."""


class CodeRecords:
    """Codes read from an ArrayRecord data set."""

    array = "codes"

    def __init__(self, path: str, split: str, tokenizer: Mapping[str, Any]):
        """Opens a data set.

        Args:
          path: its folder.
          split: one of its splits, or "all".
          tokenizer: "fingerprint", "codebook_size" and "scales" of the tokenizer in use.

        Raises:
          CodesError: not a data set of codes, or one of another tokenizer.
          ValueError: no such split, or damaged files.
        """
        check_tokenizer(path, read_about(path), tokenizer)
        self._source = sources.RecordSource(path, split)
        self._size = tokenizer["codebook_size"]
        self._length = sum(side * side for side in tokenizer["scales"])
        self.name = f"codes {split}"
        self.blank = np.zeros(self._length, np.int32)
        self.skipped = Skipped(f"codes {path} {split}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any] | None:
        name = f"{self.name} record {index}"
        try:
            example = self._source[index]
            name = example["name"]
            codes = example.get("codes")
            if codes is None or len(codes) != self._length:
                raise BrokenImage("damaged record", f"not {self._length} codes")
            if codes.min() < 0 or codes.max() >= self._size:
                raise BrokenImage("damaged record", f"codes beyond {self._size}")
        except BrokenImage as error:
            self.skipped.add(name, error)
            return None
        return example


class CodesInMemory:
    """Codes of a small data set, computed once."""

    array = "codes"

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any] | None], skipped: Skipped):
        """Keeps codes.

        Args:
          name: what they are.
          rows: for every picture what is known of it and its "codes"; None for a broken one.
          skipped: why those are broken.

        Raises:
          ValueError: all are.
        """
        usable = next((row for row in rows if row is not None), None)
        if usable is None:
            raise ValueError(f"no usable picture among the {len(rows)} of {name}")
        self.name, self.skipped, self._rows = name, skipped, rows
        self.blank = np.zeros_like(usable["codes"])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any] | None:
        return self._rows[index]


def read_about(path: str | os.PathLike) -> dict[str, Any]:
    """What a data set of codes says about its tokenizer.

    Raises:
      CodesError: there is no finished data set of codes.
    """
    folder = pathlib.Path(path)
    manifest = folder / records.MANIFEST
    if not manifest.is_file():
        plan = (folder / PLAN).is_file()
        remedy = "run the same encode command again to finish it" if plan else (
            "write one with python -m tokenflow_jax.encode"
        )  # fmt: skip
        raise CodesError(
            f"{os.fspath(path)!r} is not a {'finished ' if plan else ''}data set of codes; {remedy}"
        )
    about = json.loads(manifest.read_text(encoding="utf-8")).get("tokenizer")
    if not isinstance(about, dict) or any(key not in about for key in _ABOUT):
        raise CodesError(
            f"{os.fspath(path)!r} holds pictures, not codes; encode it with "
            "python -m tokenflow_jax.encode"
        )
    return about


def check_tokenizer(path: Any, written_by: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Raises CodesError unless codes were written by the tokenizer in use.

    Args:
      path: what holds the codes or learnt them, for the message.
      written_by: the "fingerprint" noted there, and "codebook_size" and "scales" if they are.
      used: all three of the tokenizer in use.
    """
    if written_by["fingerprint"] == used["fingerprint"]:
        return
    differences = [
        f"{key} {written_by[key]} there, {used[key]} here"
        for key in ("codebook_size", "scales")
        if key in written_by and written_by[key] != used[key]
    ]
    raise CodesError(
        f"{path} belongs to codes made by another tokenizer: their fingerprint is "
        f"{written_by['fingerprint']}, that of the tokenizer in use {used['fingerprint']}"
        + (f" ({'; '.join(differences)})" if differences else "")
        + ", whose codes mean something else; give the tokenizer that made them"
    )


class PartWriter:
    """Writes the parts of one data set of codes that fall to one host."""

    def __init__(
        self,
        folder: str | os.PathLike,
        plan: Mapping[str, Any],
        splits: Mapping[str, int],
        *,
        records_per_file: int = 10_000,
        shard_index: int = 0,
        shard_count: int = 1,
    ):
        """Begins or continues.

        Args:
          folder: of the data set; made when it does not exist.
          plan: JSON-able facts about tokenizer and pictures; all hosts and runs must have the same.
          splits: name -> pictures in it.
          records_per_file: pictures per part.
          shard_index, shard_count: this host, and how many there are.

        Raises:
          CodesError: the folder was begun with another plan.
          ValueError: a bad shard.
        """
        if not 0 <= shard_index < shard_count or records_per_file < 1:
            raise ValueError(
                f"shard_index {shard_index} of {shard_count} hosts, {records_per_file} records per "
                "file: need 0 <= shard_index < shard_count and at least one record"
            )
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = json.loads(json.dumps({**plan, "splits": splits, "per_file": records_per_file}))
        self._plan = plan
        self._check_plan(plan)
        self._shard = shard_index, shard_count

    def _check_plan(self, plan: Mapping[str, Any]) -> None:
        path = self.folder / PLAN
        if (self.folder / records.MANIFEST).exists() and not path.exists():
            raise CodesError(f"{self.folder} holds another data set; choose another folder")
        if not path.exists():
            partial = path.with_name(f".partial-{os.getpid()}-{PLAN}")
            partial.write_text(json.dumps(plan, indent=1, ensure_ascii=False) + "\n", "utf-8")
            os.replace(partial, path)
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {old.get(key)!r} and is {plan.get(key)!r}"
            for key in sorted(old.keys() | plan.keys())
            if old.get(key) != plan.get(key)
        ]
        if changed:
            raise CodesError(
                f"{self.folder} was begun otherwise: {'; '.join(changed)}. Give what it was begun "
                "with, or another folder"
            )

    def _parts(self) -> list[tuple[str, range, pathlib.Path]]:
        """All parts of all hosts: split, pictures, file."""
        parts, size = [], self._plan["per_file"]
        for split, count in self._plan["splits"].items():
            files = -(-count // size)
            for i in range(files):
                name = f"{split}-{i:05d}-of-{files:05d}.array_record"
                pictures = range(i * size, min(count, (i + 1) * size))
                parts.append((split, pictures, self.folder / name))
        return parts

    def mine(self) -> list[tuple[str, range, pathlib.Path]]:
        """The parts of this host that are not there yet: split, pictures, file."""
        index, count = self._shard
        return [part for part in self._parts()[index::count] if not part[2].exists()]

    def write(self, file: pathlib.Path, examples: Iterable[Mapping[str, Any]]) -> int:
        """Writes one part; it appears when it is complete.

        Args:
          file: of `mine`.
          examples: with "name", "codes", and what else is known of each picture.

        Returns:
          How many there were.

        Raises:
          OSError: it cannot be written, for example because the disk is full.
        """
        with records.RecordFile(file) as out:
            for example in examples:
                kept = {key: example[key] for key in _KEPT if key in example}
                out.write({**kept, "codes": example["codes"]})
        return out.count

    def finish(self) -> bool:
        """Writes `dataset.json` if all parts of all hosts are there; returns whether it did.

        Raises:
          CodesError: the parts hold nothing.
        """
        parts = self._parts()
        if not all(file.exists() for _, _, file in parts):
            return False
        splits: dict[str, dict[str, Any]] = {}
        for split, _, file in parts:
            reader = array_record_module.ArrayRecordReader(str(file))
            count = reader.num_records()
            reader.close()
            if count:  # else all of its pictures were broken
                entry = splits.setdefault(split, {"records": 0, "files": []})
                entry["records"] += count
                entry["files"].append(file.name)
        if not splits:
            raise CodesError(f"{self.folder}: not one picture was usable")
        manifest = {
            "format": records.MAGIC.decode(),
            "splits": splits,
            **{k: v for k, v in self._plan.items() if k not in ("splits", "per_file")},
        }
        partial = self.folder / f".partial-{os.getpid()}-{records.MANIFEST}"
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, self.folder / records.MANIFEST)
        return True
