"""Batches of pictures through Grain: deterministic, sharded by host, resumable.

Training:   source[host :: hosts] -> seed -> shuffle -> repeat -> decode, crop, flip -> drop broken
            ones -> batch
Evaluation: the same source in order, centre crops, every picture once, the last batch padded.

A batch is a function of (config, seed, host) and of how many batches came before; the iterator's
state is that count, so a resumed run sees exactly the pictures that the stopped one would have.
Broken pictures are left out after decoding: each host goes on with the next of its own slice.
"""

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import logging

from tokenflow_jax.data import images, sources
from tokenflow_jax.data.images import BrokenImage

AUGMENTATIONS = ("random_crop", "center")
_NUMERIC = ("label", "group")
_NAMED_AT_MOST = 20
_CACHE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One data set and how its pictures become arrays.

    Attributes:
      name, path, split: see `sources.open_source`.
      image_size: side of the square crops in pixels.
      augment: "random_crop" or "center", for training; evaluation always crops the centre.
      flip: mirrors half of the training pictures.
      max_pixels, min_side: limits beyond which a picture counts as broken.
      threads: decoding threads.
      buffer: decoded pictures kept ready.
    """

    name: str
    path: str = ""
    split: str = "train"
    image_size: int = 64
    augment: str = "random_crop"
    flip: bool = True
    max_pixels: int = images.MAX_PIXELS
    min_side: int = images.MIN_SIDE
    threads: int = 8
    buffer: int = 256

    def __post_init__(self):
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"data.augment {self.augment!r} is not one of {AUGMENTATIONS}")
        if self.image_size < 1 or self.threads < 0 or self.buffer < 1:
            raise ValueError("data: image_size and buffer must be positive, threads not negative")


class Skipped:
    """Counts the pictures that were left out; safe to use from many threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}

    def add(self, name: str, error: BrokenImage) -> None:
        """Notes a picture, once; the first ones are named in the log."""
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = error.reason
            count = len(self._reasons)
        if count <= _NAMED_AT_MOST:
            logging.warning("skipped %s: %s", name, error)
        elif count == _NAMED_AT_MOST + 1:
            logging.warning("more pictures are skipped; only their number is reported from here")

    def counts(self) -> dict[str, int]:
        """Number of distinct pictures left out, by reason."""
        with self._lock:
            return dict(Counter(self._reasons.values()))

    def names(self) -> list[str]:
        """The pictures left out, sorted."""
        with self._lock:
            return sorted(self._reasons)


