"""What a training step of each row costs: time, taken in turn so that rows compare, and memory.

Memory is what XLA plans for the compiled step: arguments, results and temporaries. The most memory
of a process would count compiling, too.
"""

import importlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.matrix import Run
from tokenflow_jax import stages
from tokenflow_jax.parallel import compiling, mesh
from tokenflow_jax.train.prefetch import DevicePrefetcher

_ROUNDS, _STEPS, _WARM_UP = 12, 4, 2  # rounds, steps of each row in one, rounds that do not count


def measure(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return "step_ms", the median time of a step, and "memory_gb" of each run, by its name."""
    going, times, memory = {}, {run.name: [] for run in runs}, {}
    for run in runs:
        print(f"measuring: {run.name}", flush=True)
        config = importlib.import_module(f"configs.{Path(run.config).stem}").get_config()
        config.update_from_flattened_dict(dict(run.settings))
        stage = stages.make_stage(config, mesh.make_mesh(config.mesh)).open()
        state, data = stage.init(), DevicePrefetcher(stage.data(), stage.batch_sharding)
        memory[run.name] = _gigabytes(stage, state, next(data))
        going[run.name] = stage, state, data
    for number in range(_ROUNDS):
        for name, (stage, state, data) in going.items():
            for batch in [next(data) for _ in range(_STEPS)]:
                start = time.perf_counter()
                state, metrics = stage.step(state, batch)
                jax.block_until_ready((state, metrics))
                if number >= _WARM_UP:
                    times[name].append(1000 * (time.perf_counter() - start))
            going[name] = stage, state, data
    return {
        name: {"step_ms": statistics.median(times[name]), "memory_gb": memory[name]}
        for name in times
    }


def _gigabytes(stage: Any, state: Any, batch: Any) -> float:
    with mesh.use(stage.mesh):
        step = stage.program.compiled.trace(state, stage.frozen, batch).lower().compile()
    plan = step.memory_analysis()
    return (plan.argument_size_in_bytes + compiling.program_sizes(plan)[0]) / 1e9
