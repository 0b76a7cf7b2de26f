"""The decoder-only language model of both language stages: Llama, Qwen2, and their relatives here.

One scanned module holds all blocks: each parameter has a leading layer axis, and compile time does
not grow with depth. The same module trains (no cache), prefills a cache and decodes with it:

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
from tokenflow_jax.nets.attention import Mask
from tokenflow_jax.nets.layers import RMSNorm, rope, rotate
from tokenflow_jax.parallel.placement import on_batch
from tokenflow_jax.parallel.token_losses import project, token_losses

NORMS = ("before", "after")
REMAT = ("none", "block", "dots")
_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Hyper-parameters of a decoder.

    Attributes:
      vocabulary_size: rows of the embedding and of the head.
      width: channels of a token.
      layers, heads, kv_heads: blocks; query heads; key and value heads, a divisor of `heads`.
      mlp_width: hidden channels of the gated MLP.
      head_width: channels of a head; 0 takes width // heads.
      rope_theta: base of the rotary angles.
      norm_eps: of every RMSNorm but those of queries and keys, whose epsilon is always 1e-6.
      qkv_bias: biases on queries, keys and values (Qwen2).
      tied_head: the head is the embedding.
      norms: "before" the sublayers, x + f(norm(x)), or "after" them, x + norm(f(x)).
      qk_norm: RMSNorm of each query and key head before the rotation.
      remat: what the backward pass recomputes: "none", a whole "block", or all but the results of
        the matrix products with parameters ("dots").
      attention: one of `attention.KINDS`. Splash attention, which "auto" takes on a TPU, gives
        other values in rows of padding, which nothing real reads.
    """

    vocabulary_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    head_width: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    tied_head: bool = False
    norms: str = "before"
    qk_norm: bool = False
    remat: str = "none"
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
        for name, choices in (
            ("norms", NORMS),
            ("remat", REMAT),
            ("attention", attention_lib.KINDS),
        ):
            if getattr(self, name) not in choices:
                problems.append(f"{name}={getattr(self, name)!r}: one of {', '.join(choices)}")
        if problems:
            raise ValueError("language model: " + "; ".join(problems))

    @property
    def head_channels(self) -> int:
        """Channels of a head."""
        return self.head_width or self.width // self.heads


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "length"),
    meta_fields=("visible",),
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far; the arrays' size never changes.

    Attributes:
      keys, values: (layers, B, max_length, kv_heads, head width).
      length: int32, tokens so far; the next ones are written behind them.
      visible: attention reads the first so many entries only, known when compiling; 0 reads all.
        It must cover `length` and the new tokens.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    visible: int = 0

    def at(self, length: jax.Array | int, visible: int | None = None) -> "Cache":
        """The same arrays with another length: what is behind it will be overwritten."""
        return dataclasses.replace(
            self,
            length=jnp.asarray(length, jnp.int32),
            visible=self.visible if visible is None else visible,
        )


def init_cache(
    config: LMConfig, batch: int, max_length: int, dtype: jnp.dtype = jnp.float32
) -> Cache:
    """An empty cache for `batch` rows of up to `max_length` tokens, prompts included."""
    shape = (config.layers, batch, max_length, config.kv_heads, config.head_channels)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


class Attention(nn.Module):
    """Self-attention with grouped heads and rotary positions.

    Attributes:
      config, dtype: see `Decoder`.
    """

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
        """Attends.

        Args:
          x_BLC: the tokens.
          cos_sin: of `rope`.
          mask, kernel: see `attention.attention`.
          cache: takes the new keys and values, and gives all of them.
          layer: this block's entry in the cache.

        Returns:
          (B, L, C) and the cache.
        """
        cfg = self.config

        def heads(name: str, count: int) -> jax.Array:
            dense = nn.Dense(
                count * cfg.head_channels,
                use_bias=cfg.qkv_bias,
                dtype=self.dtype,
                kernel_init=_INIT,
                name=name,
            )
            split = dense(x_BLC).reshape(*x_BLC.shape[:2], count, cfg.head_channels)
            return on_batch(split, "heads", None)

        q_BLHD, k_BLGD, v_BLGD = heads("q", cfg.heads), *map(heads, "kv", (cfg.kv_heads,) * 2)
        if cfg.qk_norm:
            q_BLHD = RMSNorm(1e-6, self.dtype, name="q_norm")(q_BLHD)
            k_BLGD = RMSNorm(1e-6, self.dtype, name="k_norm")(k_BLGD)
        q_BLHD, k_BLGD = rotate(q_BLHD, cos_sin), rotate(k_BLGD, cos_sin)
        if cache is not None:
            cache, k_BLGD, v_BLGD = _extend(cache, layer, k_BLGD, v_BLGD)
        out_BLHD = attention_lib.attention(q_BLHD, k_BLGD, v_BLGD, mask, kernel)
        out_BLC = out_BLHD.reshape(*x_BLC.shape[:2], cfg.heads * cfg.head_channels)
        out = nn.Dense(cfg.width, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name="out")
        return out(out_BLC), cache


