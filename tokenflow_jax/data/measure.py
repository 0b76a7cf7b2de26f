"""Measure the input pipeline of a config alone, on this machine's cores: is it fast enough?

    python -m tokenflow_jax.data.measure --config=tokenizer:b --config.data.path=DIR
    python -m tokenflow_jax.data.measure --config=tokenizer:b ... --topology=v5p:4x4x4

No model is trained and no accelerator is touched. A topology adds how long a step takes there at
least, by its arithmetic, and how many hosts like this one would feed it. `--step_ms` replaces that
time by a measured one.
"""

import collections
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from tokenflow_jax import cli, log, stages
from tokenflow_jax.data import images
from tokenflow_jax.data.chat import conversations
from tokenflow_jax.parallel import chips

_WARM_UP_S = 2.0
_BUSY = 0.8  # of the cores: more of them would help

# What is timed of an example, by the functions that do it; the source of the data is "read".
_PARTS = {
    "decode": [(images, "decode")],
    "crop": [(images, "random_crop"), (images, "center_crop"), (conversations, "fit_image")],
    "tokenize": [(conversations, "prepare")],
}


class Measured(NamedTuple):
    """A run of the pipeline; times are in seconds per example."""

    rate: float  # examples per second
    cores: float  # that were busy
    cpu: dict[str, float]  # by part
    waiting: dict[str, float]  # by part: beyond its CPU time


