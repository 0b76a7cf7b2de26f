"""Edit a picture without training: keep its codes outside a mask, and draw those inside.

The tokenizer's map of the picture before quantization, f, stays known while the model draws. At
every scale, with r = f - everything chosen so far (drawn codes included), resized to all cells:

    kept cell    the code nearest to r, averaged over the cell's part outside the mask
    drawn cell   what the model draws

so kept codes make up for what drawn ones spread over the border, as later scales of the tokenizer
make up for its coarser ones. Without a mask's cells this is the tokenizer's encoding, and with
nothing else it is plain drawing. A finest cell is inside the mask if a pixel of it is; a coarser
one is drawn if at least `SHARE` of it is inside. The coarsest `keep` scales may be kept everywhere.

Kept pixels are the decoder's, not the picture's: nothing is pasted.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tokenflow_jax.data.pictures import Picture, fit, read_picture
from tokenflow_jax.evals import pictures
from tokenflow_jax.log import log
from tokenflow_jax.messages import shown
from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.nets.resize import area_matrix, area_resize, bicubic_resize
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import (
    Codebooks,
    nearest_codes,
    normalize_halves,
    straight_through,
)

SHARE = 0.5  # of a cell inside the mask from which on it is drawn
_LARGEST_SIDE = 4096  # of a square around a picture, before it is fitted


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("map_1HWC", "outside_SHW", "drawn_1N"),
    meta_fields=("scales", "pixel_weight"),
)
@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture's map and where it is kept, for all rows of a `Sampler`."""

    map_1HWC: jax.Array  # of the tokenizer's `encode`
    outside_SHW: jax.Array  # float32, the share of a cell that kept codes of a scale go by
    drawn_1N: jax.Array  # bool, codes that the model draws
    scales: Scales
    pixel_weight: float

    def kept(
        self, scale: int, residual_BHWC: jax.Array, codebooks: Codebooks
    ) -> tuple[jax.Array, jax.Array]:
        """Return a scale's codes (B, L) for what is left of the map, and its vectors (B, L, C)."""
        batch, _, _, channels = residual_BHWC.shape
        semantic = codebooks.semantic_KC.shape[-1]
        counted_BHWC = residual_BHWC * self.outside_SHW[scale][..., None]
        z_BhwC = area_resize(counted_BHWC, self.scales.sides[scale])
        z_NC = normalize_halves(z_BhwC, semantic).reshape(-1, channels)
        code_N = nearest_codes(z_NC, codebooks.normalized(), semantic, self.pixel_weight)
        return code_N.reshape(batch, -1), z_NC.reshape(batch, -1, channels)

    def put(self, scale: int, codes_BL: jax.Array, kept_BL: jax.Array) -> jax.Array:
        """Return drawn codes with the kept ones in their places."""
        return jnp.where(self.drawn_1N[:, self.scales.slices()[scale]], codes_BL, kept_BL)

    def left_over(
        self,
        scale: int,
        residual_BHWC: jax.Array,
        vectors_BLC: jax.Array,
        z_BLC: jax.Array,
    ) -> jax.Array:
        """Return what a scale's vectors leave of the map."""
        # Kept ones with the rounding of `residual_quantize`: the next scale's codes are its own.
        drawn_1L1 = self.drawn_1N[:, self.scales.slices()[scale], None]
        vectors_BLC = jnp.where(drawn_1L1, vectors_BLC, straight_through(z_BLC, vectors_BLC))
        side = self.scales.sides[scale]
        grid_BhwC = vectors_BLC.reshape(len(vectors_BLC), side, side, -1)
        return residual_BHWC - bicubic_resize(grid_BhwC, self.scales.grid)


