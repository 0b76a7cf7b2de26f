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

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.nets.resize import area_matrix, area_resize, bicubic_resize
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import (
    Codebooks,
    nearest_codes,
    normalize_halves,
    straight_through,
)

SHARE = 0.5  # of a cell inside the mask from which on it is drawn


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
