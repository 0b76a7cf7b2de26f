"""Attention masks: which keys a query may read.

Real ones (no padding), in causal order, except inside a run of blocks (the scales of an image):
there a query reads its own block whole and all blocks before it. For blocks of 1 and 4 tokens after
two text tokens (rows are queries, x is allowed):

                 0 1 2 3 4 5 6
    0  text      x
    1  text      x x
    2  block 0   x x x
    3  block 1   x x x x x x x
    ...
    6  block 1   x x x x x x x
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A run of blocks, inside which attention is not causal; without blocks everything is."""

    start: int = 0  # index of the first block's first token
    sizes: tuple[int, ...] = ()

    def last_key(self, length: int) -> np.ndarray:
        """Return the last key that each of `length` queries may read: int32 (length,)."""
        last_L = np.arange(length, dtype=np.int32)
        stop = self.start
        for size in self.sizes:
            begin, stop = stop, stop + size
            last_L[begin:stop] = stop - 1
        return last_L


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("real_BK", "segments_BK", "last_BK"),
    meta_fields=("blocks", "ahead"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """The keys that a query may read."""

    # bool, False for padding; None if all keys are real. With a cache, K is its length.
    real_BK: jax.Array | None = None
    blocks: Blocks = Blocks()
    # int, which of the texts that share a row a token belongs to: queries read only their own text.
    # None if rows are not shared; not for use with a cache.
    segments_BK: jax.Array | None = None
    # int32, the last key that each query may read, for blocks whose place is known only at run
    # time; None if `blocks` tell. No query reads more than `ahead` keys after its own place.
    last_BK: jax.Array | None = None
    ahead: int = 0

    def over(self, keys: int) -> "Mask":
        """Return the mask of the first keys."""
        return jax.tree.map(lambda x_BK: x_BK[:, :keys], self)

    def allowed(self, queries: int, keys: int, first: jax.Array | int = 0) -> jax.Array:
        """Return the mask as bool (B, Q, K), or (1, Q, K) where all keys are real.

        `first` is the index of the first query among the keys.
        """
        last_BK = jnp.asarray(self.blocks.last_key(keys))[None]
        last_BK = last_BK if self.last_BK is None else self.last_BK
        last_BQ = last_BK[:, jnp.minimum(first + jnp.arange(queries), keys - 1)]
        allowed_BQK = jnp.arange(keys) <= last_BQ[..., None]
        if self.segments_BK is not None:
            if not queries == keys == self.segments_BK.shape[1]:
                raise ValueError("rows that several texts share are read whole, without a cache")
            allowed_BQK &= self.segments_BK[:, :, None] == self.segments_BK[:, None, :]
        if self.real_BK is None:
            return allowed_BQK
        if self.real_BK.shape[1] < keys:
            raise ValueError(
                f"the mask covers {self.real_BK.shape[1]} keys, but attention reads {keys}; with a "
                "cache, give a mask as long as the cache"
            )
        return allowed_BQK & self.real_BK[:, None, :keys]
