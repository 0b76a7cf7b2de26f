"""The key-value cache that a language model decodes with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "length"),
    meta_fields=("visible", "fresh"),
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, in arrays whose size never changes."""

    keys: jax.Array  # (layers, B, max_length, kv_heads, head width), as the values
    values: jax.Array
    length: jax.Array  # int32, tokens so far; the next ones are written behind them
    # How many entries attention reads, known when compiling: at least `length` and the new tokens;
    # 0 reads all.
    visible: int = 0
    # Nothing is in it yet: the first tokens read only each other, with the kernel of training.
    fresh: bool = False

    @property
    def readable(self) -> int:
        """Entries that attention reads."""
        return self.visible or self.keys.shape[2]

    def at(self, length: jax.Array | int, visible: int | None = None) -> "Cache":
        """Return the same arrays with another length; what lies behind it gets overwritten."""
        visible = self.visible if visible is None else visible
        length = jnp.asarray(length, jnp.int32)
        return dataclasses.replace(self, length=length, visible=visible, fresh=False)

    def extend(
        self, layer: jax.Array | int, k_BLGD: jax.Array, v_BLGD: jax.Array
    ) -> tuple["Cache", jax.Array, jax.Array]:
        """Write a layer's new keys and values; return the cache and those that attention reads."""
        new, seen = [], []
        for buffer, entries in ((self.keys, k_BLGD), (self.values, v_BLGD)):
            start = (layer, 0, self.length, 0, 0)
            buffer = jax.lax.dynamic_update_slice(buffer, entries[None].astype(buffer.dtype), start)
            size = (1, buffer.shape[1], self.readable, *buffer.shape[3:])
            read = jax.lax.dynamic_slice(buffer, (layer, 0, 0, 0, 0), size)[0]
            seen.append(entries if self.fresh else read.astype(entries.dtype))
            new.append(buffer)
        return dataclasses.replace(self, keys=new[0], values=new[1]), *seen
