"""Reads the golden vectors and pictures beside this file."""

import json
import pathlib

import numpy as np
from PIL import Image

GOLDEN = pathlib.Path(__file__).parent


def manifest(name: str) -> dict[str, list[int]]:
    """The {state_dict name: shape} of one reference module."""
    return json.loads((GOLDEN / f"{name}.manifest.json").read_text())


def images_uint8(*names: str) -> np.ndarray:
    """The named pictures as one uint8 batch (B, H, W, 3)."""
    paths = [GOLDEN / "images" / f"{name}.png" for name in names]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
