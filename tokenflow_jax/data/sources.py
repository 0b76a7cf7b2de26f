"""Random-access sources of pictures, all of one form.

A source has `len` and gives for an index an example: {"name": str} with either "bytes" (an encoded
file) or "image" (uint8 (H, W, 3)), and where known "label" (int), "group" (int), "caption" (str),
"tags" (list of str). A picture that cannot even be read raises Broken. `classes` are the
names of the labels, if any; `numbers` are the numeric labels that examples have.
"""

import contextlib
import glob
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Set
from typing import Any

from array_record.python import array_record_data_source

from tokenflow_jax.data import images, records
from tokenflow_jax.data.examples import (
    HELDOUT_NAMES,
    MIN_TO_SPLIT,
    SPLITS,
    Broken,
    check_example,
    is_heldout,
)  # fmt: skip
from tokenflow_jax.data.jsonl import JsonlSource
from tokenflow_jax.data.webdataset import WebDatasetSource
from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line, plain, shown

EMOJI = pathlib.Path(__file__).parents[1] / "assets" / "emoji.array_record"
GROUPS = (
    "smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities",
    "objects", "symbols",
)  # fmt: skip
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_USUAL_SPLITS = ("train", *HELDOUT_NAMES)
_SYNONYMS = {"training": "train", "valid": "val", "dev": "val"}


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


class FolderSource:
    """All images below a folder, sorted by path; the first sub-folder is the class.

    When pictures lie only in sub-folders named train, heldout, validation, val or test, or as
    "Train", "training", "valid", "dev" or "val2017", these are the splits, and pictures beside them
    are left out. Otherwise "train" and "heldout" are the parts of `is_heldout`; below 100 pictures
    both are everything, and the log says so. Validation, val and test mean heldout. Links that lead
    outside the folder are followed only with `allow_outside`.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "all", allow_outside: bool = False):
        root, self._allow_outside = pathlib.Path(folder), allow_outside
        if not os.fspath(folder) or not root.is_dir():
            raise ValueError(f"data.path {os.fspath(folder)!r} is not a folder of images")
        if split not in (*SPLITS, *HELDOUT_NAMES):
            raise ValueError(f"a folder of images has no split {split!r}; one of {SPLITS}")
        names, outside = _image_names(root, allow_outside)
        if outside:
            log.warning(
                "%s: %d links to folders outside are left out, such as %s; pass allow_outside if "
                "they are intended", root, len(outside), plain(outside[0]),
            )  # fmt: skip
        if not names:
            raise ValueError(
                f"{root} holds no images: none of its files ends in {', '.join(IMAGE_ENDINGS)}"
                + (", and links to folders outside need allow_outside" if outside else "")
            )
        subfolders = {name.split("/")[0] for name in names if "/" in name}  # those with pictures
        divided = split != "all" and _are_splits(root, subfolders)
        if split != "all" and not divided:
            _warn_of_deep_splits(root, names)
        # Of all splits: a class must have the same number in each.
        paths = [name.split("/")[divided:] for name in names]
        self.classes = sorted({path[0] for path in paths if len(path) > 1})
        self.numbers = ("label",) if self.classes else ()
        if divided:
            if beside := sum("/" not in name for name in names):
                log.warning(
                    "%s: %d pictures are left out, because they lie beside the splits %s",
                    root, beside, shown(sorted(subfolders)),
                )  # fmt: skip
            part = _split_folder(root, subfolders, split)
            names = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        elif split != "all" and len(names) >= MIN_TO_SPLIT:
            names = [name for name in names if is_heldout(name) == (split != "train")]
        elif split not in ("all", "train"):
            log.warning(
                "%s has %d pictures, fewer than %d: none are held out, so the figures of split %r "
                "are on training pictures", root, len(names), MIN_TO_SPLIT, split,
            )  # fmt: skip
        self._root, self._names, self._part = root, names, f"{part}/" if divided else ""

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._names[index]
        label = {"label": self.classes.index(name.split("/")[0])} if "/" in name else {}
        data = images.read_file(self._part + name, self._root, self._allow_outside)
        return {"name": name, **label, "bytes": data}


def _split_meant(folder: str) -> str | None:
    """Return the split that a folder's name usually means: of "Train2017", "train"."""
    word = re.sub(r"(?<=[a-z])(19|20)[0-9]{2}$", "", folder.lower())
    word = _SYNONYMS.get(word, word)
    return word if word in _USUAL_SPLITS else None


