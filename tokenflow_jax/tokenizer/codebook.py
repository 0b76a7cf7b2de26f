"""Other ways to start and move the codebooks than the gradient; all of them off by default.

Each works on the joint table (both halves of a code together), so the shared mapping stays one
mapping. Shapes as in `quantizers`; everything is float32.
"""

import flax.struct
import jax
import jax.numpy as jnp

from tokenflow_jax.tokenizer.quantizer import Codebooks, nearest_codes, normalize_halves


def _split(table_KC: jax.Array, semantic_channels: int) -> Codebooks:
    return Codebooks(*jnp.split(table_KC, [semantic_channels], axis=-1))


def _sums(z_NC: jax.Array, codes_N: jax.Array, weights_N: jax.Array, size: int):
    """Weighted count (K,) and sum (K, C) of the tokens assigned to each code."""
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
    """Clusters tokens by the shared mapping's own distance, to start the codebooks.

    Args:
      key: draws the first centres from the tokens, and replacements for empty clusters.
      z_NC: tokens, both halves of unit norm; fewer tokens than codes are drawn more than once.
      size: number of codes K.
      semantic_channels, pixel_weight: as in `quantizers.nearest_codes`.
      iterations: of Lloyd's algorithm.

    Returns:
      Codebooks of unit-norm halves.
    """
    tokens = z_NC.shape[0]
    even_N = jnp.ones(tokens)

    def step(table_KC, key):
        codes_N = nearest_codes(z_NC, table_KC, semantic_channels, pixel_weight)
        count_K, sum_KC = _sums(z_NC, codes_N, even_N, size)
        spare_KC = z_NC[jax.random.randint(key, (size,), 0, tokens)]
        centre_KC = jnp.where(count_K[:, None] > 0, sum_KC, spare_KC)
        return normalize_halves(centre_KC, semantic_channels), None

    start_key, key = jax.random.split(key)
    chosen_K = jax.random.choice(start_key, tokens, (size,), replace=tokens < size)
    table_KC, _ = jax.lax.scan(step, z_NC[chosen_K], jax.random.split(key, iterations))
    return _split(table_KC, semantic_channels)


class EMACodebook(flax.struct.PyTreeNode):
    """Running sums of the tokens that chose each code (VQ-VAE's moving-average codebook).

    Attributes:
      count_K: decayed number of tokens per code.
      sum_KC: decayed sum of those tokens.
    """

    count_K: jax.Array
    sum_KC: jax.Array

    @classmethod
    def start(cls, codebooks: Codebooks) -> "EMACodebook":
        """Sums that reproduce the given codebooks, each code seen once."""
        table_KC = codebooks.normalized()
        return cls(count_K=jnp.ones(codebooks.size), sum_KC=table_KC)

    def update(
        self,
        codebooks: Codebooks,
        z_NC: jax.Array,
        codes_N: jax.Array,
        weights_N: jax.Array,
        decay: float,
    ) -> tuple["EMACodebook", Codebooks]:
        """Moves every code that was chosen towards the mean of its tokens.

        Args:
          codebooks: the current codebooks; rows no token chose stay as they are.
          z_NC: tokens, both halves of unit norm.
          codes_N: their codes.
          weights_N: 0 for tokens to ignore.
          decay: of the running sums, in [0, 1).

        Returns:
          The new sums and codebooks of unit-norm halves.
        """
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
    key: jax.Array, codebooks: Codebooks, z_NC: jax.Array, count_K: jax.Array
) -> Codebooks:
    """Replaces codes that the usage window never saw by random tokens of the batch.

    Args:
      key: draws the tokens.
      codebooks: the current codebooks.
      z_NC: tokens of the batch, both halves of unit norm.
      count_K: how often each code was used within the window.

    Returns:
      The codebooks with dead rows replaced, live rows untouched.
    """
    chosen_K = jax.random.randint(key, (codebooks.size,), 0, z_NC.shape[0])
    fresh = _split(z_NC[chosen_K], codebooks.semantic_KC.shape[-1])
    dead_K1 = (count_K == 0)[:, None]
    pairs = zip(fresh, codebooks, strict=True)
    return Codebooks(*(jnp.where(dead_K1, new, old) for new, old in pairs))
