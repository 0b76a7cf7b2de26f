"""Run by test_nearest_kernel.py; prints one JSON object per line.

python nearest_program.py interpret                the kernel against the chunks, on eight devices
python nearest_program.py v5e:2x2 PROGRAM ...      compiled for chips that need not be there

PROGRAM is FUNCTION:CODES:DEVICES[:MODE], "gradient:131072:1" or "forward:32768:4:never".
"""

import functools
import json
import os
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.parallel import mesh, nearest_kernel
from tokenflow_jax.tokenizer import pyramid as multiscale
from tokenflow_jax.tokenizer import quantizer
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import Codebooks

CHANNELS = (32, 8)


def forward(features_BHWC, codebooks, scales):
    pyramid = multiscale.residual_quantize(features_BHWC, codebooks, scales, 2.0)
    return pyramid.quantized_BHWC, pyramid.codes_BL


@functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
def gradient(features_BHWC, codebooks, scales):
    """Differentiate the straight-through output and both codebook losses."""

    def loss(features_BHWC, codebooks):
        pyramid = multiscale.residual_quantize(features_BHWC, codebooks, scales, 2.0)
        chosen_BLC = codebooks.look_up(pyramid.codes_BL)
        weights_L = multiscale.token_weights(scales, jnp.ones(len(scales)))
        losses = quantizer.codebook_losses(pyramid.z_BLC, chosen_BLC, weights_L)
        seen = jnp.sum(jnp.sin(pyramid.quantized_BHWC))
        return seen + losses[0] + 0.25 * losses[1], pyramid.codes_BL

    return loss(features_BHWC, codebooks)


def run(function, mode, *arguments, sizes=None):
    """Return the function's results with one form of the search; `sizes` are those of a mesh."""
    os.environ[nearest_kernel.VARIABLE] = mode
    jitted = jax.jit(function, static_argnums=2)
    jitted.clear_cache()
    if sizes is None:
        return jax.device_get(jitted(*arguments))
    device_mesh = mesh.make_mesh(dict(zip(mesh.AXES, sizes, strict=True)))
    features_BHWC, codebooks, *rest = arguments
    features_BHWC = jax.device_put(features_BHWC, mesh.batch_sharding(device_mesh))
    with mesh.use(device_mesh):
        return jax.device_get(jitted(features_BHWC, codebooks, *rest))


def interpret():
    """Compare the kernel with the chunked form, on one device and on eight."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((8, 8, 8, sum(CHANNELS))).astype(np.float32)
    books = Codebooks(*(rng.standard_normal((2048, c)).astype(np.float32) for c in CHANNELS))
    arguments = features, books, Scales((1, 3, 8))
    expected = run(gradient, "never", *arguments)
    for sizes in (None, (1, 8, 1, 1), (1, 2, 2, 2)):
        got = run(gradient, "interpret", *arguments, sizes=sizes)
        pairs = zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True)
        print(
            json.dumps(
                {
                    "mesh": sizes,
                    "codes_that_differ": int((got[1] != expected[1]).sum()),
                    "gradients": [float(abs(a - b).max() / abs(b).max()) for a, b in pairs],
                }
            )
        )


def compiled(topology, function, size, count, mode="auto"):
    """Compile a program for some of a topology's devices and return the compiler's figures."""
    from jax.experimental import topologies

    os.environ[nearest_kernel.VARIABLE] = mode
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    device_mesh = mesh.make_mesh({"data": -1}, devices[:count])
    whole, split = mesh.replicated(device_mesh), mesh.batch_sharding(device_mesh)
    features = jax.ShapeDtypeStruct((32, 8, 8, sum(CHANNELS)), jnp.float32, sharding=split)
    books = Codebooks(
        *(jax.ShapeDtypeStruct((size, c), jnp.float32, sharding=whole) for c in CHANNELS)
    )
    began = time.monotonic()
    # As the generation stage calls the frozen tokenizer.
    with mesh.use(device_mesh), jax.default_matmul_precision("highest"):
        program = jax.jit(lambda *x: function(*x, Scales((2, 8)))).lower(features, books).compile()
    result = {
        "seconds": round(time.monotonic() - began, 1),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        # jaxlib 0.10.2 cannot print some programs for v5p and tpu7x; all can be serialized.
        "kernel": b"tpu_custom_call" in program.runtime_executable().serialize(),
    }
    if count > 1:
        result["gathers"] = re.findall(r" = (\w+\[[\d,]*\])\S* all-gather", program.as_text())
    return result


if __name__ == "__main__":
    topology, *programs = sys.argv[1:]
    if topology == "interpret":
        interpret()
    for program in programs:
        name, size, count, *mode = program.split(":")
        function = {"forward": forward, "gradient": gradient}[name]
        report = compiled(topology, function, int(size), int(count), *mode)
        print(json.dumps({"topology": topology, "program": program} | report), flush=True)
