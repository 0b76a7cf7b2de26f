"""Count the TPU instructions of the language models' splash attention, without a TPU.

    python -m benchmarks.attention_kernel                   v5e, v5p and v6e, about a minute
    python -m benchmarks.attention_kernel --topology=v5e:2x2 --side=512

libtpu (pip install libtpu) dumps the instruction bundles it schedules, one per cycle. This script
multiplies the kernels' bundles by the tiles of scores that they compute, for one row of one layer.
"before" is JAX's default: tiles of 128, a backward pass of two kernels, keys and values repeated
for grouped heads. Waiting for memory and skipped tiles are not included, so this is an estimate.
"""

import argparse
import contextlib
import pathlib
import re
from unittest import mock

from benchmarks.nearest_kernel import run_apart, scheduled_bundles

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)  # of the 7B generation model, after 131 of text
# Heads, key and value heads, tokens of a row, sizes of blocks at its end.
CASES = {"14b": (40, 8, 2048, ()), "7b": (32, 32, 947, tuple(side**2 for side in SCALES))}


def measure(topology: str, case: str, side: int, folder: str) -> str:
    """Return a line with the bundles of the forward and the backward pass; side 0: the default."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    from tokenflow_jax.nets import attention
    from tokenflow_jax.nets.masks import Blocks, Mask

    heads, groups, length, sizes = CASES[case]
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    where = jax.sharding.SingleDeviceSharding(device)
    mask = Mask(blocks=Blocks(length - sum(sizes), sizes))
    before = side == 128
    side = side or attention._splash_block(length)

    def function(q_BLHD, k_BLGD, v_BLGD, gradient_BLHD):
        if before:
            k_BLGD, v_BLGD = (jnp.repeat(x, heads // groups, axis=2) for x in (k_BLGD, v_BLGD))
        call = lambda *arrays: attention._splash(*arrays, mask)  # noqa: E731
        out_BLHD, backward = jax.vjp(call, q_BLHD, k_BLGD, v_BLGD)
        return out_BLHD, backward(gradient_BLHD)

    shapes = [
        jax.ShapeDtypeStruct((2, length, count, 128), jnp.bfloat16, sharding=where)
        for count in (heads, groups, groups, heads)
    ]
    default = splash.BlockSizes.get_default()
    with (
        mock.patch.object(attention, "_splash_block", lambda _: side),
        mock.patch.object(splash, "BlockSizes", lambda *_, **__: default)
        if before
        else contextlib.nullcontext(),
    ):
        jax.jit(function).lower(*shapes).compile()
    padded = length + -length % side
    last_L = mask.blocks.last_key(padded)
    tiles = sum(
        int(last_L[first : first + side].max()) // side + 1 for first in range(0, padded, side)
    )
    passes = {"fwd": 0, "dkv": 0, "dq": 0}
    for name, count in scheduled_bundles(pathlib.Path(folder)).items():
        if kernel := re.match(r"splash_mqa_(fwd|dkv|dq)_", name):
            passes[kernel[1]] = count * tiles * heads
    forward, backward = passes["fwd"] / 1e6, (passes["dkv"] + passes["dq"]) / 1e6
    return f"tiles of {side:4}: forward {forward:6.2f} M, backward {backward:6.2f} M bundles"


def main() -> None:
    """Print two lines per chip and model, each compiled in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--topology", action="append", help=f"one or more of {TOPOLOGIES}")
    parser.add_argument(
        "--side", type=int, action="append", help="of tiles; 0: as chosen by length"
    )
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    topologies, sides = options.topology or TOPOLOGIES, options.side or (128, 0)
    if options.case:
        print(measure(topologies[0], options.case, sides[0], options.folder))
        return
    for topology in topologies:
        for case in CASES:
            for side in sides:
                result = run_apart(
                    "benchmarks.attention_kernel",
                    f"--case={case}",
                    f"--side={side}",
                    f"--topology={topology}",
                )
                print(f"{topology:<10} {case:<4} {result}", flush=True)


if __name__ == "__main__":
    main()
