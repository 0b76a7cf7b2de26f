"""The decoder-only language model of both language stages: Llama, Qwen2 and their relatives.

The same module trains (no cache), prefills a cache and decodes with it:

    decoder = Decoder(config, jnp.bfloat16)
    hidden, _ = decoder.apply(params, embeddings, positions, mask)
    hidden, cache = decoder.apply(params, embeddings, positions, mask, cache)
    logits = decoder.apply(params, hidden, rows=(start, count), method="logits")
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokenflow_jax.nets import attention as attention_lib
from tokenflow_jax.nets.cache import Cache
from tokenflow_jax.nets.layers import REMAT, RMSNorm, rope, rotate, stack
from tokenflow_jax.nets.masks import Mask
from tokenflow_jax.parallel import placement
from tokenflow_jax.parallel.placement import on_batch
from tokenflow_jax.parallel.token_losses import project, token_losses

NORMS = ("before", "after")
_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Hyper-parameters of a decoder."""

    vocabulary_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int  # a divisor of `heads`
    mlp_width: int
    head_width: int = 0  # 0: width // heads
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6  # but 1e-6 always for queries and keys
    qkv_bias: bool = False  # Qwen2 has them
    tied_head: bool = False  # the head is the embedding
    norms: str = "before"  # of the sublayers, x + f(norm(x)), or "after": x + norm(f(x))
    qk_norm: bool = False  # of each query and key head before the rotation
    remat: str = "none"  # what the backward pass recomputes; see `layers.stack`
    # Splash attention, which "auto" takes on a TPU, gives other values in rows of padding, which
    # nothing real reads.
    attention: str = "auto"

    def __post_init__(self):
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("vocabulary_size", "width", "layers", "heads", "kv_heads", "mlp_width")
            if getattr(self, name) < 1
        ]
        if not problems and self.heads % self.kv_heads:
            problems.append(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if not problems and not self.head_width and self.width % self.heads:
            problems.append(
                f"heads={self.heads} does not divide width={self.width}; give a head_width"
            )
        if not problems and self.head_channels % 2:
            problems.append(f"a head has {self.head_channels} channels; the rotation pairs them")
        choices = {"norms": NORMS, "remat": REMAT, "attention": attention_lib.KINDS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                problems.append(f"{name}={getattr(self, name)!r}: one of {', '.join(known)}")
        if problems:
            raise ValueError("language model: " + "; ".join(problems))

    @property
    def head_channels(self) -> int:
        return self.head_width or self.width // self.heads


def init_cache(
    config: LMConfig, batch: int, max_length: int, dtype: jnp.dtype = jnp.float32
) -> Cache:
    """Return an empty cache for `batch` rows of up to `max_length` tokens, prompts included."""
    shape = (config.layers, batch, max_length, config.kv_heads, config.head_channels)
    arrays = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))
    return Cache(*arrays, fresh=True)


def _apart(x: jax.Array) -> jax.Array:
    """Keep what makes products' inputs out of the products, and its gradient out of theirs."""
    # On TPUs XLA computes norms and activations in a product's own loop, where they take longer
    # than the product: 5 % of the 7B model's step (benchmarks/compiled.md).
    return jax.lax.optimization_barrier(x) if placement.platform() == "tpu" else x


class Attention(nn.Module):
    """Self-attention with grouped heads and rotary positions."""

    config: LMConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BLC: jax.Array,
        cos_sin: tuple[jax.Array, jax.Array],
        mask: Mask | jax.Array,
        kernel: str,
        cache: Cache | None = None,
        layer: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Return the attended tokens (B, L, C), and the cache with layer `layer` extended."""
        cfg = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_INIT)

        def heads(name: str, count: int) -> jax.Array:
            project = dense(count * cfg.head_channels, use_bias=cfg.qkv_bias, name=name)
            split = project(x_BLC).reshape(*x_BLC.shape[:2], count, cfg.head_channels)
            return on_batch(split, "heads", None)

        q_BLHD = heads("q", cfg.heads)
        k_BLGD, v_BLGD = heads("k", cfg.kv_heads), heads("v", cfg.kv_heads)
        if cfg.qk_norm:
            q_BLHD = RMSNorm(1e-6, self.dtype, name="q_norm")(q_BLHD)
            k_BLGD = RMSNorm(1e-6, self.dtype, name="k_norm")(k_BLGD)
        q_BLHD, k_BLGD = rotate(q_BLHD, cos_sin), rotate(k_BLGD, cos_sin)
        if cache is not None:
            cache, k_BLGD, v_BLGD = cache.extend(layer, k_BLGD, v_BLGD)
        out_BLHD = attention_lib.attention(q_BLHD, k_BLGD, v_BLGD, mask, kernel)
        out_BLC = out_BLHD.reshape(*x_BLC.shape[:2], cfg.heads * cfg.head_channels)
        return dense(cfg.width, use_bias=False, name="out")(out_BLC), cache


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    config: LMConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=_INIT)
        gate = dense(self.config.mlp_width, name="gate")(x_BLC)
        up = dense(self.config.mlp_width, name="up")(x_BLC)
        hidden = _apart(on_batch(jax.nn.silu(gate) * up, "mlp"))
        return dense(self.config.width, name="down")(hidden)


class Block(nn.Module):
    """One layer; its carry is (tokens, cache), the form that `nn.scan` wants."""

    config: LMConfig
    dtype: jnp.dtype = jnp.float32
    kernel: str = "xla"

    @nn.compact
    def __call__(self, carry, layer, cos_sin, mask) -> tuple[tuple[jax.Array, Cache | None], None]:
        cfg = self.config
        x_BLC, cache = carry
        norm1 = RMSNorm(cfg.norm_eps, self.dtype, name="norm1")
        norm2 = RMSNorm(cfg.norm_eps, self.dtype, name="norm2")
        attention = Attention(cfg, self.dtype, name="attention")
        mlp = MLP(cfg, self.dtype, name="mlp")
        inputs_BLC = _apart(norm1(x_BLC) if cfg.norms == "before" else x_BLC)
        out_BLC, cache = attention(inputs_BLC, cos_sin, mask, self.kernel, cache, layer)
        if cfg.norms == "before":
            x_BLC = on_batch(x_BLC + out_BLC)
            x_BLC = on_batch(x_BLC + mlp(_apart(norm2(x_BLC))))
        else:
            x_BLC = on_batch(x_BLC + norm1(out_BLC))
            x_BLC = on_batch(x_BLC + norm2(mlp(_apart(x_BLC))))
        return (x_BLC, cache), None


class Head(nn.Module):
    """The kernel (C, V) that turns tokens into logits."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", _INIT, self.shape)


