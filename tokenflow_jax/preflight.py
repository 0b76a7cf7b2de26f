r"""Check whether a training job fits a pod, and how it is laid out, without having one.

    python -m tokenflow_jax.preflight --config=configs/tokenizer.py:xl --topology=v5p:4x4x4 \
        --config.mesh.fsdp=16
    python -m tokenflow_jax.preflight --config=generation:7b --topology=v5e:1x1 --sample=1

Compiles the real training step with the compiler for those chips, which takes minutes and none of
them: libtpu (pip install 'jax[tpu]') for TPUs, the plugin of CUDA for NVIDIA GPUs (h100:8, h200:64;
pip install -e '.[preflight-gpu]'). Prints memory, operations, a floor and an estimate of the step
time, and the traffic between devices. GPUs without their compiler, or anything with --nocompile, is
estimated by arithmetic alone, in seconds. Needs no weights and no data.
Exit codes: 0 it fits, 1 it does not, 2 wrong flags or config.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from tokenflow_jax import cli, stages
from tokenflow_jax.log import log
from tokenflow_jax.parallel import chip_flags, compiling, hlo
from tokenflow_jax.parallel.chips import COMPILER_ONLY, Topology, parse_topology

if TYPE_CHECKING:  # it imports jax
    from tokenflow_jax.parallel.costs import Operations

# Of the peak that kernels reach, whose cycles XLA does not estimate. By the bundles that libtpu
# schedules (benchmarks/compiled.md) splash attention reaches 55 % on v5p with 2,048 tokens and 45 %
# with 947, waits for memory left out.
KERNEL_RATE = 0.5


class Report(NamedTuple):
    """What `report` finds."""

    fits: bool
    text: str
    program: str  # the compiled program's text, where there is one
    figures: Mapping[str, float]  # see `_figures`


def main(options: flags.FlagValues) -> int:
    """Print the report and return the exit code."""
    topology = parse_topology(options.topology or "")
    really = options["compile"].value
    found = report(options.config, topology, options.sample, options.weights_dtype, really)
    if options.hlo and found.program:
        pathlib.Path(options.hlo).write_text(found.program, encoding="utf-8")
    if options.figures:
        text = json.dumps({"fits": found.fits, **found.figures}, indent=1)
        pathlib.Path(options.figures).write_text(text + "\n", encoding="utf-8")
    print(found.text)
    return 0 if found.fits else 1


def report(
    config: Any,
    topology: Topology,
    sample: int = 0,
    weights_dtype: str = "",
    really: bool = True,
) -> Report:
    """Compile a config's step, or drawing `sample` pictures, for a topology and describe it.

    Without `really`, or without a compiler for GPUs, estimate memory by arithmetic.
    """
    import jax  # after the environment is set

    from tokenflow_jax.parallel import costs, mesh

    stages.stage_class(config.stage)
    compiler_options = chip_flags.compiler_options(topology.chip)
    began, chip, sizes = time.monotonic(), topology.chip, config.get("mesh") or {}
    device_mesh = mesh.make_abstract_mesh(sizes, topology.devices)
    pack = config.get("pack", 1)
    mesh.check_batch_size(sample or config.batch_size, device_mesh, pack)
    found = compiling.has_compiler(topology)
    if really and chip.tpu and not found:
        raise ValueError(
            "compiling for TPUs needs their compiler: pip install 'jax[tpu]' (no TPU is needed), "
            "or --nocompile"
        )
    really = really and found
    if really:
        device_mesh = mesh.make_mesh(sizes, compiling.devices(topology))
    elif "attention" in config:
        config.attention = "xla"  # kernels cannot be traced without devices
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
    with mesh.use(device_mesh.abstract_mesh if really else device_mesh):
        jaxpr = jax.make_jaxpr(program.function)(*arguments).jaxpr
    if really:
        log.info("compiling for %s ... (large models: up to 10 minutes on two cores)", topology)
        with mesh.use(device_mesh):
            compiled = compiling.compile_for(
                program.compiled.lower(*arguments), topology, total, compiler_options or {}
            )
    else:
        temporaries = int(costs.live_bytes(jaxpr) / mesh.batch_parts(device_mesh))
        excess = max(total + temporaries - chip.memory_bytes, 0)
        compiled = compiling.Compiled(temporaries, excess=excess)
    operations = costs.operations(jaxpr)
    figures = _figures(operations, total, compiled, topology)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.parts["parameters"]))
    lines = [
        f"{'sampling' if sample else config.stage} on {topology}: {topology.chips} chips, "
        f"{topology.devices} devices, mesh "
        + " x ".join(f"{axis}={size}" for axis, size in device_mesh.shape.items()),
        f"parameters: {parameters / 1e6:.1f} million, "
        f"batch: {config.batch_size}{f' in rows of {pack}' * (pack > 1)}, compute: {stage.dtype}",
        *([chip_flags.describe(compiler_options)] if chip.tpu else []),
        "",
        *_memory(held, compiled, topology, really),
        "",
        *_time(operations, figures, topology),
        "",
        *_traffic(compiled.costs),
        *mesh.describe_whole(program.arguments[0], device_mesh),
    ]
    if compiled.excess:
        lines += ["", *_levers(config, held, compiled, topology, device_mesh)]
    lines += ["", f"took {time.monotonic() - began:.0f} s"]
    return Report(compiled.excess == 0, "\n".join(lines), compiled.text, figures)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 2**30:8.2f} GiB"


def _memory(
    held: Mapping[str, int], compiled: compiling.Compiled, topology: Topology, really: bool
) -> list[str]:
    chip, available = topology.chip, topology.chip.memory_bytes
    temporaries = "activations, temporaries" + ("" if really else " (estimate, nothing fused)")
    rows = {**held, temporaries: compiled.temporaries, "program": compiled.code}
    total = sum(rows.values())
    lines = ["memory per device"]
    lines += [f"  {name:<44}{_gb(size)}" for name, size in rows.items() if size]
    verdict = (
        f"does NOT fit: {_gb(compiled.excess).strip()} too much" if compiled.excess else "fits"
    )
    lines += [f"  {'total':<44}{_gb(total)} of {_gb(available).strip()}: {verdict}"]
    if not chip.tpu and 0.75 * available < total <= available:
        lines += ["  JAX takes 75 % of a GPU's memory: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"]
    if not really:
        lines += ["  by arithmetic, attention without kernels"]
        if not chip.tpu:
            lines += [f"  to compile for GPUs, without one: {compiling.GPU_COMPILER}"]
    elif not chip.tpu:
        lines += ["  without workspaces, which are chosen on the GPU"]
    return lines


def _figures(
    operations: "Operations", held: int, compiled: compiling.Compiled, topology: Topology
) -> dict[str, float]:
    """Return seconds of a step by what takes them, the MFU, and the bytes of memory per device.

    "floor" is the larger of "arithmetic" and "memory". With a compiled program "step" is the sum
    of "instructions", "kernels" and "waiting" for other devices.
    """
    chip, costs = topology.chip, compiled.costs
    peak = topology.chips * chip.tflops * 1e12
    figures = {"arithmetic": operations.computed / peak}
    # Read and write what is held once, and write and read what is computed once.
    moved = 2 * (held + compiled.temporaries)
    figures["memory"] = moved / (chip.bandwidth_gbs * 1e9 / chip.devices)
    figures["floor"] = max(figures.values())
    figures["bytes"] = held + compiled.temporaries + compiled.code
    if costs is None:
        return figures
    if chip.tpu:
        figures["instructions"] = costs.cycles / (chip.clock_ghz * 1e9)
        figures["kernels"] = operations.kernels / peak / KERNEL_RATE
    else:
        figures["instructions"], figures["kernels"] = figures["floor"], 0.0
    working = figures["instructions"] + figures["kernels"]
    rate = topology.links_gbs * 1e9
    beside = costs.beside / rate if rate else 0.0
    figures["waiting"] = (costs.waiting / rate if rate else 0.0) + max(beside - working, 0.0)
    figures["step"] = working + figures["waiting"]
    figures["mfu"] = operations.needed / peak / figures["step"]
    return figures


def _time(operations: "Operations", figures: Mapping[str, float], topology: Topology) -> list[str]:
    chip, ms = topology.chip, {name: f"{1e3 * value:.0f} ms" for name, value in figures.items()}
    lines = [
        f"operations: {operations.computed / 1e12:.1f} TFLOP per step over all devices, "
        f"recomputation included; {operations.needed / 1e12:.1f} without it",
        f"floor of the step time: {ms['floor']} "
        f"(arithmetic {ms['arithmetic']} at {chip.tflops:.0f} TFLOP/s per chip, "
        f"memory {ms['memory']} at {chip.bandwidth_gbs:.0f} GB/s per chip)",
    ]
    if "step" not in figures:
        return lines
    parts = f"instructions {ms['instructions']} by the compiler at {chip.clock_ghz} GHz, "
    parts += f"kernels {ms['kernels']} at {KERNEL_RATE:.0%} of the peak"
    if not chip.tpu:
        parts = f"instructions at the floor, {ms['floor']}: the compiler estimates none"
    return [
        *lines,
        f"estimated step time: {'' if chip.tpu else 'at least '}{ms['step']} ({parts}, "
        f"waiting for other devices {ms['waiting']} at {topology.links_gbs:.0f} GB/s)",
        f"estimated MFU: {'' if chip.tpu else 'at most '}{figures['mfu']:.0%} (operations without "
        "recomputation, kernels of attention without masked pairs; collectives beside other work "
        "are hidden, others are waited for)",
    ]


def _traffic(costs: hlo.Costs | None) -> list[str]:
    if costs is None:
        return ["between devices: unknown (there is no compiled program that can be read)"]
    lines = ["between devices, per step and device"]
    for kind, (times, nbytes) in sorted(costs.collectives.items()):
        lines.append(f"  {kind:<20}{times:6} times {nbytes / 2**20:10.1f} MiB")
    if len(lines) == 1:
        return ["between devices: nothing"]
    sent = f"{costs.waiting / 2**20:.1f} MiB waited for, {costs.beside / 2**20:.1f} beside work"
    return [*lines, f"  sent: {sent}"]


def _levers(
    config: Any,
    held: Mapping[str, int],
    compiled: compiling.Compiled,
    topology: Topology,
    mesh: Any,
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
    define.bool("compile", True, "Compile; otherwise estimate by arithmetic, in seconds.")
    define.string("figures", None, "File for the figures of the step time, JSON, in seconds.")
    define.string("hlo", None, "File for the compiled program's text.")


def run(argv: Sequence[str] | None = None) -> int:
    # Tracing and compiling need no device; a TPU of this machine must stay free.
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    return cli.run("preflight", main, define_flags, argv, config=True, runtime=False)


if __name__ == "__main__":
    sys.exit(run())
