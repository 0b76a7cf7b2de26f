"""The nearest code in one TPU kernel: scores that never leave the chip, full float32 precision.

A kernel (Pallas, Mosaic) of the search in `quantizers.nearest_codes`. The grid goes over blocks of
tokens and, inside, over blocks of codes; for each pair the scores (codes x tokens) are computed in
VMEM and folded into a running maximum per token.

Precision. `precision="highest"` on a TPU means: each float32 is the sum of three bfloat16 pieces,
x = hi + mid + lo, and of the nine products of pieces the six largest are summed in float32. Done
one after another these are six passes over a matrix unit whose depth (128 on v4 and v5, 256 on v6e
and tpu7x) the 40 channels fill to a third or a sixth. Here the pieces are stacked along the
channels instead, 6 x 40 = 240 of them, so that the same sum needs two passes, or one:

    codes  [hi  mid lo  hi  mid hi ]
    tokens [lo  mid hi  mid hi  hi ]      small products first

Where it is used. No TPU was at hand. `benchmarks/nearest_kernel.py` counts the instruction bundles,
one per cycle, that the TPU compiler schedules; per 1,000 scores, waiting for memory left out:

    tokens x codes                  v5e     v5p     v6e   tpu7x
    21,760 x 32,768   by chunks   13.34   13.71    9.98    9.74
                      kernel       4.27    4.08    1.82    1.80
    32 x 131,072      by chunks   28.23   49.55   24.28   23.81
                      kernel      18.69   19.19   12.16   12.51
    8 x 2,048         by chunks   45.17   49.32   39.67   33.94
                      kernel      80.99   83.31   56.27   53.47

Memory is not what decides: XLA, too, keeps a chunk's scores on the chip, and a block of 1,024 codes
is 164 kB from HBM per 1,024 tokens: 37 bytes per cycle on a v5e that can read 500, 86 on a v6e that
can read 900. XLA makes more passes, and its argmax compares indices and looks for NaN at every
score, where the kernel has a comparison and two selections. So TPUs use the kernel but for searches
too small to matter, where its start costs more, and for codes too wide for its memory. All other
machines use the chunks.

Pallas kernels cannot be split by XLA: on several devices they need a `shard_map`, which
`placement.over_codes` makes wherever a mesh is in use. Without one the kernel is used only by
processes that see a single device.

The environment variable TOKENFLOW_NEAREST_KERNEL, read when a program is traced, overrides this:
"never" is the chunked form everywhere, "always" the kernel on TPUs whatever the size, "interpret"
the kernel, interpreted, on any machine (slow, for tests), "auto" the rule above.

Shapes as in `quantizers`: N tokens, K codes, C channels.
"""

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VARIABLE = "TOKENFLOW_NEAREST_KERNEL"
_MODES = ("auto", "always", "never", "interpret")
_LANES, _SUBLANES = 128, 8
_MAX_TOKENS = 1024
_MAX_ROWS = 4096
_MAX_SCORES = 2**20  # per block: 4 MiB of float32
_VMEM = 12 * 2**20  # of the 16 MiB that every TPU lets a kernel have
_PRODUCTS = 6
_MIN_SCORES = 2**17  # where the table above breaks even

Search = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def where_faster(z_NC: jax.Array, codes_KC: jax.Array, chunked: Search) -> Search:
    """Chooses how to search; on which platform is decided when the program is lowered.

    Args:
      z_NC, codes_KC: as in `best_of`.
      chunked: the form for all machines.

    Returns:
      `chunked`, or a function that is `best_of` on TPUs and `chunked` elsewhere.

    Raises:
      ValueError: TOKENFLOW_NEAREST_KERNEL is none of the modes.
    """
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in _MODES:
        raise ValueError(f"{VARIABLE}={mode!r} must be one of {', '.join(_MODES)}")
    if mode == "interpret":
        return functools.partial(best_of, interpret=True)
    if mode == "never" or (mode == "auto" and not _worthwhile(z_NC.shape[0], *codes_KC.shape)):
        return chunked
    return functools.partial(jax.lax.platform_dependent, tpu=best_of, default=chunked)


