"""The lines of a large text file: found once, read by any thread, divided into splits.

Only places and lengths stay in memory. Going through ten million lines takes minutes, so what was
found in a large file is kept beside it (FILE.index.npz) and taken up as long as the file is the
same, by its size and time of change.
"""

import array
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging

from tokenflow_jax.data.splits import MIN_TO_SPLIT, is_heldout

_KEEP_FROM = 100_000  # lines; smaller files are gone through every time
_VERSION = 1  # of what is kept; another one is made anew
_COLUMNS = {"offsets": np.int64, "numbers": np.int64, "lengths": np.int32, "held_out": np.bool_}


class Described(NamedTuple):
    """What a line is about.

    Attributes:
      length: for grouped sampling; may be negative.
      key: decides on the split; a line without stays in training.
    """

    length: int = 1
    key: str = ""


class Lines:
    """The lines of a file that are not blank.

    Attributes:
      file: the path.
      offsets, numbers, lengths, held_out: of each line: where it begins in bytes, its number from
        1, `Described.length`, and whether it belongs to the split "heldout".
    """

    def __init__(self, file: str | os.PathLike, kind: str, describe: Callable[[bytes], Described]):
        """Finds the lines, or takes up what was found before.

        Args:
          file: the path; stays open.
          kind: names what `describe` does: another one's findings are not taken up.
          describe: must not raise.

        Raises:
          OSError: the file cannot be read.
        """
        self.file = pathlib.Path(file)
        self._open = self.file.open("rb")
        status = os.fstat(self._open.fileno())
        self._identity = f"{kind} {_VERSION} {status.st_size} {status.st_mtime_ns}"
        self._kept = self.file.with_name(self.file.name + ".index.npz")
        columns = self._take_up()
        if columns is None:
            columns = self._find(describe)
            if len(columns["offsets"]) >= _KEEP_FROM:
                self._keep(columns)
        self.offsets, self.numbers, self.lengths, self.held_out = (columns[n] for n in _COLUMNS)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> bytes:
        """A line without its end, read without moving a position that threads share."""
        line, size, start = b"", 4096, int(self.offsets[index])
        while True:
            piece = os.pread(self._open.fileno(), size, start + len(line))
            end = piece.find(b"\n")
            line += piece if end < 0 else piece[:end]
            if end >= 0 or not piece:
                return line

    def split(self, name: str) -> np.ndarray:
        """Places of a split's lines.

        Args:
          name: "all", "train" or "heldout". Below 100 lines all of them are everything, and the log
            says so.

        Returns:
          int64, ascending.
        """
        if name == "all" or len(self) < MIN_TO_SPLIT:
            if name == "heldout":
                logging.warning(
                    "%s has %d lines, fewer than %d: none are held out, so the figures are on "
                    "training data", self.file, len(self), MIN_TO_SPLIT,
                )  # fmt: skip
            return np.arange(len(self))
        return np.flatnonzero(self.held_out == (name == "heldout"))

    def _find(self, describe: Callable[[bytes], Described]) -> dict[str, np.ndarray]:
        rows, offset = {name: array.array("q") for name in _COLUMNS}, 0
        for number, line in enumerate(self._open, 1):
            if line.strip():
                length, key = describe(line)
                values = (offset, number, length, bool(key) and is_heldout(key))
                for name, value in zip(_COLUMNS, values, strict=True):
                    rows[name].append(value)
            offset += len(line)
        return {name: np.array(rows[name], dtype) for name, dtype in _COLUMNS.items()}

    def _take_up(self) -> dict[str, np.ndarray] | None:
        """What was found before, if it is of this very file."""
        try:
            with np.load(self._kept, allow_pickle=False) as kept:
                if str(kept["identity"]) != self._identity:
                    return None
                return {name: kept[name] for name in _COLUMNS}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logging.warning("%s cannot be used (%s): it is made anew", self._kept, error)
            return None

    def _keep(self, columns: dict[str, np.ndarray]) -> None:
        """Writes beside the file; several processes may do so at once."""
        partial = self._kept.with_name(f"{self._kept.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            with partial.open("wb") as out:
                np.savez(out, identity=np.array(self._identity), **columns)
            partial.replace(self._kept)
        except OSError as error:
            partial.unlink(missing_ok=True)
            logging.warning(
                "%s cannot be written (%s): every start goes through the %d lines of %s again",
                self._kept, error, len(columns["offsets"]), self.file.name,
            )  # fmt: skip