class Decoder(nn.Module):
    """A decoder-only language model."""

    config: LMConfig
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32 unless given

    def setup(self):
        cfg = self.config
        self.table = nn.Embed(cfg.vocabulary_size, cfg.width, embedding_init=_INIT, name="embed")
        self.final_norm = RMSNorm(cfg.norm_eps, self.dtype, name="norm")
        if not cfg.tied_head:
            self.output = Head((cfg.width, cfg.vocabulary_size), name="head")

    def embed(self, ids_BL: jax.Array) -> jax.Array:
        """Embed token ids, int (B, L), as (B, L, C)."""
        # Rows are taken before they are cast (`nn.Embed` casts the whole table), and outside jit
        # parameters may be NumPy's.
        rows_BLC = jnp.asarray(self.table.embedding)[ids_BL]
        return on_batch(rows_BLC.astype(self.dtype))

    @nn.compact
    def __call__(
        self,
        embeddings_BLC: jax.Array,
        positions: jax.Array,
        mask: Mask | jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the blocks and the final norm; return tokens (B, L, C) and the extended cache.

        Args:
          positions: for the rotation, (B, L) or of several axes (B, L, axes); a single row serves
            all.
          mask: a `Mask`, bool (B or 1, L, K) with True for allowed, or None for causal. With a
            cache, K is the number of its visible entries.
          cache: holds the tokens before these; None computes these alone.
        """
        cfg = self.config
        batch, length, _ = embeddings_BLC.shape
        mask = Mask() if mask is None else mask
        shape = (batch, length, cfg.heads, cfg.head_channels)
        if cache is not None and length > cache.readable:
            raise ValueError(f"{length} tokens do not fit into a cache of {cache.readable}")
        alone = cache is None or cache.fresh  # these tokens read only each other
        if cache is not None and alone:
            mask = mask.over(length) if isinstance(mask, Mask) else mask[..., :length]
        kernel = attention_lib.choose(cfg.attention, mask, self.dtype, shape, not alone)
        first, keys = (0, length) if alone else (cache.length, cache.readable)
        if isinstance(mask, Mask) and kernel == "xla":
            mask = mask.allowed(length, keys, first)
        carry = (on_batch(embeddings_BLC.astype(self.dtype)), cache)
        cos_sin = rope(positions, cfg.head_channels, cfg.rope_theta)
        remat = cfg.remat if cache is None else "none"
        blocks = stack(Block, cfg.layers, remat, in_axes=(0, nn.broadcast, nn.broadcast))(
            cfg, self.dtype, kernel, name="blocks"
        )
        (x_BLC, cache), _ = blocks(carry, jnp.arange(cfg.layers), cos_sin, mask)
        if cache is not None:
            cache = cache.at(cache.length + length)
        return self.final_norm(x_BLC), cache

    def head_kernel(self) -> jax.Array:
        """Return the head (C, V); where they are tied, the transposed embedding."""
        return self.table.embedding.T if self.config.tied_head else self.output()

    def logits(self, hidden_BLC: jax.Array, rows: tuple[int, int] | None = None) -> jax.Array:
        """Compute float32 scores of the vocabulary, or of the ids `rows` = (start, count) only."""
        kernel_CV = self.head_kernel()
        if rows is not None:
            kernel_CV = kernel_CV[:, rows[0] : rows[0] + rows[1]]
        return on_batch(project(hidden_BLC, kernel_CV, self.dtype), "vocabulary")

    def token_losses(
        self,
        hidden_BLC: jax.Array,
        labels_BL: jax.Array,
        tokens: int = 4096,
        bounds: tuple[int, ...] = (),
        learned_from: int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute the cross entropy of every token; see the function `token_losses`.

        The head's columns of ids below `learned_from` get no gradient.
        """
        kernel_CV = self.head_kernel()
        if learned_from:
            learned_V = jnp.arange(kernel_CV.shape[1]) >= learned_from
            kernel_CV = jnp.where(learned_V, kernel_CV, jax.lax.stop_gradient(kernel_CV))
        return token_losses(hidden_BLC, kernel_CV, labels_BL, tokens, self.dtype, bounds)

    def whole(self, ids_BL: jax.Array) -> jax.Array:
        """Compute logits (B, L, V) of plain text; `init` with this makes all parameters."""
        positions = jnp.arange(ids_BL.shape[1])[None]
        hidden_BLC, _ = self(self.embed(ids_BL), positions)
        return self.logits(hidden_BLC)
