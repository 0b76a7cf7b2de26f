"""Decode untrusted picture files; crop and flip pictures.

Every function depends on its arguments alone; randomness comes in as a NumPy Generator. Pictures
are uint8 RGB arrays (height, width, 3).
"""

import functools
import io
import math
import os
import pathlib

import numpy as np
from PIL import Image

from tokenflow_jax import files, remote
from tokenflow_jax.data.examples import Broken
from tokenflow_jax.messages import one_line, shown

MAX_BYTES = 2**28  # of a picture file
_MOST_PLAIN = 2**17  # of a PPM in digits: PIL's time grows with the square of its comments
MAX_PIXELS = 64_000_000
MIN_SIDE = 8
# A picture this elongated is a banner or an attack: 8 x 8,000,000 pixels pass the area check and
# would be resized to 64 x 64,000,000.
MAX_ASPECT = 50
# Tried on a file whatever its name. A short list on purpose: some of PIL's other readers start
# programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


_root_of = functools.lru_cache(maxsize=64)(os.path.realpath)


def _may_lead_outside(root: str, name: str) -> bool:
    """Return True if a path has links or ".." below its root; `realpath` is five times slower."""
    for part in name.split("/"):
        root = f"{root}/{part}"
        if part == ".." or os.path.islink(root):
            return True
    return False


def locate(name: str, root: str | os.PathLike, allow_outside: bool = False) -> str:
    """Return the path of a picture named in data, or raise Broken unless it is below `root`.

    Links count as what they lead to. `allow_outside` allows any path.
    """
    try:
        if remote.is_remote(root):  # object stores have no links
            return _below(os.fspath(root), name)
        path = os.path.join(root, name)
        path = str(pathlib.Path(path)) if "://" in path else path  # no address
        inside = allow_outside or not os.path.isabs(name)
        if inside and not allow_outside and _may_lead_outside(os.fspath(root), name):
            real = os.path.join(os.path.realpath(path), "")
            inside = real.startswith(os.path.join(_root_of(root), ""))
    except (OSError, ValueError, TypeError) as error:  # a loop of links, a null byte, a number
        raise Broken("cannot be read", f"{shown(name)} ({one_line(error)})") from None
    if not inside:
        raise _outside(name, "; pass allow_outside if that is intended")
    return path


def _below(root: str, name: str) -> str:
    if name.startswith("/") or "://" in name or ".." in name.split("/"):
        raise _outside(name)
    return remote.join(root, *(part for part in name.split("/") if part not in ("", ".")))


def _outside(name: str, remedy: str = "") -> Broken:
    text = f"{shown(name)} is not a relative path below the folder{remedy}"
    return Broken("outside the folder", text)


