"""Residual multi-scale quantisation: an image becomes a pyramid of codes, coarse to fine.

For scales (1, 2, 4) and a 4 x 4 map of features f:

    f --area to 1x1--> quantise: 1 code  --bicubic to 4x4--> u1,   r1 = f  - sg(u1)
    r1 --area to 2x2--> quantise: 4 codes --bicubic to 4x4--> u2,   r2 = r1 - sg(u2)
    r2 --as it is-----> quantise: 16 codes ----------------> u3

The quantised map is u1 + u2 + u3; the image is the row of 1 + 4 + 16 = 21 codes. Each scale
explains what the coarser ones left over. Gradients reach the features through every scale's
normalisation and area resize, never through the subtraction.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.nets.resize import area_resize, bicubic_resize
from tokenflow_jax.parallel import placement
from tokenflow_jax.tokenizer import quantizer
from tokenflow_jax.tokenizer.quantizer import Codebooks


@dataclasses.dataclass(frozen=True)
class Scales:
    """The sides of the pyramid's grids, ascending; the last is the side of the feature map.

    Example: Scales((1, 2, 4)).tokens == 21, .slices() == [0:1, 1:5, 5:21].
    """

    sides: tuple[int, ...]

    def __post_init__(self):
        sides = self.sides
        if not sides or any(s < 1 for s in sides) or list(sides) != sorted(set(sides)):
            raise ValueError(f"scales {sides}: give one or more ascending positive grid sides")

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def grid(self) -> int:
        """Side of the finest grid."""
        return self.sides[-1]

    @property
    def tokens(self) -> int:
        """Codes per image, L."""
        return sum(side * side for side in self.sides)

    def slices(self) -> list[slice]:
        """Where each scale's codes lie in a row of L codes."""
        ends = np.cumsum([side * side for side in self.sides]).tolist()
        return [slice(end - side * side, end) for side, end in zip(self.sides, ends, strict=True)]

    def prefix(self, tokens: int) -> "Scales":
        """The coarsest scales that `tokens` codes fill exactly.

        Raises:
          ValueError: when the codes end inside a scale; the message lists the possible counts.
        """
        ends = [s.stop for s in self.slices()]
        if tokens not in ends:
            raise ValueError(
                f"{tokens} codes per image end inside a scale; scales {self.sides} give "
                f"one of {ends}"
            )
        return Scales(self.sides[: ends.index(tokens) + 1])

    def per_token(self, values_S: jax.Array) -> jax.Array:
        """Repeats one value per scale for each of its tokens: (S,) to (L,)."""
        repeats = np.array([side * side for side in self.sides])
        return jnp.repeat(values_S, repeats, total_repeat_length=self.tokens)


class Pyramid(NamedTuple):
    """The result of `residual_quantize`.

    Attributes:
      quantized_BHWC: sum over scales, straight-through to the features; float32.
      codes_BL: int32, coarse to fine, row by row within a scale.
      z_BLC: the normalised inputs of the quantiser, differentiable.
    """

    quantized_BHWC: jax.Array
    codes_BL: jax.Array
    z_BLC: jax.Array


def residual_quantize(
    features_BHWC: jax.Array,
    codebooks: Codebooks,
    scales: Scales,
    pixel_weight: float = 1.0,
    keep_S: jax.Array | None = None,
) -> Pyramid:
    """Quantises feature maps scale by scale.

    Args:
      features_BHWC: (B, g, g, C) unnormalised features, semantic channels first, g = scales.grid.
      codebooks: the two codebooks.
      scales: the pyramid.
      pixel_weight: weight of the pixel distance in the shared mapping.
      keep_S: one 0 or 1 per scale; a dropped scale adds nothing and leaves the residual alone. Its
        codes are computed all the same (one program for every draw) and mean nothing.

    Returns:
      A `Pyramid`.
    """
    features_BHWC = features_BHWC.astype(jnp.float32)
    batch, grid, _, channels = features_BHWC.shape
    if grid != scales.grid:
        raise ValueError(f"a {grid} x {grid} feature map cannot end at scales {scales.sides}")
    semantic_channels = codebooks.semantic_KC.shape[-1]
    table_KC = jax.lax.stop_gradient(codebooks.normalized())

    residual_BHWC, quantized_BHWC = features_BHWC, jnp.zeros_like(features_BHWC)
    codes, inputs = [], []
    for s, side in enumerate(scales.sides):
        z_BhwC = area_resize(residual_BHWC, side)
        z_BhwC = quantizer.normalize_halves(z_BhwC, semantic_channels)
        code_N = quantizer.nearest_codes(
            z_BhwC.reshape(-1, channels), table_KC, semantic_channels, pixel_weight
        )
        chosen_BhwC = placement.take_rows(table_KC, code_N).reshape(z_BhwC.shape)
        chosen_BhwC = quantizer.straight_through(z_BhwC, chosen_BhwC)
        up_BHWC = bicubic_resize(chosen_BhwC, grid)
        if keep_S is not None:
            up_BHWC *= keep_S[s]
        quantized_BHWC += up_BHWC
        residual_BHWC -= jax.lax.stop_gradient(up_BHWC)
        codes.append(code_N.reshape(batch, side * side))
        inputs.append(z_BhwC.reshape(batch, side * side, channels))
    return Pyramid(quantized_BHWC, jnp.concatenate(codes, 1), jnp.concatenate(inputs, 1))


def features_from_codes(codes_BL: jax.Array, codebooks: Codebooks, scales: Scales) -> jax.Array:
    """The quantised map that codes stand for.

    Args:
      codes_BL: int codes of all scales, or of the coarsest ones only.
      codebooks: the two codebooks.
      scales: the whole pyramid; also a prefix is resized to its finest grid.

    Returns:
      (B, g, g, C) float32.

    Raises:
      ValueError: when the codes end inside a scale.
    """
    used = scales.prefix(codes_BL.shape[1])
    vectors_BLC = codebooks.look_up(codes_BL)
    total = 0.0
    for side, where in zip(used.sides, used.slices(), strict=True):
        grid_BhwC = vectors_BLC[:, where].reshape(codes_BL.shape[0], side, side, -1)
        total += bicubic_resize(grid_BhwC, scales.grid)
    return total


def draw_kept_scales(key: jax.Array, scales: Scales, probability: float) -> jax.Array:
    """Draws which scales a training step uses.

    Args:
      key: the step's key.
      scales: the pyramid.
      probability: of leaving out one scale, any but the first, for the whole batch.

    Returns:
      float32 (S,) of ones, at most one of them zero.
    """
    count = len(scales)
    if count == 1 or probability == 0:
        return jnp.ones(count)
    drop_key, which_key = jax.random.split(key)
    dropped = jax.random.randint(which_key, (), 1, count)
    drop = jax.random.bernoulli(drop_key, probability)
    return jnp.where(drop & (jnp.arange(count) == dropped), 0.0, 1.0)


def token_weights(scales: Scales, keep_S: jax.Array) -> jax.Array:
    """Weights (L,) that average over a scale's tokens, then over kept scales; their sum is 1."""
    sizes_S = jnp.array([side * side for side in scales.sides], jnp.float32)
    return scales.per_token(keep_S / (sizes_S * keep_S.sum()))
