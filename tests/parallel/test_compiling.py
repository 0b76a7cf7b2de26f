"""What the compilers answer, and small steps compiled for accelerators that are not here."""

import os
import subprocess
import sys

import pytest

from tokenflow_jax.parallel import chips, compiling


def test_both_complaints_of_the_compiler_are_understood():
    gib = 2**30
    used = "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity"
    assert compiling.too_large(used, 2 * gib) == (18 * gib, 0, int(4.25 * gib))
    needed = (
        "CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (57.50G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert compiling.too_large(needed, 2 * gib) == (int(57.5 * gib), 0, int(43.75 * gib))
    assert compiling.too_large("INTERNAL: something else", 0) is None


# One layer that attends, and whose weights are split; in a process that has touched no device.
PROGRAM = """
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tokenflow_jax.nets import attention
from tokenflow_jax.nets.masks import Mask
from tokenflow_jax.parallel import chips, compiling, mesh

topology = chips.parse_topology(sys.argv[1])
device_mesh = mesh.make_mesh({"fsdp": -1}, compiling.devices(topology))
count = topology.devices


def loss(weights, x_BLC):
    def layer(x_BLC, w_CC):
        x_BLHD = (x_BLC @ w_CC).reshape(*x_BLC.shape[:2], 4, 128)
        mask = Mask()
        kernel = attention.choose("auto", mask, x_BLC.dtype, x_BLHD.shape, False)
        print(kernel)
        mask = mask.allowed(256, 256) if kernel == "xla" else mask
        return attention.attention(x_BLHD, x_BLHD, x_BLHD, mask, kernel).reshape(x_BLC.shape), None

    return jax.lax.scan(layer, x_BLC, weights)[0].astype(jnp.float32).sum()


def array(*shape, spec):
    where = NamedSharding(device_mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)


arrays = (array(3, 512, 512, spec=(None, "fsdp")), array(count, 256, 512, spec=("fsdp",)))
with mesh.use(device_mesh):
    lowered = jax.jit(jax.grad(loss), out_shardings=arrays[0].sharding).lower(*arrays)
    found = compiling.compile_for(lowered, topology, 0, {})
print(found.temporaries, found.excess, found.costs.cycles)
print(sum(times for times, _ in found.costs.collectives.values()))
"""


def compiled(topology):
    if not compiling.has_compiler(chips.parse_topology(topology)):
        pytest.skip("needs the compiler: pip install -e '.[preflight]' or '.[preflight-gpu]'")
    environment = os.environ | chips.COMPILER_ONLY
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernel, *_, sizes, collectives = done.stdout.split("\n")[:-1]
    return kernel, *map(int, sizes.split()), int(collectives)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100:8", "a100:4", "b200:16"])
def test_gpus_take_the_kernel_of_cudnn(topology):
    kernel, temporaries, excess, cycles, collectives = compiled(topology)
    assert kernel == "cudnn" and excess == cycles == 0
    assert 0 < temporaries < 2**26  # 32 MiB are cuBLAS's workspace
    assert collectives >= 3 * 3  # both passes gather each layer's weights, and sum gradients


@pytest.mark.slow
def test_tpus_take_splash_attention_and_estimate_cycles():
    kernel, _, excess, cycles, collectives = compiled("v5e:2x2")
    assert kernel == "splash" and excess == 0 and cycles > 1e4 and collectives >= 3 * 3
