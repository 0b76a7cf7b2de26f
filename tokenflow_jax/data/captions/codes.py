"""Data sets of image codes, written by a frozen tokenizer, with their captions.

A data set of codes is an ArrayRecord data set (`data.records`) whose `dataset.json` also has the
fingerprint of the tokenizer that wrote it. Reading checks it: codes of another tokenizer look like
codes and mean something else.

`python -m tokenflow_jax.encode` writes one, part by part, see `parts`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenflow_jax import remote
from tokenflow_jax.data import parts, records, sources
from tokenflow_jax.data.examples import Broken, Skipped
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
        plan = remote.kind_of(remote.join(path, PLAN)) == "file"
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


class PartWriter(parts.PartWriter):
    """A writer of the parts of one data set of codes that fall to one host."""

    plan_name, error = PLAN, CodesError
