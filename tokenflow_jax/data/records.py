"""The record format of the package's ArrayRecord files, and their atomic writer.

One ArrayRecord entry is one picture:

    bytes 0..3    b"TFX1"
    bytes 4..7    length n of the header, unsigned 32-bit little endian
    bytes 8..8+n  header, one JSON object in UTF-8
    the rest      the picture: an encoded file (PNG, JPEG, WebP, ...), raw RGB, or a tokenizer's
                  codes of it

Header keys: `name` (always), and where known `label` (class number), `group` (int), `caption`
(str), `captions` and `tags` (lists of str). `shape` [height, width, 3] marks a raw uint8 RGB
payload, `codes` the type of codes ("<u2" or "<i4", NumPy's names).

A data set is a folder of `SPLIT-00000-of-00004.array_record` files and one `dataset.json` naming
the files of each split and the class names. Files are written under a temporary name and
renamed when complete, `dataset.json` last, so an interrupted run never looks finished.
"""

import contextlib
import json
import os
import pathlib
import shutil
import struct
from typing import Any

import numpy as np
from array_record.python import array_record_module

from tokenflow_jax.data.images import BrokenImage

MAGIC = b"TFX1"
MANIFEST = "dataset.json"
_HEADER = struct.Struct("<4sI")
_HEADER_KEYS = ("name", "label", "group", "caption", "captions", "tags")
# How codes are stored, by whether 16 bits hold them.
_CODE_TYPES = {True: "<u2", False: "<i4"}
# One picture per chunk: random access reads exactly one. Encoded pictures are compressed already.
_WRITER_OPTIONS = {True: "group_size:1,uncompressed", False: "group_size:1,zstd:3"}


def pack(example: dict[str, Any]) -> bytes:
    """Serialises one picture.

    Args:
      example: `name` and one of `bytes` (an encoded file), `image` (uint8 (H, W, 3)) and `codes`
        (integers (L,)); optional `label`, `group`, `caption`, `captions`, `tags`.

    Returns:
      One ArrayRecord entry.

    Raises:
      ValueError: not exactly one of these, or one of another type or shape.
    """
    header = {key: example[key] for key in _HEADER_KEYS if key in example}
    payloads = [key for key in ("bytes", "image", "codes") if key in example]
    if len(payloads) != 1:
        raise ValueError(f"{example.get('name')}: give exactly one of 'bytes', 'image' and 'codes'")
    if "image" in example:
        image_HWC = np.asarray(example["image"])
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[-1] != 3:
            raise ValueError(
                f"{example.get('name')}: image is {image_HWC.dtype} {image_HWC.shape}; "
                "a raw picture must be uint8 (height, width, 3)"
            )
        header["shape"] = list(image_HWC.shape)
        payload = image_HWC.tobytes()
    elif "codes" in example:
        codes_L = np.asarray(example["codes"])
        if codes_L.ndim != 1 or codes_L.dtype.kind not in "iu" or codes_L.min(initial=0) < 0:
            raise ValueError(
                f"{example.get('name')}: codes are {codes_L.dtype} {codes_L.shape}; they must be "
                "integers of at least 0, one row"
            )
        header["codes"] = _CODE_TYPES[bool(codes_L.max(initial=0) < 2**16)]
        payload = codes_L.astype(header["codes"]).tobytes()
    else:
        payload = example["bytes"]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return _HEADER.pack(MAGIC, len(text)) + text + payload


def unpack(record: bytes) -> dict[str, Any]:
    """Reads back what `pack` wrote.

    Args:
      record: one ArrayRecord entry.

    Returns:
      The example, with `bytes`, `image` (uint8 (H, W, 3), read-only) or `codes` (int32 (L,)).

    Raises:
      BrokenImage: the entry is not in this format.
    """
    if len(record) < _HEADER.size or record[:4] != MAGIC:
        raise BrokenImage("not a record of this package", f"starts with {record[:4]!r}")
    length = _HEADER.unpack_from(record)[1]
    start = _HEADER.size + length
    try:
        example = json.loads(record[_HEADER.size : start])
        if not isinstance(example, dict) or "name" not in example:
            raise ValueError("the header is no object with a name")
        shape, kind = example.pop("shape", None), example.pop("codes", None)
        if kind is not None:
            if kind not in _CODE_TYPES.values():
                raise ValueError(f"codes of type {kind!r}")
            example["codes"] = np.frombuffer(record, kind, offset=start).astype(np.int32)
        elif shape is None:
            example["bytes"] = record[start:]
        else:
            example["image"] = np.frombuffer(record, np.uint8, offset=start).reshape(shape)
    except (ValueError, TypeError) as error:
        raise BrokenImage("damaged record", str(error)) from error
    return example


