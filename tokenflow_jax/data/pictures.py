"""Pictures as people have them: files, bytes, PIL images and arrays, one or many."""

import io
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from tokenflow_jax.data import images
from tokenflow_jax.data.examples import Broken
from tokenflow_jax.messages import one_line, shown

# A PIL image, a path, the bytes of a file, an open file, or an array (H, W, 3) of NumPy, JAX or
# PyTorch.
Picture = Any
_FILES = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, io.IOBase)
_KINDS = "a PIL image, a path, the bytes of a file, an array (height, width, 3)"
_LOADING = threading.Lock()  # a lazily opened image may be in a list twice


def is_single(pictures: Picture | Iterable[Picture]) -> bool:
    """Tell one picture from several."""
    return isinstance(pictures, _FILES) or len(getattr(pictures, "shape", (0,) * 4)) != 4


def each(pictures: Picture | Iterable[Picture]) -> tuple[Iterable[Picture], int | None]:
    """Return pictures to iterate over, as an array if they are one, and their number if known.

    Args:
      pictures: one, or an iterable or an array (B, H, W, 3) of them.

    Raises:
      ValueError: there are none, or they are something else.
    """
    if isinstance(pictures, _FILES):
        return [pictures], 1
    if hasattr(pictures, "shape"):
        array = _as_array(pictures, "images")
        array = array[None] if array.ndim == 3 else array
        return array, len(array)
    if not isinstance(pictures, Iterable) or isinstance(pictures, Mapping):
        raise ValueError(f"images are {shown(pictures)}: give {_KINDS}, or a list of these")
    count = len(pictures) if hasattr(pictures, "__len__") else None
    if count == 0:
        raise ValueError(f"no images: the {type(pictures).__name__} is empty")
    return pictures, count


def read_picture(picture: Picture, name: str = "picture") -> np.ndarray:
    """Return a picture as uint8 (H, W, 3), or as floats if it has these.

    Raises:
      ValueError: it cannot be read, or has another shape or dtype; the text begins with `name`.
    """
    try:
        picture = picture.read() if isinstance(picture, io.IOBase) else picture
        shows = picture
        if isinstance(picture, str | os.PathLike):
            shows = os.fspath(picture)
            if shows.lower().startswith(("http://", "https://")):
                raise Broken("an address", "fetch it first, and give the path or the bytes")
            return images.decode(images.read_file(picture))
        if isinstance(picture, bytes | bytearray | memoryview):
            shows = type(picture)
            return images.decode(bytes(picture))
        if isinstance(picture, Image.Image):
            with _LOADING:
                picture.load()
            return images.to_rgb(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError, Broken) as error:
        raise ValueError(f"{name} {shown(shows)}: {error}") from error
    if not hasattr(picture, "shape"):
        raise ValueError(f"{name} is {shown(picture)}: give {_KINDS}")
    array = _as_array(picture, name)
    if array.ndim != 3:
        raise ValueError(f"{name} of shape {array.shape}: give (height, width, 3)")
    return array


def _as_array(picture: Any, name: str) -> np.ndarray:
    """Return pixels (..., H, W, 3), uint8 or floating; ValueError says what else they are."""
    try:
        array = np.asarray(picture)
    except Exception as error:  # such as a tensor on another device
        raise ValueError(f"{name}: no NumPy array can be made of it ({one_line(error)})") from error
    shape, problem = array.shape, ""
    if array.dtype == object:
        problem = "give pictures of different sizes as a list"
    elif array.ndim not in (3, 4) or shape[-1] != 3:
        problem = "give uint8 (height, width, 3) or (batch, height, width, 3)"
        if array.ndim in (3, 4) and shape[-3] == 3:
            problem += "; channels come last, move them with " + (
                "transpose(0, 2, 3, 1)" if array.ndim == 4 else "transpose(1, 2, 0)"
            )
    elif not array.size:
        problem = "there are no pixels in it"
    if problem:
        raise ValueError(f"{name} of shape {shape} and dtype {array.dtype}: {problem}")
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(
            f"{name} of dtype {array.dtype}: give uint8, or floats in [-1, 1] where they are taken"
        )
    return array


def fit(image_HWC: np.ndarray, size: int, resize: bool = True, name: str = "picture") -> np.ndarray:
    """Return a picture of side `size`, center-cropped as evaluation does.

    Raises:
      ValueError: it has another size and `resize` is false, or its size is out of bounds.
    """
    height, width, _ = image_HWC.shape
    if height == width == size:
        return image_HWC
    if not resize:
        raise ValueError(
            f"{name} has {width} x {height} pixels, the model takes {size} x {size}: crop and "
            "resize it first, or leave out resize=False"
        )
    try:
        images.check_size(width, height)
    except Broken as error:
        raise ValueError(f"{name}: {error}") from None
    return images.center_crop(image_HWC, size)
