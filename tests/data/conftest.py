"""Broken picture files for the tests of this folder."""

import pytest
from picture_files import encode, picture, plain, png_bomb


@pytest.fixture(scope="session")
def bomb():
    """Return the bytes of a 20,000 x 20,000 PNG."""
    return png_bomb()


@pytest.fixture
def write_broken(bomb):
    """Return a function that writes four broken files to a folder."""

    def write(folder):
        whole = encode(picture(99, 200, 200), "JPEG", quality=95)
        (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
        (folder / "text.png").write_text("this is not a picture\n")
        (folder / "pixel.png").write_bytes(encode(plain(9, side=1)))
        (folder / "bomb.png").write_bytes(bomb)

    return write
