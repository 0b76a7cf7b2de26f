"""Codebook learning: k-means start, moving-average update, revival of dead codes, and usage.

The first three replace the gradient on the codebooks; all are off by default. They work on both
halves of a code together, so the shared mapping stays one mapping. Shapes as in `quantizer`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import Codebooks, nearest_codes, normalize_halves


def _split(table_KC: jax.Array, semantic_channels: int) -> Codebooks:
    return Codebooks(*jnp.split(table_KC, [semantic_channels], axis=-1))


def _sums(z_NC: jax.Array, codes_N: jax.Array, weights_N: jax.Array, size: int):
    """Return the weighted count (K,) and sum (K, C) of the tokens assigned to each code."""
    count_K = jnp.zeros(size).at[codes_N].add(weights_N)
    sum_KC = jnp.zeros((size, z_NC.shape[-1])).at[codes_N].add(z_NC * weights_N[:, None])
    return count_K, sum_KC


def kmeans(
    key: jax.Array,
    z_NC: jax.Array,
    size: int,
    semantic_channels: int,
    pixel_weight: float = 1.0,
    iterations: int = 10,
) -> Codebooks:
    """Start the codebooks by clustering unit-norm tokens with the shared mapping's own distance."""
    tokens = z_NC.shape[0]
    even_N = jnp.ones(tokens)

    def step(table_KC, key):
        codes_N = nearest_codes(z_NC, table_KC, semantic_channels, pixel_weight)
        count_K, sum_KC = _sums(z_NC, codes_N, even_N, size)
        spare_KC = z_NC[jax.random.randint(key, (size,), 0, tokens)]
        center_KC = jnp.where(count_K[:, None] > 0, sum_KC, spare_KC)
        return normalize_halves(center_KC, semantic_channels), None

    start_key, key = jax.random.split(key)
    # Tokens fewer than codes are drawn repeatedly.
    chosen_K = jax.random.choice(start_key, tokens, (size,), replace=tokens < size)
    table_KC, _ = jax.lax.scan(step, z_NC[chosen_K], jax.random.split(key, iterations))
    return _split(table_KC, semantic_channels)


class EMACodebook(flax.struct.PyTreeNode):
    """Running sums of the tokens that chose each code (VQ-VAE's moving-average codebook)."""

    count_K: jax.Array  # decayed number of tokens per code
    sum_KC: jax.Array  # decayed sum of those tokens

    @classmethod
    def start(cls, codebooks: Codebooks) -> "EMACodebook":
        """Return sums that reproduce the given codebooks, each code seen once."""
        table_KC = codebooks.normalized()
        return cls(count_K=jnp.ones(codebooks.size), sum_KC=table_KC)

    def update(
        self,
        codebooks: Codebooks,
        z_NC: jax.Array,
        codes_N: jax.Array,
        weights_N: jax.Array,  # 0 for tokens to ignore
        decay: float,  # of the running sums, in [0, 1)
    ) -> tuple["EMACodebook", Codebooks]:
        """Move every chosen code towards the mean of its tokens; the other rows stay."""
        count_K, sum_KC = _sums(z_NC, codes_N, weights_N, codebooks.size)
        new = EMACodebook(
            count_K=decay * self.count_K + (1 - decay) * count_K,
            sum_KC=decay * self.sum_KC + (1 - decay) * sum_KC,
        )
        semantic = codebooks.semantic_KC.shape[-1]
        moved_KC = normalize_halves(new.sum_KC, semantic)
        table_KC = jnp.where(count_K[:, None] > 0, moved_KC, codebooks.normalized())
        return new, _split(table_KC, semantic)


