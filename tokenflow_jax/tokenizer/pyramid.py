"""Residual multi-scale quantization: an image becomes a pyramid of codes, coarse to fine.

For scales (1, 2, 4) and a 4 x 4 map of features f:

    f  --area to 1x1--> quantize: 1 code   --bicubic to 4x4--> u1,   r1 = f  - sg(u1)
    r1 --area to 2x2--> quantize: 4 codes  --bicubic to 4x4--> u2,   r2 = r1 - sg(u2)
    r2 --as it is-----> quantize: 16 codes -----------------> u3

The quantized map is u1 + u2 + u3; the image is the row of 1 + 4 + 16 = 21 codes. Each scale
explains what the coarser ones left over. Gradients reach the features through every scale's
normalization and area resize, never through the subtraction.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.nets.resize import area_resize, bicubic_resize
from tokenflow_jax.tokenizer import quantizer as quantizers
from tokenflow_jax.tokenizer.kinds import PAPER, QuantizerConfig
from tokenflow_jax.tokenizer.quantizer import Codebooks, nearest_codes


@dataclasses.dataclass(frozen=True)
class Scales:
    """The sides of the pyramid's grids, ascending; the last is the side of the feature map.

    Example: Scales((1, 2, 4)).tokens == 21, .slices() == [0:1, 1:5, 5:21].
    """

    sides: tuple[int, ...]

    def __post_init__(self):
        sides = self.sides
        if not sides or any(s < 1 for s in sides) or list(sides) != sorted(set(sides)):
            raise ValueError(f"scales {sides}: give one or more positive grid sides, ascending")

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def grid(self) -> int:
        return self.sides[-1]

    @property
    def tokens(self) -> int:
        """Codes per image, L."""
        return sum(side * side for side in self.sides)

    @property
    def labels(self) -> list[str]:
        """Names of the scales in pictures."""
        return [f"scale {i} ({side}x{side})" for i, side in enumerate(self.sides, 1)]

    def slices(self) -> list[slice]:
        """Return where each scale's codes lie in a row of L codes."""
        ends = np.cumsum([side * side for side in self.sides]).tolist()
        return [slice(end - side * side, end) for side, end in zip(self.sides, ends, strict=True)]

    def prefix(self, codes: int, heads: int = 1) -> "Scales":
        """Return the coarsest scales that `codes`, `heads` a token, fill exactly; or ValueError."""
        ends = [s.stop * heads for s in self.slices()]
        if codes not in ends:
            raise ValueError(
                f"{codes} codes per image end inside a scale; scales {self.sides} give "
                f"one of {ends}"
            )
        return Scales(self.sides[: ends.index(codes) + 1])

    def per_token(self, values_S: jax.Array) -> jax.Array:
        """Repeat each scale's value for all its tokens: (S,) to (L,)."""
        repeats = np.array([side * side for side in self.sides])
        return jnp.repeat(values_S, repeats, total_repeat_length=self.tokens)


class Pyramid(NamedTuple):
    quantized_BHWC: jax.Array  # sum over scales, straight-through to the features; float32
    codes_BL: jax.Array  # int32, coarse to fine, row by row within a scale
    z_BLC: jax.Array  # the quantizer's normalized inputs, differentiable


def residual_quantize(
    features_BHWC: jax.Array,
    codebooks: Codebooks,
    scales: Scales,
    pixel_weight: float = 1.0,
    keep_S: jax.Array | None = None,
    quantizer: QuantizerConfig = PAPER,
) -> Pyramid:
    """Quantize features (B, g, g, C), g = scales.grid and semantic channels first, scale by scale.

    `keep_S` is 0 or 1 per scale: a dropped scale adds nothing and leaves the residual alone. Its
    codes are still computed, so that every draw runs the same program, but mean nothing.
    """
    features_BHWC = features_BHWC.astype(jnp.float32)
    batch, grid, _, channels = features_BHWC.shape
    if grid != scales.grid:
        raise ValueError(f"a {grid} x {grid} feature map cannot end at scales {scales.sides}")
    tables = codebooks.tables()
    if not quantizer.trains_codes:
        tables = jax.lax.stop_gradient(tables)
    estimate = quantizer.estimator(codebooks)

    residual_BHWC, quantized_BHWC = features_BHWC, jnp.zeros_like(features_BHWC)
    codes, inputs = [], []
    for s, side in enumerate(scales.sides):
        z_BhwC = codebooks.inputs(area_resize(residual_BHWC, side))
        z_NC = z_BhwC.reshape(-1, channels)
        searches = codebooks.searches(z_NC, tables, pixel_weight)
        code_N = codebooks.joined(*(nearest_codes(*search) for search in searches))
        chosen_NC = estimate(z_NC, codebooks.rows(tables, code_N), searches)
        chosen_BhwC = chosen_NC.reshape(z_BhwC.shape)
        up_BHWC = bicubic_resize(chosen_BhwC, grid)
        if keep_S is not None:
            up_BHWC *= keep_S[s]
        quantized_BHWC += up_BHWC
        residual_BHWC -= jax.lax.stop_gradient(up_BHWC)
        codes.append(code_N.reshape(batch, -1))
        inputs.append(z_BhwC.reshape(batch, side * side, channels))
    return Pyramid(quantized_BHWC, jnp.concatenate(codes, 1), jnp.concatenate(inputs, 1))


