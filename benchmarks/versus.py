"""Compare our JAX programs with the original PyTorch code on this machine's CPU.

    python -m benchmarks.versus --original=CHECKOUT            all rows
    python -m benchmarks.versus --original=CHECKOUT encode     one of them

CHECKOUT is your own copy of the original repository; what it imports must be installed (torch,
torchvision, transformers 4.43, timm, einops, ftfy, regex, setuptools < 81). Both sides get the same
random weights where a row has a checkpoint's layout, float32, and take turns in one process; the
ratio is of the medians. The ratio of CPU time, which counts waiting threads, too, depends less on
what else the machine does. Memory is each side's peak in a process of its own, above what the
process used once the weights were there.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import io
import multiprocessing
import os
import resource
import statistics
import time

# Row -> the largest ratio of time that we aim at.
ROWS = {
    "encode": 0.9, "decode": 0.9, "answering": 0.8, "understanding_step": 0.9,
    "tokenizer_step": 1.0, "sampling": 0.15, "quantizer": 0.3,
}  # fmt: skip


def measure(name: str, checkout: str, sides: tuple[int, ...], repeats: int) -> dict:
    """Return the seconds of each side (0 ours, 1 theirs), and GB of memory."""
    import jax

    from benchmarks import original, versus_rows

    original.use(checkout)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            both = getattr(versus_rows, name)()
        except Exception as error:  # not all of them survive the way to the parent
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        walls, cpus = ({side: [] for side in sides} for _ in range(2))
        for _ in range(repeats + 1):
            for side in sides:
                wall, cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(both[side]())
                walls[side].append(time.perf_counter() - wall)
                cpus[side].append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": [statistics.median(walls[side][1:]) for side in sides],
        "cpu": [statistics.median(cpus[side][1:]) for side in sides],
        "memory": (peak - before) * 1024 / 1e9,
    }


def main() -> None:
    """Print one line per row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], metavar="row")
    parser.add_argument("--original", required=True, help="a checkout of the original code")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("torch is not installed: pip install 'tokenflow_jax[parity]'")
    if not os.path.isdir(os.path.join(options.original, "tokenflow")):
        parser.error(f"--original={options.original}: there is no tokenflow/ in it")
    context = multiprocessing.get_context("spawn")

    def child(*arguments):
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            return pool.submit(measure, *arguments).result()

    print("row                   ours   original  ratio   aim  CPU ratio   memory ours / original")
    for name in options.rows or ROWS:
        try:
            found = child(name, options.original, (0, 1), options.repeats)
            memory = [child(name, options.original, (side,), 1)["memory"] for side in (0, 1)]
        except RuntimeError as error:  # or out of memory; the other rows still run
            print(f"{name:<19} not available: {error}", flush=True)
            continue
        (ours, theirs), (our_cpu, their_cpu) = found["seconds"], found["cpu"]
        print(
            f"{name:<19} {ours:6.2f} s {theirs:8.2f} s  {ours / theirs:5.2f} {ROWS[name]:5.2f}"
            f"{our_cpu / their_cpu:10.2f}   {memory[0]:.2f} / {memory[1]:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
