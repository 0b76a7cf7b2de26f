"""Time the training steps of rows in turn, in one process, so that they compare."""

import importlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.matrix import Run

_ROUNDS, _STEPS, _WARM_UP = 12, 4, 2  # rounds, steps of each row in one, rounds that do not count


def milliseconds(runs: Sequence[Run]) -> dict[str, float]:
    """Return the median time of a step of each run, by its name."""
    import jax

    from tokenflow_jax import stages
    from tokenflow_jax.parallel import mesh
    from tokenflow_jax.train.prefetch import DevicePrefetcher

    going, times = {}, {run.name: [] for run in runs}
    for run in runs:
        print(f"timing: {run.name}", flush=True)
        config = importlib.import_module(f"configs.{Path(run.config).stem}").get_config()
        config.update_from_flattened_dict(dict(run.settings))
        stage = stages.make_stage(config, mesh.make_mesh(config.mesh)).open()
        going[run.name] = stage, stage.init(), DevicePrefetcher(stage.data(), stage.batch_sharding)
    for number in range(_ROUNDS):
        for name, (stage, state, data) in going.items():
            for batch in [next(data) for _ in range(_STEPS)]:
                start = time.perf_counter()
                state, metrics = stage.step(state, batch)
                jax.block_until_ready((state, metrics))
                if number >= _WARM_UP:
                    times[name].append(1000 * (time.perf_counter() - start))
            going[name] = stage, state, data
    return {name: statistics.median(found) for name, found in times.items()}
