"""Makers of small picture files of all kinds."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encode(image_HWC, kind="PNG", **options):
    """Return the bytes of a picture file."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, kind, **options)
    return file.getvalue()


def picture(seed, height=40, width=48):
    """Return a smooth random picture, which compresses well and survives JPEG."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def plain(value, side=16):
    """Return a picture of one color, recognizable in any crop."""
    return np.full((side, side, 3), value, np.uint8)


def png_bomb(side=20_000):
    """Return a valid PNG of side x side black pixels, 5 MB, without allocating the pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer, row, parts = zlib.compressobj(1), bytes(1 + 3 * side), []
    parts = [packer.compress(row) for _ in range(side)] + [packer.flush()]
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", b"".join(parts))
        + chunk(b"IEND", b"")
    )
