"""The nearest code in one TPU kernel: scores that never leave the chip, full float32 precision.

A Pallas kernel of the search in `tokenizer.quantizer.nearest_codes`. The grid goes over blocks of
tokens and, inside, over blocks of codes; the scores of each pair (codes x tokens) are computed in
VMEM and folded into a running maximum per token.

The environment variable TOKENFLOW_NEAREST_KERNEL, read when a program is traced, selects the form:
"auto" the kernel on TPUs where it is faster, "always" the kernel on TPUs whatever the size, "never"
the chunked form everywhere, "interpret" the kernel, interpreted, on any machine (slow, for tests).

Shapes: N tokens, K codes, C channels.
"""

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokenflow_jax.parallel import self_check

VARIABLE = "TOKENFLOW_NEAREST_KERNEL"
_MODES = ("auto", "always", "never", "interpret")
_LANES, _SUBLANES = 128, 8
_MAX_TOKENS = 1024
_MAX_ROWS = 4096
_MAX_SCORES = 2**20  # per block: 4 MiB of float32
_VMEM = 12 * 2**20  # of the 16 MiB that every TPU lets a kernel have
_PRODUCTS = 6
# The kernel has run on no TPU yet. `benchmarks/nearest_kernel.py` counts the instruction bundles,
# one per cycle, that the TPU compiler schedules; per 1,000 scores, waiting for memory left out,
# by chunks / with the kernel:
#
#     tokens x codes        v5e             v5p             v6e             tpu7x
#     21,760 x 32,768   13.34 /  4.27   13.71 /  4.08    9.98 /  1.82    9.74 /  1.80
#     32 x 131,072      28.23 / 18.69   49.55 / 19.19   24.28 / 12.16   23.81 / 12.51
#     8 x 2,048         45.17 / 80.99   49.32 / 83.31   39.67 / 56.27   33.94 / 53.47
#
# Memory does not decide (1,024 codes are 37 of the 500 bytes per cycle that a v5e can read): XLA
# makes more passes, and its argmax compares indices and looks for NaN at every score. Searches
# below this size do not make up for the kernel's start.
_MIN_SCORES = 2**17

Search = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def where_faster(z_NC: jax.Array, codes_KC: jax.Array, chunked: Search) -> Search:
    """Return `chunked`, or a function that is `best_of` when it is lowered for a TPU."""
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in _MODES:
        raise ValueError(f"{VARIABLE}={mode!r} must be one of {', '.join(_MODES)}")
    if mode == "interpret":
        return functools.partial(best_of, interpret=True)
    (tokens, channels), size = z_NC.shape, codes_KC.shape[0]
    known = isinstance(tokens, int)  # the batch of an exported program may be a symbol
    large = known and size >= _LANES and tokens * size >= _MIN_SCORES
    # XLA cannot split a Pallas kernel: on several devices it needs a `shard_map`, which
    # `placement.over_codes` makes where a mesh is in use. Without a mesh the devices are unknown.
    one_device = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
    suitable = large and one_device and _block_sizes(tokens, size, channels) is not None
    if mode == "never" or (mode == "auto" and not suitable):
        return chunked
    if mode == "auto" and jax.default_backend() == "tpu" and not proves_itself():
        return chunked
    return functools.partial(jax.lax.platform_dependent, tpu=best_of, default=chunked)


@functools.cache
def proves_itself(interpret: bool = False) -> bool:
    """Compare the kernel with a plain search on this machine once; warn if they differ."""
    return self_check.passes(
        "the TPU kernel for nearest codes", functools.partial(_difference, interpret), 1e-4
    )


def _difference(interpret: bool) -> float:
    """Return by how much the kernel's scores, or those of its codes, are off at most."""
    z_NC, codes_KC = (jax.random.normal(jax.random.key(n), (n, 40)) for n in (300, 1000))
    scores_NK = jnp.dot(z_NC, codes_KC.T, precision="highest")
    top_N, code_N = jax.jit(functools.partial(best_of, interpret=interpret))(z_NC, codes_KC)
    chosen_N = jnp.take_along_axis(scores_NK, code_N[:, None], axis=1)[:, 0]
    best_N = scores_NK.max(axis=1)
    # Sums in another order may exchange codes that are level to rounding, no others.
    return float(jnp.maximum(abs(top_N - best_N), best_N - chosen_N).max())