def features_from_codes(codes_BL: jax.Array, codebooks: Codebooks, scales: Scales) -> jax.Array:
    """Return the quantized map (B, g, g, C) of the codes of all scales or of the coarsest ones."""
    used = scales.prefix(codes_BL.shape[1], codebooks.heads)
    return map_of_vectors(codebooks.look_up(codes_BL), used, grid=scales.grid)


def map_of_vectors(
    vectors_BLC: jax.Array, scales: Scales, keep_S: jax.Array | None = None, grid: int | None = None
) -> jax.Array:
    """Return the map (B, grid, grid, C) that the code vectors of all tokens add up to."""
    total = 0.0
    for s, (side, where) in enumerate(zip(scales.sides, scales.slices(), strict=True)):
        grid_BhwC = vectors_BLC[:, where].reshape(vectors_BLC.shape[0], side, side, -1)
        up_BHWC = bicubic_resize(grid_BhwC, grid or scales.grid)
        total += up_BHWC if keep_S is None else up_BHWC * keep_S[s]
    return total


def draw_kept_scales(key: jax.Array, scales: Scales, probability: float) -> jax.Array:
    """Return float32 (S,) ones, one of them zero with the given probability, never the first."""
    count = len(scales)
    if count == 1 or probability == 0:
        return jnp.ones(count)
    drop_key, which_key = jax.random.split(key)
    dropped = jax.random.randint(which_key, (), 1, count)
    drop = jax.random.bernoulli(drop_key, probability)
    return jnp.where(drop & (jnp.arange(count) == dropped), 0.0, 1.0)


def token_weights(scales: Scales, keep_S: jax.Array) -> jax.Array:
    """Return weights (L,) that average over each scale's tokens, then over the kept scales."""
    sizes_S = jnp.array([side * side for side in scales.sides], jnp.float32)
    return scales.per_token(keep_S / (sizes_S * keep_S.sum()))


def entropy_loss(
    z_BLC: jax.Array, codebooks: Codebooks, scales: Scales, pixel_weight: float, keep_S: jax.Array
) -> jax.Array:
    """Return `quantizer.entropy_loss`, summed over the searches, averaged over the kept scales."""
    tables, per_scale = codebooks.tables(), []
    for where in scales.slices():
        z_NC = z_BLC[:, where].reshape(-1, z_BLC.shape[-1])
        weights_N = jnp.full(z_NC.shape[0], 1 / z_NC.shape[0])
        searches = codebooks.searches(z_NC, tables, pixel_weight)
        per_scale.append(sum(quantizers.entropy_loss(*s[:2], weights_N, *s[2:]) for s in searches))
    return jnp.sum(jnp.stack(per_scale) * keep_S) / keep_S.sum()


def distance_statistics(
    z_BLC: jax.Array, codebooks: Codebooks, weights_L: jax.Array
) -> dict[str, jax.Array]:
    """Return the reference's distance norms of both halves, where these have norm one."""
    if len(codebooks.parts) != 2:
        return {}
    batch, _, channels = z_BLC.shape
    weights_N = jnp.tile(weights_L / batch, batch)
    searches = codebooks.searches(z_BLC.reshape(-1, channels), codebooks.tables())
    found = [quantizers.distance_statistics(*s[:2], weights_N, s[2]) for s in searches]
    return {"distance/semantic": found[0][0], "distance/pixel": found[-1][-1]}
