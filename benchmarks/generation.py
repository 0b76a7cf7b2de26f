"""Compare sampling with and without the cache, on the same weights.

    python -m benchmarks.generation                        one image, guided, 131 + 817 tokens
    python -m benchmarks.generation --passes=3 --images=2

Without the cache, each pass computes the prefix and the scales so far again, as the original does.

The layout is the published one: a prefix of 131 ids, nine scales of 817 codes out of 32,768. The
network is smaller (12 layers of 512 channels) and random, which does not affect the comparison.
Both methods compute the head only where codes are drawn; the original computes it everywhere. Each
method runs in its own process. The time excludes the first call; memory is the process's peak above
what it used with its inputs ready and its program compiled.
"""

import argparse
import functools
import multiprocessing
import resource
import time

METHODS = ("cache", "so_far")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokens_processed(scales, prefix: int, passes: int, method: str) -> int:
    """Return the number of tokens that the network processes for one row of an image."""
    sizes = [side * side for side in scales]
    total, before = prefix, prefix
    for size in sizes[1:]:
        total += passes * (size if method == "cache" else before + size)
        before += size
    return total


def measure(options: argparse.Namespace, method: str) -> dict[str, float]:
    """Return seconds per image, compile seconds, extra GB and a sum of the codes."""
    import jax
    import jax.numpy as jnp

    from tests.helpers import recomputed_sampling
    from tokenflow_jax.generation import sample as generate
    from tokenflow_jax.generation.model import VARIANTS, Generation, GenerationConfig
    from tokenflow_jax.nets.lm import LMConfig
    from tokenflow_jax.tokenizer.quantizer import Codebooks

    published = VARIANTS["7b"]
    lm = LMConfig(
        vocabulary_size=published.lm.vocabulary_size,
        width=options.width,
        layers=options.layers,
        heads=options.width // 64,
        kv_heads=options.width // 64,
        mlp_width=options.width * 11 // 4,
        norms="after",
        qk_norm=True,
    )
    config = GenerationConfig(lm, published.scales, published.codebook_size, published.image_start)
    dtype = jnp.dtype(options.dtype)
    model = Generation(config, dtype)
    keys = jax.random.split(jax.random.key(0), options.images + 3)
    codes, channels = config.pyramid.tokens, config.code_channels
    arguments = (
        jnp.zeros((1, 2), jnp.int32),
        jnp.ones((1, 2), bool),
        jnp.zeros((1, codes), jnp.int32),
        jnp.zeros((1, codes - 1, channels)),
        jnp.zeros((1, 2), jnp.int32),
    )
    # Random weights of the usual size, drawn by shape so that the init program never runs.
    shapes = jax.eval_shape(functools.partial(model.init, method="losses"), keys[0], *arguments)
    leaves, tree = jax.tree.flatten(shapes)
    values = [
        0.02 * jax.random.normal(jax.random.fold_in(keys[0], i), leaf.shape, dtype)
        if leaf.ndim > 1 and min(leaf.shape) > 64
        else jnp.ones(leaf.shape, dtype)
        for i, leaf in enumerate(leaves)
    ]
    params = jax.tree.unflatten(tree, values)
    books = Codebooks(
        jax.random.normal(keys[1], (config.codebook_size, 32)),
        jax.random.normal(keys[2], (config.codebook_size, 8)),
    )
    ids = jax.random.randint(keys[0], (options.images, 131), 0, config.image_start)
    sampler = generate.Sampler(model, -1, generate.PASSES[options.passes])  # no id is padding

    def recomputed(*args):
        codes = {d.scale: d.codes_BL for d in recomputed_sampling.draws(sampler, method, *args)}
        return jnp.concatenate(list(codes.values()), axis=1)

    run = jax.jit(sampler if method == "cache" else recomputed)
    inputs = (params["params"], books, ids, ids[:1] + 1, keys[3:], 7.5)
    start = time.perf_counter()
    compiled = run.lower(*inputs).compile()
    compile_seconds = time.perf_counter() - start
    before = _peak_bytes()
    times = []
    for _ in range(1 + options.repeats):
        start = time.perf_counter()
        drawn = jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
    return {
        "seconds": min(times[1:]) / options.images,
        "compile": compile_seconds,
        "memory": (_peak_bytes() - before) / 1e9,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "first_codes": int(drawn[0, :21].sum()),
    }


def main() -> None:
    """Print one line per method and the speed-up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--passes", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512, help="channels, a multiple of 64")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    if options.width % 64:
        parser.error(f"--width={options.width} is not a multiple of 64")
    context = multiprocessing.get_context("spawn")
    found = {}
    for method in METHODS:
        with context.Pool(1) as pool:
            found[method] = pool.apply(measure, (options, method))
        scales = (1, 2, 4, 6, 8, 10, 12, 14, 16)
        tokens = tokens_processed(scales, 131, options.passes, method)
        result = found[method]
        print(
            f"{method:<9} {result['seconds']:8.2f} s per image   "
            f"{tokens:6d} tokens per row   peak memory +{result['memory']:.2f} GB "
            f"(temporaries {result['temporaries']:.2f} GB)   compiled in {result['compile']:.0f} s",
            flush=True,
        )
    times = found["so_far"]["seconds"] / found["cache"]["seconds"]
    print(f"the cache is {times:.1f} times as fast")


if __name__ == "__main__":
    main()
