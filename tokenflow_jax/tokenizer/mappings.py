"""Mappings: which rows of the two codebooks a code stands for, if not the shared mapping's.

- `Separate`: each half takes its own nearest code, and a code holds both indices, semantic * K' +
  pixel with K' pixel codes. It has to fit int32.
- `Joined`: one codebook of whole vectors, of unit norm as wholes.
- `Heads`: both halves are cut into heads, and each head of a token has a code of its own under the
  shared mapping, over its columns of both codebooks. A token's codes follow each other: (B, L H).
- `Flat`, `SeparateFlat`: the pixel half is a fixed grid of points that are not of unit norm (FSQ,
  LFQ), compared by their plain distances.

Only codes of the shared mapping can be read and written by the language models: the others have no
two codebooks of which one index selects a row each (`kinds.QuantizerConfig.shared_index`).

Shapes: N tokens, H heads, K codes, C channels, D pixel channels.
"""

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.parallel import placement
from tokenflow_jax.tokenizer.quantizer import (
    Codebooks,
    Search,
    l2_normalize,
    normalize_halves,
)


class Joined(Codebooks):
    """One codebook for both halves together; |z - c|^2 knows no weight of the pixel half."""

    @property
    def parts(self) -> tuple[int, ...]:
        return (sum(super().parts),)

    def normalized(self) -> jax.Array:
        return l2_normalize(jnp.concatenate([*self], axis=-1).astype(jnp.float32))

    def look_up(self, codes: jax.Array) -> jax.Array:
        rows = [placement.take_rows(half, codes) for half in self]
        return l2_normalize(jnp.concatenate(rows, axis=-1).astype(jnp.float32))

    def inputs(self, features: jax.Array) -> jax.Array:
        return l2_normalize(features.astype(jnp.float32))

    def searches(self, z_NC, tables, pixel_weight=1.0):
        return [Search(z_NC, *tables, self.semantic_channels)]


