"""Pictures as people have them: the same pixels from a path, a PIL image and an array."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tokenflow_jax.data import images
from tokenflow_jax.data.pictures import read_picture


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "RGBA", "P", "CMYK"])
def test_an_open_image_has_the_pixels_of_its_file(tmp_path, mode):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (8, 8)).astype(np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8), "RGBA")
        image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image.save(path)
    from_path = read_picture(path)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read_picture(opened), from_path)
    np.testing.assert_array_equal(read_picture(from_path), from_path)


def test_one_lazily_opened_image_is_read_by_several_threads(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    for _ in range(20):
        with Image.open(tmp_path / "a.png") as image, ThreadPoolExecutor(8) as pool:
            for read in pool.map(read_picture, [image] * 8):
                np.testing.assert_array_equal(read, noise)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.png"):
        read_picture(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="floating-point pixels"):
        read_picture(Image.new("F", (4, 4)))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_a_picture_is_a_regular_file_of_bounded_size(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b"x" * 101)
    with pytest.raises(
        ValueError, match=rf"{kind}.*(not a regular file|Is a directory|the limit is 100)"
    ):
        read_picture(str(tmp_path / kind))


def test_a_damaged_image_that_was_opened_lazily_is_a_short_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    first = data.index(b"IDAT") + 4
    (tmp_path / "a.png").write_bytes(data[:first] + data[first:].replace(b"IDAT", b"\0\0\0\0"))
    with Image.open(tmp_path / "a.png") as image, pytest.raises(ValueError, match="picture <PIL"):
        read_picture(image)
