"""Batches of pictures through Grain: deterministic, shared out over hosts, resumable.

Training:   one endless shuffled stream -> decode, crop, flip -> this host's share -> drop broken
            ones -> batch; see `dealing`
Evaluation: the pictures in order, centre crops, every one once, broken ones and padding masked.

A batch is a function of (config, seed, share) and of the places taken before, so a resumed run sees
exactly the pictures that the stopped one would have.
"""

import dataclasses
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from tokenflow_jax.data import images, sources
from tokenflow_jax.data.dealing import DealtBatches, close_reader, evaluation_places, reading
from tokenflow_jax.data.images import BrokenImage
from tokenflow_jax.data.skipped import Skipped

AUGMENTATIONS = ("random_crop", "center")
_LEAST = {
    "image_size": 1,
    "max_pixels": 1,
    "min_side": 1,
    "threads": 0,
    "buffer": 1,
    "cache_megabytes": 0,
}
_MISSING = np.int32(-1)  # the label of a picture that has none, and of padding


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One data set and how its pictures become arrays.

    Attributes:
      name: "emoji", "folder", "jsonl", "array_record" or "tfds".
      path: folder, ArrayRecord files, or TFDS name; not used by "emoji".
      split: which part of the data set; see `data.sources`.
      image_size: side of the square crops in pixels.
      augment: "random_crop" or "center", for training; evaluation always crops the centre.
      flip: mirrors half of the training pictures.
      max_pixels: pictures with more pixels than this count as broken.
      min_side: pictures with a shorter side than this count as broken.
      threads: decoding threads; 0 takes one per core, at most 32.
      buffer: cropped pictures kept ready.
      image_folder: of "jsonl", where its images are; the file's own folder when empty.
      cache_megabytes: a data set whose decoded pictures fit in this much memory is decoded once.
    """

    name: str
    path: str = ""
    split: str = "train"
    image_size: int = 64
    augment: str = "random_crop"
    flip: bool = True
    max_pixels: int = images.MAX_PIXELS
    min_side: int = images.MIN_SIDE
    threads: int = 0
    buffer: int = 256
    cache_megabytes: int = 256
    image_folder: str = ""

    def __post_init__(self):
        problems = []
        if self.augment not in AUGMENTATIONS:
            problems.append(f"augment {self.augment!r} is not one of {AUGMENTATIONS}")
        for field, least in _LEAST.items():
            value = getattr(self, field)
            if value < least:
                problems.append(f"{field} is {value}, must be at least {least}")
        if problems:
            raise ValueError("data: " + "; ".join(problems))


class Decoded:
    """A source's pictures as arrays; keeps a small data set in memory, counts what is broken."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.source = sources.open_source(
            config.name, config.path, config.split, config.image_folder
        )
        place = " ".join(filter(None, (config.name, config.path, config.split)))
        self.skipped = Skipped(place)
        # Pictures by index; None once the data set turned out not to fit.
        self._cache: dict[int, dict[str, Any]] | None = {}
        self._room = config.cache_megabytes * 2**20
        self._lock = threading.Lock()
        self._failures = 0
        self._any_usable = False

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """The example at an index with "image" uint8 (H, W, 3), or None for a broken one.

        Raises:
          ValueError: as many failures as there are pictures, and not one usable picture yet.
        """
        cache = self._cache
        if cache is not None and index in cache:
            return cache[index]
        name = f"{self.config.name} record {index}"
        try:
            example = self.source[index]
            name = example["name"]
            image_HWC = self._image(example)
        except BrokenImage as error:
            self.skipped.add(name, error)
            with self._lock:
                self._failures += 1
                hopeless = not self._any_usable and self._failures >= len(self)
            if hopeless:
                raise ValueError(self.nothing_usable()) from error
            return None
        self._any_usable = True
        if "bytes" in example:  # raw pictures are as quick to read again
            example = {key: value for key, value in example.items() if key != "bytes"}
            example["image"] = image_HWC
            self._keep(index, example)
        return example

    def _image(self, example: dict[str, Any]) -> np.ndarray:
        config = self.config
        if "image" in example:
            height, width = example["image"].shape[:2]
            images.check_size(width, height, max_pixels=config.max_pixels, min_side=config.min_side)
            return example["image"]
        if "codes" in example:
            raise BrokenImage("codes instead of a picture", "only generation trains on such data")
        # In training a JPEG may be decoded at a fraction of its size; twice the crop's side leaves
        # a true averaging by two. Evaluation decodes fully: its figures are compared.
        training = config.augment == "random_crop"
        return images.decode(
            example["bytes"],
            max_pixels=config.max_pixels,
            min_side=config.min_side,
            draft_side=2 * images.max_short_side(config.image_size) if training else 0,
        )

    def _keep(self, index: int, example: dict[str, Any]) -> None:
        """Caches an example, or gives the cache up: part of a large data set is no use."""
        with self._lock:
            if self._cache is None or index in self._cache:
                return
            self._room -= example["image"].nbytes
            if self._room < 0:
                self._cache = None
            else:
                self._cache[index] = example

    def nothing_usable(self) -> str:
        """The message of an error that names what is wrong with all pictures."""
        config = self.config
        return (
            f"no usable picture among the {len(self)} of data set {config.name!r} {config.path} "
            f"(split {config.split!r}): {self.skipped.counts()}, for example "
            f"{', '.join(self.skipped.names()[:3])}"
        )


