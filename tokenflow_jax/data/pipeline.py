"""Batches of pictures: deterministic, shared out over hosts, resumable.

Training:   endless shuffled stream -> decode, crop, flip -> this host's share -> drop broken ones
            -> batch; see `dealing`
Evaluation: every picture once, in order, center-cropped, broken ones and padding masked
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tokenflow_jax.data import images, sources
from tokenflow_jax.data.dealing import DealtBatches, Example
from tokenflow_jax.data.examples import (
    Broken,
    Guard,
    Skipped,
    fitting_captions,
    notes_on,
)  # fmt: skip
from tokenflow_jax.data.masked import masked_batches
from tokenflow_jax.data.mixture import Mixed
from tokenflow_jax.data.stream_order import threads_for

AUGMENTATIONS = ("random_crop", "center")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One data set and the way its pictures become arrays."""

    name: (
        str  # "emoji", "folder", "jsonl", "array_record", "tfds", "webdataset", "parquet", "arrow"
    )
    path: str = ""  # folder, files, or TFDS name; not used by "emoji"
    split: str = "train"  # see the sources
    image_size: int = 64  # side of the square crops in pixels
    augment: str = "random_crop"  # or "center", for training; evaluation always crops the center
    flip: bool = True  # mirrors half of the training pictures
    max_pixels: int = images.MAX_PIXELS  # larger pictures count as broken
    min_side: int = images.MIN_SIDE  # pictures with a shorter side count as broken
    max_aspect: int = images.MAX_ASPECT  # longer pictures, in shorter sides, count as broken
    min_caption: int = 0  # characters; shorter captions are left out
    max_caption: int = 0  # the same of longer ones; 0: no limit
    shuffle_block: int = 0  # neighbours that stay close, see `block_order`; 0: none do
    shuffle_window: int = 16_384  # pictures that are mixed at a time
    threads: int = 0  # for decoding; 0 takes one per core, at most 32, or 32 if `path` is remote
    buffer: int = 256  # cropped pictures kept ready
    cache_megabytes: int = 256  # a data set that fits, decoded, is decoded once
    image_folder: str = ""  # for "jsonl": the folder of its images; the file's own when empty
    allow_outside: bool = False  # read pictures outside the folder, by path or link
    image_column: str = ""  # for "parquet" and "arrow"; found by name and type when empty

    def __post_init__(self):
        problems = []
        if self.augment not in AUGMENTATIONS:
            problems.append(f"augment {self.augment!r} is not one of {AUGMENTATIONS}")
        may_be_0 = ("threads", "cache_megabytes", "min_caption", "max_caption", "shuffle_block")
        for field in (
            *("image_size", "max_pixels", "min_side", "max_aspect", "shuffle_window", "buffer"),
            *may_be_0,
        ):
            least = 0 if field in may_be_0 else 1
            if (value := getattr(self, field)) < least:
                problems.append(f"{field} is {value}, must be at least {least}")
        if problems:
            raise ValueError("data: " + "; ".join(problems))


class Decoded:
    """A source's pictures as arrays; keeps a small data set in memory, counts what is broken."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.source = sources.open_source(
            config.name,
            config.path,
            config.split,
            config.image_folder,
            config.allow_outside,
            config.image_column,
        )
        place = " ".join(filter(None, (config.name, config.path, config.split)))
        self.skipped = Skipped(place, len(self.source))
        self._guard = Guard(self.skipped, "picture")
        # Pictures by index; None once the data set turned out not to fit.
        self._cache: dict[int, dict[str, Any]] | None = {}
        self._room = config.cache_megabytes * 2**20
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """Return an example with "image" uint8 (H, W, 3), or None for a broken one."""
        cache = self._cache
        if cache is not None and index in cache:
            self._guard.check(True)
            return cache[index]
        name = f"{self.config.name} record {index}"
        try:
            example = self.source[index]
            name = example["name"]
            example = fitting_captions(example, self.config.min_caption, self.config.max_caption)
            image_HWC = self._image(example)
        except Broken as error:
            self.skipped.add(name, error)
            self._guard.check(False)
            return None
        self._guard.check(True)
        example = {**example, "image": image_HWC}
        if example.pop("bytes", None) is not None:  # raw pictures are as quick to read again
            self._keep(index, example)
        return example

    def will_need(self, indices: np.ndarray) -> None:
        """Tell the source which sorted indices are read soon, if it wants to know."""
        if hasattr(self.source, "will_need"):
            self.source.will_need(indices)

    def _image(self, example: dict[str, Any]) -> np.ndarray:
        config = self.config
        limits = {
            "max_pixels": config.max_pixels,
            "min_side": config.min_side,
            "max_aspect": config.max_aspect,
        }
        if "image" in example:
            height, width = example["image"].shape[:2]
            images.check_size(width, height, **limits)
            return example["image"]
        if "codes" in example:
            raise Broken("codes instead of a picture", "only generation trains on such data")
        # In training a JPEG may be decoded at a fraction of its size; twice the crop's side leaves
        # a true averaging by two. Evaluation decodes fully: its figures are compared.
        training = config.augment == "random_crop"
        draft_side = 2 * images.max_short_side(config.image_size) if training else 0
        return images.decode(example["bytes"], draft_side=draft_side, **limits)

    def _keep(self, index: int, example: dict[str, Any]) -> None:
        """Cache an example, or give the cache up: part of a large data set is no use."""
        with self._lock:
            if self._cache is None or index in self._cache:
                return
            self._room -= example["image"].nbytes
            if self._room < 0:
                self._cache = None
            else:
                self._cache[index] = example

    def arrays(
        self, example: dict[str, Any], image_HWC: np.ndarray, numbers: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the arrays, the same in all examples of a data set; -1 for a missing number."""
        names = self.source.numbers if numbers is None else numbers
        found = {name: np.int32(example.get(name, -1)) for name in names}
        return {"image": np.ascontiguousarray(image_HWC), **found}


