"""Starts the processes of one run on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

HELPERS = pathlib.Path(__file__).parent
DEVICES = 8  # of all processes together


def start(program, *arguments, processes=1, **environment):
    """Start a program of this folder in so many processes, which share the devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
        **environment,
    }
    started = []
    for i in range(processes):
        command = [sys.executable, HELPERS / program, *arguments]
        if processes > 1:
            command += [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
            command += [f"--process_id={i}"]
        started.append(
            subprocess.Popen(
                list(map(str, command)),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(started):
    """Return the outputs of processes that must succeed."""
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [p.returncode for p in started] == [0] * len(started), "\n".join(outputs)
    return outputs