def make_edit(
    map_HWC: jax.Array,
    mask_HW: np.ndarray,
    keep: int,
    scales: Scales,
    pixel_weight: float,
    share: float = SHARE,
) -> Edit:
    """Return an edit inside a mask of pixels, bool (H, H), from scale `keep` on."""
    resized = area_matrix(len(mask_HW), scales.grid)
    inside_HW = (resized @ mask_HW @ resized.T > 0).astype(np.float32)
    outside_SHW = np.broadcast_to(1 - inside_HW, (len(scales), *inside_HW.shape)).copy()
    outside_SHW[:keep] = 1
    drawn = []
    for scale, side in enumerate(scales.sides):
        area = area_matrix(scales.grid, side)
        drawn.append((area @ inside_HW @ area.T >= share - 1e-6).ravel() & (scale >= keep))
    arrays = (map_HWC[None], jnp.asarray(outside_SHW), jnp.asarray(np.concatenate(drawn)[None]))
    return Edit(*arrays, scales, pixel_weight)


class Request(NamedTuple):
    """An edit as users ask for it, fitted to the tokenizer."""

    edit: Edit | None = None  # None: there is no picture
    about: dict[str, Any] | None = None  # for recipes
    image_HWC: np.ndarray | None = None  # uint8
    mask_HW: np.ndarray | None = None  # bool

    def row(self, tokenizer: Tokenizer, edited_HWC: np.ndarray) -> np.ndarray:
        """Return the original, its reconstruction, the mask and the edit side by side."""
        rebuilt_HWC = np.asarray(tokenizer.reconstruct(self.image_HWC))
        mask_HWC = np.repeat(self.mask_HW[..., None] * np.uint8(255), 3, axis=2)
        cells = [self.image_HWC, rebuilt_HWC, mask_HWC, edited_HWC]
        return pictures.grid([np.stack(cells)])


def request(
    tokenizer: Tokenizer,
    image: Picture | None,
    mask: Picture | None = None,
    strength: float | None = None,
    keep: int | None = None,
    outpaint: Sequence[float] = (),
) -> Request:
    """Prepare an edit, if there is a picture.

    Args:
      image: the picture, fitted as the tokenizer fits pictures.
      mask: bool (H, W), or a picture, white where the image is to change; None: everywhere, or
        with `outpaint` only around the picture.
      strength: 0 to 1, the part of the scales, the finest ones, that is drawn again.
      keep: the same as a number of coarsest scales that are kept; 0 by default.
      outpaint: parts of its size that the picture grows by on the left, top, right and bottom; it
        shrinks within the tokenizer's square, and the rest of the square is drawn.

    Raises:
      ValueError: a picture that cannot be read, a mask of another aspect, values out of range.
    """
    config, outpaint = tokenizer.config, _parts(outpaint)
    size, scales = config.image_size, config.pyramid
    asked = mask is not None or strength is not None or keep is not None or bool(outpaint)
    if image is None:
        if asked:
            raise ValueError("mask, strength, keep and outpaint need an image")
        return Request()
    image_HWC, name = read_picture(image, "image"), _name(image)
    if image_HWC.dtype != np.uint8:
        raise ValueError(f"image {name} of dtype {image_HWC.dtype}: give uint8")
    if not asked:
        raise ValueError(f"image {name}: give a mask, strength, keep or outpaint to say what stays")
    mask_HW = np.full(image_HWC.shape[:2], mask is None and not outpaint)
    if mask is not None:
        mask_HW = _read_mask(mask, image_HWC.shape[:2], name)
    everywhere = mask_HW.all()
    if outpaint:
        image_HWC, mask_HW = _outpainted(image_HWC, mask_HW, outpaint)
    image_HWC = fit(image_HWC, size, name=f"image {name}")
    mask_HW = fit(np.repeat(mask_HW[..., None] * np.uint8(255), 3, axis=2), size)[..., 0] > 127
    keep = _kept_scales(len(scales), strength, keep)
    map_HWC = tokenizer.compiled["maps"](tokenizer.params, to_float(image_HWC)[None])[0]
    pixels = hashlib.sha256(image_HWC.tobytes() + mask_HW.tobytes()).hexdigest()[:16]
    about = {
        "image": name,
        "mask": None if mask is None else _name(mask),
        "keep": keep,
        "outpaint": list(outpaint),
        "pixels": pixels,  # of the fitted picture and mask
    }
    edit = make_edit(map_HWC, mask_HW, keep, scales, config.pixel_weight)
    if not edit.drawn_1N.any():
        log.warning("image %s: nothing of it is drawn, it is only reconstructed", name)
    elif edit.drawn_1N.all() and not everywhere:
        log.warning("image %s: nothing is left of it in %d pixels, all is drawn", name, size)
    return Request(edit, about, image_HWC, mask_HW)