def read_file(
    name: str | os.PathLike, root: str | os.PathLike | None = None, allow_outside: bool = False
) -> bytes:
    """Return the bytes of a picture, a regular file of at most MAX_BYTES, or raise Broken.

    Without a `root` the user names it; else data do, see `locate`.
    """
    path = os.fspath(name) if root is None else locate(name, root, allow_outside)
    try:
        return files.read_bytes(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise Broken("cannot be read", f"{shown(os.fspath(name))} ({one_line(error)})") from None


def check_size(
    width: int,
    height: int,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    max_aspect: int = MAX_ASPECT,
) -> None:
    """Raise Broken for a size, as a picture's header states it, that is out of bounds."""
    size = f"{width} x {height} pixels"
    if width * height > max_pixels:
        raise Broken("too large", f"{size}, the limit is {max_pixels:,} (max_pixels)")
    if min(width, height) < min_side:
        raise Broken("too small", f"{size}, each side must be at least {min_side} (min_side)")
    if max(width, height) > max_aspect * min(width, height):
        raise Broken("too elongated", f"{size}, the limit is {max_aspect} to 1 (max_aspect)")


def decode(data: bytes, *, draft_side: int = 0, **limits: int) -> np.ndarray:
    """Decode a picture file within the limits of `check_size`, or raise Broken.

    Transparent pixels are laid on white; palette, gray, CMYK and 16-bit pictures become 8-bit RGB;
    of an animation the first frame is taken. EXIF orientation is ignored, as the reference does.
    With `draft_side`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides
    stay at least this many pixels: several times faster, and slightly different pixels.
    """
    if data[:2] in (b"P1", b"P2", b"P3") and len(data) > _MOST_PLAIN:
        raise Broken("too large", f"a plain PPM of {len(data):,} bytes; use PNG, or PPM in binary")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, **limits)
            if draft_side:
                image.draft("RGB", (draft_side, draft_side))
            image.load()
            return to_rgb(image)
    except (Broken, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        kind = "an empty file" if not data else f"starts with {data[:8]!r}"
        raise Broken("not an image", kind) from error
    except Image.DecompressionBombError as error:
        raise Broken("too large", str(error)) from error
    except Exception as error:  # a damaged file makes PIL's readers raise almost anything
        raise Broken("damaged", f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return a picture of any mode as uint8 (H, W, 3), or raise Broken; see `decode`."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode.startswith("I"):  # 16-bit gray arrives as I;16 or, from some files, as I
        gray_HW = np.asarray(image).astype(np.int64)
        if gray_HW.min() < 0 or gray_HW.max() > 0xFFFF:
            raise Broken("unsupported pixels", f"mode {image.mode} beyond 16 bits")
        # The high byte, which is what PIL takes of 16-bit color.
        return np.repeat((gray_HW >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise Broken("unsupported pixels", "floating-point pixels have no known range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _halve(image: Image.Image, width: int, height: int) -> Image.Image:
    """Halve by averaging as long as both sides stay at least this long."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _shrink(image: Image.Image, short_side: int) -> Image.Image:
    """Resize to a short side: halvings by averaging, then one bicubic."""
    image = _halve(image, short_side, short_side)
    if min(image.size) == short_side:
        return image
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def fit_within(image_HWC: np.ndarray, longest_side: int) -> np.ndarray:
    """Shrink to a longest side as `center_crop` does; a picture that is smaller stays as it is."""
    height, width = image_HWC.shape[:2]
    scale = longest_side / max(width, height)
    if scale >= 1:
        return image_HWC
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = _halve(Image.fromarray(image_HWC), *size)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def encode(image_HWC: np.ndarray, kind: str, quality: int) -> bytes:
    """Return a picture as a file, JPEG or WEBP of a quality from 1 to 100, or else PNG."""
    kind, out = kind if kind in ("JPEG", "WEBP") else "PNG", io.BytesIO()
    options = {} if kind == "PNG" else {"quality": quality}
    Image.fromarray(image_HWC).save(out, kind, **options)
    return out.getvalue()


def kind_of(data: bytes) -> str:
    """Return PIL's name of the format of a picture that can be decoded."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.format or ""


def center_crop(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Shrink or enlarge to short side `size` and crop the middle, as ADM prepares ImageNet."""
    image = _shrink(Image.fromarray(image_HWC), size)
    top = (image.height - size) // 2
    left = (image.width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def random_crop(
    image_HWC: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
) -> np.ndarray:
    """Crop a random square at a random scale, the reference's training augmentation.

    The short side is drawn uniformly from the integers ceil(size / max_crop_frac) ..
    ceil(size / min_crop_frac), then the square's place in the picture shrunk to it.
    """
    if not 0 < min_crop_frac <= max_crop_frac <= 1:
        raise ValueError(
            f"crop fractions are {min_crop_frac} and {max_crop_frac}; "
            "need 0 < min_crop_frac <= max_crop_frac <= 1"
        )
    smallest = math.ceil(size / max_crop_frac)
    largest = max_short_side(size, min_crop_frac)
    image = _shrink(Image.fromarray(image_HWC), int(rng.integers(smallest, largest + 1)))
    top = int(rng.integers(image.height - size + 1))
    left = int(rng.integers(image.width - size + 1))
    return np.asarray(image)[top : top + size, left : left + size]


def max_short_side(size: int, min_crop_frac: float = 0.8) -> int:
    """Return the largest short side that `random_crop` draws."""
    return math.ceil(size / min_crop_frac)


def random_flip(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image_HWC[:, ::-1] if rng.random() < 0.5 else image_HWC
