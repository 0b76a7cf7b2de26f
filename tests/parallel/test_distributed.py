"""Several processes: detected clusters, flags that go together, and messages of a lost process.

Tests with two real processes are in tests/train/test_processes.py.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tokenflow_jax.parallel import distributed

REPOSITORY = Path(__file__).parents[2]
STEP = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "16"}, "slurm"),
        # The batch script, and a step of one task, are processes of their own.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a.svc,b.svc", "TPU_WORKER_ID": "0"}, "gke"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a.svc", "MEGASCALE_NUM_SLICES": "2"}, "gke"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, "gke"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_clusters_are_detected(environment, expected):
    assert distributed.cluster({"JAX_PLATFORMS": "cpu", **environment}) == expected


def flags(**given):
    names = ("distributed", "coordinator", "num_processes", "process_id")
    return types.SimpleNamespace(**{name: given.get(name) for name in names})


def test_missing_flags_are_named():
    with pytest.raises(ValueError, match="go together; missing: num_processes, process_id"):
        distributed.start(flags(coordinator="host:1"))
    with pytest.raises(ValueError, match="missing: coordinator"):
        distributed.start(flags(num_processes=2, process_id=0))
    with pytest.raises(ValueError, match="--nodistributed contradicts"):
        distributed.start(
            flags(distributed=False, coordinator="h:1", num_processes=1, process_id=0)
        )


def test_a_missing_cluster_is_explained():
    """In a process of its own: jax.distributed can be started once."""
    done = run("distributed.start(flags(distributed=True))")
    assert done.returncode == 1
    assert "did not find each other" in done.stderr and "--nodistributed" in done.stderr


def run(line):
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_distributed import distributed, flags
{line}
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TPU"))}
    environment |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("end", ["os.abort()", "os.kill(os.getpid(), 9)"])
def test_an_abort_is_explained(end):
    done = run(f"distributed._watch(); {end}")
    assert done.returncode < 0
    assert "process 0 of 1 ended unexpectedly" in done.stderr
    assert "Start the same command again" in done.stderr


def test_a_normal_exit_is_silent():
    done = run("distributed._watch(); print('done')")
    assert done.returncode == 0 and done.stdout == "done\n"
    assert "unexpectedly" not in done.stderr