_OPEN: dict[DataConfig, Decoded] = {}
_OPEN_LOCK = threading.Lock()


def opened(config: DataConfig) -> Decoded:
    """The data set of a config; opened once per process, so that its users share its cache.

    Files that appear in a folder later are therefore not seen.
    """
    key = dataclasses.replace(config, flip=False, threads=0, buffer=1)
    with _OPEN_LOCK:
        if key not in _OPEN:
            _OPEN[key] = Decoded(key)
        return _OPEN[key]


def skipped(config: DataConfig) -> dict[str, int]:
    """Number of distinct pictures left out so far, by reason.

    Reading ahead may have met broken pictures of batches that were not yet taken.
    """
    return opened(config).skipped.counts()


def skipped_notes(*configs: DataConfig) -> list[str]:
    """One line per data set that had broken pictures: how many, why, and the first names."""
    notes = []
    for decoded in {id(d): d for d in map(opened, configs)}.values():
        counts, names = decoded.skipped.counts(), decoded.skipped.names()
        if counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            notes.append(
                f"{decoded.config.name} {decoded.config.split}: skipped {len(names)} of "
                f"{len(decoded)} pictures ({reasons}): {', '.join(names[:5])}{more}"
            )
    return notes


def _features(
    decoded: Decoded, example: dict[str, Any], image_HWC: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays of an example; all examples of a data set have the same."""
    numbers = {key: np.int32(example.get(key, _MISSING)) for key in decoded.source.numbers}
    return {"image": np.ascontiguousarray(image_HWC), **numbers}


def train_batches(
    config: DataConfig, *, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
) -> DealtBatches:
    """An endless iterator of shuffled, augmented batches; see `dealing` for its order and position.

    Args:
      config: the data set.
      batch_size: pictures per batch of this share.
      seed: of the order, crops and flips.
      shard_index: which share, from 0.
      shard_count: number of shares; this one gets every shard_count-th picture of the stream.

    Returns:
      An iterator of {"image": uint8 (B, size, size, 3)} and, where the data have them, int32
      "label" and "group" (B,), -1 for a picture without.

    Raises:
      ValueError: no data, or a bad share; from the iterator: after as many failures as there are
        pictures not one was usable.
    """
    decoded = opened(config)
    size = config.image_size

    def augmented(index: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        example = decoded[index]
        if example is None:
            return None
        if config.augment == "random_crop":
            image = images.random_crop(example["image"], size, rng)
        else:
            image = images.center_crop(example["image"], size)
        return _features(decoded, example, images.random_flip(image, rng) if config.flip else image)

    return DealtBatches(
        augmented,
        len(decoded),
        batch_size=batch_size,
        seed=seed,
        share=shard_index,
        shares=shard_count,
        identity={"data": f"{config.name} {config.split}"},
        threads=config.threads,
        buffer=config.buffer,
    )


def eval_batches(
    config: DataConfig,
    *,
    batch_size: int,
    limit: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every usable picture once, centre-cropped, in a fixed order.

    All hosts get the same number of batches, so that computations across hosts stay in step.

    Args:
      config: the data set.
      batch_size: pictures per batch of this host.
      limit: uses only so many pictures, evenly spaced over the data set, so that a few pictures of
        a data set sorted by class still show all classes.
      shard_index: this host, from 0.
      shard_count: number of hosts; this one gets every shard_count-th picture.

    Yields:
      {"image": uint8 (B, size, size, 3), "mask": bool (B,), "index": int32 (B,)}, the index being
      a place in `labels`, and int32 "label" and "group" (B,) where the data have them. Where the
      mask is False, at broken pictures and at the padding of the last batches, the image is black
      and the numbers are -1.

    Raises:
      ValueError: no data, a bad shard, or no usable picture in this host's share.
    """
    decoded = opened(config)
    mine = evaluation_places(len(decoded), batch_size, limit, shard_index, shard_count)

    def crop(index: int) -> dict[str, np.ndarray] | None:
        example = decoded[int(index)] if index >= 0 else None
        if example is None:
            return {}
        image = images.center_crop(example["image"], config.image_size)
        return {**_features(decoded, example, image), "index": np.int32(index)}

    dataset = (
        grain.MapDataset.source(mine)
        .map(crop)
        .to_iter_dataset(reading(config.threads, config.buffer))
    )
    batches = _masked(iter(dataset), batch_size, config.image_size, decoded.source.numbers)
    return _with_some_usable(batches, decoded) if (mine >= 0).any() else batches


def _masked(
    examples: grain.DatasetIterator, batch_size: int, size: int, numbers: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Batches examples, of which those that are empty are masked out; closes them at the end."""
    blank = np.zeros((size, size, 3), np.uint8)
    try:
        while batch := list(itertools.islice(examples, batch_size)):
            mask = np.array([bool(example) for example in batch])
            # All batches have the same keys, also one without a usable picture.
            yield {
                "image": np.stack([example.get("image", blank) for example in batch]),
                "mask": mask,
                **{
                    key: np.array([example.get(key, _MISSING) for example in batch], np.int32)
                    for key in ("index", *numbers)
                },
            }
    finally:  # also when nobody asks for the rest
        close_reader(examples)


def _with_some_usable(
    batches: Iterator[dict[str, np.ndarray]], decoded: Decoded
) -> Iterator[dict[str, np.ndarray]]:
    """Raises at the end when no batch had a usable picture."""
    any_usable = False
    for batch in batches:
        any_usable |= bool(batch["mask"].any())
        yield batch
    if not any_usable:
        raise ValueError(decoded.nothing_usable())


def labels(config: DataConfig) -> list[dict[str, Any]]:
    """What is known of each picture besides its pixels; reads the whole data set, decodes nothing.

    Args:
      config: the data set.

    Returns:
      One dict per picture, at the place that "index" of `eval_batches` gives: "name", and where
      known "label", "group" (a place in `sources.GROUPS`), "caption" and "tags". Empty for a
      picture that cannot be read.
    """
    source = opened(config).source
    rows = []
    for index in range(len(source)):
        try:
            example = source[index]
        except BrokenImage:  # counted and logged where its picture is wanted
            example = {}
        rows.append({k: v for k, v in example.items() if k not in ("image", "bytes")})
    return rows


def classes(config: DataConfig) -> list[str]:
    """The names of the classes that "label" numbers; empty when the data set names none."""
    return list(opened(config).source.classes)