class _Clock:
    """CPU and wall time of functions by part, over all threads; inner parts do not count twice."""

    def __init__(self):
        self.cpu, self.wall = collections.Counter(), collections.Counter()
        self._lock, self._local = threading.Lock(), threading.local()

    def timed(self, part: str, function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            outer = getattr(self._local, "inner", None)
            self._local.inner = inner = [0.0, 0.0]
            cpu, wall = time.thread_time(), time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
                with self._lock:
                    self.cpu[part] += cpu - inner[0]
                    self.wall[part] += wall - inner[1]
                self._local.inner = outer
                if outer is not None:
                    outer[0], outer[1] = outer[0] + cpu, outer[1] + wall

        return call

    def clear(self) -> None:
        with self._lock:
            self.cpu.clear()
            self.wall.clear()


class _TimedSource:
    """A source whose reading is timed."""

    def __init__(self, source: Any, clock: _Clock):
        self._source = source
        self._read = clock.timed("read", source.__getitem__)
        if hasattr(source, "image_bytes"):
            self.image_bytes = clock.timed("read", source.image_bytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._read(index)


@contextlib.contextmanager
def _timing(data_set: Any) -> Iterator[_Clock]:
    """Time the parts of this process's pipeline within the block."""
    clock, before = _Clock(), []
    holder = getattr(data_set, "decoded", data_set)
    if hasattr(holder, "source"):
        before.append((holder, "source", holder.source))
        holder.source = _TimedSource(holder.source, clock)
    for part, functions in _PARTS.items():
        for module, name in functions:
            before.append((module, name, getattr(module, name)))
            setattr(module, name, clock.timed(part, getattr(module, name)))
    try:
        yield clock
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def measure(stage: Any, seconds: float) -> Measured:
    """Run the training batches of an open stage for some seconds."""
    examples = stage.config.batch_size
    with _timing(stage.data_set) as clock:
        batches = stage.data()
        try:
            _take(batches, _WARM_UP_S)
            clock.clear()
            cpu, began = time.process_time(), time.perf_counter()
            count = _take(batches, seconds) * examples
            elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
        finally:
            batches.close()
    made = max(count, 1)
    parts = {name: value / made for name, value in clock.cpu.items()}
    parts["other"] = max(cpu / made - sum(parts.values()), 0.0)
    waiting = {name: max(wall - clock.cpu[name], 0.0) / made for name, wall in clock.wall.items()}
    return Measured(count / elapsed, cpu / elapsed, parts, waiting)


def _take(batches: Iterator[Any], seconds: float) -> int:
    """Take batches for some seconds, at least one, and return their number."""
    end, count = time.perf_counter() + seconds, 0
    while not count or time.perf_counter() < end:
        next(batches)
        count += 1
    return count


def describe(found: Measured, cores: int) -> list[str]:
    """Return lines about a run on a machine with some cores."""
    total = sum(found.cpu.values())
    lines = ["per example, ms      on a core     waiting"]
    for part in ("read", "decode", "crop", "tokenize", "other"):
        if cpu := found.cpu.get(part):
            wait = found.waiting.get(part, 0.0)
            lines.append(f"  {part:<12}{cpu * 1e3:16.3f}{wait * 1e3:12.3f}")
    lines.append(
        f"this process: {found.rate:,.0f} examples/s with {found.cores:.1f} of {cores} cores, "
        f"{1 / max(total, 1e-9):,.0f} per core"
    )
    if found.cores > _BUSY * cores:
        part = max(found.cpu, key=found.cpu.get)
        limit = f"the cores, {found.cpu[part] / total:.0%} of whose time goes to: {part}"
    elif found.waiting.get("read", 0.0) > total:
        limit = (
            "waiting for the storage: more --config.data.threads, or data.shuffle_block, or the "
            "data on a faster disk"
        )
    else:
        limit = "one process's Python, or its number of threads (--config.data.threads)"
    return [*lines, f"what limits it: {limit}"]


def floor_of_step(config: Any, topology: chips.Topology) -> float:
    """Return the seconds that a step's arithmetic takes on a topology at its peak."""
    import jax

    from tokenflow_jax.parallel import costs, mesh

    device_mesh = mesh.make_abstract_mesh(config.get("mesh") or {}, topology.devices)
    program = stages.make_stage(config, device_mesh, "tpu").program
    with mesh.use(device_mesh):
        jaxpr = jax.make_jaxpr(program.function)(*program.arguments).jaxpr
    return costs.operations(jaxpr).computed / (topology.chips * topology.chip.tflops * 1e12)


def demand(rate: float, batch_size: int, step: float, hosts: int, name: str) -> list[str]:
    """Return lines that compare a host's rate with what steps of some seconds need."""
    needed = batch_size / step
    wanted = -(-needed // rate)
    verdict = f"enough, {rate * hosts / needed:.1f} times what is needed"
    if rate * hosts < needed:
        times = needed / rate / hosts
        verdict = f"NOT enough: {wanted:,.0f} hosts are, or ones {times:.1f} times as fast"
    return [
        f"{name}: a batch of {batch_size} in {step * 1e3:,.0f} ms needs {needed:,.0f} examples/s",
        f"{hosts} hosts like this one: {rate * hosts:,.0f} examples/s, {verdict}",
    ]


def main(options: flags.FlagValues) -> None:
    if options.seconds <= 0:
        raise ValueError(f"--seconds={options.seconds} must be above 0")
    from tokenflow_jax.parallel import mesh

    config = options.config
    topology = chips.parse_topology(options.topology) if options.topology else None
    step = options.step_ms and options.step_ms / 1e3
    if topology and not step:
        log.log.info("tracing the step for %s, less than a minute", topology)
        step = floor_of_step(config, topology)
    batch_size = config.batch_size
    hosts = topology.hosts if topology else 1
    with config.unlocked():  # one host's share, on this machine
        config.batch_size, config.mesh = max(batch_size // hosts, 1), {}
        if config.data.get("encode"):
            config.data.encode = "step"
    stage = stages.make_stage(config, mesh.make_mesh({}))
    if config.stage != "tokenizer":  # whose pictures need no frozen network
        stage.open()
    data = config.data
    about = f"{data.name} {data.path}".strip()
    print(f"{about}, split {data.split}: {len(stage.data_set):,} examples")
    print(f"measuring for {options.seconds + _WARM_UP_S:.0f} s", flush=True)
    found = measure(stage, options.seconds)
    print("\n".join(describe(found, len(os.sched_getaffinity(0)))))
    if step:
        name = str(topology) if topology else "this run"
        print("\n".join(demand(found.rate, batch_size, step, hosts, name)))


def define_flags(define: cli.Define) -> None:
    define.string("topology", None, "CHIP:SHAPE such as v5p:4x4x4 or h100:64, to compare with.")
    define.float("step_ms", None, "A step's time in milliseconds, if it was measured.")
    define.float("seconds", 10.0, "How long to measure.")


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator of this machine stays free
    for name, value in chips.COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    return cli.run("measure", main, define_flags, argv, config=True, runtime=False)


if __name__ == "__main__":
    sys.exit(run())