_OPEN: dict[DataConfig, Decoded] = {}
_OPEN_LOCK = threading.Lock()


def opened(config: DataConfig) -> Decoded:
    """Return a data set, opened once per process so that its users share its cache.

    Files that appear in a folder later are therefore not seen.
    """
    key = dataclasses.replace(
        config, flip=False, threads=0, buffer=1, shuffle_block=0, shuffle_window=1
    )
    with _OPEN_LOCK:
        if key not in _OPEN:
            _OPEN[key] = Decoded(key)
        return _OPEN[key]


def skipped_notes(*configs: DataConfig) -> list[str]:
    """Return one line per data set that had broken pictures, also in batches not yet taken."""
    return notes_on(opened(config).skipped for config in configs)


def train_batches(config: DataConfig, **options: int) -> DealtBatches:
    """Return an endless iterator of shuffled, augmented batches; options as of `DealtBatches`.

    A batch has "image", uint8 (B, size, size, 3), and, where the data have them, "label" and
    "group", int32 (B,), -1 for a picture without.
    """
    decoded = opened(config)
    return DealtBatches(
        _augmenter(config, decoded.source.numbers),
        len(decoded),
        identity={"data": f"{config.name} {config.split}"},
        will_need=decoded.will_need,
        **_reading(config),
        **options,
    )


def mixed_batches(
    configs: Mapping[str, DataConfig], weights: Sequence[float], **options: int
) -> DealtBatches:
    """Return batches of several data sets by name; "source", int32 (B,), is a picture's data set.

    They are read and shuffled as the first one says. For the rest see `train_batches`.
    """
    sets = {name: opened(config) for name, config in configs.items()}
    numbers = sorted({number for decoded in sets.values() for number in decoded.source.numbers})
    makes = [_augmenter(config, numbers) for config in configs.values()]
    mixed = Mixed(makes, [len(decoded) for decoded in sets.values()])
    return DealtBatches(
        mixed.make,
        dict(zip(sets, mixed.counts, strict=True)),
        weights=weights,
        identity={"data": "mixture"},
        will_need=mixed.telling([decoded.will_need for decoded in sets.values()]),
        **_reading(next(iter(configs.values()))),
        **options,
    )


def _reading(config: DataConfig) -> dict[str, int]:
    names = ("buffer", "shuffle_block", "shuffle_window")
    threads = threads_for(config.threads, config.path)
    return {"threads": threads, **{name: getattr(config, name) for name in names}}


def _augmenter(config: DataConfig, numbers: Sequence[str]) -> Callable[..., Example | None]:
    """Return the function that makes the training arrays of an example."""
    decoded, size = opened(config), config.image_size

    def augmented(index: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        if (example := decoded[index]) is None:
            return None
        if config.augment == "random_crop":
            image = images.random_crop(example["image"], size, rng)
        else:
            image = images.center_crop(example["image"], size)
        image = images.random_flip(image, rng) if config.flip else image
        return decoded.arrays(example, image, numbers)

    return augmented


def eval_batches(config: DataConfig, **options: int | None) -> Iterator[dict[str, np.ndarray]]:
    """Yield every picture once, in order, center-cropped; see `masked_batches`.

    Broken pictures and padding are black, their numbers -1.
    """
    decoded = opened(config)

    def cropped(index: int) -> dict[str, np.ndarray] | None:
        if (example := decoded[index]) is None:
            return None
        return decoded.arrays(example, images.center_crop(example["image"], config.image_size))

    black = np.zeros((config.image_size, config.image_size, 3), np.uint8)
    return masked_batches(
        cropped,
        len(decoded),
        blank=decoded.arrays({}, black),
        threads=threads_for(config.threads, config.path),
        buffer=config.buffer,
        skipped=decoded.skipped,
        **options,
    )