class Separate(Codebooks):
    """Two codebooks, of any sizes, in which each half finds its own nearest code."""

    @property
    def size(self) -> int:
        return self.semantic_KC.shape[0] * self.pixel_KC.shape[0]

    def _indices(self, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.divmod(codes, self.pixel_KC.shape[0])

    def joined(self, semantic_N, pixel_N):
        return semantic_N * self.pixel_KC.shape[0] + pixel_N

    def tables(self) -> tuple[jax.Array, ...]:
        return tuple(l2_normalize(half.astype(jnp.float32)) for half in self)

    def searches(self, z_NC, tables, pixel_weight=1.0):
        channels = self.semantic_channels
        halves = jnp.split(z_NC, [channels], axis=-1)
        split = (channels, 0)  # all channels of a half are semantic, or none is
        return [Search(*s) for s in zip(halves, tables, split, strict=True)]

    def rows(self, tables, codes_N):
        pairs = zip(tables, self._indices(codes_N), strict=True)
        return jnp.concatenate([placement.take_rows(*pair) for pair in pairs], axis=-1)

    def look_up(self, codes: jax.Array) -> jax.Array:
        pairs = zip(self, self._indices(codes), strict=True)
        rows = [l2_normalize(placement.take_rows(*pair).astype(jnp.float32)) for pair in pairs]
        return jnp.concatenate(rows, axis=-1)


class Heads(Codebooks):
    """Sub-codebooks: the shared mapping in each head by itself, as UniTok's (arXiv 2502.20321)."""

    heads: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(half // self.heads for half in super().parts for _ in range(self.heads))

    def _by_head(self, x: jax.Array) -> list[jax.Array]:
        halves = jnp.split(x, [self.semantic_channels], axis=-1)
        pairs = zip(*(jnp.split(half, self.heads, axis=-1) for half in halves), strict=True)
        return [jnp.concatenate(pair, axis=-1) for pair in pairs]

    def _normalized(self, x: jax.Array) -> jax.Array:
        return normalize_halves(x, self.semantic_channels // self.heads)

    def _together(self, by_head: Sequence[jax.Array]) -> jax.Array:
        split = [jnp.split(x, [self.semantic_channels // self.heads], axis=-1) for x in by_head]
        semantic, pixel = zip(*split, strict=True)
        return jnp.concatenate([*semantic, *pixel], axis=-1)

    def inputs(self, features: jax.Array) -> jax.Array:
        return self._together([self._normalized(x) for x in self._by_head(features)])

    def tables(self) -> tuple[jax.Array, ...]:
        return tuple(map(self._normalized, self._by_head(jnp.concatenate([*self], axis=-1))))

    def searches(self, z_NC, tables, pixel_weight=1.0):
        split = (self.semantic_channels // self.heads, pixel_weight)
        return [Search(*pair, *split) for pair in zip(self._by_head(z_NC), tables, strict=True)]

    def joined(self, *codes_N):
        return jnp.stack(codes_N, axis=-1)

    def rows(self, tables, codes_NH):
        pairs = zip(tables, jnp.moveaxis(codes_NH, -1, 0), strict=True)
        return self._together([placement.take_rows(*pair) for pair in pairs])

    def look_up(self, codes: jax.Array) -> jax.Array:
        """Return the vectors of codes (..., L H): (..., L, C)."""
        tables = self._by_head(jnp.concatenate([*self], axis=-1))
        codes = codes.reshape(*codes.shape[:-1], -1, self.heads)
        return self._together(
            [
                self._normalized(placement.take_rows(table, codes[..., head]))
                for head, table in enumerate(tables)
            ]
        )


class _GridHalf:
    """What a pixel half of grid points changes, whatever the mapping.

    As their norms differ, |z - c|^2 = const - 2 (z.c - |c|^2 / 2): one more channel, 1 in z and
    -|c|^2 / 2 in the codes, makes that an inner product again.
    """

    @property
    def parts(self) -> tuple[int, ...]:
        return (self.semantic_channels,)

    def inputs(self, features: jax.Array) -> jax.Array:
        features = features.astype(jnp.float32)
        semantic, pixel = jnp.split(features, [self.semantic_channels], axis=-1)
        pixel = bounded(pixel, self.levels) if self.levels else pixel
        return jnp.concatenate([l2_normalize(semantic), pixel], axis=-1)

    def searches(self, z_NC, tables, pixel_weight=1.0):
        z_NC = jnp.pad(z_NC, ((0, 0), (0, 1)), constant_values=1.0)
        return super().searches(z_NC, tables, pixel_weight)

    def rows(self, tables, codes_N):
        return super().rows(tables, codes_N)[:, :-1]

    def tables(self) -> tuple[jax.Array, ...]:
        norm_K1 = jnp.sum(self.pixel_KC**2, axis=-1, keepdims=True)
        semantic_KC = l2_normalize(self.semantic_KC.astype(jnp.float32))
        return semantic_KC, jnp.concatenate([self.pixel_KC, -norm_K1 / 2], axis=-1)

    def look_up(self, codes: jax.Array) -> jax.Array:
        pairs = zip(self, self._indices(codes), strict=True)
        semantic, pixel = (placement.take_rows(*pair) for pair in pairs)
        return jnp.concatenate([l2_normalize(semantic.astype(jnp.float32)), pixel], axis=-1)


class Flat(_GridHalf, Codebooks):
    """The shared mapping with a grid for the pixel half: the index minimizes the same sum."""

    levels: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())  # (): not bounded

    def _indices(self, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return codes, codes

    def tables(self) -> tuple[jax.Array, ...]:
        return (jnp.concatenate(super().tables(), axis=-1),)


class SeparateFlat(_GridHalf, Separate):
    """Two indices, the pixel half's that of the nearest point: FSQ's and LFQ's rounding."""

    levels: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())


def bounded(x: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Squash channels (..., D) to where FSQ's grid of these levels is: about -1 to 1."""
    levels_D = jnp.asarray(levels, jnp.float32)
    half_D = (levels_D - 1) * (1 + 1e-3) / 2  # beyond the outer points, which tanh never reaches
    offset_D = jnp.where(levels_D % 2 == 0, 0.5, 0.0)
    shift_D = jnp.arctanh(offset_D / half_D)  # zero stays zero
    return (jnp.tanh(x + shift_D) * half_D - offset_D) / (levels_D // 2)


def grid(levels: Sequence[int], kind: str) -> jax.Array:
    """Return the points (K', D) of a grid, the first channel changing fastest.

    "fsq": FSQ's (arXiv 2309.15505), -1 to 1 in steps of 1 / (level // 2); "lfq": the signs (arXiv
    2310.05737); "bsq": the signs with norm one (arXiv 2406.07548).
    """
    basis_D = np.cumprod([1, *levels[:-1]])
    digits_KD = jnp.arange(math.prod(levels))[:, None] // basis_D % np.asarray(levels)
    if kind == "fsq":
        middle_D = np.asarray(levels) // 2
        return ((digits_KD - middle_D) / middle_D).astype(jnp.float32)
    signs_KD = 2.0 * digits_KD - 1
    return signs_KD / math.sqrt(len(levels)) if kind == "bsq" else signs_KD
