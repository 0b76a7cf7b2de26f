"""Decoding of good and bad files; crops and flips."""

import io
import os
import time

import numpy as np
import pytest
from picture_files import encode, picture, plain
from PIL import Image

from tokenflow_jax.data import images
from tokenflow_jax.data.examples import Broken


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(kind):
    image = picture(0)
    np.testing.assert_array_equal(images.decode(encode(image, kind)), image)


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})]
)
def test_lossy_formats_come_back_nearly(kind, options):
    image = picture(1)
    decoded = images.decode(encode(image, kind, **options))
    assert decoded.shape == image.shape
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - image).mean() < 4


def test_transparency_is_laid_on_white():
    rgba = np.zeros((10, 10, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:5, :, 3] = 255
    rgba[5:8, :, 3] = 51  # a fifth
    decoded = images.decode(encode(rgba))
    np.testing.assert_array_equal(decoded[0, 0], [200, 0, 0])
    np.testing.assert_array_equal(decoded[6, 0], [244, 204, 204])
    np.testing.assert_array_equal(decoded[9, 0], [255, 255, 255])


def test_palette_with_transparent_entry():
    image = Image.new("P", (10, 10), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((3, 2), 1)
    decoded = images.decode(saved(image, "PNG", transparency=0))
    np.testing.assert_array_equal(decoded[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(decoded[2, 3], [40, 50, 60])


def test_gray_and_16_bit_gray():
    gray = np.arange(100, dtype=np.uint8).reshape(10, 10)
    np.testing.assert_array_equal(images.decode(encode(gray)), np.repeat(gray[..., None], 3, -1))
    deep = (np.arange(100, dtype=np.uint16) * 600).reshape(10, 10)
    decoded = images.decode(saved(Image.fromarray(deep), "PNG"))
    np.testing.assert_array_equal(decoded[..., 1], deep >> 8)


def test_cmyk_and_gray_alpha():
    cmyk = Image.new("CMYK", (10, 12), (0, 0, 0, 0))
    assert images.decode(saved(cmyk, "JPEG")).shape == (12, 10, 3)
    assert images.decode(saved(cmyk, "JPEG")).min() > 250
    decoded = images.decode(saved(Image.new("LA", (10, 10), (0, 0)), "PNG"))
    np.testing.assert_array_equal(decoded, np.full((10, 10, 3), 255))


def test_draft_decodes_smaller_but_never_too_small():
    data = encode(picture(2, 400, 600), "JPEG", quality=95)
    assert images.decode(data).shape == (400, 600, 3)
    assert images.decode(data, draft_side=100).shape == (100, 150, 3)
    assert images.decode(data, draft_side=101).shape == (200, 300, 3)


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("not an image", b""),
        ("not an image", b"hello, I am a text file\n"),
        ("not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n"),
        ("too small", encode(picture(0, 1, 1))),
        ("too small", encode(picture(0, 7, 100))),
        ("too elongated", encode(picture(0, 8, 401))),
        ("damaged", encode(picture(0), "JPEG", quality=95)[:400]),
        ("damaged", encode(picture(0))[:60]),
        ("damaged", encode(picture(0), "WEBP", quality=95)[:100]),
    ],
)
def test_broken_files_are_refused(reason, data):
    with pytest.raises(Broken) as caught:
        images.decode(data)
    assert caught.value.reason == reason


def test_floating_point_picture_is_refused():
    data = saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF")
    with pytest.raises(Broken, match="unsupported pixels"):
        images.decode(data)


def test_bomb_is_refused_from_its_header(bomb):
    assert len(bomb) < 6_000_000
    start = time.thread_time()
    with pytest.raises(Broken, match="too large") as caught:
        images.decode(bomb)
    assert time.thread_time() - start < 0.5  # decoding takes seconds and 1.2 GB
    assert caught.value.reason == "too large"


def test_limits_can_be_set():
    data = encode(picture(0, 20, 30))
    with pytest.raises(Broken, match=r"30 x 20 pixels, the limit is 599"):
        images.decode(data, max_pixels=599)
    assert images.decode(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(Broken, match="too small"):
        images.decode(data, min_side=21)


@pytest.mark.parametrize("shape", [(64, 64), (63, 65), (128, 128), (300, 70), (9, 30), (257, 511)])
@pytest.mark.parametrize("size", [32, 64])
def test_crops_have_the_size(shape, size):
    image = picture(3, *shape)
    rng = np.random.default_rng(0)
    for crop in (images.center_crop(image, size), images.random_crop(image, size, rng)):
        assert crop.shape == (size, size, 3)
        assert crop.dtype == np.uint8


def test_center_crop_keeps_a_fitting_picture():
    image = picture(4, 64, 64)
    np.testing.assert_array_equal(images.center_crop(image, 64), image)
    wide = picture(4, 64, 101)
    np.testing.assert_array_equal(images.center_crop(wide, 64), wide[:, 18:82])


def test_center_crop_halves_by_averaging():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean = image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    # Rows and columns are averaged in turn, each rounded; bicubic would be
    # tens of levels off on this noise.
    assert np.abs(images.center_crop(image, 16) - mean).max() <= 1
    twice = image.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    assert np.abs(images.center_crop(image, 8) - twice).max() <= 2


def test_center_crop_ends_with_bicubic():
    image = picture(5, 100, 130)
    expected = Image.fromarray(image).resize((round(130 * 0.64), 64), Image.Resampling.BICUBIC)
    expected = np.asarray(expected)
    left = (expected.shape[1] - 64) // 2
    np.testing.assert_array_equal(images.center_crop(image, 64), expected[:, left : left + 64])


def test_random_crop_is_a_function_of_the_generator():
    image = picture(6, 90, 120)
    crops = [images.random_crop(image, 48, np.random.default_rng(s)) for s in (1, 1, 2)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert (crops[0] != crops[2]).any()


def test_random_crop_scale_and_place_cover_their_range():
    # Red is the row, green the column: what a crop shows can be read from its corners.
    ramp = np.arange(256, dtype=np.uint8)
    image = np.zeros((256, 256, 3), np.uint8)
    image[..., 0], image[..., 1] = ramp[:, None], ramp[None]
    rng = np.random.default_rng(0)
    spans, tops = [], []
    for _ in range(300):
        crop = images.random_crop(image, 40, rng).astype(float)
        spans.append((crop[-1, 20, 0] - crop[0, 20, 0]) / 256 * 40 / 39)
        tops.append(crop[0, 20, 0])
    assert 0.75 < min(spans) < 0.83  # four fifths of the picture: short side 50
    assert 0.97 < max(spans) < 1.03  # all of it: short side 40
    assert min(tops) < 6 < 45 < max(tops) < 0.2 * 256 + 5


def test_random_crop_checks_its_fractions():
    with pytest.raises(ValueError, match="min_crop_frac <= max_crop_frac"):
        images.random_crop(picture(0), 8, np.random.default_rng(0), min_crop_frac=1.2)


def test_flip_mirrors_half():
    image = picture(7)
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        result = images.random_flip(image, rng)
        mirrored = (result == image[:, ::-1]).all()
        assert mirrored or (result == image).all()
        flipped += mirrored
    assert 160 < flipped < 240


def refused(*arguments):
    with pytest.raises(Broken) as caught:
        images.read_file(*arguments)
    return str(caught.value)


def test_pictures_named_in_data_lie_below_their_folder(tmp_path):
    folder, data = tmp_path / "folder", encode(plain(1))
    (folder / "deep").mkdir(parents=True)
    for path in (tmp_path / "out.png", folder / "in.png", folder / "deep" / "in.png"):
        path.write_bytes(data)
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "own.png").symlink_to(folder / "in.png")
    for name in ("in.png", "deep/in.png", "deep/../in.png", "./in.png", "own.png"):
        assert images.read_file(name, folder) == data, name
    outside = ("../out.png", "link.png", "linked/out.png", str(tmp_path / "out.png"),
               "deep/../../out.png", "../folder2/out.png")  # fmt: skip
    for name in outside[:5]:
        assert "pass allow_outside if that is intended" in refused(name, folder), name
        assert images.read_file(name, folder, True) == data, name
    (tmp_path / "folder2").mkdir()
    assert "outside the folder" in refused(outside[5], folder)
    # A folder that is a link itself is no reason to refuse what it holds.
    (tmp_path / "alias").symlink_to(folder)
    assert images.read_file("deep/../in.png", tmp_path / "alias") == data


@pytest.mark.parametrize("allow_outside", [False, True])
def test_only_regular_files_of_bounded_size_are_read(tmp_path, monkeypatch, allow_outside):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "large.png").write_bytes(b"x" * 101)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    names = ("pipe.png", "folder.png", "zero.png", "loop.png", "large.png", "/dev/zero", "", "no",
             "a\0b", "a\ud83d.png", "x" * 5000, "two\nlines")  # fmt: skip
    for name in names:
        text = refused(name, tmp_path, allow_outside)
        assert text.isprintable() and len(text) < 700
    assert "not a regular file" in refused(tmp_path / "pipe.png")
    assert "has 101 bytes, the limit is 100" in refused(tmp_path / "large.png")


@pytest.mark.parametrize("name", [5, None, ["a.png"], {"a": 1}])
def test_a_name_is_text(tmp_path, name):
    assert "cannot be read" in refused(name, tmp_path)


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(path, "wb") as file:
        file.write(b"data")
    assert images.read_file(os.fsdecode(b"caf\xe9.png"), tmp_path) == b"data"


def test_a_plain_ppm_of_comments_is_refused_at_once():
    data = b"P3 16 16 255\n" + b"#\n" * 400_000
    start = time.monotonic()
    with pytest.raises(Broken, match="a plain PPM of 800,013 bytes"):
        images.decode(data)
    assert time.monotonic() - start < 1
    small = b"P3 8 8 255\n# gray\n" + b"7 7 7\n" * 64
    assert (images.decode(small) == 7).all()
