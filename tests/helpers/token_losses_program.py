"""Run by test_token_losses.py with eight fake devices; prints one JSON object per mesh.

A mesh is "slice,data,fsdp,tensor", or "none", with the size of the vocabulary and perhaps the id
that begins its second part. Results are losses, right predictions, both gradients
and the bytes that travel.
"""

import json
import sys

import jax
import jax.numpy as jnp

from tokenflow_jax.parallel import hlo, mesh
from tokenflow_jax.parallel.token_losses import token_losses

BATCH, LENGTH, WIDTH, VOCABULARY = 8, 23, 16, 64
TOKENS = 4  # of a piece: at least six pieces


def run(name, vocabulary, *bounds):
    def total(hidden, kernel, labels, weights):
        losses, right = token_losses(hidden, kernel, labels, TOKENS, bounds=bounds)
        return (losses * weights).sum(), (losses, right)

    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
    kernel = jax.random.normal(keys[1], (WIDTH, vocabulary))
    labels = jax.random.randint(keys[2], (BATCH, LENGTH), -vocabulary // 3, vocabulary)
    labels = jnp.where(jnp.arange(LENGTH) % 3 == 0, jnp.argmax(hidden @ kernel, -1), labels)
    weights = jax.random.uniform(keys[3], (BATCH, LENGTH))
    function = jax.grad(total, (0, 1), has_aux=True)
    if name == "none":
        step = jax.jit(function)
        (gradients, (losses, right)), moved = step(hidden, kernel, labels, weights), {}
    else:
        device_mesh = mesh.make_mesh(dict(zip(mesh.AXES, map(int, name.split(",")), strict=True)))
        rows = mesh.batch_sharding(device_mesh)
        table = jax.sharding.NamedSharding(
            device_mesh, mesh.partition("head/kernel", kernel.shape, device_mesh)
        )
        step = jax.jit(function, in_shardings=(rows, table, rows, rows))
        with mesh.use(device_mesh):
            compiled = step.lower(hidden, kernel, labels, weights).compile()
            gradients, (losses, right) = step(hidden, kernel, labels, weights)
        moved = hlo.read(compiled.as_text()).collectives
    return {
        "losses": losses.tolist(),
        "right": right.tolist(),
        "gradients": [x.tolist() for x in gradients],
        "bytes": sum(nbytes for _, nbytes in moved.values()),
    }


if __name__ == "__main__":
    for arguments in sys.argv[1:]:
        name, *numbers = arguments.split(":")
        print(json.dumps(run(name, *map(int, numbers))))