def _seem_splits(named: Set[str]) -> bool:
    # Not "train" alone, which may well be a class of vehicles among other classes.
    several = len(named) > 1 and "train" in map(_split_meant, named)
    return several or any(name.lower() not in _USUAL_SPLITS for name in named)


def _are_splits(root: pathlib.Path, subfolders: Set[str]) -> bool:
    named = {name for name in subfolders if _split_meant(name)}
    if named != subfolders and _seem_splits(named):
        log.warning(
            "%s: %s are taken as classes, not as splits, because %s hold pictures too; if they are "
            "splits, move the others away",
            root, shown(sorted(named)), shown(sorted(subfolders - named)),
        )  # fmt: skip
    return bool(named) and named == subfolders


def _warn_of_deep_splits(root: pathlib.Path, names: Iterable[str]) -> None:
    inner = defaultdict(set)  # first folder -> folders in it that are named as splits
    for first, second in {tuple(n.split("/", 2)[:2]) for n in names if n.count("/") > 1}:
        if _split_meant(second):
            inner[first].add(second)
    found = [f"{first}/{name}" for first in sorted(inner) for name in sorted(inner[first])
             if _seem_splits(inner[first])]  # fmt: skip
    if found:
        log.warning(
            "%s: %s are taken as parts of classes, not as splits; if they are splits, name the "
            "folder that they lie in as data.path", root, shown(found),
        )  # fmt: skip


def _split_folder(root: pathlib.Path, subfolders: Set[str], split: str) -> str:
    meant: dict[str, str] = {}
    for folder in sorted(subfolders):
        other = meant.setdefault(_split_meant(folder) or "", folder)
        if other != folder:
            raise ValueError(
                f"{root}: {other!r} and {folder!r} both mean split {_split_meant(folder)!r}; move "
                "one away, or name one as data.path"
            )
    for name in [split] if split == "train" else [split, *HELDOUT_NAMES]:
        if name in meant:
            return meant[name]
    raise ValueError(
        f"{root} is divided into {sorted(subfolders)}, none of which is split {split!r}; add that "
        "sub-folder, or name one of these as data.path"
    )


def _image_names(root: pathlib.Path, allow_outside: bool) -> tuple[list[str], list[str]]:
    """Return sorted relative paths of images, following links once each, and those left out."""
    names, outside, seen = [], [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up, or a second link to the same place
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in list(subfolders):
            path = os.path.relpath(os.path.join(folder, name), root)
            try:
                images.locate(path, root, allow_outside)
            except Broken:
                subfolders.remove(name)
                outside.append(path)
        for name in files:
            if not name.startswith(".") and name.lower().endswith(IMAGE_ENDINGS):
                names.append(pathlib.Path(folder, name).relative_to(root).as_posix())
    return sorted(names), outside


class RecordSource:
    """ArrayRecord files written by `data.prepare`: a data set folder, or files by glob."""

    def __init__(self, path: str, split: str):
        # `split` is not used for a pattern, which names its files.
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
        files = [os.path.join(path, name) for part in wanted for name in splits[part]["files"]]
        if missing := [file for file in files if not os.path.isfile(file)]:
            raise ValueError(f"data.path {path!r}: {plain(missing[0])} is missing or damaged")
        return files, list(about.get("classes", ()))
    files = sorted(glob.glob(path)) if path else []
    if not files or not all(os.path.isfile(file) for file in files):
        raise ValueError(
            f"data.path {path!r} is neither a folder with {records.MANIFEST} (see python -m "
            "tokenflow_jax.data.prepare) nor a pattern of ArrayRecord files"
        )
    return files, []


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
            is_folder = (pathlib.Path(name) / "dataset_info.json").is_file()
            builder = tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise ValueError(f"TFDS data set {name!r}: {one_line(error)}") from error
        features = builder.info.features
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
    name: str, path: str, split: str, image_folder: str = "", allow_outside: bool = False
) -> Any:
    """Open a source that is not empty; the arguments are those of `pipeline.DataConfig`."""
    kinds = {
        "emoji": lambda: EmojiSource(split),
        "folder": lambda: FolderSource(path, split, allow_outside),
        "jsonl": lambda: JsonlSource(path, split, image_folder, allow_outside),
        "array_record": lambda: RecordSource(path, split),
        "tfds": lambda: TFDSSource(path, split),
        "webdataset": lambda: WebDatasetSource(path, split),
    }
    if name not in kinds:
        raise ValueError(f"data.name {name!r} is not one of {sorted(kinds)}")
    source = kinds[name]()
    if not len(source):
        raise ValueError(f"data set {name!r} {path} has no pictures in split {split!r}")
    return source
