"""Measure time and memory of the shared mapping, in chunks and with dense distances.

    python -m benchmarks.quantizer                         26,144 tokens x 131,072 codes
    python -m benchmarks.quantizer --tokens=4096 --dense   both methods, each in its own process

One step finds the nearest codes and computes the codebook and commitment losses and their gradient
with respect to the tokens and both codebooks. On a TPU, set TOKENFLOW_NEAREST_KERNEL=never or
always to compare the chunked search with the kernel. Extra memory is the process's peak above what
it used with its inputs ready.
"""

import argparse
import multiprocessing
import resource
import time


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _step(dense: bool, entropy: bool):
    """Return a jitted function (tokens, codebooks) -> losses on codes and their gradients."""
    import jax
    import jax.numpy as jnp

    from tokenflow_jax.tokenizer import quantizer

    def nearest(z_NC, table_KC):
        if not dense:
            return quantizer.nearest_codes(z_NC, table_KC, 32)
        # As the original: |z|^2 + |c|^2 - 2 z.c for each half, all pairs at once.
        distance_NK = 0.0
        for half in (slice(0, 32), slice(32, 40)):
            z, c = z_NC[:, half], table_KC[:, half]
            distance_NK += (z**2).sum(1)[:, None] + (c**2).sum(1) - 2 * z @ c.T
        return jnp.argmin(distance_NK, axis=1)

    def loss(features_NC, books):
        z_NC = quantizer.normalize_halves(features_NC, 32)
        table_KC = books.normalized()
        codes = nearest(z_NC, jax.lax.stop_gradient(table_KC))
        weights = jnp.full(len(z_NC), 1 / len(z_NC))
        vq, commitment = quantizer.codebook_losses(z_NC[None], books.look_up(codes)[None], weights)
        total = vq + 0.25 * commitment
        if entropy:
            total += 0.1 * quantizer.entropy_loss(z_NC, table_KC, weights, 32)
        return total

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def measure(tokens: int, codes: int, dense: bool, entropy: bool) -> tuple[float, float]:
    """Return (seconds per step, GB of extra memory)."""
    import jax

    from tokenflow_jax.tokenizer.quantizer import Codebooks

    keys = jax.random.split(jax.random.key(0), 3)
    features_NC = jax.random.normal(keys[0], (tokens, 40))
    books = Codebooks(
        jax.random.normal(keys[1], (codes, 32)), jax.random.normal(keys[2], (codes, 8))
    )
    step = _step(dense, entropy)
    few = Codebooks(books.semantic_KC[:8], books.pixel_KC[:8])
    jax.block_until_ready(step(features_NC[:8], few))  # one-time loading
    compiled = step.lower(features_NC, books).compile()
    before = _peak_bytes()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(compiled(features_NC, books))
        times.append(time.perf_counter() - start)
    return min(times), (_peak_bytes() - before) / 1e9


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=26_144)
    parser.add_argument("--codes", type=int, default=131_072)
    parser.add_argument("--dense", action="store_true", help="measure dense distances too")
    parser.add_argument("--entropy", action="store_true", help="with the entropy loss")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for dense in (False, True) if options.dense else (False,):
        with spawn.Pool(1) as pool:
            arguments = (options.tokens, options.codes, dense, options.entropy)
            seconds, gigabytes = pool.apply(measure, arguments)
        way = "dense  " if dense else "chunked"
        print(
            f"{way} {options.tokens:,} tokens x {options.codes:,} codes: "
            f"{seconds:.2f} s, {gigabytes:.2f} GB extra"
        )


if __name__ == "__main__":
    main()
