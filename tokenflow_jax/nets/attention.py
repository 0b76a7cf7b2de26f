"""Attention, and the kernels that the language models choose from."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tokenflow_jax.nets import chunked_attention
from tokenflow_jax.nets.masks import Blocks, Mask
from tokenflow_jax.parallel import costs, placement, self_check

_GPUS = ("gpu", "cuda")
# Of bfloat16, whose products and sums in another order differ by less.
_TOLERANCE = 0.03
KINDS = ("auto", "xla", "splash", "cudnn")
# Added to scores that are not allowed. It swallows the score, so that a query without any allowed
# key attends evenly, while gradients still flow to the score: a sum, not a `where`.
NOT_ALLOWED = float(np.finfo(np.float32).min)
SAVED = "attention"  # checkpoint name of what a backward pass would have to run a kernel again for


def choose(
    kind: str, mask: Mask | jax.Array, dtype: Any, shape: tuple[int, ...], cached: bool
) -> str:
    """Return the kernel to use: "xla", "splash", "cudnn" or "chunked".

    "auto" is splash attention on TPUs and cuDNN's on NVIDIA GPUs, where it can be used and proves
    itself, else XLA, in chunks of queries for long rows on CPUs.

    Args:
      dtype, shape: of the queries, (B, Q, heads, head width).
      cached: the keys come from a cache.
    """
    if kind not in KINDS:
        raise ValueError(f"attention {kind!r}: one of {', '.join(KINDS)}")
    if kind == "xla":
        return kind
    device, name, width = placement.platform(), jnp.dtype(dtype).name, shape[-1]
    kernel = kind
    if kind == "auto":
        kernel = "cudnn" if device in _GPUS else "splash"
    if kernel == "cudnn":
        checks = (
            (cached, "it does not read a cache"),
            (device not in _GPUS, f"it is for NVIDIA GPUs, and this is a {device}"),
            (name not in ("bfloat16", "float16"), f"it computes bfloat16 or float16, not {name}"),
            (width not in range(8, 129, 8), f"head width {width} is not a multiple of 8 up to 128"),
        )
    else:
        checks = (
            (device != "tpu", f"it is for TPUs, and this is a {device}"),
            (cached, "it does not read a cache"),
            # A `Mask` has its order known when compiling.
            (not isinstance(mask, Mask), "the mask is an array, not a `Mask`"),
            (width % 64, f"head width {width} is not a multiple of 64"),
        )
    if (
        kind == "auto"
        and not cached
        and isinstance(mask, Mask)
        and chunked_attention.pays(shape[1])
    ):
        return "chunked"
    obstacles = [obstacle for found, obstacle in checks if found]
    if kind == "auto":
        # Compiling for a device that is not here (preflight), there is nothing to run.
        here = jax.default_backend() == device
        return "xla" if obstacles or (here and not proves_itself(kernel, width, name)) else kernel
    if obstacles:
        raise ValueError(
            f"attention={kind!r} cannot be used: {'; '.join(obstacles)}. Use 'xla', or 'auto', "
            "which picks the best kernel available"
        )
    return kind


@functools.cache
def proves_itself(kernel: str, width: int, dtype: str) -> bool:
    """Compare a kernel with XLA's attention on this machine once; warn if they differ."""
    used = functools.partial(attention, kernel=kernel)
    difference = functools.partial(difference_from_xla, used, width, dtype)
    return self_check.passes(f"the kernel {kernel!r} of attention", difference, _TOLERANCE)


def difference_from_xla(kernel: Callable[..., jax.Array], width: int, dtype: str) -> float:
    """Return by how much results and gradients are off, as a part of the largest.

    Two rows of four heads that share two, causal and with blocks after padding.
    """
    length, pad = 190, 17
    q_BLHD, weights_BLHD = jax.random.normal(jax.random.key(0), (2, 2, length, 4, width))
    k_BLGD, v_BLGD = jax.random.normal(jax.random.key(1), (2, 2, length, 2, width))
    arrays = tuple(x.astype(dtype) for x in (q_BLHD, k_BLGD, v_BLGD))
    real_BL = jnp.arange(length) >= jnp.array([[0], [pad]])
    worst = 0.0
    for mask in (Mask(), Mask(real_BL, Blocks(40, (1, 4, 16, 64)))):
        # Rows of padding mean nothing.
        weighted = weights_BLHD * (1.0 if mask.real_BK is None else real_BL[..., None, None])

        def both(function, mask, weighted=weighted):
            def loss(*arrays):
                out_BLHD = function(*arrays, mask).astype(jnp.float32) * weighted
                return out_BLHD.sum(), out_BLHD

            (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), True))(*arrays)
            return out, *gradients

        plain = both(attention, mask.allowed(length, length))
        for one, other in zip(both(kernel, mask), plain, strict=True):
            one, other = (np.asarray(x, np.float32) for x in (one, other))
            worst = np.maximum(worst, abs(one - other).max() / abs(other).max())  # NaN stays
    return float(worst)


