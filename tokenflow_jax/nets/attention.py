"""Masks and kernels of the language models' attention.

A mask says which keys a query may read: which keys are real (no padding), and how real ones depend
on order. Order is causal, except inside a run of blocks (the scales of an image) where a query
reads its own block whole and all blocks before it. For blocks of 1 and 4 that start at index 2,
after two text tokens (rows are queries, x is allowed):

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.parallel import placement

KINDS = ("auto", "xla", "splash", "cudnn")
# What a kernel adds to a score that is not allowed. It swallows the score, so that a query without
# any allowed key attends evenly, while gradients still flow to the score: a sum, not a choice.
NOT_ALLOWED = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A run of blocks within which attention is not causal; without blocks all is causal.

    Attributes:
      start: index of the first block's first token.
      sizes: tokens of each block.
    """

    start: int = 0
    sizes: tuple[int, ...] = ()

    def last_key(self, length: int) -> np.ndarray:
        """The last key that each of `length` queries may read: int32 (length,)."""
        last_L = np.arange(length, dtype=np.int32)
        stop = self.start
        for size in self.sizes:
            begin, stop = stop, stop + size
            last_L[begin:stop] = stop - 1
        return last_L


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("real_BK", "segments_BK"),
    meta_fields=("blocks",),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may read; see the module.

    Attributes:
      real_BK: bool (B, K), False for padding; None where all keys are real. With a cache, K is the
        cache's length.
      blocks: where attention is not causal.
      segments_BK: int (B, K), which of the texts that share a row a token belongs to: queries read
        keys of their own. None where rows are not shared; not for use with a cache.
    """

    real_BK: jax.Array | None = None
    blocks: Blocks = Blocks()
    segments_BK: jax.Array | None = None

    def allowed(self, queries: int, keys: int, first: jax.Array | int = 0) -> jax.Array:
        """The mask as an array.

        Args:
          queries: number of queries, Q.
          keys: number of keys, K; more of them than `real_BK` has are an error.
          first: index of the first query among the keys.

        Returns:
          bool (B, Q, K), or (1, Q, K) where all keys are real.
        """
        if isinstance(first, int):
            last_Q = jnp.asarray(self.blocks.last_key(first + queries)[first:])
        else:
            last_K = jnp.asarray(self.blocks.last_key(keys))
            last_Q = last_K[jnp.minimum(first + jnp.arange(queries), keys - 1)]
        allowed_BQK = (jnp.arange(keys) <= last_Q[:, None])[None]
        if self.segments_BK is not None:
            if not queries == keys == self.segments_BK.shape[1]:
                raise ValueError("rows that several texts share are read whole, without a cache")
            allowed_BQK &= self.segments_BK[:, :, None] == self.segments_BK[:, None, :]
        if self.real_BK is None:
            return allowed_BQK
        if self.real_BK.shape[1] < keys:
            raise ValueError(
                f"the mask knows {self.real_BK.shape[1]} keys, but attention reads {keys}; with a "
                "cache, give a mask as long as the cache"
            )
        return allowed_BQK & self.real_BK[:, None, :keys]


def choose(kind: str, mask: Mask | jax.Array, dtype: Any, shape: tuple[int, ...], cached: bool):
    """The kernel for one attention.

    Args:
      kind: one of KINDS. "auto" takes splash attention on a TPU where it can be used, else XLA;
        cuDNN's kernel is taken when it is asked for.
      mask: a `Mask`, or bool (B, Q, K).
      dtype: of queries, keys and values.
      shape: of the queries, (B, Q, heads, head width).
      cached: whether keys come from a cache.

    Returns:
      "xla", "splash" or "cudnn".

    Raises:
      ValueError: a kernel was asked for that cannot be used here; everything that is in the way.
    """
    if kind not in KINDS:
        raise ValueError(f"attention {kind!r}: one of {', '.join(KINDS)}")
    if kind == "xla":
        return kind
    if kind == "cudnn":
        obstacles = _cudnn_obstacles(dtype, shape, cached)
    else:
        obstacles = _splash_obstacles(mask, shape, cached)
    if kind == "auto":
        return "xla" if obstacles else "splash"
    if obstacles:
        raise ValueError(
            f"attention={kind!r} cannot be used: {'; '.join(obstacles)}. Take 'xla', or 'auto', "
            "which takes the best kernel that can be used"
        )
    return kind


def _platform() -> str:
    """The platform that the program is for: of the mesh in use, else of the default device."""
    kind = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = getattr(kind, "device_kind", "") or ""
    return "tpu" if "TPU" in kind else jax.default_backend()


def _splash_obstacles(mask: Mask | jax.Array, shape: tuple[int, ...], cached: bool) -> list[str]:
    found = []
    if _platform() != "tpu":
        found.append(f"it is a kernel for TPUs, and this is a {_platform()}")
    if cached:
        found.append("it does not read a cache")
    if not isinstance(mask, Mask):
        found.append("the mask is an array, not a `Mask` whose order is known when compiling")
    if shape[-1] % 64:
        found.append(f"the head width {shape[-1]} is not a multiple of 64")
    return found


def _cudnn_obstacles(dtype: Any, shape: tuple[int, ...], cached: bool) -> list[str]:
    found = ["it does not read a cache"] if cached else []
    if _platform() not in ("gpu", "cuda"):
        found.append(f"it is a kernel for NVIDIA GPUs, and this is a {_platform()}")
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        found.append(f"it computes in bfloat16 or float16, not {jnp.dtype(dtype).name}")
    if shape[-1] % 8 or shape[-1] > 128:
        found.append(f"the head width {shape[-1]} is not a multiple of 8 up to 128")
    return found


def attention(
    q_BQHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: Mask | jax.Array,
    kernel: str = "xla",
) -> jax.Array:
    """Softmax attention with grouped heads: H query heads share G key and value heads.

    Args:
      q_BQHD: queries.
      k_BKGD, v_BKGD: keys and values; G divides H.
      mask: bool (B or 1, Q, K); a `Mask` for "splash".
      kernel: of `choose`.

    Returns:
      (B, Q, H, D) in the dtype of the queries; the softmax is float32.
    """
    if kernel == "splash":
        return _splash(q_BQHD, k_BKGD, v_BKGD, mask)
    if kernel == "cudnn":
        return _cudnn(q_BQHD, k_BKGD, v_BKGD, mask)
    batch, queries, heads, width = q_BQHD.shape
    groups = k_BKGD.shape[2]
    q_BQGHD = q_BQHD.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum(
        "bqghd,bkgd->bghqk", q_BQGHD, k_BKGD, preferred_element_type=jnp.float32
    ) * (width**-0.5)
    scores += jnp.where(mask, 0.0, NOT_ALLOWED)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BQHD.dtype)
    out_BQGHD = jnp.einsum("bghqk,bkgd->bqghd", weights, v_BKGD)
    return out_BQGHD.reshape(batch, queries, heads, width)


def _cudnn(q_BLHD: jax.Array, k_BLGD: jax.Array, v_BLGD: jax.Array, mask: jax.Array) -> jax.Array:
    """cuDNN's attention, whose gradient wants an even length."""
    length = q_BLHD.shape[1]
    odd = length % 2
    pad = ((0, 0), (0, odd), (0, 0), (0, 0))
    allowed_BLL = jnp.pad(mask, ((0, 0), (0, odd), (0, odd)))
    out_BLHD = jax.nn.dot_product_attention(
        *(jnp.pad(x, pad) for x in (q_BLHD, k_BLGD, v_BLGD)),
        mask=allowed_BLL[:, None],
        implementation="cudnn",
    )
    return out_BLHD[:, :length]


