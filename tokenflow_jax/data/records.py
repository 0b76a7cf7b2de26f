"""The record format of the package's ArrayRecord files, and their writers.

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
the files of each split and the class names. It is written last, so an interrupted run never looks
finished.
"""

import contextlib
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from tokenflow_jax import files, remote
from tokenflow_jax.data.examples import Broken, check_example
from tokenflow_jax.messages import one_line, shown

MAGIC = b"TFX1"
MANIFEST = "dataset.json"
_HEADER = struct.Struct("<4sI")
_HEADER_KEYS = ("name", "label", "group", "caption", "captions", "tags")


def pack(example: Mapping[str, Any]) -> bytes:
    """Serialize one picture: header keys, and one of `bytes`, `image` and `codes` (integers)."""
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
        header["codes"] = "<u2" if codes_L.max(initial=0) < 2**16 else "<i4"
        payload = codes_L.astype(header["codes"]).tobytes()
    else:
        payload = example["bytes"]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    text = text.encode(errors="backslashreplace")  # lone surrogates, as JSON escapes them
    return _HEADER.pack(MAGIC, len(text)) + text + payload


def unpack(record: bytes) -> dict[str, Any]:
    """Read an example back, with a read-only `image` or int32 `codes`, or raise Broken."""
    if len(record) < _HEADER.size or record[:4] != MAGIC:
        raise Broken("not a record of this package", f"starts with {record[:4]!r}")
    start = _HEADER.size + _HEADER.unpack_from(record)[1]
    try:
        header = files.parse_json(record[_HEADER.size : start], "the header")
        shape, kind = header.get("shape"), header.get("codes")
        example = {key: header[key] for key in _HEADER_KEYS if key in header}
        if kind is not None:
            if kind not in ("<u2", "<i4"):
                raise ValueError(f"codes of type {shown(kind)}")
            example["codes"] = np.frombuffer(record, kind, offset=start).astype(np.int32)
        elif shape is None:
            example["bytes"] = record[start:]
        else:
            sides = [side for side in shape if type(side) is int and side > 0]
            if sides != shape or len(shape) != 3 or shape[2] != 3:
                raise ValueError(f"a picture of shape {shown(shape)}")
            example["image"] = np.frombuffer(record, np.uint8, offset=start).reshape(shape)
    except (ValueError, TypeError) as error:
        raise Broken("damaged record", str(error)) from error
    return check_example(example)


def count_records(path: os.PathLike) -> int:
    """Return the number of records of a file, or raise OSError."""
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise OSError(
            f"{path} is no whole ArrayRecord file ({one_line(error)}): remove it and run "
            "the same again"
        ) from error
    return count


class RecordWriter:
    """A writer of one ArrayRecord file; raw pictures are compressed unless `compressed_payload`."""

    def __init__(self, path: pathlib.Path, compressed_payload: bool = True):
        self.path, self.count = path, 0
        # One picture per chunk: random access reads exactly one.
        options = "group_size:1," + ("uncompressed" if compressed_payload else "zstd:3")
        with self._named_errors():
            self._writer = array_record_module.ArrayRecordWriter(str(path), options)

    def write(self, example: Mapping[str, Any]) -> None:
        record = pack(example)
        with self._named_errors():
            self._writer.write(record)
        self.count += 1

    def close(self) -> None:
        """Finish the file, or raise OSError."""
        with self._named_errors():
            self._writer.close()
            # The writer buffers: a full disk may show only here, or only in a file that is short.
            written = count_records(self.path)
            if written != self.count:
                raise OSError(f"{written} of {self.count} records arrived")

    def discard(self) -> None:
        with contextlib.suppress(RuntimeError):  # on a full disk closing fails as writing did
            self._writer.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            free = shutil.disk_usage(self.path.parent).free
            raise OSError(
                f"cannot write {self.path}: {error} ({free / 1e6:,.0f} MB free there; "
                "free some space or choose another folder)"
            ) from error