def revive_dead_codes(
    key: jax.Array,
    codebooks: Codebooks,
    z_NC: jax.Array,
    count_K: jax.Array | Mapping[str, jax.Array],
) -> Codebooks:
    """Replace codes whose count in the usage window is zero by random tokens of the batch.

    `count_K` has the counts of each of `TokenizerConfig.index_sizes`.
    """
    chosen_K = jax.random.randint(key, codebooks.semantic_KC.shape[:1], 0, z_NC.shape[0])
    fresh = _split(z_NC[chosen_K], codebooks.semantic_channels)
    if not isinstance(count_K, Mapping):
        dead = [(count_K == 0)[:, None]] * 2
    elif codebooks.heads == 1:
        dead = [(count_K[half] == 0)[:, None] for half in ("semantic", "pixel")]
    else:
        dead_KH = jnp.stack([count_K[f"head_{h}"] == 0 for h in range(codebooks.heads)], axis=-1)
        dead = [jnp.repeat(dead_KH, half.shape[-1] // codebooks.heads, 1) for half in codebooks]
    semantic, pixel = (jnp.where(*half) for half in zip(dead, fresh, codebooks, strict=True))
    return codebooks.replace(semantic_KC=semantic, pixel_KC=pixel)


class Usage(flax.struct.PyTreeNode):
    """Codebook usage and perplexity over the last W codes of the global batch, on the device.

    A ring remembers the window's codes, so that those leaving it can be subtracted from the counts:
    a step costs three scatters and no sort, and only the final figures travel to the host.
    """

    history_W: jax.Array  # int32 ring of `scale * K + code`; -1 where nothing was written yet
    counts_SK: jax.Array  # int32, uses of each code by each scale within the window
    head: jax.Array  # int32, where the next entry goes

    @classmethod
    def empty(cls, window: int, scales: Scales, codebook_size: int) -> "Usage":
        """Return an empty window of that many codes."""
        return cls(
            history_W=jnp.full(window, -1, jnp.int32),
            counts_SK=jnp.zeros((len(scales), codebook_size), jnp.int32),
            head=jnp.zeros((), jnp.int32),
        )

    def update(self, codes_BL: jax.Array, scales: Scales, keep_S: jax.Array) -> "Usage":
        """Add the codes of the kept scales, scale by scale, of which the last W stay."""
        window, (_, size) = self.history_W.shape[0], self.counts_SK.shape
        batch = codes_BL.shape[0]
        by_scale = [codes_BL[:, where].reshape(-1) + s * size
                    for s, where in enumerate(scales.slices())]  # fmt: skip
        entry_M = jnp.concatenate(by_scale)
        kept_M = jnp.concatenate(
            [jnp.full(batch * n * n, keep_S[s] > 0) for s, n in enumerate(scales.sides)]
        )
        rank_M = jnp.cumsum(kept_M) - 1
        total = rank_M[-1] + 1
        written_M = kept_M & (rank_M >= total - window)
        nowhere = window + self.counts_SK.size  # out of range of both: dropped
        slot_M = jnp.where(written_M, (self.head + rank_M) % window, nowhere)

        leaving_M = self.history_W.at[slot_M].get(mode="fill", fill_value=-1)
        counts = self.counts_SK.reshape(-1)
        counts = counts.at[jnp.where(leaving_M >= 0, leaving_M, nowhere)].add(-1, mode="drop")
        counts = counts.at[jnp.where(written_M, entry_M, nowhere)].add(1, mode="drop")
        return Usage(
            history_W=self.history_W.at[slot_M].set(entry_M, mode="drop"),
            counts_SK=counts.reshape(self.counts_SK.shape),
            head=(self.head + total) % window,
        )

    def metrics(self, scales: Scales) -> dict[str, jax.Array]:
        """Return usage/all, usage/scale_<side> (fractions of codes) and perplexity/... (1 to K)."""
        rows = {"all": self.counts_SK.sum(axis=0)}
        rows |= {f"scale_{side}": self.counts_SK[s] for s, side in enumerate(scales.sides)}
        metrics = {}
        for name, counts_K in rows.items():
            p_K = counts_K / jnp.maximum(counts_K.sum(), 1)
            # Perplexity is exp(entropy) of the counts.
            entropy = -jnp.sum(p_K * jnp.log(jnp.where(p_K > 0, p_K, 1.0)))
            metrics[f"usage/{name}"] = jnp.mean(counts_K > 0)
            metrics[f"perplexity/{name}"] = jnp.exp(entropy)
        return metrics


Usages = Usage | Mapping[str, Usage]  # of the codes, or of each of their indices


def each_usage(function: Callable, usage: Usages, *indices: Any) -> Any:
    """Apply a function to a usage, or to that of each index, with what `indices` have for it."""
    return jax.tree.map(function, usage, *indices, is_leaf=lambda x: isinstance(x, Usage))


def usage_metrics(usage: Usages, scales: Scales) -> dict[str, jax.Array]:
    """Return the metrics of a usage, or of each: usage/semantic_all, usage/pixel_scale_1, ..."""
    if isinstance(usage, Usage):
        return usage.metrics(scales)
    return {
        name.replace("/", f"/{half}_"): value
        for half, one in usage.items()
        for name, value in one.metrics(scales).items()
    }