def best_of(
    z_NC: jax.Array, codes_KC: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return each token's largest inner product with any code and the first code that has it.

    Both have the shape (N,); where all scores are NaN they are -inf and 0. `interpret` runs on any
    machine, without the TPU's compiler.
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
    result = functools.partial(jax.ShapeDtypeStruct, (1, z_CN.shape[1]))
    score_1N, code_1N = pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid=grid,
        in_specs=[
            pl.BlockSpec((depth, k), lambda i, j: (0, j)),
            pl.BlockSpec((depth, n), lambda i, j: (0, i)),
        ],
        out_specs=[pl.BlockSpec((1, n), lambda i, j: (0, i))] * 2,
        out_shape=[result(jnp.float32), result(jnp.int32)],
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
    # Up to what blocks are made of; the added rows are never read as results.
    rows, channels = x_MC.shape
    return jnp.pad(x_MC, ((0, -rows % _LANES), (0, -channels % _SUBLANES)))


def _block_sizes(tokens: int, size: int, channels: int) -> tuple[int, int] | None:
    """Return tokens and codes per block, multiples of 128, or None if nothing fits.

    Example: 21,760 tokens, 32,768 codes of 40 channels are 22 x 32 blocks of 1024 x 1024.
    """
    depth = channels + -channels % _SUBLANES
    # Wide blocks reuse what is loaded. Two at least, where there are tokens enough, because chips
    # with two cores (v4, v5p) share them out.
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
    """Round down to a power of two."""
    return 2 ** (x.bit_length() - 1)


def _side_by_side(n: int) -> int:
    # Running maxima per token: more with few tokens, to shorten the dependency chain.
    return _SUBLANES * max(1, _MAX_TOKENS // n)


def _kernel(
    codes_ref, z_ref, score_ref, code_ref, stack_ref, scores_ref, best_ref, group_ref, *, size
):
    """Search one block of codes (C, k) for one block of tokens (C, n); the results are (1, n).

    Row r of `best_ref` (side, n) is the best score of the codes r, r + side, r + 2 side, ..., and
    row r of `group_ref` the group of `side` codes that has it.
    """
    j, last = pl.program_id(1), pl.num_programs(1) - 1
    (_, k), (side, _) = codes_ref.shape, best_ref.shape
    groups = k // side

    @pl.when(j == 0)
    def _():
        best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
        group_ref[...] = jnp.zeros_like(group_ref)
        # Precision "highest" on a TPU: each float32 is the sum of three bfloat16 pieces, and of the
        # nine products of pieces the six largest are summed in float32. One after another these are
        # six passes over a matrix unit whose depth (128, or 256 on v6e and tpu7x) 40 channels fill
        # to a third or less. Stacked along the channels, small products first, the same sum needs
        # two passes, or one.
        hi, mid, lo = _pieces(z_ref[...])
        # Stacked as float32, whose tiles are 8 rows high: 40 is a multiple of that, not of 16.
        stack_ref[...] = jnp.concatenate([lo, mid, hi, mid, hi, hi]).astype(jnp.bfloat16)

    hi, mid, lo = _pieces(codes_ref[...])
    codes_Dk = jnp.concatenate([hi, mid, lo, hi, mid, hi]).astype(jnp.bfloat16)
    scores_ref[...] = jax.lax.dot_general(
        codes_Dk,
        stack_ref[...],
        (((0,), (0,)), ((), ())),
        # Explicit, because a caller's default may be the highest, which bfloat16 does not have.
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
    """Return three float32 numbers of bfloat16's precision each, whose sum is x exactly."""

    def rounded(x):  # by hand: a compiler may drop a conversion to bfloat16 and back
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        return jax.lax.bitcast_convert_type((bits + 0x8000) & ~0xFFFF, jnp.float32)

    hi = rounded(x)
    mid = rounded(x - hi)
    return hi, mid, x - hi - mid
