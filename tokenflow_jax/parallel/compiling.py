"""Compiles programs for accelerators that need not exist."""

import importlib.util
import math
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenflow_jax.parallel import hlo
from tokenflow_jax.parallel.chips import Topology

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Without a GPU nothing can be tried out, and Triton's products need that.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
GPU_COMPILER = "pip install jax-cuda13-plugin && pip install --no-deps nvidia-cudnn-cu13"


class Compiled(NamedTuple):
    """Bytes per device as the compiler, or for GPUs without theirs arithmetic, finds them."""

    temporaries: int
    code: int = 0
    excess: int = 0  # that do not fit
    costs: hlo.Costs | None = None  # None: unknown
    text: str = ""  # the program's, where there is one


def has_compiler(topology: Topology) -> bool:
    """Return True if the compiler for a kind of chip is installed."""
    names = ("libtpu",) if topology.chip.tpu else ("jax_plugins.xla_cuda13", "nvidia.cudnn")
    try:
        return all(importlib.util.find_spec(name) for name in names)
    except ModuleNotFoundError:  # a name's first half
        return False


def devices(topology: Topology) -> list[Any]:
    """Return devices that need not exist; needs the compiler for them."""
    from jax.experimental import topologies

    chip, options = topology.chip, {}
    if chip.tpu:
        name = f"{chip.name}:{'x'.join(map(str, topology.shape))}"
        options["wrap"] = topology.wrap
        if topology.slices > 1:
            options["num_slices"] = topology.slices
        if topology.chips == 1:  # by default a host has several
            options["chips_per_host_bounds"] = (1, 1, 1)
        arguments = {"platform": "tpu", "topology_name": name}
    else:
        each = math.gcd(math.prod(topology.shape), 8)  # slices x machines x GPUs of a machine
        name = f"{topology.slices}x{math.prod(topology.shape) // each}x{each}"
        options = {"topology": name, "target_config": chip.target}
        arguments = {"platform": "cuda", "topology_name": ""}
    try:
        return list(topologies.get_topology_desc(**arguments, **options).devices)
    except Exception as error:  # the plugins' own kinds, whose text says what is wrong
        raise ValueError(
            f"the compiler knows no topology {topology}: {str(error)[:200]}"
        ) from error


def compile_for(lowered: Any, topology: Topology, held: int, flags: Mapping[str, str]) -> Compiled:
    """Compile; a program that is too large is a result, too.

    `held` are the bytes of the program's arguments, `flags` the compiler's for a TPU.
    """
    if not topology.chip.tpu:
        compiled = lowered.compile(_GPU_OPTIONS)
        temporaries, code = program_sizes(compiled.memory_analysis())
        # Nothing is refused for its size: the device's own allocator would.
        excess = max(held + temporaries + code - topology.chip.memory_bytes, 0)
        text = compiled.as_text()
        return Compiled(temporaries, code, excess, hlo.read(text), text)
    # The text comes through a file: jaxlib cannot print every program of a newer libtpu.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **flags}
        try:
            temporaries, code = program_sizes(lowered.compile(options).memory_analysis())
        except Exception as error:  # XlaRuntimeError is not public under one name
            sizes = too_large(str(error), held)
            if sizes is None:
                raise
            return Compiled(*sizes)
        texts = sorted(pathlib.Path(folder).glob("*.after_codegen.txt"))
        text = texts[-1].read_text(encoding="utf-8") if texts else ""
    return Compiled(temporaries, code, 0, hlo.read(text) if text else None, text)


def program_sizes(memory: Any) -> tuple[int, int]:
    """Return bytes of temporaries, with results that take no donated argument's place, and code."""
    results = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    return memory.temp_size_in_bytes + results, memory.generated_code_size_in_bytes


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
