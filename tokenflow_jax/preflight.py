r"""Check whether a training job fits a pod, and how it is laid out, without having one.

    python -m tokenflow_jax.preflight --config=configs/tokenizer.py:xl --topology=v5p:4x4x4 \
        --config.mesh.fsdp=16
    python -m tokenflow_jax.preflight --config=generation:7b --topology=v5e:1x1 --sample=1

Compiles the real training step for those chips with libtpu (pip install 'jax[tpu]'), which takes
minutes and no TPU, and prints memory, operations, a floor of the step time and the traffic between
devices. For GPUs (h100:64) it estimates the same by arithmetic alone. Needs no weights and no data.
Exit codes: 0 it fits, 1 it does not, 2 wrong flags or config.
"""

import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from tokenflow_jax import cli, stages
from tokenflow_jax.parallel import chip_flags
from tokenflow_jax.parallel.chips import COMPILER_ONLY, Topology, parse_topology

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """Bytes per device as the compiler, or for GPUs arithmetic, finds them."""

    temporaries: int
    code: int = 0
    excess: int = 0  # that do not fit
    collectives: Mapping[str, tuple[int, int]] | None = None  # kind -> (times, bytes); None unknown
    text: str = ""  # the program's, where there is one


def main(options: flags.FlagValues) -> int:
    """Print the report and return the exit code."""
    topology = parse_topology(options.topology or "")
    fits, text, program = report(options.config, topology, options.sample, options.weights_dtype)
    if options.hlo and program:
        pathlib.Path(options.hlo).write_text(program, encoding="utf-8")
    print(text)
    return 0 if fits else 1


def report(
    config: Any, topology: Topology, sample: int = 0, weights_dtype: str = ""
) -> tuple[bool, str, str]:
    """Compile a config's step, or drawing `sample` pictures, for a topology and describe it.

    Returns True if it fits, the description, and the compiled program's text.
    """
    import jax  # after the environment is set

    from tokenflow_jax.parallel import costs, mesh

    stages.stage_class(config.stage)
    compiler_options = chip_flags.compiler_options(topology.chip)
    began, chip, sizes = time.monotonic(), topology.chip, config.get("mesh") or {}
    device_mesh = mesh.make_abstract_mesh(sizes, topology.devices)
    pack = config.get("pack", 1)
    mesh.check_batch_size(sample or config.batch_size, device_mesh, pack)
    if chip.tpu:
        device_mesh = mesh.make_mesh(sizes, _tpu_devices(topology))
    if sample:
        if config.stage != "generation":
            raise ValueError(f"--sample is for the stage generation, this is {config.stage}")
    elif weights_dtype:
        raise ValueError("--weights_dtype is for --sample; training has --config.lora.weights")
    if sample:
        config.batch_size = sample
    stage = stages.make_stage(config, device_mesh, "tpu" if chip.tpu else "gpu")
    program = stage.sampling(sample, weights_dtype) if sample else stage.program
    held = {name: costs.shard_bytes(tree) for name, tree in program.parts.items()}
    arguments, total = program.arguments, sum(held.values())
    abstract = device_mesh.abstract_mesh if chip.tpu else device_mesh
    with mesh.use(abstract):
        jaxpr = jax.make_jaxpr(program.function)(*arguments).jaxpr
    if chip.tpu:
        with mesh.use(device_mesh):
            compiled = _compile(program.compiled.lower(*arguments), total, compiler_options or {})
    else:
        temporaries = int(costs.live_bytes(jaxpr) / mesh.batch_parts(device_mesh))
        excess = max(total + temporaries - chip.memory_bytes, 0)
        compiled = Compiled(temporaries, excess=excess)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.parts["parameters"]))
    lines = [
        f"{'sampling' if sample else config.stage} on {topology}: {topology.chips} chips, "
        f"{topology.devices} devices, mesh "
        + " x ".join(f"{axis}={size}" for axis, size in device_mesh.shape.items()),
        f"parameters: {parameters / 1e6:.1f} million, "
        f"batch: {config.batch_size}{f' in rows of {pack}' * (pack > 1)}, compute: {stage.dtype}",
        *([chip_flags.describe(compiler_options)] if chip.tpu else []),
        "",
        *_memory(held, compiled, chip.memory_bytes, estimated=not chip.tpu),
        "",
        *_time(costs.flops(jaxpr), total, compiled, topology),
        "",
        *_traffic(compiled),
        *mesh.describe_whole(program.arguments[0], device_mesh),
    ]
    if compiled.excess:
        lines += ["", *_levers(config, held, compiled, topology, device_mesh)]
    lines += ["", f"took {time.monotonic() - began:.0f} s"]
    return compiled.excess == 0, "\n".join(lines), compiled.text


