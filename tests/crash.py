"""Kills runs at random moments and flips random bits of checkpoints, and counts the outcomes.

python -m tests.crash --kills=200 --flips=300 --seed=1

After any number of kills the run must end as one that nothing disturbed, curves included. A
checkpoint with a flipped bit must restore to exactly what was saved, or be refused by name.
"""

import argparse
import collections
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

HELPERS = pathlib.Path(__file__).parent / "helpers"
sys.path[:0] = [str(HELPERS), str(HELPERS.parents[1])]

import toy_stage  # noqa: E402 - after its folder is known

from tokenflow_jax.log import hush_tensorstore  # noqa: E402
from tokenflow_jax.train import checkpoint, checkpoint_info, curves  # noqa: E402
from tokenflow_jax.weights.formats import orbax  # noqa: E402


def contents(workdir):
    """Return all that a run leaves: arrays, config and data position, and curves but for speed."""
    info, arrays = orbax.open_checkpoint(workdir, subtrees=("step", "params", "ema", "opt_state"))
    history = curves.read_history(pathlib.Path(workdir) / "metrics.jsonl")
    lines = [{k: v for k, v in line.items() if k[:5] != "perf/"} for line in history]
    info = {name: info[name] for name in ("config", "data", "averages", "step")}
    return info, {name: array.read().tobytes() for name, array in arrays.items()}, lines


def kill(folder, kills, rng):
    """Return how many of so many kills were survived, run by run; raise when a run differs."""
    changes = {"step_delay": 0.02, "checkpoint_every": 3, "log_every": 4}
    reference, done, runs = folder / "reference", 0, 0
    toy_stage.run(reference, **changes)
    expected = contents(reference)
    while done < kills:
        workdir, runs = folder / f"run{runs}", runs + 1
        command = [sys.executable, HELPERS / "toy_stage.py", workdir]
        command += [f"{name}={value}" for name, value in changes.items()]
        for _ in range(rng.randint(3, 8)):
            process = subprocess.Popen(
                list(map(str, command)),
                env={**os.environ, "PYTHONPATH": str(HELPERS.parents[1])},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            # Python and JAX start for two seconds or so; any moment may be the one.
            time.sleep(rng.uniform(0.5, 6.0))
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            output, done = process.communicate(timeout=60)[0], done + 1
            if process.returncode not in (0, -signal.SIGKILL, -signal.SIGTERM):
                raise AssertionError(f"{workdir}: {output}")
        toy_stage.run(workdir, **changes)
        if contents(workdir) != expected:
            raise AssertionError(f"{workdir} differs from {reference} after kills")
        print(f"{done} kills in {runs} runs: each ended like the undisturbed one", flush=True)
        shutil.rmtree(workdir)


def flip(folder, flips, rng):
    """Return the outcomes of so many flips; "silent" must not be among them."""
    hush_tensorstore()
    workdir = folder / "flipped"
    toy_stage.run(workdir, total_steps=7, checkpoint_every=0)
    path = workdir / "checkpoints" / "7"
    good, outcomes = contents(workdir), collections.Counter()
    names = sorted(file for file in path.rglob("*") if file.is_file())
    state = toy_stage.run(workdir, total_steps=7, checkpoint_every=0).state
    saved = jax.tree.map(np.asarray, jax.tree.leaves(state))
    for _ in range(flips):
        file = rng.choice(names)
        before = file.read_bytes()
        if not before:
            continue
        changed = bytearray(before)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        outcomes[f"open: {opened(workdir, good)}"] += 1
        outcomes[f"restore: {restored(workdir, state, saved, good[0])}"] += 1
        file.write_bytes(before)
    return outcomes


def opened(workdir, good):
    try:
        return "right" if contents(workdir) == good else "silent"
    except checkpoint.CheckpointError as error:
        return "refused" if str(workdir) in str(error) else "refused without its name"


class Position:
    def set_state(self, positions):
        self.positions = positions


def restored(workdir, state, saved, info):
    position = Position()
    checkpoints = checkpoint.Checkpoints(workdir)
    try:
        found = jax.tree.leaves(checkpoints.restore(7, state, position))
        same = all(np.array_equal(a, b) for a, b in zip(map(np.asarray, found), saved, strict=True))
        again = checkpoint_info.read_info(checkpoints.path(7))
        same = same and position.positions == info["data"]
        same = same and all(again[name] == info[name] for name in info)
        return "right" if same else "silent"
    except checkpoint.CheckpointError as error:
        return "refused" if str(workdir) in str(error) else "refused without its name"
    finally:
        checkpoints.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("kills", 20), ("flips", 300), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = flip(pathlib.Path(folder), options.flips, rng)
        for name, count in sorted(outcomes.items()):
            print(f"{count:6d} {name}", flush=True)
        kill(pathlib.Path(folder), options.kills, rng)
    return int(any("silent" in name or "without" in name for name in outcomes))


if __name__ == "__main__":
    sys.exit(main())
