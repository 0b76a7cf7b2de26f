"""Where pictures come from: random-access sources, all of one form.

A source has `len` and gives for an index an example: {"name": str} with either "bytes" (an encoded
file) or "image" (uint8 (H, W, 3)), and where known "label" (int), "group" (int), "caption" (str),
"tags" (list of str).
"""

import glob
import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from tokenflow_jax.data import records
from tokenflow_jax.data.images import BrokenImage

EMOJI = pathlib.Path(__file__).parents[1] / "assets" / "emoji.array_record"
EMOJI_SPLITS = ("train", "heldout", "all")
GROUPS = (
    "smileys-emotion",
    "people-body",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def is_heldout(name: str) -> bool:
    """Whether a shipped picture is in the fixed tenth that never trains."""
    return zlib.crc32(name.encode()) % 10 == 0


class EmojiSource:
    """The captioned emoji inside the package; small, so they stay in memory once read."""

    def __init__(self, split: str):
        if split not in EMOJI_SPLITS:
            raise ValueError(f"the emoji have no split {split!r}; one of {EMOJI_SPLITS}")
        reader = array_record_module.ArrayRecordReader(str(EMOJI))
        examples = [records.unpack(record) for record in reader.read_all()]
        reader.close()
        if split != "all":
            examples = [e for e in examples if is_heldout(e["name"]) == (split == "heldout")]
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._examples[index]


class FolderSource:
    """All images below a folder, sorted by path; the first sub-folder is the class."""

    def __init__(self, folder: str):
        root = pathlib.Path(folder)
        if not folder or not root.is_dir():
            raise ValueError(f"data.path {folder!r} is not a folder of images")
        self._root = root
        self._paths = sorted(
            path for path in root.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS
        )
        if not self._paths:
            raise ValueError(
                f"{folder} holds no images: none of its files ends in {', '.join(IMAGE_ENDINGS)}"
            )
        parts = [path.relative_to(root).parts for path in self._paths]
        self.classes = sorted({p[0] for p in parts if len(p) > 1})
        self._labels = [self.classes.index(p[0]) if len(p) > 1 else -1 for p in parts]

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The picture's path below the folder."""
        return str(self._paths[index].relative_to(self._root))

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        example = {"name": self.name(index)}
        try:
            example["bytes"] = path.read_bytes()
        except OSError as error:
            raise BrokenImage("cannot be read", str(error)) from error
        if len(self.classes) and self._labels[index] >= 0:
            example["label"] = self._labels[index]
        return example


class RecordSource:
    """ArrayRecord files written by `data.prepare`: a data set folder, or files by glob."""

    def __init__(self, path: str, split: str):
        self._source = array_record_data_source.ArrayRecordDataSource(_record_files(path, split))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._source[index]
        except (RuntimeError, ValueError, IndexError) as error:
            raise BrokenImage("damaged record", str(error)) from error
        return records.unpack(record)


def _record_files(path: str, split: str) -> Sequence[str]:
    manifest = pathlib.Path(path) / records.MANIFEST
    if manifest.is_file():
        splits = json.loads(manifest.read_text())["splits"]
        if split not in splits:
            raise ValueError(f"{path} has no split {split!r}; it has {sorted(splits)}")
        return [str(manifest.parent / name) for name in splits[split]["files"]]
    files = sorted(glob.glob(path)) if path else []
    if not files or any(os.path.isdir(file) for file in files):
        raise ValueError(
            f"data.path {path!r} is neither a folder with {records.MANIFEST} (see python -m "
            "tokenflow_jax.data.prepare) nor a pattern of ArrayRecord files"
        )
    return files


class TFDSSource:
    """A data set of TensorFlow Datasets, prepared as ArrayRecord; TensorFlow is not needed.

    `path` is `name`, `name:version` or `name/config`; $TFDS_DATA_DIR says where the data lie.
    """

    def __init__(self, name: str, split: str):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                "data.name 'tfds' needs the package tensorflow-datasets: pip install "
                "'tokenflow_jax[tfds]'"
            ) from error
        builder = _tfds_builder(tfds, name)
        if "image" not in builder.info.features:
            features = sorted(builder.info.features)
            raise ValueError(f"TFDS data set {name!r} has no feature 'image', but {features}")
        if split not in builder.info.splits:
            raise ValueError(
                f"TFDS data set {name!r} has no split {split!r}; it has "
                f"{sorted(builder.info.splits)}"
            )
        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            self._source = builder.as_data_source(split=split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(_tfds_remedy(name)) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._source[index]
        example = {"name": str(index)}
        if isinstance(row.get("file_name"), bytes | str):
            name = row["file_name"]
            example["name"] = name.decode() if isinstance(name, bytes) else name
        image = row["image"]
        if isinstance(image, bytes):
            example["bytes"] = image
        else:  # mocked data come decoded
            example["image"] = np.asarray(image, np.uint8)
        if "label" in row and np.ndim(row["label"]) == 0:
            example["label"] = int(row["label"])
        return example


def _tfds_builder(tfds: Any, name: str) -> Any:
    """The builder of prepared data, or ValueError that says how to prepare them."""
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(f"TFDS data set {name!r}: {str(error).splitlines()[0]}") from error
    if not builder.is_prepared():
        raise ValueError(_tfds_remedy(name))
    return builder


def _tfds_remedy(name: str) -> str:
    return (
        f"TFDS data set {name!r} is not prepared as ArrayRecord in $TFDS_DATA_DIR. Prepare it once, "
        f"where TensorFlow is installed: tfds build {name} --file_format=array_record"
    )


def open_source(name: str, path: str, split: str) -> Any:
    """Opens a source.

    Args:
      name: "emoji", "folder", "array_record" or "tfds".
      path: folder, files, or TFDS name; not used by "emoji".
      split: which part; a folder of images has none, its path is the split.

    Returns:
      A source as this module's docstring describes.

    Raises:
      ValueError: no such data, or nothing in them.
    """
    kinds = {
        "emoji": lambda: EmojiSource(split),
        "folder": lambda: FolderSource(path),
        "array_record": lambda: RecordSource(path, split),
        "tfds": lambda: TFDSSource(path, split),
    }
    if name not in kinds:
        raise ValueError(f"data.name {name!r} is not one of {sorted(kinds)}")
    source = kinds[name]()
    if not len(source):
        raise ValueError(f"data set {name!r} {path} has no pictures in split {split!r}")
    return source
