"""Decoding of untrusted picture files, and the crops and flips of training and evaluation.

Every function here is pure: its result depends on its arguments alone, randomness comes in as a
NumPy Generator. Pictures are uint8 RGB arrays (height, width, 3).
"""

import io
import math

import numpy as np
from PIL import Image

MAX_PIXELS = 64_000_000
MIN_SIDE = 8
# A picture this elongated is a banner or an attack: 8 x 8,000,000 pixels pass the area check and
# would be resized to 64 x 64,000,000.
MAX_ASPECT = 50
# What is tried on a file, whatever its name. A short list on purpose: some of PIL's other readers
# start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Scales 16-bit grey to 8 bits as PIL does for 16-bit colour, by the high byte.
_HIGH_BYTE = 8


class BrokenImage(ValueError):
    """A picture that cannot be used.

    Attributes:
      reason: a short category, the same for all pictures with this defect; counted.
      detail: what exactly is wrong with this one; logged.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def check_size(
    width: int, height: int, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> None:
    """Checks a picture's size, which its header states, before anything is decoded.

    Args:
      width: in pixels.
      height: in pixels.
      max_pixels: largest width x height.
      min_side: smallest width and smallest height.

    Raises:
      BrokenImage: too large, too small, or one side more than 50 times the other.
    """
    size = f"{width} x {height} pixels"
    if width * height > max_pixels:
        raise BrokenImage("too large", f"{size}, the limit is {max_pixels:,} (max_pixels)")
    if min(width, height) < min_side:
        raise BrokenImage("too small", f"{size}, each side must be at least {min_side} (min_side)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BrokenImage("too elongated", f"{size}, the limit is {MAX_ASPECT} to 1")


def decode(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    draft_side: int = 0,
) -> np.ndarray:
    """Decodes a picture file.

    Transparent pixels are laid on white; palette, grey, CMYK and 16-bit pictures become 8-bit RGB;
    of an animation the first frame is taken. EXIF orientation is ignored, as the reference does.

    Args:
      data: the file's bytes: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.
      max_pixels: larger pictures are refused from their header, without decoding them.
      min_side: pictures with a smaller side are refused.
      draft_side: when not 0, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both
        sides stay at least this many pixels: several times faster, and slightly different pixels.

    Returns:
      uint8 (height, width, 3).

    Raises:
      BrokenImage: not a picture, truncated, damaged, or of an absurd size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, max_pixels=max_pixels, min_side=min_side)
            if draft_side:
                image.draft("RGB", (draft_side, draft_side))
            image.load()
            return _to_rgb(image)
    except (BrokenImage, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        kind = "an empty file" if not data else f"starts with {data[:8]!r}"
        raise BrokenImage("not an image", kind) from error
    except Image.DecompressionBombError as error:
        raise BrokenImage("too large", str(error)) from error
    except Exception as error:  # a damaged file makes PIL's readers raise almost anything
        raise BrokenImage("damaged", f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Returns uint8 (H, W, 3) of a loaded PIL image of any mode."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode.startswith("I"):  # 16-bit grey arrives as I;16 or, from some files, as I
        grey_HW = np.asarray(image).astype(np.int64)
        if grey_HW.min() < 0 or grey_HW.max() > 0xFFFF:
            raise BrokenImage("unsupported pixels", f"mode {image.mode} beyond 16 bits")
        grey_HW = (grey_HW >> _HIGH_BYTE).astype(np.uint8)
        return np.repeat(grey_HW[..., None], 3, axis=-1)
    if image.mode == "F":
        raise BrokenImage("unsupported pixels", "floating-point pixels have no known range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _shrink(image: Image.Image, short_side: int) -> Image.Image:
    """Resizes so that the short side is `short_side`: halvings by averaging, then one bicubic."""
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) == short_side:
        return image
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Crops the middle square, the way ADM (guided diffusion) prepares ImageNet.

    The picture is halved by averaging while its short side is at least twice `size`, resized
    bicubically to short side `size`, and cropped in the centre.

    Args:
      image_HWC: uint8 (height, width, 3) of any size; smaller pictures are enlarged.
      size: side of the result, in pixels.

    Returns:
      uint8 (size, size, 3).
    """
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
    """Crops a random square at a random scale, the reference's training augmentation.

    The short side is drawn uniformly from the integers ceil(size / max_crop_frac) ..
    ceil(size / min_crop_frac), the picture is shrunk to it as in `center_crop`, and the square's
    place is drawn uniformly.

    Args:
      image_HWC: uint8 (height, width, 3) of any size; smaller pictures are enlarged.
      size: side of the result, in pixels.
      rng: source of randomness; three draws.
      min_crop_frac: smallest part of the short side that a crop shows, in (0, max_crop_frac].
      max_crop_frac: largest such part, at most 1.

    Returns:
      uint8 (size, size, 3).

    Raises:
      ValueError: the fractions are not 0 < min <= max <= 1.
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
    """Returns the largest short side, in pixels, that `random_crop` draws for a `size` crop."""
    return math.ceil(size / min_crop_frac)


def random_flip(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors left and right with probability one half.

    Args:
      image_HWC: any (height, width, channels).
      rng: source of randomness; one draw.

    Returns:
      The picture or its mirror image, same shape.
    """
    return image_HWC[:, ::-1] if rng.random() < 0.5 else image_HWC