def _worthwhile(tokens: int, size: int, channels: int) -> bool:
    """Whether a TPU should use the kernel, and may."""
    large = size >= _LANES and tokens * size >= _MIN_SCORES
    # Outside a mesh nobody says which devices the program will run on, and a kernel that is not
    # in a shard_map fails to compile for more than one.
    one_device = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
    return large and one_device and _block_sizes(tokens, size, channels) is not None


def best_of(
    z_NC: jax.Array, codes_KC: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The largest inner product of each token with any code, and the first code that has it.

    Args:
      z_NC: float32 tokens, at least one.
      codes_KC: float32 codes, at least one.
      interpret: runs on any machine, without the TPU's compiler.

    Returns:
      Scores (N,) float32 and int32 codes (N,). Where all scores are NaN: -inf and 0.

    Raises:
      ValueError: so many channels that not even small blocks fit a TPU's memory.
    """
    (tokens, channels), size = z_NC.shape, codes_KC.shape[0]
    blocks = _block_sizes(tokens, size, channels)
    if blocks is None:
        raise ValueError(
            f"{channels} channels per code are too many for the TPU kernel; set {VARIABLE}=never"
        )
    n, k = blocks
    # Last axes are lanes: with tokens and codes there nothing is padded, and a maximum over codes
    # runs over rows. XLA stores narrow arrays so anyway; the transposes cost nothing.
    z_CN, codes_CK = _padded(z_NC).T, _padded(codes_KC).T
    depth = z_CN.shape[0]
    grid = (pl.cdiv(z_CN.shape[1], n), pl.cdiv(codes_CK.shape[1], k))
    side = _side_by_side(n)
    score_1N, code_1N = pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid=grid,
        in_specs=[
            pl.BlockSpec((depth, k), lambda i, j: (0, j)),
            pl.BlockSpec((depth, n), lambda i, j: (0, i)),
        ],
        out_specs=[pl.BlockSpec((1, n), lambda i, j: (0, i))] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((1, z_CN.shape[1]), jnp.float32),
            jax.ShapeDtypeStruct((1, z_CN.shape[1]), jnp.int32),
        ],
        scratch_shapes=[
            pltpu.VMEM((_PRODUCTS * depth, n), jnp.bfloat16),
            pltpu.VMEM((k, n), jnp.float32),
            pltpu.VMEM((side, n), jnp.float32),
            pltpu.VMEM((side, n), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * size * depth * _PRODUCTS,
            bytes_accessed=4 * (depth * (tokens + grid[0] * size) + 2 * tokens),
            transcendentals=0,
        ),
        interpret=interpret,
        name="nearest_codes",
    )(codes_CK, z_CN)
    return score_1N.reshape(-1)[:tokens], code_1N.reshape(-1)[:tokens]


def _padded(x_MC: jax.Array) -> jax.Array:
    """Rows and channels up to what blocks are made of; the rows are never read as results."""
    rows, channels = x_MC.shape
    return jnp.pad(x_MC, ((0, -rows % _LANES), (0, -channels % _SUBLANES)))


def _block_sizes(tokens: int, size: int, channels: int) -> tuple[int, int] | None:
    """Tokens and codes per block, or None if nothing fits: multiples of 128.

    Wide blocks reuse what is loaded. Two blocks of tokens at least, where there are enough: chips
    with two cores (v4, v5p) share out blocks. Example: 21,760 tokens, 32,768 codes of 40 channels
    are 22 x 32 blocks of 1024 x 1024.
    """
    depth = channels + -channels % _SUBLANES
    count = max(-(-tokens // _MAX_TOKENS), 1 if tokens <= _LANES else 2)
    n = -(-tokens // (count * _LANES)) * _LANES
    k = _power_of_two(min(_MAX_SCORES // n, _MAX_ROWS, size + -size % _LANES))

    def held() -> int:
        # The scores; both stacks, that of the codes also transposed; two buffers of each block.
        return 4 * n * k + 2 * _PRODUCTS * depth * (n + 2 * k) + 2 * 4 * depth * (n + k)

    while held() > _VMEM and k > _LANES:
        k //= 2
    while held() > _VMEM and n > _LANES:
        n = _power_of_two(n - 1)
    return (n, k) if held() <= _VMEM else None


def _power_of_two(x: int) -> int:
    """The largest one that is not larger."""
    return 2 ** (x.bit_length() - 1)


def _side_by_side(n: int) -> int:
    """How many running maxima per token: with few tokens more, lest each wait for the last."""
    return _SUBLANES * max(1, _MAX_TOKENS // n)


def _kernel(
    codes_ref, z_ref, score_ref, code_ref, stack_ref, scores_ref, best_ref, group_ref, *, size
):
    """One block of codes for one block of tokens.

    Args:
      codes_ref: (C, k).
      z_ref: (C, n).
      score_ref, code_ref: (1, n), written at the last block of codes.
      stack_ref: (6 C, n), the pieces of the tokens.
      scores_ref: (k, n).
      best_ref: (side, n); row r is the best score of the codes r, r + side, r + 2 side, ...
      group_ref: (side, n), in which group of `side` codes that was.
      size: K.
    """
    j, last = pl.program_id(1), pl.num_programs(1) - 1
    (_, k), (side, _) = codes_ref.shape, best_ref.shape
    groups = k // side

    @pl.when(j == 0)
    def _():
        best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
        group_ref[...] = jnp.zeros_like(group_ref)
        hi, mid, lo = _pieces(z_ref[...])
        # Stacked as float32, whose tiles are 8 rows high: 40 is a multiple of that, not of 16.
        stack_ref[...] = jnp.concatenate([lo, mid, hi, mid, hi, hi]).astype(jnp.bfloat16)

    hi, mid, lo = _pieces(codes_ref[...])
    codes_Dk = jnp.concatenate([hi, mid, lo, hi, mid, hi]).astype(jnp.bfloat16)
    scores_ref[...] = jax.lax.dot_general(
        codes_Dk,
        stack_ref[...],
        (((0,), (0,)), ((), ())),
        # Said, because a caller's default may be the highest, which bfloat16 does not have.
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    row = jax.lax.broadcasted_iota(jnp.int32, best_ref.shape, 0)

    def fold(partial: bool):
        def visit(i, carry):
            best, best_group = carry
            score, group = scores_ref[pl.ds(i * side, side), :], j * groups + i
            if partial:
                score = jnp.where(group * side + row < size, score, -jnp.inf)
            better = score > best  # strictly: the lowest index wins a tie
            return jnp.where(better, score, best), jnp.where(better, group, best_group)

        carry = best_ref[...], group_ref[...]
        best_ref[...], group_ref[...] = jax.lax.fori_loop(0, groups, visit, carry, unroll=groups)

    if size % k:
        pl.when(j == last)(lambda: fold(True))
        pl.when(j != last)(lambda: fold(False))
    else:
        fold(False)

    @pl.when(j == last)
    def _():
        best = best_ref[...]
        top = jnp.max(best, axis=0, keepdims=True)
        code = jnp.where(best == top, group_ref[...] * side + row, size)
        score_ref[...] = top
        code_ref[...] = jnp.min(code, axis=0, keepdims=True)


def _pieces(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three float32 numbers of bfloat16's precision each, whose sum is x exactly.

    Rounded by hand: a compiler may take a conversion to bfloat16 and back for none at all.
    """

    def rounded(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        return jax.lax.bitcast_convert_type((bits + 0x8000) & ~0xFFFF, jnp.float32)

    hi = rounded(x)
    mid = rounded(x - hi)
    return hi, mid, x - hi - mid
