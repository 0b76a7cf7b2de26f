"""StableHLO: serialized programs for CPUs, NVIDIA GPUs and TPUs that jax.export reads again."""

import jax

from tokenflow_jax.export.programs import Program

PLATFORMS = ("cpu", "cuda", "tpu")


def convert(program: Program) -> bytes:
    """Return a program for any batch size; `jax.export.deserialize(...).call(array)` runs it."""
    (batch,) = jax.export.symbolic_shape("B")
    exported = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)
    return bytes(exported(program.spec(batch)).serialize())