def attention(
    q_BQHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: Mask | jax.Array,
    kernel: str = "xla",
) -> jax.Array:
    """Compute softmax attention, where H query heads share G key and value heads: (B, Q, H, D).

    The mask is bool (B or 1, Q, K), but a `Mask` for all kernels but "xla"; the softmax is float32.
    """
    if kernel == "chunked":
        return chunked_attention.chunked(attention, q_BQHD, k_BKGD, v_BKGD, mask)
    if kernel != "xla":
        function, length = _splash if kernel == "splash" else _cudnn, q_BQHD.shape[1]
        keys = np.mean(mask.blocks.last_key(length) + 1) if isinstance(mask, Mask) else length
        with jax.named_scope(costs.attention_scope(keys, length)):
            return function(q_BQHD, k_BKGD, v_BKGD, mask)
    batch, queries, heads, width = q_BQHD.shape
    groups = k_BKGD.shape[2]
    q_BQGHD = q_BQHD.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum(
        "bqghd,bkgd->bghqk", q_BQGHD, k_BKGD, preferred_element_type=jnp.float32
    ) * (width**-0.5)
    scores += jnp.where(mask, 0.0, NOT_ALLOWED)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BQHD.dtype)
    out_BQGHD = jnp.einsum("bghqk,bkgd->bqghd", weights, v_BKGD)
    return checkpoint_name(out_BQGHD, SAVED).reshape(q_BQHD.shape)


def _cudnn(
    q_BLHD: jax.Array, k_BLGD: jax.Array, v_BLGD: jax.Array, mask: Mask | jax.Array
) -> jax.Array:
    length = q_BLHD.shape[1]
    odd = length % 2  # its gradient with a mask needs an even length
    pad = ((0, 0), (0, odd), (0, 0), (0, 0))
    # It skips what the causal order forbids and needs no mask for that. Anything else it reads as
    # an array that is added to the scores.
    causal = isinstance(mask, Mask) and not mask.blocks.sizes and mask.last_BK is None
    allowed_BLL = None
    if not isinstance(mask, Mask):
        allowed_BLL = mask
    elif not causal or mask.real_BK is not None or mask.segments_BK is not None:
        allowed_BLL = mask.allowed(length, length)
    if allowed_BLL is not None:
        allowed_BLL = jnp.pad(allowed_BLL, ((0, 0), (0, odd), (0, odd)))[:, None]
    out_BLHD = jax.nn.dot_product_attention(
        *(jnp.pad(x, pad) for x in (q_BLHD, k_BLGD, v_BLGD)),
        mask=allowed_BLL,
        is_causal=causal,
        implementation="cudnn",
    )
    return out_BLHD[:, :length]


def _splash_block(length: int) -> int:
    """Return the side of the fewest equal square tiles of at most 1,024 that cover `length`."""
    # Instructions per score fall up to this side, forward and backward; larger ones exceed the
    # compiler's limit of VMEM (benchmarks/attention_kernel.py).
    tiles = -(-length // 1024)
    return -(-length // (128 * tiles)) * 128


def _splash(
    q_BLHD: jax.Array, k_BLGD: jax.Array, v_BLGD: jax.Array, mask: Mask, interpret: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # Padding reads only padding here: its rows differ from XLA's and mean nothing.
    batch, length, _, width = q_BLHD.shape
    side = _splash_block(length)
    extra = -length % side  # up to whole tiles
    segments_BL = mask.real_BK if mask.segments_BK is None else mask.segments_BK
    if segments_BL is None:
        segments_BL = jnp.ones((batch, length), jnp.int32)

    def prepare(x_BLHD: jax.Array) -> jax.Array:
        return jnp.pad(x_BLHD, ((0, 0), (0, extra), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    segments_BL = jnp.pad(segments_BL.astype(jnp.int32), ((0, 0), (0, extra)))
    arrays = (prepare(q_BLHD * width**-0.5), prepare(k_BLGD), prepare(v_BLGD), segments_BL)
    # Computed in the kernel, tile by tile, and without a tile that no query reads: key <= last key.
    order = splash.CausalMask((length + extra,) * 2)
    order.q_sequence = mask.blocks.last_key(length + extra) + mask.ahead
    if mask.last_BK is not None:
        last_BL = jnp.broadcast_to(mask.last_BK, (batch, length))
        arrays += (jnp.pad(last_BL, ((0, 0), (0, extra))),)
    sides = splash.BlockSizes(*[side] * 6, use_fused_bwd_kernel=True)

    def local(q_BHLD, k_BGLD, v_BGLD, segments_BL, *last_BL):  # one device's rows and heads
        rows, heads, *rest = q_BHLD.shape
        groups = k_BGLD.shape[1]
        kernel = splash.make_splash_mqa(
            splash.MultiHeadMask([order] * (heads // groups)),
            block_sizes=sides,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )

        def row(q_GHLD, k_GLD, v_GLD, segments_L, *last_L):
            ids, used = splash.SegmentIds(segments_L, segments_L), kernel
            for last in last_L:  # in place of the order that its tiles were chosen by
                infos, options = kernel.tree_flatten()
                infos = [info and info._replace(q_sequence=last) for info in infos]
                used = kernel.tree_unflatten(options, infos)
            return jax.vmap(used, in_axes=(0, 0, 0, None))(q_GHLD, k_GLD, v_GLD, ids)

        # The grid's leading axes, rows and groups, share out the cores of a chip that has two.
        q_BGHLD = q_BHLD.reshape(rows, groups, heads // groups, *rest)
        return jax.vmap(row)(q_BGHLD, k_BGLD, v_BGLD, segments_BL, *last_BL).reshape(q_BHLD.shape)

    more = (None,) * (len(arrays) - 3)
    out_BHLD = placement.over_batch(local, arrays, heads=(1, 1, 1, *more))
    return out_BHLD.transpose(0, 2, 1, 3)[:, :length]