def _extend(
    cache: Cache, layer: jax.Array | int, k_BLGD: jax.Array, v_BLGD: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Writes new keys and values into a layer of the cache; returns that layer's visible ones."""
    visible = cache.visible or cache.keys.shape[2]
    new, seen = [], []
    for buffer, entries in ((cache.keys, k_BLGD), (cache.values, v_BLGD)):
        start = (layer, 0, cache.length, 0, 0)
        entries = entries[None].astype(buffer.dtype)
        buffer = jax.lax.dynamic_update_slice(buffer, entries, start)
        size = (1, buffer.shape[1], visible, *buffer.shape[3:])
        seen.append(jax.lax.dynamic_slice(buffer, (layer, 0, 0, 0, 0), size)[0])
        new.append(buffer)
    cache = dataclasses.replace(cache, keys=new[0], values=new[1])
    return cache, seen[0].astype(k_BLGD.dtype), seen[1].astype(v_BLGD.dtype)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases.

    Attributes:
      config, dtype: see `Decoder`.
    """

    config: LMConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=_INIT)
        gate = dense(self.config.mlp_width, name="gate")(x_BLC)
        up = dense(self.config.mlp_width, name="up")(x_BLC)
        hidden = on_batch(jax.nn.silu(gate) * up, "mlp")
        return dense(self.config.width, name="down")(hidden)


class Block(nn.Module):
    """One layer; its carry is (tokens, cache), the form that `nn.scan` wants.

    Attributes:
      config, dtype: see `Decoder`.
      kernel: of attention.
    """

    config: LMConfig
    dtype: jnp.dtype = jnp.float32
    kernel: str = "xla"

    @nn.compact
    def __call__(self, carry, layer, cos_sin, mask) -> tuple[tuple[jax.Array, Cache | None], None]:
        cfg = self.config
        x_BLC, cache = carry
        norm1 = RMSNorm(cfg.norm_eps, self.dtype, name="norm1")
        norm2 = RMSNorm(cfg.norm_eps, self.dtype, name="norm2")
        attend = functools.partial(
            Attention(cfg, self.dtype, name="attention"),
            cos_sin=cos_sin,
            mask=mask,
            kernel=self.kernel,
            cache=cache,
            layer=layer,
        )
        mlp = MLP(cfg, self.dtype, name="mlp")
        if cfg.norms == "before":
            out_BLC, cache = attend(norm1(x_BLC))
            x_BLC = on_batch(x_BLC + out_BLC)
            x_BLC = on_batch(x_BLC + mlp(norm2(x_BLC)))
        else:
            out_BLC, cache = attend(x_BLC)
            x_BLC = on_batch(x_BLC + norm1(out_BLC))
            x_BLC = on_batch(x_BLC + norm2(mlp(x_BLC)))
        return (x_BLC, cache), None


class Embedding(nn.Module):
    """A table of token embeddings; rows are taken before they are cast."""

    size: int
    width: int

    def setup(self):
        self.embedding = self.param("embedding", _INIT, (self.size, self.width))

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        return jnp.asarray(self.embedding)[ids_BL]  # NumPy parameters outside jit, too


class Head(nn.Module):
    """The kernel (C, V) that turns tokens into logits."""

    size: int
    width: int

    def setup(self):
        self.kernel = self.param("kernel", _INIT, (self.width, self.size))

    def __call__(self) -> jax.Array:
        return self.kernel


class Decoder(nn.Module):
    """A decoder-only language model.

    Attributes:
      config: hyper-parameters.
      dtype: computation dtype; parameters are float32 unless others are passed in.
    """

    config: LMConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg = self.config
        self.table = Embedding(cfg.vocabulary_size, cfg.width, name="embed")
        self.final_norm = RMSNorm(cfg.norm_eps, self.dtype, name="norm")
        if not cfg.tied_head:
            self.output = Head(cfg.vocabulary_size, cfg.width, name="head")

    def embed(self, ids_BL: jax.Array) -> jax.Array:
        """Embeds token ids: int (B, L), 0 to vocabulary_size - 1, to (B, L, C)."""
        return on_batch(self.table(ids_BL).astype(self.dtype))

    @nn.compact
    def __call__(
        self,
        embeddings_BLC: jax.Array,
        positions_BL: jax.Array,
        mask: Mask | jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the blocks and the final norm.

        Args:
          embeddings_BLC: inputs, from `embed` or elsewhere.
          positions_BL: int positions for the rotation; (1, L) serves all rows.
          mask: which keys may be read: a `Mask`, or bool (B or 1, L, K) with True for allowed, or
            None for causal. With a cache, K is the number of its visible entries.
          cache: holds the tokens before these; None computes these alone.

        Returns:
          (B, L, C) after the final norm, and the cache with these tokens (None if there was none).

        Raises:
          ValueError: more tokens than the cache can hold, or the configured attention kernel
            cannot be used (see `attention.choose`).
        """
        cfg = self.config
        batch, length, _ = embeddings_BLC.shape
        mask = Mask() if mask is None else mask
        shape = (batch, length, cfg.heads, cfg.head_channels)
        kernel = attention_lib.choose(cfg.attention, mask, self.dtype, shape, cache is not None)
        first, keys = 0, length
        if cache is not None:
            first, keys = cache.length, cache.visible or cache.keys.shape[2]
            if length > keys:
                raise ValueError(f"{length} tokens do not fit into a cache of {keys}")
        if isinstance(mask, Mask) and kernel != "splash":
            mask = mask.allowed(length, keys, first)
        carry = (on_batch(embeddings_BLC.astype(self.dtype)), cache)
        cos_sin = rope(positions_BL, cfg.head_channels, cfg.rope_theta)
        scanned = nn.scan(
            _rematerialised(Block, cfg.remat) if cache is None else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=cfg.layers,
        )(cfg, self.dtype, kernel, name="blocks")
        (x_BLC, cache), _ = scanned(carry, jnp.arange(cfg.layers), cos_sin, mask)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return self.final_norm(x_BLC), cache

    def head_kernel(self) -> jax.Array:
        """The head (C, V), or the transposed embedding where they are tied."""
        return self.table.embedding.T if self.config.tied_head else self.output()

    def logits(self, hidden_BLC: jax.Array, rows: tuple[int, int] | None = None) -> jax.Array:
        """Scores of the vocabulary.

        Args:
          hidden_BLC: result of a call.
          rows: (start, count): only these ids, and no others are computed; None takes all.

        Returns:
          float32 (B, L, V or count).
        """
        kernel_CV = self.head_kernel()
        if rows is not None:
            kernel_CV = kernel_CV[:, rows[0] : rows[0] + rows[1]]
        return on_batch(project(hidden_BLC, kernel_CV, self.dtype), "vocabulary")

    def token_losses(
        self, hidden_BLC: jax.Array, labels_BL: jax.Array, tokens: int = 4096
    ) -> tuple[jax.Array, jax.Array]:
        """Cross entropies over the vocabulary; see the function `token_losses`."""
        return token_losses(hidden_BLC, self.head_kernel(), labels_BL, tokens, self.dtype)

    def loss(
        self, hidden_BLC: jax.Array, labels_BL: jax.Array, tokens: int = 4096
    ) -> tuple[jax.Array, jax.Array]:
        """Summed cross entropy and the number of labels that it sums, both float32 scalars."""
        losses_BL, _ = self.token_losses(hidden_BLC, labels_BL, tokens)
        return losses_BL.sum(), (labels_BL >= 0).sum().astype(jnp.float32)

    def whole(self, ids_BL: jax.Array) -> jax.Array:
        """Logits (B, L, V) of plain text at positions 0 to L - 1; `init` needs it, too."""
        positions = jnp.arange(ids_BL.shape[1])[None]
        hidden_BLC, _ = self(self.embed(ids_BL), positions)
        return self.logits(hidden_BLC)


def _rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
    if policy == "none":
        return block
    saved = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return nn.remat(block, prevent_cse=False, policy=saved[policy])
