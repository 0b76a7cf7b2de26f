"""Codebook usage and perplexity over a sliding window of the global batch, kept on the device.

The window holds the last W codes of all processes together (the reference: 131,072 per process). A
ring remembers them so that those which leave can be subtracted from the counts; a step costs three
scatters and no sort, and nothing travels to the host but the final figures.
"""

import flax.struct
import jax
import jax.numpy as jnp

from tokenflow_jax.tokenizer.pyramid import Scales


class Usage(flax.struct.PyTreeNode):
    """The window.

    Attributes:
      history_W: int32 ring of `scale * K + code`; -1 where nothing was written yet.
      counts_SK: int32, how often each scale used each code within the window.
      head: int32, where the next entry goes.
    """

    history_W: jax.Array
    counts_SK: jax.Array
    head: jax.Array

    @classmethod
    def empty(cls, window: int, scales: Scales, codebook_size: int) -> "Usage":
        """Returns an empty window of that many codes."""
        return cls(
            history_W=jnp.full(window, -1, jnp.int32),
            counts_SK=jnp.zeros((len(scales), codebook_size), jnp.int32),
            head=jnp.zeros((), jnp.int32),
        )

    def update(self, codes_BL: jax.Array, scales: Scales, keep_S: jax.Array) -> "Usage":
        """Adds a batch's codes, scale by scale and within a scale image by image.

        Args:
          codes_BL: int32 codes of the global batch.
          scales: the pyramid.
          keep_S: 1 for the scales that were used; codes of the others are left out.

        Returns:
          The moved window; when the batch alone overfills it, its last W codes.
        """
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
        """Fraction of codes used and perplexity, overall and per scale.

        Returns:
          Scalars "usage/all", "perplexity/all", "usage/scale_<side>", "perplexity/scale_<side>";
          perplexity is exp(entropy) of the code counts, between 1 and K.
        """
        rows = {"all": self.counts_SK.sum(axis=0)}
        rows |= {f"scale_{side}": self.counts_SK[s] for s, side in enumerate(scales.sides)}
        metrics = {}
        for name, counts_K in rows.items():
            p_K = counts_K / jnp.maximum(counts_K.sum(), 1)
            entropy = -jnp.sum(p_K * jnp.log(jnp.where(p_K > 0, p_K, 1.0)))
            metrics[f"usage/{name}"] = jnp.mean(counts_K > 0)
            metrics[f"perplexity/{name}"] = jnp.exp(entropy)
        return metrics
