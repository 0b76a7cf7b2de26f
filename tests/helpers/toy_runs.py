"""Programs that train the toy stage, and comparisons of what they leave."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import toy_stage
from read_weights import load_for_inference

from tokenflow_jax.train import curves

REPOSITORY = Path(__file__).parents[2]


def start(workdir, *changes, **popen):
    """Starts the toy run as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(Path(toy_stage.__file__)), str(workdir), *changes],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def wait_for_step(workdir, step, process, limit=240):
    """Waits until metrics.jsonl shows a step."""
    began = time.time()
    while not any(line["step"] >= step for line in curves.read_history(workdir / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.time() - began < limit, "the run does not get on"
        time.sleep(0.02)


def arrays_of(workdir):
    """Every array of the newest checkpoint by name, read without the loop."""
    fields = ("step", "params", "ema", "opt_state")
    _, state = load_for_inference(workdir, subtrees=fields)
    named = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}


def assert_same_end(workdir, reference):
    mine, theirs = arrays_of(workdir), arrays_of(reference)
    assert mine.keys() == theirs.keys() and len(mine) > 12
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
