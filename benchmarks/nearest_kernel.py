"""Count the TPU instructions of the nearest-code kernel and of the chunked search, without a TPU.

    python -m benchmarks.nearest_kernel                     v5e, v5p, v6e and tpu7x, about a minute
    python -m benchmarks.nearest_kernel --topology=v5e:2x2 --tokens=8 --codes=131072

libtpu (pip install libtpu) dumps the instruction bundles it schedules, one per cycle. This script
multiplies them by the iterations of each loop and divides by the number of scores. Time spent
waiting for memory is not included, so this is an estimate; on a TPU, measure with
benchmarks.quantizer and TOKENFLOW_NEAREST_KERNEL=never or always.
"""

import argparse
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from tokenflow_jax.parallel.chips import COMPILER_ONLY

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def scheduled_bundles(folder: pathlib.Path) -> dict[str, int]:
    """Return the scheduled bundles of each instruction of the compiled program."""
    found = {}
    for path in folder.glob("*schedule-analysis_final_bundles.txt"):
        total = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
        name = re.fullmatch(r"\d+-(.*)-\d+-schedule-analysis_final_bundles.txt", path.name)
        if total and name:
            found[name[1]] = int(total[1])
    return found


def measure(topology: str, kernel: bool, tokens: int, codes: int, folder: str) -> str:
    """Return a line with the bundles per 1,000 scores and the bytes of temporaries."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from tokenflow_jax.parallel import nearest_kernel
    from tokenflow_jax.tokenizer import quantizer

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    where = jax.sharding.SingleDeviceSharding(device)
    shapes = (
        jax.ShapeDtypeStruct((rows, 40), jnp.float32, sharding=where) for rows in (tokens, codes)
    )
    function = nearest_kernel.best_of if kernel else quantizer._best_by_chunks
    program = jax.jit(function).lower(*shapes).compile()
    bundles, text = scheduled_bundles(pathlib.Path(folder)), program.as_text()
    if kernel:
        n, k = nearest_kernel._block_sizes(tokens, codes, 40)
        steps = math.ceil(tokens / n) * math.ceil(codes / k)
        total = steps * max(v for name, v in bundles.items() if name.startswith("nearest_codes"))
    else:
        # The instructions of the scan's body, times its iterations.
        body = re.search(r"body=%([\w.\-]+)", text)
        chunks = quantizer.in_chunks(jnp.zeros((codes, 1)), tokens)[0].shape[0]
        lines = text
        if body:
            lines = text[text.index(f"\n%{body[1]} (") :]
            lines = lines[: lines.index("\n}")]
        total = 0
        for name, count in bundles.items():
            line = re.search(rf"%{re.escape(name)} = .*", lines)
            if line:
                inner = re.search(r'"iteration_bounds":\[([^\]]*)\]', line[0])
                times = math.prod(int(n) for n in re.findall(r"\d+", inner[1])) if inner else 1
                total += chunks * times * count
    temporaries = program.memory_analysis().temp_size_in_bytes
    return f"{total / tokens / codes * 1e3:8.2f} per 1,000 scores, {temporaries:,} B of temporaries"


def run_apart(module: str, *arguments: str) -> str:
    """Return what a benchmark prints in its own process, whose compiler dumps to --folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, *arguments, f"--folder={folder}"]
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | COMPILER_ONLY
        environment |= {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": dump}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else done.stderr[-2000:]


def main() -> None:
    """Print one line per chip and method, each compiled in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--topology", action="append", help=f"one or more of {TOPOLOGIES}")
    parser.add_argument("--tokens", type=int, default=21_760)
    parser.add_argument("--codes", type=int, default=32_768)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    topologies = options.topology or TOPOLOGIES
    if options.form:
        kernel = options.form == "kernel"
        print(measure(topologies[0], kernel, options.tokens, options.codes, options.folder))
        return
    for topology in topologies:
        for form in ("chunks", "kernel"):
            result = run_apart(
                "benchmarks.nearest_kernel",
                f"--form={form}",
                f"--topology={topology}",
                f"--tokens={options.tokens}",
                f"--codes={options.codes}",
            )
            print(f"{topology:<12} {form:<7} {result}", flush=True)


if __name__ == "__main__":
    main()