@contextlib.contextmanager
def record_file(path: str | os.PathLike) -> Iterator[RecordWriter]:
    """Yield the writer of a file (not of raw pictures) that appears when it is complete."""
    with files.write_atomically(path, overwrite=True) as partial:
        writer = RecordWriter(partial)
        try:
            yield writer
        except BaseException:
            writer.discard()
            raise
        writer.close()


def file_name(split: str, number: int, count: int) -> str:
    """Return the name of one of the `count` files of a split."""
    return f"{split}-{number:05d}-of-{count:05d}.array_record"


def write_json(path: os.PathLike, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with write_at_once(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def write_at_once(path: os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a partial file that becomes `path`, local or remote; hosts may do so at once."""
    # `files.write_atomically` has one partial name for all.
    if remote.is_remote(path):
        with remote.staged(os.fspath(path)) as partial:
            yield partial
        return
    path = pathlib.Path(path)
    partial = path.with_name(f".partial-{os.uname().nodename}-{os.getpid()}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return the `dataset.json` of a folder; None where there is none.

    Raises:
      ValueError: it is not as `write_manifest` writes it, or names files outside the folder.
    """
    path = remote.join(folder, MANIFEST)
    if not remote.kind_of(path):
        return None
    about = files.read_json(path, keys=("splits",))
    splits, classes = about["splits"], about.get("classes", [])
    if not isinstance(splits, dict) or not splits:
        raise ValueError(f"{path}: its splits are {shown(splits)}")
    for name, split in splits.items():
        names = split.setdefault("files", []) if isinstance(split, dict) else None
        if not isinstance(names, list):
            raise ValueError(f"{path}: split {shown(name)} is {shown(split)}")
        for file in names:
            if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".."):
                raise ValueError(f"{path}: {shown(file)} is not the name of a file in its folder")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path}: its classes are {shown(classes)}")
    return about


def write_manifest(folder: epath.Path, splits: Mapping[str, Any], about: Mapping) -> None:
    """Write the `dataset.json` that makes a folder a data set."""
    write_json(folder / MANIFEST, {"format": MAGIC.decode(), "splits": splits, **about})


class DatasetWriter(contextlib.AbstractContextManager):
    """A writer of a data set in a temporary folder, which is moved into place at the end."""

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        records_per_file: int = 10_000,
        compressed_payload: bool = True,
        overwrite: bool = False,
    ):
        self.folder = pathlib.Path(folder)
        if (self.folder / MANIFEST).exists() and not overwrite:
            raise ValueError(
                f"{self.folder} already holds a data set ({MANIFEST}); "
                "choose another folder or pass --overwrite"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.about: dict[str, Any] = {}
        self._records_per_file, self._compressed = records_per_file, compressed_payload
        self._partial = self.folder / f".partial-{os.getpid()}"
        self._partial.mkdir(exist_ok=True)
        self._files: dict[str, list[RecordWriter]] = {}  # the last of a split is open

    def write(self, split: str, example: Mapping[str, Any]) -> None:
        written = self._files.get(split, [])
        if not written or written[-1].count >= self._records_per_file:
            if written:
                written[-1].close()
            file = RecordWriter(self._partial / f"{split}-{len(written):05d}", self._compressed)
            self._files[split] = written = [*written, file]
        written[-1].write(example)

    def counts(self) -> dict[str, int]:
        """Return the number of pictures written so far, per split."""
        return {split: sum(file.count for file in done) for split, done in self._files.items()}

    def __exit__(self, kind, value, traceback):
        try:
            for written in self._files.values():
                written[-1].close() if kind is None else written[-1].discard()
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _publish(self) -> None:
        # The old manifest goes first: from here until the new one is there, the folder is
        # visibly not a data set.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for old in self.folder.glob("*-of-*.array_record"):
            old.unlink()
        splits = {}
        for split, written in self._files.items():
            names = [file_name(split, i, len(written)) for i in range(len(written))]
            for file, name in zip(written, names, strict=True):
                file.path.replace(self.folder / name)
            splits[split] = {"records": sum(file.count for file in written), "files": names}
        write_manifest(self.folder, splits, self.about)
