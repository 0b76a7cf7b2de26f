"""A conversation's cache, kept between turns: the model reads only what is new."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.data.pictures import Picture
from tokenflow_jax.nets.cache import Cache
from tokenflow_jax.understanding.answer import AnswerState, Decoding

_CHUNK = 64  # tokens are read, and
_ROOM = 256  # the cache doubles from this on, so that few programs are compiled


class Session:
    """What the model has read of one conversation, and where the cache of it is."""

    def __init__(
        self,
        compiled: Mapping[str, Callable],
        params: Any,
        vectors: int,
        features: Callable[..., Any],
    ):
        """Begin with nothing.

        Args:
          compiled: jitted functions, "read" and "step" of `understanding.answer`.
          vectors: per picture.
          features: of a row's pictures, as the model takes them, for a batch of one.
        """
        self._compiled, self._params = compiled, params
        self._vectors, self._features = vectors, features
        self._kept: Cache | None = None
        self._read = np.zeros((2, 0), np.int32)  # ids and places of the tokens in the cache
        self._pictures: list[Picture] = []

    def tokens(
        self,
        row: Mapping[str, np.ndarray],  # of `insertion.merge_row`, the whole conversation
        pictures: Sequence[Picture],
        decoding: Decoding,
        seed: int,
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield the ids of an answer so far, int32 (n,), and True if it is complete."""
        tokens = np.stack([row["ids"], row["places"]])
        state = self._begin(tokens, list(pictures), decoding, seed)
        for count in range(1, decoding.max_new + 1):
            if count > 1 and self._kept is not state.cache:
                raise ValueError("the conversation went on before this answer was complete")
            self._kept = None  # its arrays are given away
            state = self._compiled["step"](self._params, state=state, decoding=decoding)
            ids_N = np.asarray(state.ids_BN)[0, :count]  # a slice on the device would be compiled
            self._kept = state.cache
            self._read = np.concatenate([tokens, [ids_N, np.full(count, insertion.TEXT)]], axis=1)
            done = bool(state.done_B[0])
            yield ids_N, done
            if done:
                return

    def _begin(
        self, tokens: np.ndarray, pictures: list[Picture], decoding: Decoding, seed: int
    ) -> AnswerState:
        """Read what the cache lacks; the last token is read in any case, for what follows it."""
        kept = self._common(tokens, pictures)
        prompt, count = self._prompt(tokens[:, kept:], pictures)
        cache, room = self._cache(kept, prompt, tokens.shape[1] + decoding.max_new)
        self._forget(pictures)
        return self._compiled["read"](
            self._params,
            prompt,
            cache,
            np.int32(kept),
            np.int32(count),
            jax.random.key(seed),
            decoding=decoding,
            room=room,
        )

    def _prompt(
        self, new: np.ndarray, pictures: list[Picture]
    ) -> tuple[dict[str, np.ndarray], int]:
        """Return a padded row of new tokens with the pictures that it shows, and their number."""
        count = new.shape[1]
        shown = new[1][new[1] >= 0]
        first = int(shown.min()) // self._vectors if shown.size else len(pictures)
        if (wanted := (int(shown.max(initial=-1)) + 1) // self._vectors) > len(pictures):
            raise ValueError(f"the turns show {wanted} pictures, and there are {len(pictures)}")
        places = np.where(new[1] >= 0, new[1] - first * self._vectors, new[1])
        row = {"ids": new[0], "places": places}
        prompt = insertion.pad_rows([row], -(-count // _CHUNK) * _CHUNK)
        del prompt["labels"]
        prompt["features"] = self._features([pictures[first:]])
        return prompt, count

    def _cache(
        self, kept: int, prompt: Mapping[str, np.ndarray], needed: int
    ) -> tuple[Cache | None, int]:
        """Return the cache of `kept` tokens with room for a prompt and for `needed` in all."""
        room = max(kept + prompt["ids"].shape[1], needed)
        room = _ROOM << max(0, (room - 1) // _ROOM).bit_length()
        cache = self._kept if kept else None
        if cache is not None and room > cache.keys.shape[2]:
            cache = jax.tree.map(_grown(room), cache)
        elif cache is not None:
            room = cache.keys.shape[2]
        return cache, room

    def _forget(self, pictures: list[Picture]) -> None:
        """Give the cache away."""
        self._kept, self._read, self._pictures = None, self._read[:, :0], pictures

    def _common(self, tokens: np.ndarray, pictures: list[Picture]) -> int:
        """Return how many tokens of a row are in the cache."""
        most = min(tokens.shape[1] - 1, self._read.shape[1])
        same = (tokens[:, :most] == self._read[:, :most]).all(axis=0)
        kept = most if same.all() else int(np.argmin(same))
        seen = -(-(int(tokens[1, :kept].max(initial=-1)) + 1) // self._vectors)
        known = zip(pictures[:seen], self._pictures, strict=False)
        return kept if self._kept is not None and all(a is b for a, b in known) else 0


def _grown(room: int) -> Callable[[jax.Array], jax.Array]:
    """Return a function that makes room for more entries in the arrays of a cache."""

    def grow(x: jax.Array) -> jax.Array:
        if x.ndim < 3:
            return x
        return jnp.pad(x, ((0, 0), (0, 0), (0, room - x.shape[2]), *((0, 0),) * (x.ndim - 3)))

    return grow
