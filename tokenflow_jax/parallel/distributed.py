"""Several processes that work together: finding each other, and noticing when one is lost.

`start` is called once, before the first use of a device. On TPU pods, under `srun` and in GKE it
needs no flags; elsewhere --coordinator, --num_processes and --process_id identify the processes.

When a process dies the others' collectives would block forever. JAX's coordination service notices
within HEARTBEAT_SECONDS and then aborts every process, with a page of C++ on stderr. A shell that
watches for the end of this process adds what it means and what to do.
"""

import atexit
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

HEARTBEAT_SECONDS = 30
_REMEDY = (
    "All saved checkpoints are intact. Start the same command again on all machines, or on fewer: "
    "it continues from the last complete checkpoint of its workdir."
)
# Prints its argument unless a line arrives before the end of its input. It ignores signals to the
# whole process group.
_WATCH = 'trap "" HUP INT TERM; read -r line || printf "%s\\n" "$1" >&2'
_watcher: subprocess.Popen | None = None


def define_flags(define: Any) -> None:
    """Define --distributed, --coordinator, --num_processes and --process_id, by a `cli.Define`."""
    define.bool(
        "distributed",
        None,
        "Run as one of several processes; by default detected: a TPU pod, srun and GKE are "
        "recognized. --nodistributed turns it off.",
    )
    define.string("coordinator", None, "HOST:PORT of process 0, where it is not detected.")
    define.integer("num_processes", None, "With --coordinator: the number of processes.", 1)
    define.integer("process_id", None, "With --coordinator: this process's index.", 0)


def start(values: Any) -> None:
    """Connect this process to the others, if the flags or the machine ask for it."""
    given = {
        "coordinator_address": values.coordinator,
        "num_processes": values.num_processes,
        "process_id": values.process_id,
    }
    lacking = [name for name, value in given.items() if value is None]
    if 0 < len(lacking) < len(given):
        raise ValueError(
            "--coordinator, --num_processes and --process_id go together; "
            f"missing: {', '.join(name.removesuffix('_address') for name in lacking)}"
        )
    if values.distributed is False and not lacking:
        raise ValueError("--nodistributed contradicts --coordinator; drop one of them")
    detect = values.distributed is None and lacking
    if values.distributed is False or (detect and cluster(os.environ) is None):
        return
    import jax  # here, so that wrong flags are reported at once

    try:
        jax.distributed.initialize(
            **(given if not lacking else {}), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes of this run did not find each other ({error}); identify them with "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I, or use --nodistributed if "
            "this machine works alone"
        ) from error
    if jax.process_count() > 1:
        _watch()


def cluster(environment: Mapping[str, str]) -> str | None:
    """Detect the cluster that started this process as one of several.

    Returns:
      "slurm" (a step of several tasks), "gke" (several TPU hosts, or an indexed job), "tpu" (a
      Cloud TPU VM, even of one host: its preemption notices come this way), or None.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1:
        return "slurm"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "gke"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "gke"
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or hosts:
        return None
    if "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return None
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" if chips else None


def leave(cause: str) -> None:
    """End a process that failed alone among several with exit code 1; a lone process returns."""
    # At once: a normal exit waits for the others, and these may wait for this one. They notice that
    # its heartbeat is gone.
    import jax

    if jax.process_count() == 1:
        return
    _dismiss()
    print(f"{_name()} ends: {cause}. {_REMEDY}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _name() -> str:
    import jax

    return f"tokenflow_jax: process {jax.process_index()} of {jax.process_count()}"


def _watch() -> None:
    """Start a shell that prints a line if this process ends, in any way, without `_dismiss`."""
    global _watcher
    text = (
        f"{_name()} ended unexpectedly. If the lines above mention heartbeats, the coordination "
        "service or unhealthy tasks, another process was lost (killed, out of memory, preempted): "
        f"see its own log. {_REMEDY}"
    )
    command = ["sh", "-c", _WATCH, "sh", text]
    _watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(_dismiss)


def _dismiss() -> None:
    global _watcher
    if _watcher is not None:
        watcher, _watcher = _watcher, None
        watcher.communicate(b"done\n")
