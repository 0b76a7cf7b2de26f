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
    links_gbs: float  # that one chip sends to others over all its links at the same time
    clock_ghz: float
    devices: int = 1  # JAX devices per chip
    dimensions: int = 0  # that a TPU's links lead in
    target: str = ""  # of GPUs, what XLA has to know to compile for one

    @property
    def tpu(self) -> bool:
        return not self.target

    @property
    def memory_bytes(self) -> int:
        """Memory of one device."""
        return int(self.memory_gb * (2**30 if self.tpu else 1e9)) // self.devices


def _gpu(
    name: str,
    tflops: float,
    memory_gb: float,
    bandwidth_gbs: float,
    links_gbs: float,
    clock_ghz: float,
    kind: str,
    capability: tuple[int, int],
    cores: int,
    l2: int,
    shared: int,
    fpus: int = 128,
) -> Chip:
    """Return a GPU whose cores have `shared` bytes of shared memory and which has `l2` of cache."""
    # XLA's GpuTargetConfigProto. A block may have all of a core's shared memory but 1 KiB.
    target = f"""gpu_device_info {{
        cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
        core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock_ghz}
        device_memory_size: {int(memory_gb * 1e9)} memory_bandwidth: {int(bandwidth_gbs * 1e9)}
        l2_cache_size: {l2} shared_memory_per_core: {shared}
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared - 1024}
        threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
        runtime_version {{ major: 13 }} device_description_str: "{kind}" """
    return Chip(name, tflops, memory_gb, bandwidth_gbs, links_gbs, clock_ghz, target=target)


# Peaks and memories: Cloud TPU system architecture pages; data sheets of the GPUs (SXM versions,
# without sparsity), whose cores, caches and capabilities come from NVIDIA's architecture papers.
# Links of TPUs: one-way bandwidth per link, as "How to Scale Your Model" measured it, times links
# (Ironwood: 90 % of half of the published 1,200 GB/s for both ways, as on the others); of GPUs:
# half of NVLink's published sum of both ways. Clocks of TPUs: the peak over the operations per
# cycle of all matrix units (v5p: 459e12 / (8 units x 128 x 128 x 2) = 1.75e9).
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275, 32, 1228, 270, 1.05, devices=2, dimensions=3),
        Chip("v5e", 197, 16, 819, 180, 1.5, dimensions=2),
        Chip("v5p", 459, 95, 2765, 540, 1.75, dimensions=3),
        Chip("v6e", 918, 32, 1640, 360, 1.75, dimensions=2),
        Chip("tpu7x", 2307, 192, 7380, 540, 2.2, devices=2, dimensions=3),
        _gpu("a100", 312, 80, 2039, 300, 1.41, "NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 << 20,
             164 << 10, fpus=64),
        _gpu("h100", 989, 80, 3350, 450, 1.98, "NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20,
             228 << 10),
        _gpu("h200", 989, 141, 4800, 450, 1.98, "NVIDIA H200", (9, 0), 132, 50 << 20, 228 << 10),
        _gpu("b200", 2250, 180, 8000, 900, 1.965, "NVIDIA B200", (10, 0), 148, 126 << 20,
             228 << 10),
    )
}  # fmt: skip
# Of a machine of 8 GPUs to others: 8 adapters of 400 Gbit/s, as DGX H100 has. What all of its GPUs
# gather or sum enters and leaves it once.
_NETWORK_GBS = 400


# Pieces of the names that JAX gives to devices.
_KINDS = {
    "v4": ("TPU v4",),
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5",),
    "v6e": ("TPU v6",),
    "tpu7x": ("TPU7x",),
    "a100": ("A100",),
    "h100": ("H100",),
    "h200": ("H200",),
    "b200": ("B200",),
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of a JAX device's `device_kind`; None for an unknown one, such as a CPU."""
    found = (n for n, kinds in _KINDS.items() if any(kind in device_kind for kind in kinds))
    return CHIPS.get(next(found, ""))


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
    def wrap(self) -> tuple[bool, bool, bool]:
        """The dimensions of a TPU slice that are rings, whose ends are linked.

        "All 4x4x4 and larger slices have full 3D torus" (Cloud TPU v5p): optical switches close
        slices of whole cubes. A v5e or v6e pod is a torus of 16 x 16: only 16 chips make a ring.
        """
        if self.chip.dimensions == 3:
            return (len(self.shape) == 3 and all(side % 4 == 0 for side in self.shape),) * 3
        return (*(side == 16 for side in self.shape), False, False)[:3]

    @property
    def links_gbs(self) -> float:
        """Bytes, in 1e9 per second, that a device of a slice sends: its share of the links in use.

        Without a ring, half of a dimension's links lead nowhere at its ends.
        """
        chip = self.chip
        if not chip.tpu:
            return chip.links_gbs if self.hosts == 1 else min(_NETWORK_GBS, chip.links_gbs)
        used = sum((0.5, 1.0)[self.wrap[i]] for i, side in enumerate(self.shape) if side > 1)
        return chip.links_gbs / chip.dimensions * used / chip.devices

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