_TILE = 128


def _splash(
    q_BLHD: jax.Array, k_BLGD: jax.Array, v_BLGD: jax.Array, mask: Mask, interpret: bool = False
) -> jax.Array:
    """Splash attention. Padding reads padding only: its rows differ from XLA's and mean nothing."""
    batch, length, _, width = q_BLHD.shape
    padded = -(-length // _TILE) * _TILE
    segments_BL = mask.real_BK if mask.segments_BK is None else mask.segments_BK
    if segments_BL is None:
        segments_BL = jnp.ones((batch, length), jnp.int32)

    def prepare(x_BLHD: jax.Array) -> jax.Array:
        x_BLHD = jnp.pad(x_BLHD, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return x_BLHD.transpose(0, 2, 1, 3)

    segments_BL = jnp.pad(segments_BL.astype(jnp.int32), ((0, 0), (0, padded - length)))
    arrays = (prepare(q_BLHD * width**-0.5), prepare(k_BLGD), prepare(v_BLGD), segments_BL)
    last_L = mask.blocks.last_key(padded)
    out_BHLD = placement.over_batch(
        functools.partial(_splash_local, last_L=last_L, interpret=interpret),
        arrays,
        heads=(1, 1, 1, None),
    )
    return out_BHLD.transpose(0, 2, 1, 3)[:, :length]


def _splash_local(
    q_BHLD: jax.Array,
    k_BGLD: jax.Array,
    v_BGLD: jax.Array,
    segments_BL: jax.Array,
    last_L: np.ndarray,
    interpret: bool,
) -> jax.Array:
    """Splash attention of one device's rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    heads, length = q_BHLD.shape[1:3]
    allowed_LL = np.arange(length) <= last_L[:, None]
    masks = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.NumpyMask(allowed_LL)] * heads
    )
    kernel = splash_attention_kernel.make_splash_mha(
        mask=masks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    repeat = heads // k_BGLD.shape[1]
    k_BHLD, v_BHLD = (jnp.repeat(x, repeat, axis=1) for x in (k_BGLD, v_BGLD))
    ids = splash_attention_kernel.SegmentIds(segments_BL, segments_BL)
    return jax.vmap(kernel)(q_BHLD, k_BHLD, v_BHLD, ids)