class Decoded:
    """A source's pictures as arrays; keeps what fits in memory, counts what is broken."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.source = sources.open_source(config.name, config.path, config.split)
        self.skipped = Skipped()
        self._cache: dict[int, dict[str, Any]] = {}
        self._room = _CACHE_BYTES
        self._failures = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """The example at an index with "image" uint8 (H, W, 3), or None for a broken one.

        Raises:
          ValueError: as many failures in a row as there are pictures: none is usable.
        """
        if index in self._cache:
            return self._cache[index]
        name = f"{self.config.name} {index}"
        try:
            example = self.source[index]
            name = example["name"]
            example = {**example, "image": self._image(example)}
            example.pop("bytes", None)
        except BrokenImage as error:
            self.skipped.add(name, error)
            self._failures += 1
            if self._failures >= len(self):
                raise ValueError(self._nothing_usable()) from error
            return None
        self._failures = 0
        if self._room >= example["image"].nbytes:
            self._room -= example["image"].nbytes
            self._cache[index] = example
        return example

    def _image(self, example: dict[str, Any]) -> np.ndarray:
        config = self.config
        if "image" not in example:
            return images.decode(
                example["bytes"],
                max_pixels=config.max_pixels,
                min_side=config.min_side,
                draft_side=2 * config.image_size,
            )
        height, width = example["image"].shape[:2]
        if min(height, width) < config.min_side or height * width > config.max_pixels:
            raise BrokenImage("unusable size", f"{width} x {height}")
        return example["image"]

    def _nothing_usable(self) -> str:
        return (
            f"no usable picture among {len(self)} of data set {self.config.name!r} "
            f"{self.config.path}: {self.skipped.counts()}"
        )


_OPEN: dict[DataConfig, Decoded] = {}
_OPEN_LOCK = threading.Lock()


def opened(config: DataConfig) -> Decoded:
    """The data set of a config; opened once, so that training and evaluation share its cache."""
    key = dataclasses.replace(config, augment="center", flip=False)
    with _OPEN_LOCK:
        if key not in _OPEN:
            _OPEN[key] = Decoded(key)
        return _OPEN[key]


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


def _features(example: dict[str, Any], image_HWC: np.ndarray) -> dict[str, np.ndarray]:
    numbers = {key: np.int32(example[key]) for key in _NUMERIC if key in example}
    return {"image": np.ascontiguousarray(image_HWC), **numbers}


def _read_options(config: DataConfig) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.buffer)


def train_batches(
    config: DataConfig, *, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
) -> grain.DatasetIterator:
    """An endless iterator of shuffled, augmented batches.

    Args:
      config: the data set.
      batch_size: pictures per batch of this host.
      seed: of the order, crops and flips.
      shard_index, shard_count: which of how many hosts this is; it sees every shard_count-th picture.

    Returns:
      A Grain iterator (`get_state`, `set_state`) of {"image": uint8 (B, size, size, 3)} and, where
      the data have them, int32 "label" and "group" (B,).

    Raises:
      ValueError: nothing usable in this host's share; at once, or after one pass without success.
    """
    decoded = opened(config)
    if not 0 <= shard_index < shard_count <= len(decoded):
        raise ValueError(
            f"shard {shard_index} of {shard_count}: the data set has {len(decoded)} pictures"
        )
    size = config.image_size

    def augment(index: int, rng: np.random.Generator):
        example = decoded[int(index)]
        if example is None:
            return None
        if config.augment == "random_crop":
            image = images.random_crop(example["image"], size, rng)
        else:
            image = images.center_crop(example["image"], size)
        return _features(example, images.random_flip(image, rng) if config.flip else image)

    indices = np.arange(shard_index, len(decoded), shard_count)
    dataset = grain.MapDataset.source(indices).seed(seed).shuffle().repeat().random_map(augment)
    dataset = dataset.filter(lambda example: example is not None)
    dataset = dataset.to_iter_dataset(_read_options(config))
    return iter(dataset.batch(batch_size, drop_remainder=True))


def eval_batches(
    config: DataConfig,
    *,
    batch_size: int,
    limit: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every usable picture once, centre-cropped, in a fixed order.

    Args:
      config: the data set.
      batch_size: pictures per batch; the last one is padded with zeros.
      limit: uses the first so many pictures only.
      shard_index, shard_count: as in `train_batches`.

    Yields:
      {"image": uint8 (B, size, size, 3), "mask": bool (B,), True for real pictures} and int32
      "label" and "group" where known.

    Raises:
      ValueError: no picture is usable.
    """
    decoded = opened(config)

    def prepare(index: int):
        example = decoded[int(index)]
        if example is None:
            return None
        return _features(example, images.center_crop(example["image"], config.image_size))

    indices = np.arange(shard_index, len(decoded), shard_count)[:limit]
    dataset = grain.MapDataset.source(indices).map(prepare)
    dataset = dataset.filter(lambda example: example is not None)
    found = False
    for batch in dataset.to_iter_dataset(_read_options(config)).batch(batch_size):
        found = True
        missing = batch_size - len(batch["image"])
        mask = np.arange(batch_size) < len(batch["image"])
        padded = {
            key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
            for key, value in batch.items()
        }
        yield {**padded, "mask": mask}
    if not found:
        raise ValueError(decoded._nothing_usable())


def labels(config: DataConfig) -> list[dict[str, Any]]:
    """Names, captions, tags and classes of all usable pictures, in the order of `eval_batches`."""
    decoded = opened(config)
    examples = (decoded[i] for i in range(len(decoded)))
    return [{k: v for k, v in e.items() if k != "image"} for e in examples if e is not None]
