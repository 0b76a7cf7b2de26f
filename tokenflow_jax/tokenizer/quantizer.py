"""The two codebooks and their shared mapping, TokenFlow's idea (arXiv 2412.03069, sec. 3.1).

One index selects a row in both codebooks, the one with the smallest SUM of both squared distances:

    i* = argmin_i  |z_sem - c_sem[i]|^2 + w |z_pix - c_pix[i]|^2

so every code stands for a meaning and an appearance at once. All four vectors are l2-normalized;
hence |z - c|^2 = 2 - 2 z.c, and the same index is

    i* = argmax_i  z_sem . c_sem[i] + w z_pix . c_pix[i],

ONE inner product over the concatenated channels, with w folded into z. `nearest_codes` searches
chunk by chunk with a running maximum (on TPUs in one kernel, see `nearest_kernel`); no array of
tokens x codes exists, in the forward or the backward pass. Everything here is float32 with
full-precision products, whatever the rest of the model computes in, because an argmin decides.

Shapes: N tokens, K codes, C = semantic + pixel channels (semantic first).
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from tokenflow_jax.parallel import nearest_kernel, placement
from tokenflow_jax.parallel.placement import Split

_CHUNK_ELEMENTS = 2**24  # scores alive at once: 64 MiB of float32
_MAX_CHUNK = 4096
_ENTROPY_TEMPERATURE = 0.01
_ENTROPY_EPSILON = 1e-5


class Search(NamedTuple):
    """A search for nearest codes: the arguments of `nearest_codes`."""

    z_NC: jax.Array
    codes_KC: jax.Array
    semantic_channels: int
    pixel_weight: float = 1.0


class Codebooks(flax.struct.PyTreeNode):
    """Codebooks of any norm, normalized where they are used, under the shared mapping.

    Other mappings derive from this class and replace what follows `size`.
    """

    semantic_KC: jax.Array
    pixel_KC: jax.Array

    heads: ClassVar[int] = 1  # codes of a token

    @classmethod
    def of(cls, params: Mapping[str, jax.Array]) -> "Codebooks":
        """Pick the codebooks out of a finished tokenizer's parameters."""
        return cls(params["semantic_codebook"], params["pixel_codebook"])

    def params(self) -> dict[str, jax.Array]:
        """Return the codebooks by their names among the parameters."""
        return {"semantic_codebook": self.semantic_KC, "pixel_codebook": self.pixel_KC}

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.semantic_KC, self.pixel_KC))

    @property
    def semantic_channels(self) -> int:
        return self.semantic_KC.shape[-1]

    @property
    def parts(self) -> tuple[int, ...]:
        """Channels of the parts of z, and of vectors, that have norm one."""
        return tuple(half.shape[-1] for half in self)

    @property
    def size(self) -> int:
        return self.semantic_KC.shape[0]

    def normalized(self) -> jax.Array:
        """Return both codebooks side by side, each half of unit norm: (K, C) float32."""
        halves = (l2_normalize(half.astype(jnp.float32)) for half in self)
        return jnp.concatenate(list(halves), axis=-1)

    def look_up(self, codes: jax.Array) -> jax.Array:
        """Return the vectors of int codes of any shape (...): float32 (..., C)."""
        # Only the selected rows are normalized: the gradient is one scatter into the codebooks.
        rows = (placement.take_rows(half, codes) for half in self)
        halves = (l2_normalize(row.astype(jnp.float32)) for row in rows)
        return jnp.concatenate(list(halves), axis=-1)

    def inputs(self, features: jax.Array) -> jax.Array:
        """Return features (..., C) as the vectors z that are compared with codes, float32."""
        return normalize_halves(features, self.semantic_channels)

    def tables(self) -> tuple[jax.Array, ...]:
        """Return what each search goes through; made once for all scales."""
        return (self.normalized(),)

    def searches(
        self, z_NC: jax.Array, tables: tuple[jax.Array, ...], pixel_weight: float = 1.0
    ) -> list[Search]:
        """Return the searches for a code; their results are the arguments of `joined`."""
        return [Search(z_NC, *tables, self.semantic_channels, pixel_weight)]

    def joined(self, code_N: jax.Array) -> jax.Array:
        """Return the codes of the searches' results."""
        return code_N

    def rows(self, tables: tuple[jax.Array, ...], codes_N: jax.Array) -> jax.Array:
        """Return the vectors of codes as `look_up` does, from the tables: (N, C)."""
        return placement.take_rows(*tables, codes_N)


