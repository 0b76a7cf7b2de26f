"""Random-access sources of pictures, all of one form.

A source has `len` and gives for an index an example: {"name": str} with either "bytes" (an encoded
file) or "image" (uint8 (H, W, 3)), and where known "label" (int), "group" (int), "caption" (str),
"tags" (list of str). A picture that cannot even be read raises Broken. `classes` are the
names of the labels, if any; `numbers` are the numeric labels that examples have.
"""

import contextlib
import glob
import pathlib
from typing import Any

from array_record.python import array_record_data_source

from tokenflow_jax import remote
from tokenflow_jax.data import file_names, records
from tokenflow_jax.data.arrow import ArrowSource
from tokenflow_jax.data.examples import SPLITS, Broken, check_example, is_heldout
from tokenflow_jax.data.folders import FolderSource
from tokenflow_jax.data.jsonl import JsonlSource
from tokenflow_jax.data.parquet import ParquetSource
from tokenflow_jax.data.webdataset import WebDatasetSource
from tokenflow_jax.messages import one_line, plain, shown

EMOJI = pathlib.Path(__file__).parents[1] / "assets" / "emoji.array_record"
GROUPS = (
    "smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities",
    "objects", "symbols",
)  # fmt: skip


class EmojiSource(list):
    """The captioned emoji inside the package; small, so they stay in memory once read."""

    numbers = ("group",)

    def __init__(self, split: str):
        if split not in SPLITS:
            raise ValueError(f"the emoji have no split {split!r}; one of {SPLITS}")
        self.classes: list[str] = []
        everything = RecordSource(glob.escape(str(EMOJI)), "all")
        examples = (everything[i] for i in range(len(everything)))
        super().__init__(
            e for e in examples if split == "all" or is_heldout(e["name"]) == (split == "heldout")
        )


class RecordSource:
    """ArrayRecord files written by `data.prepare`: a data set folder, or files by glob."""

    def __init__(self, path: str, split: str):
        # `split` is not used for a pattern, which names its files.
        if remote.is_remote(path) and not path.startswith("gs://"):
            raise ValueError(
                f"data.path {path!r}: ArrayRecord is read from disks and gs:// only; copy the data "
                "set, or read tars or Parquet from there"
            )
        files, self.classes = _record_files(path, split)
        try:
            self._source = array_record_data_source.ArrayRecordDataSource(files)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"data.path {path!r}: a file is missing or damaged ({one_line(error)}); write the "
                "data set again with python -m tokenflow_jax.data.prepare"
            ) from error
        self.numbers: tuple[str, ...] = ()
        for index in range(len(self)):
            with contextlib.suppress(Broken):
                # Those of the first record that can be read: the writer treats all alike.
                self.numbers = tuple(key for key in ("label", "group") if key in self[index])
                break

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._source[index]
        except (RuntimeError, ValueError, IndexError) as error:
            raise Broken("damaged record", one_line(error)) from error
        return records.unpack(record)


def _record_files(path: str, split: str) -> tuple[list[str], list[str]]:
    """Return the files of a split and the class names."""
    about = records.read_manifest(path) if path else None
    if about is not None:
        splits = about["splits"]
        if split != "all" and split not in splits:
            raise ValueError(f"{path} has no split {split!r}; it has {shown([*splits, 'all'])}")
        wanted = splits if split == "all" else [split]
        files = [remote.join(path, name) for part in wanted for name in splits[part]["files"]]
        if missing := [file for file in files if remote.kind_of(file) != "file"]:
            raise ValueError(f"data.path {path!r}: {plain(missing[0])} is missing or damaged")
        return files, list(about.get("classes", ()))
    remedy = (
        f"give a folder with {records.MANIFEST} (see python -m tokenflow_jax.data.prepare) or a "
        "pattern of ArrayRecord files"
    )
    return file_names.expand(path, (".array_record",), remedy), []


