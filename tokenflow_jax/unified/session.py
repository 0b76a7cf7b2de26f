"""The cache of a conversation in which pictures are drawn, too."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenflow_jax.data.chat.insertion import TEXT, code_places
from tokenflow_jax.data.pictures import Picture
from tokenflow_jax.generation.sample import Recipe
from tokenflow_jax.understanding.session import Session


class DrawnPicture(NamedTuple):
    """A picture of the model's own; what it reads of it are these codes."""

    image_HWC: np.ndarray  # uint8
    codes_N: np.ndarray


class DrawingSession(Session):
    """A session whose rows may have places of codes, those of its drawn pictures in order."""

    def __init__(self, *arguments: Any, codes: int):
        """Begin with nothing; `codes` per picture. See `Session`."""
        super().__init__(*arguments)
        self._codes = codes

    def draw(
        self,
        row: Mapping[str, np.ndarray],
        pictures: Sequence[Picture | DrawnPicture],
        codebooks: Any,
        empty_1P: np.ndarray | None,
        key_1: jax.Array,
        recipe: Recipe,
    ) -> np.ndarray:
        """Draw the picture with which a row ends; return its codes, int32 (N,).

        Args:
          row: of the whole conversation, up to the new picture's first code.
          pictures: all before it.
          codebooks, empty_1P, key_1, recipe: see `unified.draw.draw`.
        """
        tokens, pictures = np.stack([row["ids"], row["places"]]), list(pictures)
        if empty_1P is not None and empty_1P.shape[1] >= tokens.shape[1]:
            raise ValueError(
                f"the conversation has {tokens.shape[1] - 1} tokens, one that asks for nothing "
                f"{empty_1P.shape[1]}: draw without guidance (guidance=0)"
            )
        kept = self._common(tokens[:, :-1], pictures)
        prompt, count = self._prompt(tokens[:, kept:], pictures)
        cache, room = self._cache(kept, prompt, tokens.shape[1] + self._codes)
        self._forget(pictures)
        places = (np.int32(kept), np.int32(count - 1))
        prefix = self._compiled["begin"](self._params, prompt, cache, *places, empty_1P, room=room)
        how = (key_1, np.float32(recipe.guidance))
        codes_1N, cache = self._compiled["draw"](
            self._params,
            codebooks,
            prefix.cache,
            prefix._replace(cache=None),
            *how,
            passes=recipe.passes,
        )
        # The other row is what was guided away from.
        own = (cache.keys[:, :1], cache.values[:, :1])
        self._kept = dataclasses.replace(cache, keys=own[0], values=own[1])
        first = -2 - tokens[1, -1]
        places = code_places(first, self._codes - 1)
        self._read = np.concatenate([tokens[:, :-1], [0 * places, places]], axis=1)
        codes_N = np.asarray(codes_1N)[0]
        self._pictures = [*pictures, DrawnPicture(None, codes_N)]
        return codes_N

    def _prompt(
        self, new: np.ndarray, pictures: list[Picture]
    ) -> tuple[dict[str, np.ndarray], int]:
        codes = -2 - new[1][new[1] < TEXT]
        first = int(codes.min(initial=0)) // self._codes
        shifted = np.where(new[1] < TEXT, new[1] + first * self._codes, new[1])
        prompt, count = super()._prompt(np.stack([new[0], shifted]), pictures)
        if codes.size:
            drawn = [p.codes_N for p in pictures if isinstance(p, DrawnPicture)][first:]
            if new[1, -1] < TEXT:  # the one that is to be drawn
                drawn.append(np.zeros(self._codes, np.int32))
            if (wanted := int(codes.max()) // self._codes + 1 - first) != len(drawn):
                raise ValueError(
                    f"the turns have {wanted + first} drawn pictures, and there are "
                    f"{len(drawn) + first}"
                )
            write_MNC = self._compiled["next_scale"](np.stack(drawn))
            prompt["features"] = {**prompt["features"], "write": np.asarray(write_MNC)[None]}
        return prompt, count

    def _common(self, tokens: np.ndarray, pictures: list[Picture]) -> int:
        kept = super()._common(tokens, pictures)
        count = -(-int((-1 - tokens[1, :kept]).max(initial=0)) // self._codes)
        old, new = (
            [p.codes_N for p in some if isinstance(p, DrawnPicture)][:count]
            for some in (self._pictures, pictures)
        )
        return kept if len(old) == len(new) and all(map(operator.is_, old, new)) else 0