def nearest_codes(
    z_NC: jax.Array, codes_KC: jax.Array, semantic_channels: int, pixel_weight: float = 1.0
) -> jax.Array:
    """Find the code with the smallest weighted sum of both squared distances: int32 (N,).

    Both halves of `z_NC` have unit norm; `codes_KC` is `Codebooks.normalized()`. The lowest index
    wins a tie, as in torch.argmin. Not differentiable.
    """
    z_NC = fold_weight(jax.lax.stop_gradient(z_NC), semantic_channels, pixel_weight)
    codes_KC = jax.lax.stop_gradient(codes_KC)
    size = codes_KC.shape[0]

    def nearest(split: Split, codes_kC: jax.Array, z_nC: jax.Array) -> jax.Array:
        search = nearest_kernel.where_faster(z_nC, codes_kC, _best_by_chunks)
        score_N, code_N = search(z_nC, codes_kC)
        if not split.codes:
            return code_N
        code_N += split.first_row(codes_kC.shape[0])
        best_N = jax.lax.pmax(score_N, split.codes)
        # Ties between devices go to the lowest index, as they do on one device.
        return jax.lax.pmin(jnp.where(score_N == best_N, code_N, size), split.codes)

    run = placement.over_codes(nearest, z_NC.shape[0], size, always=True)
    return run(codes_KC, z_NC)