def _tpu_devices(topology: Topology) -> list[Any]:
    """Return devices of TPUs that need not exist."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for TPUs needs their compiler: pip install 'jax[tpu]' (no TPU is needed)"
        )
    from jax.experimental import topologies

    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chips == 1:  # by default a host has several
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu's own kinds, whose text says what is wrong
        raise ValueError(f"libtpu knows no topology {name}: {str(error)[:200]}") from error
    return list(description.devices)


def _compile(lowered: Any, held: int, flags: Mapping[str, str]) -> Compiled:
    """Compile; a program that is too large is a result, too."""
    from tokenflow_jax.parallel import costs

    # The text comes through a file: jaxlib cannot print every program of a newer libtpu.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **flags}
        try:
            memory = lowered.compile(options).memory_analysis()
        except Exception as error:  # XlaRuntimeError is not public under one name
            sizes = too_large(str(error), held)
            if sizes is None:
                raise
            return Compiled(*sizes)
        texts = sorted(pathlib.Path(folder).glob("*.after_codegen.txt"))
        text = texts[-1].read_text(encoding="utf-8") if texts else ""
    collectives = costs.collectives(text) if text else None
    return Compiled(
        memory.temp_size_in_bytes, memory.generated_code_size_in_bytes, 0, collectives, text
    )


def too_large(message: str, held: int) -> tuple[int, int, int] | None:
    """Read bytes of temporaries, program (0: unknown) and excess from an error about memory.

    `held` are the bytes of the program's arguments; another kind of error gives None.
    """
    number = r"([\d.]+)([KMGT])"
    for pattern, counted in (  # and the bytes of arguments that its first number counts
        (rf"Used {number} of {number} hbm", held),
        (rf"HLO temporaries \({number}\) exceeds available HBM \({number}\)", 0),
    ):
        if found := re.search(pattern, message):
            used = int(float(found[1]) * _UNITS[found[2]])
            available = int(float(found[3]) * _UNITS[found[4]])
            return used - counted, 0, held + used - counted - available
    return None


def _gb(nbytes: float) -> str:
    return f"{nbytes / 2**30:8.2f} GiB"


def _memory(
    held: Mapping[str, int], compiled: Compiled, available: int, estimated: bool
) -> list[str]:
    temporaries = "activations, temporaries" + (" (estimate, nothing fused)" if estimated else "")
    rows = {**held, temporaries: compiled.temporaries, "program": compiled.code}
    total = sum(rows.values())
    lines = ["memory per device"]
    lines += [f"  {name:<44}{_gb(size)}" for name, size in rows.items() if size]
    verdict = (
        f"does NOT fit: {_gb(compiled.excess).strip()} too much" if compiled.excess else "fits"
    )
    return [*lines, f"  {'total':<44}{_gb(total)} of {_gb(available).strip()}: {verdict}"]


def _time(flops: float, held: int, compiled: Compiled, topology: Topology) -> list[str]:
    """Return the roofline: neither arithmetic nor memory can exceed the chip's peak."""
    chip = topology.chip
    compute = flops / (topology.chips * chip.tflops * 1e12)
    # Read and write what is held once, and write and read what is computed once.
    moved = 2 * (held + compiled.temporaries)
    memory = moved / (chip.bandwidth_gbs * 1e9 / chip.devices)
    floor = max(compute, memory)
    return [
        f"operations: {flops / 1e12:.1f} TFLOP per step over all devices, recomputation included",
        f"floor of the step time: {floor * 1e3:.0f} ms "
        f"(arithmetic {compute * 1e3:.0f} ms at {chip.tflops:.0f} TFLOP/s per chip, "
        f"memory {memory * 1e3:.0f} ms at {chip.bandwidth_gbs:.0f} GB/s per chip)",
    ]


def _traffic(compiled: Compiled) -> list[str]:
    if compiled.collectives is None:
        return ["between devices: unknown (there is no compiled program that can be read)"]
    lines = ["between devices, per step and device"]
    for kind, (times, nbytes) in compiled.collectives.items():
        lines.append(f"  {kind:<20}{times:6} times {nbytes / 2**20:10.1f} MiB")
    return lines if len(lines) > 1 else ["between devices: nothing"]


def _levers(
    config: Any, held: Mapping[str, int], compiled: Compiled, topology: Topology, mesh: Any
) -> list[str]:
    """List the three settings that would save most per device."""
    from tokenflow_jax.parallel.mesh import batch_parts

    state = sum(size for name, size in held.items() if name != "batch")
    rows = []
    split, count = mesh.shape["fsdp"], topology.devices // topology.slices
    if split < count:
        saved = state * (1 - split / count)
        rows.append((saved, f"--config.mesh.fsdp={count} --config.mesh.data=1: split the state"))
    if config.remat != "block":
        rows.append((compiled.temporaries * 0.6, "--config.remat=block: recompute activations"))
    parts = batch_parts(mesh) * config.get("pack", 1)
    needed = max(compiled.temporaries - compiled.excess, 1)
    smaller = max(int(config.batch_size * needed / compiled.temporaries) // parts, 1) * parts
    smaller = min(smaller, config.batch_size // 2)
    if smaller >= parts:
        saved = compiled.temporaries * (1 - smaller / config.batch_size)
        rows.append((saved, f"--config.batch_size={smaller}: fewer images per step"))
        each = config.batch_size // parts  # rows per device, which microbatches must divide
        at_least = -(-config.batch_size // smaller)
        times = next((n for n in range(at_least, each + 1) if each % n == 0), 1)
        saved = compiled.temporaries * (1 - 1 / times)
        if times > 1:
            rows.append((saved, f"--config.accumulate={times}: the same batch in parts"))
    most = sorted(rows, reverse=True)[:3]
    lines = [f"  {_gb(saved)}  {text}" for saved, text in most]
    return ["what would save most per device (estimates)", *lines]


def define_flags(define: cli.Define) -> None:
    define.string("topology", None, "CHIP:SHAPE such as v5p:4x4x4, two slices 2*v5e:16x16, or GPUs "
                  "h100:64.")  # fmt: skip
    define.integer("sample", 0, "Pictures to draw at a time, instead of training (generation).")
    define.enum("weights_dtype", "", ["", "int8", "int4", "nf4"], "Of --sample's decoder layers.")
    define.string("hlo", None, "File for the compiled program's text.")


def run(argv: Sequence[str] | None = None) -> int:
    # Tracing and compiling need no device; a TPU of this machine must stay free.
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    return cli.run("preflight", main, define_flags, argv, config=True, runtime=False)


if __name__ == "__main__":
    sys.exit(run())
