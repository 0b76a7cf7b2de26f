"""The quantizers by name, `config.model.quantizer`: parameters, codebooks, gradient, finished form.

| kind     | codebooks                                     | gradient                        |
|----------|-----------------------------------------------|---------------------------------|
| vq       | learned (the paper)                           | straight-through                |
| rotation | learned                                       | of a rotation, 2410.06424       |
| ibq      | learned                                       | through all scores, 2412.02692  |
| simvq    | frozen ones times learned maps, 2411.02038    | straight-through                |
| bsq      | pixel half: signs on the sphere, 2406.07548   | straight-through                |
| lfq      | pixel half: signs, features unbounded, 2310.05737 | straight-through            |
| fsq      | pixel half: a grid of `levels`, 2309.15505    | straight-through                |

The gradient, SimVQ's factors and, with the shared mapping, BSQ's rule are of training only:
`finished` gives the plain tokenizer that loading and conversion make of it. What is left belongs to
the model and is recorded with it. `mappings` has what `mapping` chooses.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.tokenizer import estimators
from tokenflow_jax.tokenizer.mappings import Flat, Heads, Joined, Separate, SeparateFlat, grid
from tokenflow_jax.tokenizer.quantizer import Codebooks, l2_normalize, straight_through
from tokenflow_jax.weights.lazy import LazyTensor, in_memory, whole

KINDS = ("vq", "rotation", "ibq", "simvq", "bsq", "lfq", "fsq")
MAPPINGS = ("shared", "separate", "joined")
_GRIDS = ("bsq", "lfq", "fsq")
_HALVES = ("semantic", "pixel")


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """Which quantizer; the defaults are the paper's."""

    kind: str = "vq"  # one of KINDS
    mapping: str = "shared"  # one index for both halves; separate: two; joined: one codebook
    levels: tuple[int, ...] = ()  # of fsq, for each pixel channel
    heads: int = 1  # codes of a token, each of its own part of both halves
    temperature: float = 0.1  # of ibq's softmax over distances

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(self.levels))
        problems = [
            f"quantizer.{name} {value!r} is not one of {allowed}"
            for name, value, allowed in (
                ("kind", self.kind, KINDS),
                ("mapping", self.mapping, MAPPINGS),
            )
            if value not in allowed
        ]
        if bool(self.levels) != (self.kind == "fsq") or any(n < 3 for n in self.levels):
            problems.append(
                f"quantizer.levels {self.levels}: kind 'fsq' needs three or more for each pixel "
                "channel, such as (8, 5, 5, 5); other kinds have none"
            )
        if self.temperature <= 0:
            problems.append(f"quantizer.temperature {self.temperature} must be positive")
        if self.mapping == "joined" and self.kind in _GRIDS:
            problems.append(
                f"quantizer.kind {self.kind!r} has a grid of pixel codes, mapping 'joined' has none"
            )
        if self.heads < 1 or (self.heads > 1 and self._one_head_only):
            problems.append(
                f"quantizer.heads {self.heads} needs kind 'vq' or 'rotation' and mapping 'shared'; "
                "1 is one code for a token"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def _one_head_only(self) -> bool:
        return self.kind not in ("vq", "rotation") or self.mapping != "shared"

    def problems(self, size: int, semantic_channels: int, pixel_channels: int) -> list[str]:
        """Return what does not fit a tokenizer with that codebook_size and those channels."""
        found, count = [], self.pixel_size(size, pixel_channels)
        if semantic_channels % self.heads or pixel_channels % self.heads:
            found.append(
                f"quantizer.heads {self.heads} does not divide semantic_channels "
                f"{semantic_channels} and pixel_channels {pixel_channels}"
            )
        if self.levels and len(self.levels) != pixel_channels:
            return [f"quantizer.levels {self.levels} are not for pixel_channels {pixel_channels}"]
        if self.mapping == "shared" and count != size:
            found.append(
                f"codebook_size {size} is not the {count} points of quantizer.kind {self.kind!r}, "
                "which the shared index selects, too"
            )
        if self.mapping == "separate" and size * count > 2**31:
            found.append(f"codebook_size {size} times {count} pixel codes do not fit an int32 code")
        return found

    def pixel_size(self, size: int, pixel_channels: int) -> int:
        """Return the number of pixel codes."""
        if self.kind not in _GRIDS:
            return size
        return math.prod(self.levels) if self.levels else 2**pixel_channels

    @property
    def shared_index(self) -> bool:
        """One index selects a row of unit norm in two codebooks: what language models read."""
        return self.mapping == "shared" and self.heads == 1 and self.kind not in ("lfq", "fsq")

    @property
    def fixed_codes(self) -> bool:
        """Some codes are not parameters that could be moved one by one."""
        return self.kind in ("simvq", *_GRIDS)

    def parameters(self, size: int, channels: Mapping[str, int]) -> dict[str, tuple]:
        """Return (initializer, shape) of the parameters; `channels` are those of both halves."""
        found = {}
        for half, width in channels.items():
            if self.kind == "simvq":  # random rows as in its released code; the map starts neutral
                init = nn.initializers.normal(width**-0.5)
                found[f"{half}_map"] = (lambda _, shape: jnp.eye(*shape), (width, width))
            else:
                init = _uniform_direction
            if half == "semantic" or self.kind not in _GRIDS:
                found[f"{half}_codebook"] = (init, (size, width))
        return found

    def codebooks(self, params: Mapping[str, jax.Array], pixel_channels: int) -> Codebooks:
        """Return the codebooks that a tokenizer's parameters stand for."""
        tables = [params.get(f"{half}_codebook") for half in _HALVES]
        if self.kind == "simvq":
            maps = (params[f"{half}_map"] for half in _HALVES)
            tables = [
                jnp.dot(jax.lax.stop_gradient(table), map_CC, precision="highest")
                for table, map_CC in zip(tables, maps, strict=True)
            ]
        if self.kind in _GRIDS:
            tables[1] = grid(self.levels or (2,) * pixel_channels, self.kind)
        if self.kind in ("lfq", "fsq"):
            form = {"shared": Flat, "separate": SeparateFlat}[self.mapping]
            return form(*tables, levels=self.levels)
        if self.heads > 1:
            return Heads(*tables, heads=self.heads)
        return {"shared": Codebooks, "separate": Separate, "joined": Joined}[self.mapping](*tables)

    def estimator(self, codebooks: Codebooks) -> Callable[..., jax.Array]:
        """Return the function of (z, codes, searches) that gives codes their gradient."""
        if self.kind == "ibq":
            return lambda z, codes, searches: estimators.propagate_to_index(
                codes, searches, self.temperature
            )
        if self.kind == "rotation":
            return lambda z, codes, searches: estimators.rotate(z, codes, codebooks.parts)
        return lambda z, codes, searches: straight_through(z, codes)

    @property
    def trains_codes(self) -> bool:
        """The estimator's gradient reaches the codes, not the losses on codes alone."""
        return self.kind == "ibq"

    def check_codebook(self, codebook: Any) -> None:
        """Raise ValueError for a `state.CodebookConfig` that cannot move these codebooks."""
        one_by_one, shared = not self.fixed_codes, self.mapping == "shared" and self.heads == 1
        refused = {
            f"init={codebook.init!r}": codebook.init == "kmeans" and not (one_by_one and shared),
            f"learning={codebook.learning!r}": codebook.learning == "ema"
            and not (one_by_one and shared and not self.trains_codes),
            f"revive_every={codebook.revive_every}": codebook.revive_every and not one_by_one,
        }
        if names := [name for name, is_refused in refused.items() if is_refused]:
            raise ValueError(
                f"codebook.{', codebook.'.join(names)} cannot be had with quantizer.kind "
                f"{self.kind!r}, mapping {self.mapping!r} and heads {self.heads}; give "
                "codebook.init='uniform', learning='gradient', revive_every=0"
            )

    @property
    def finished(self) -> "QuantizerConfig":
        """The quantizer without what is of training only."""
        if self.kind in ("lfq", "fsq") or (self.kind == "bsq" and not self.shared_index):
            return self
        return QuantizerConfig(mapping=self.mapping, heads=self.heads)

    def finish(
        self, arrays: Mapping[str, LazyTensor], pixel_channels: int
    ) -> dict[str, LazyTensor]:
        """Return the parameters, by path, of the `finished` quantizer."""
        found = dict(arrays)
        if self.kind == "simvq":
            for half in _HALVES:
                table, map_CC = found[f"{half}_codebook"], found.pop(f"{half}_map")
                found[f"{half}_codebook"] = _product(table, map_CC)
        if self.kind == "bsq" and self.shared_index:
            points = np.asarray(grid((2,) * pixel_channels, "bsq"))
            found["pixel_codebook"] = in_memory("pixel_codebook", points)
        return found


PAPER = QuantizerConfig()


def _uniform_direction(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Uniform in a cube, then normalized, as in the reference.
    return l2_normalize(jax.random.uniform(key, shape, minval=-1, maxval=1))


def _product(table: LazyTensor, map_CC: LazyTensor) -> LazyTensor:
    def read_part(index) -> np.ndarray:
        rows_KC = table[index[0], slice(0, table.shape[1])]
        return (rows_KC @ map_CC.read())[:, index[1]]

    read = functools.partial(read_part, whole(table.shape))
    return LazyTensor(table.name, table.shape, table.dtype, read, read_part)