def _best_by_chunks(z_NC: jax.Array, codes_KC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the largest score (N,) and the first code (N,) that reaches it."""
    size = codes_KC.shape[0]

    def visit(best, chunk):
        best_score_N, best_code_N = best
        chunk_RC, start = chunk
        scores_NR = chunk_scores(z_NC, chunk_RC, start, size)
        score_N = scores_NR.max(axis=-1)
        code_N = start + jnp.argmax(scores_NR, axis=-1).astype(jnp.int32)
        better_N = score_N > best_score_N  # strictly: an earlier chunk wins a tie
        best_score_N = jnp.where(better_N, score_N, best_score_N)
        return (best_score_N, jnp.where(better_N, code_N, best_code_N)), None

    tokens = z_NC.shape[0]
    start = (jnp.full(tokens, -jnp.inf, jnp.float32), jnp.zeros(tokens, jnp.int32))
    best, _ = jax.lax.scan(visit, start, in_chunks(codes_KC, tokens))
    return best


def fold_weight(z_NC: jax.Array, semantic_channels: int, pixel_weight: float) -> jax.Array:
    """Multiply the pixel half of z by w, so that scores are plain inner products."""
    channel = jnp.arange(z_NC.shape[-1])
    return z_NC * jnp.where(channel < semantic_channels, 1.0, pixel_weight)


def in_chunks(codes_KC: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Split the codebook for a scan: (chunks, rows, C), and each chunk's first row number."""
    size = codes_KC.shape[0]
    tokens = max(tokens, 1) if isinstance(tokens, int) else 1  # a symbol where one is exported
    rows = max(128, 2 ** ((_CHUNK_ELEMENTS // tokens).bit_length() - 1))
    rows = min(rows, _MAX_CHUNK, size)
    count = -(-size // rows)
    padded = jnp.pad(codes_KC, ((0, count * rows - size), (0, 0)))
    return padded.reshape(count, rows, -1), rows * jnp.arange(count)


def chunk_scores(z_NC: jax.Array, chunk_RC: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Return the inner products (N, R) with one chunk of codes; padding rows score -inf."""
    scores_NR = jnp.einsum("nc,rc->nr", z_NC, chunk_RC, precision="highest")
    if size % chunk_RC.shape[0]:
        row = start + jnp.arange(chunk_RC.shape[0])
        scores_NR = jnp.where(row < size, scores_NR, -jnp.inf)
    return scores_NR


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Divide the last axis by max(its norm, epsilon); zero stays zero, gradient included."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    # rsqrt's gradient at 0 is infinite: the inner where keeps it out of the backward pass.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / jnp.maximum(norm, epsilon)


def normalize_halves(features: jax.Array, semantic_channels: int) -> jax.Array:
    """Normalize the semantic and the pixel channels of (..., C) separately, in float32."""
    features = features.astype(jnp.float32)
    halves = jnp.split(features, [semantic_channels], axis=-1)
    return jnp.concatenate([l2_normalize(half) for half in halves], axis=-1)


def straight_through(z: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the codes in the forward pass; pass the gradient on to z unchanged."""
    return z + jax.lax.stop_gradient(codes - z)


def codebook_losses(
    z_BLC: jax.Array, chosen_BLC: jax.Array, weights_L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the codebook loss, mean (sg(z) - code)^2, and commitment loss, mean (z - sg(code))^2.

    The first trains the codebooks, the second the encoders; token weights sum to one.
    """
    stop = jax.lax.stop_gradient

    def mean(square_BLC):
        return jnp.sum(jnp.mean(square_BLC, axis=(0, 2)) * weights_L)

    return mean((stop(z_BLC) - chosen_BLC) ** 2), mean((z_BLC - stop(chosen_BLC)) ** 2)


def entropy_loss(
    z_NC: jax.Array,
    codes_KC: jax.Array,
    weights_N: jax.Array,
    semantic_channels: int,
    pixel_weight: float = 1.0,
) -> jax.Array:
    """Return the mean entropy of the soft assignments p_n minus the entropy of their mean.

    With p_n = softmax(-d_n / 0.01) over the codes it is small when each token is sure of its code
    and the tokens together use all codes. The token weights sum to one.
    """
    # A constant added to the logits cancels, so twice the inner product replaces -d.
    scaled_NC = fold_weight(z_NC, semantic_channels, pixel_weight) * (2 / _ENTROPY_TEMPERATURE)
    run = placement.over_codes(_entropy, z_NC.shape[0], codes_KC.shape[0])
    return run(codes_KC, scaled_NC, weights_N)


def _entropy(
    split: Split, codes_KC: jax.Array, scaled_NC: jax.Array, weights_N: jax.Array
) -> jax.Array:
    """Sum the entropy loss over devices, each with its own rows and tokens; two chunked passes."""
    size = codes_KC.shape[0]
    chunks = in_chunks(codes_KC, scaled_NC.shape[0])

    @jax.checkpoint
    def accumulate(carry, chunk):
        top_N, total_N, weighted_N = carry
        logits_NR = chunk_scores(scaled_NC, *chunk, size)
        new_top_N = jnp.maximum(top_N, jax.lax.stop_gradient(logits_NR.max(axis=-1)))
        shrink_N = jnp.exp(top_N - new_top_N)
        p_NR = jnp.exp(logits_NR - new_top_N[:, None])
        finite_NR = jnp.where(jnp.isfinite(logits_NR), logits_NR, 0.0)
        total_N = total_N * shrink_N + p_NR.sum(-1)
        weighted_N = weighted_N * shrink_N + (p_NR * finite_NR).sum(-1)
        return (new_top_N, total_N, weighted_N), None

    zeros_N = jnp.zeros(scaled_NC.shape[0], jnp.float32)
    start = (zeros_N - 1e30, zeros_N, zeros_N)
    (top_N, total_N, weighted_N), _ = jax.lax.scan(accumulate, start, chunks)
    if split.codes:
        all_top_N = jax.lax.pmax(jax.lax.stop_gradient(top_N), split.codes)
        shrink_N = jnp.exp(jax.lax.stop_gradient(top_N) - all_top_N)
        total_N, weighted_N = jax.lax.psum((total_N * shrink_N, weighted_N * shrink_N), split.codes)
        top_N = all_top_N
    log_total_N = top_N + jnp.log(total_N)
    entropy_of_tokens = jnp.sum(weights_N * (log_total_N - weighted_N / total_N))

    @jax.checkpoint
    def entropy_of_mean(carry, chunk):
        logits_NR = chunk_scores(scaled_NC, *chunk, size)
        p_R = jnp.einsum("n,nr->r", weights_N, jnp.exp(logits_NR - log_total_N[:, None]))
        p_R = jax.lax.psum(p_R, split.tokens) if split.tokens else p_R
        return carry - jnp.sum(p_R * jnp.log(p_R + _ENTROPY_EPSILON)), None

    mean_entropy, _ = jax.lax.scan(entropy_of_mean, jnp.float32(0), chunks)
    if split.codes:
        mean_entropy = jax.lax.psum(mean_entropy, split.codes)
    if split.tokens:
        entropy_of_tokens = jax.lax.psum(entropy_of_tokens, split.tokens)
    return entropy_of_tokens - mean_entropy


def distance_statistics(
    z_NC: jax.Array, codes_KC: jax.Array, weights_N: jax.Array, semantic_channels: int
) -> tuple[jax.Array, jax.Array]:
    """Return the reference's distance norms, sum_k d_k^2 averaged over tokens, of both halves."""

    # With unit vectors d_k = 2 - 2 z.c_k, so sum_k d_k^2 = 4 (K - 2 z . sum_k c_k + z' (C' C) z).
    def statistic(z_NC, codes_KC):
        gram_CC = jnp.einsum("kc,kd->cd", codes_KC, codes_KC, precision="highest")
        linear_N = jnp.einsum("nc,c->n", z_NC, codes_KC.sum(axis=0), precision="highest")
        square_N = jnp.einsum("nc,cd,nd->n", z_NC, gram_CC, z_NC, precision="highest")
        return jnp.sum(weights_N * 4 * (codes_KC.shape[0] - 2 * linear_N + square_N))

    z_halves = jnp.split(jax.lax.stop_gradient(z_NC), [semantic_channels], axis=-1)
    code_halves = jnp.split(jax.lax.stop_gradient(codes_KC), [semantic_channels], axis=-1)
    semantic, pixel = (statistic(z, c) for z, c in zip(z_halves, code_halves, strict=True))
    return semantic, pixel