def _name(picture: Picture) -> str:
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else "given as pixels"


def _read_mask(mask: Picture, shape: tuple[int, int], image: str) -> np.ndarray:
    """Return a mask as bool (H, W) of the image's size."""
    name = _name(mask)
    if isinstance(mask, np.ndarray) and mask.ndim == 2:
        mask = mask * np.uint8(255) if mask.dtype == bool else mask
        mask = mask[..., None].repeat(3, axis=2)
    pixels_HWC = read_picture(mask, "mask")
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.max() == 1:
        raise ValueError(
            f"mask {name} of dtype {pixels_HWC.dtype}, at most {pixels_HWC.max()}: give bool, or "
            "uint8 with 255 where the image is to change"
        )
    (height, width), (rows, columns) = shape, pixels_HWC.shape[:2]
    if abs(height * columns - width * rows) > max(height, width, rows, columns):
        raise ValueError(
            f"mask {name} of {columns} x {rows} pixels has another aspect than the image {image} "
            f"of {width} x {height}: crop or draw it to the image's size"
        )
    gray = Image.fromarray(pixels_HWC).convert("L").resize((width, height), Image.Resampling.BOX)
    return np.asarray(gray) > 127


def _parts(outpaint: Sequence[float]) -> tuple[float, ...]:
    parts = tuple(outpaint) if np.iterable(outpaint) and not isinstance(outpaint, str) else None
    if parts == ():
        return parts
    if (
        parts is None
        or len(parts) != 4
        or not all(isinstance(part, Real) and 0 <= part <= 4 for part in parts)
        or not any(parts)
    ):
        raise ValueError(
            f"outpaint {shown(outpaint)}: give the parts of the picture's size, 0 to 4, that it "
            "grows by on the left, top, right and bottom, such as 0.5,0,0.5,0"
        )
    return parts


def _outpainted(
    image_HWC: np.ndarray, mask_HW: np.ndarray, outpaint: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a square with the picture and what is to be drawn around it."""
    height, width = mask_HW.shape
    left, top, right, bottom = (
        round(part * side)
        for part, side in zip(outpaint, (width, height, width, height), strict=True)
    )
    if not (left or top or right or bottom):
        raise ValueError(f"outpaint {outpaint} is less than a pixel of {width} x {height}")
    wide, high = left + width + right, top + height + bottom
    side = max(wide, high)  # what is missing to a square goes to both sides
    if side > _LARGEST_SIDE:
        image, mask = Image.fromarray(image_HWC), Image.fromarray(mask_HW * np.uint8(255))
        factor = -(-side // _LARGEST_SIDE)
        mask_HW = np.asarray(mask.reduce(factor)) > 127
        return _outpainted(np.asarray(image.reduce(factor)), mask_HW, outpaint)
    left, top = left + (side - wide) // 2, top + (side - high) // 2
    around = ((top, side - top - height), (left, side - left - width))
    image_HWC = np.pad(image_HWC, (*around, (0, 0)), mode="edge")
    return image_HWC, np.pad(mask_HW, around, constant_values=True)


def _kept_scales(count: int, strength: float | None, keep: int | None) -> int:
    if strength is not None and keep is not None:
        raise ValueError(f"strength {strength} and keep {keep} say the same: give one of them")
    if strength is not None:
        if not isinstance(strength, Real) or not 0 <= strength <= 1:
            raise ValueError(f"strength {shown(strength)} must be 0 (change nothing) to 1")
        return int((1 - strength) * count + 0.5)
    if keep is not None and (not isinstance(keep, Integral) or not 0 <= keep <= count):
        raise ValueError(f"keep {shown(keep)} must be 0 to {count}, the number of scales")
    return int(keep or 0)