class TFDSSource:
    """A data set of TensorFlow Datasets, prepared as ArrayRecord; TensorFlow is not needed."""

    def __init__(self, name: str, split: str):
        # Never downloads or prepares anything: the name is searched for in $TFDS_DATA_DIR, or is
        # the folder of one prepared version, with dataset_info.json.
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                "data.name 'tfds' needs the package tensorflow-datasets: pip install "
                "tensorflow-datasets"
            ) from error
        try:
            is_folder = remote.kind_of(remote.join(name, "dataset_info.json")) == "file"
            builder = tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise ValueError(f"TFDS data set {name!r}: {one_line(error)}") from error
        features = builder.info.features
        self.splits = list(builder.info.splits or ())
        self._image = _only(features, tfds.features.Image, "image")
        if not self._image:
            raise ValueError(
                f"TFDS data set {name!r} has no single image per example; it has {sorted(features)}"
            )
        self._label = _only(features, tfds.features.ClassLabel, "label")
        self.classes = list(features[self._label].names or ()) if self._label else []
        self.numbers = ("label",) if self._label else ()
        self._source = _tfds_data(builder, name, split, {self._image: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = self._source[index]
            file_name = row.get("file_name", str(index))
            if isinstance(file_name, bytes):
                file_name = file_name.decode(errors="replace")
            example = {"name": str(file_name), "bytes": bytes(row[self._image])}
            if self._label:
                example["label"] = int(row[self._label])
        except (RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise Broken("damaged record", one_line(error)) from error
        return check_example(example)


def _only(features: Any, kind: type, usual: str) -> str | None:
    """Return the key of the one feature of a kind, or the usual one of several."""
    keys = [key for key, feature in features.items() if isinstance(feature, kind)]
    if usual in keys:
        return usual
    return keys[0] if len(keys) == 1 else None


def _tfds_data(builder: Any, name: str, split: str, decoders: dict[str, Any]) -> Any:
    """Return the random-access data, or raise ValueError that says how to prepare them."""
    splits = builder.info.splits
    if splits and split.split("[")[0] not in (*splits, "all"):
        raise ValueError(f"TFDS data set {name!r} has no split {split!r}; it has {sorted(splits)}")
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except (NotImplementedError, AssertionError, ValueError, OSError) as error:
        remedy = (
            f"prepare it once, where TensorFlow is installed: tfds build {name} "
            "--file_format=array_record, and set $TFDS_DATA_DIR to where it lies"
        )
        problem = f", split {split!r}: {error}"
        if not builder.is_prepared():
            problem = f" is not prepared in {builder.data_path}; {remedy}"
        elif isinstance(error, NotImplementedError):
            where, kind = builder.data_path, builder.info.file_format.value
            problem = f" in {where} was prepared as {kind}, without random access; {remedy}"
        raise ValueError(f"TFDS data set {name!r}{problem}") from error


def open_source(
    name: str,
    path: str,
    split: str,
    image_folder: str = "",
    allow_outside: bool = False,
    image_column: str = "",
) -> Any:
    """Open a source that is not empty; the arguments are those of `pipeline.DataConfig`."""
    kinds = {
        "emoji": lambda: EmojiSource(split),
        "folder": lambda: FolderSource(path, split, allow_outside),
        "jsonl": lambda: JsonlSource(path, split, image_folder, allow_outside),
        "array_record": lambda: RecordSource(path, split),
        "tfds": lambda: TFDSSource(path, split),
        "webdataset": lambda: WebDatasetSource(path, split),
        "parquet": lambda: ParquetSource(path, split, image_column),
        "arrow": lambda: ArrowSource(path, split, image_column),
    }
    if name not in kinds:
        raise ValueError(f"data.name {name!r} is not one of {sorted(kinds)}")
    source = kinds[name]()
    if not len(source):
        raise ValueError(f"data set {name!r} {path} has no pictures in split {split!r}")
    return source
