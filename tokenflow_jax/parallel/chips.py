"""Accelerators as their makers publish them, and topologies such as "v5p:4x4x4"."""

import math
import re
from typing import NamedTuple

# Environment of libtpu as a mere compiler: ask no metadata server, lock no device, log errors only.
COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


class Chip(NamedTuple):
    """One kind of accelerator; figures are per chip."""

    name: str  # as in a topology
    tflops: float  # peak dense bfloat16, 1e12 operations per second
    memory_gb: float  # high-bandwidth memory, in vendors' GB (TPUs: 2**30 bytes)
    bandwidth_gbs: float  # of that memory, 1e9 bytes per second
    tpu: bool = True  # TPUs can be compiled for without having one
    devices: int = 1  # JAX devices per chip

    @property
    def memory_bytes(self) -> int:
        """Memory of one device."""
        return int(self.memory_gb * (2**30 if self.tpu else 1e9)) // self.devices


# Cloud TPU system architecture pages; data sheets of the GPUs (SXM versions, without sparsity).
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275, 32, 1228, devices=2),
        Chip("v5e", 197, 16, 819),
        Chip("v5p", 459, 95, 2765),
        Chip("v6e", 918, 32, 1640),
        Chip("tpu7x", 2307, 192, 7380, devices=2),
        Chip("a100", 312, 80, 2039, tpu=False),
        Chip("h100", 989, 80, 3350, tpu=False),
        Chip("h200", 989, 141, 4800, tpu=False),
        Chip("b200", 2250, 180, 8000, tpu=False),
    )
}


class Topology(NamedTuple):
    """Chips of one kind, in slices of the same shape."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each side of one slice
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Number of machines, as the clouds usually build them: 4 TPU chips each, or 8 GPUs."""
        return max(self.chips // (4 if self.chip.tpu else 8), 1)

    def __str__(self) -> str:
        text = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return text if self.slices == 1 else f"{self.slices}*{text}"


def parse_topology(text: str) -> Topology:
    """Parse "v5p:4x4x4", "v6e:16x16", "2*v5e:16x16" (two slices) or "h100:64"."""
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text)
    if match is None or match[2] not in CHIPS:
        raise ValueError(
            f"topology {text!r}: write CHIP:SHAPE such as v5e:4x4, v5p:4x4x4, 2*v6e:16x16 or "
            f"h100:64; the chips are {', '.join(CHIPS)}"
        )
    shape = tuple(map(int, match[3].split("x")))
    slices = int(match[1] or 1)
    if 0 in (*shape, slices):
        raise ValueError(f"topology {text!r} has no chips")
    return Topology(CHIPS[match[2]], shape, slices)