class RecordFile:
    """Writes one ArrayRecord file that appears under its name only when it is complete.

    Use as a context manager; on an exception the partial file is removed.
    """

    def __init__(self, path: str | os.PathLike, compressed_payload: bool = True):
        """Opens a temporary file beside `path`.

        Args:
          path: the final name.
          compressed_payload: whether pictures are compressed already (raw ones get zstd).
        """
        self.path = pathlib.Path(path)
        self.count = 0
        self._partial = self.path.with_name(f".partial-{os.getpid()}-{self.path.name}")
        self._writer = _open_writer(self._partial, _WRITER_OPTIONS[compressed_payload])

    def write(self, example: dict[str, Any]) -> None:
        """Appends one picture (see `pack`)."""
        try:
            self._writer.write(pack(example))
        except (RuntimeError, OSError) as error:
            raise OSError(_write_failure(self.path, error)) from error
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if kind is not None:
            with contextlib.suppress(RuntimeError):  # on a full disk closing fails as writing did
                self._writer.close()
            self._partial.unlink(missing_ok=True)
            return
        try:
            self._writer.close()
            # The writer buffers: a full disk may show only here, or only in a file that is short.
            reader = array_record_module.ArrayRecordReader(str(self._partial))
            written = reader.num_records()
            reader.close()
            if written != self.count:
                raise OSError(f"{written} of {self.count} records arrived")
        except (RuntimeError, ValueError, OSError) as error:
            self._partial.unlink(missing_ok=True)
            raise OSError(_write_failure(self.path, error)) from error
        os.replace(self._partial, self.path)


class DatasetWriter:
    """Writes a folder of sharded ArrayRecord files with its `dataset.json`.

    Use as a context manager. Everything is written in a temporary folder inside `folder` and moved
    into place at the end.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        records_per_file: int = 10_000,
        compressed_payload: bool = True,
        overwrite: bool = False,
    ):
        """Opens the folder.

        Args:
          folder: where the data set goes; made when it does not exist.
          records_per_file: pictures per file.
          compressed_payload: whether pictures are compressed already.
          overwrite: whether a data set that is there already may be replaced.

        Raises:
          ValueError: the folder holds a data set and `overwrite` is false.
        """
        self.folder = pathlib.Path(folder)
        if (self.folder / MANIFEST).exists() and not overwrite:
            raise ValueError(
                f"{self.folder} already holds a data set ({MANIFEST}); "
                "choose another folder or pass --overwrite"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.about: dict[str, Any] = {}
        self._records_per_file = records_per_file
        self._compressed = compressed_payload
        self._partial = self.folder / f".partial-{os.getpid()}"
        self._partial.mkdir(exist_ok=True)
        self._open: dict[str, RecordFile] = {}
        self._done: dict[str, list[RecordFile]] = {}

    def write(self, split: str, example: dict[str, Any]) -> None:
        """Appends one picture (see `pack`) to a split."""
        file = self._open.get(split)
        if file is None:
            number = len(self._done.setdefault(split, []))
            file = RecordFile(self._partial / f"{split}-{number:05d}", self._compressed)
            self._open[split] = file
        file.write(example)
        if file.count >= self._records_per_file:
            self._finish(split)

    def counts(self) -> dict[str, int]:
        """Returns the number of pictures written so far per split."""
        files = {split: list(done) for split, done in self._done.items()}
        for split, file in self._open.items():
            files[split].append(file)
        return {split: sum(file.count for file in done) for split, done in files.items()}

    def _finish(self, split: str) -> None:
        file = self._open.pop(split)
        file.__exit__(None, None, None)
        self._done[split].append(file)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        try:
            if kind is None:
                for split in list(self._open):
                    self._finish(split)
                self._publish()
            for file in self._open.values():
                file.__exit__(kind, value, traceback)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _publish(self) -> None:
        # The old manifest goes first: from here until the new one is there, the folder is
        # visibly not a data set.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for old in self.folder.glob("*-of-*.array_record"):
            old.unlink()
        splits = {}
        for split, files in self._done.items():
            names = [f"{split}-{i:05d}-of-{len(files):05d}.array_record" for i in range(len(files))]
            for file, name in zip(files, names, strict=True):
                os.replace(file.path, self.folder / name)
            splits[split] = {"records": sum(file.count for file in files), "files": names}
        manifest = {"format": MAGIC.decode(), "splits": splits, **self.about}
        partial = self._partial / MANIFEST
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, self.folder / MANIFEST)


def _open_writer(path: pathlib.Path, options: str):
    """Opens an ArrayRecord writer, or raises OSError with the reason."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return array_record_module.ArrayRecordWriter(str(path), options)
    except (RuntimeError, OSError) as error:
        raise OSError(_write_failure(path, error)) from error


def _write_failure(path: pathlib.Path, error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
    return (
        f"cannot write {path}: {error} ({free / 1e6:,.0f} MB free there; "
        "free some space or choose another --dst)"
    )
