"""Starts in several processes: each reads and holds what its own devices do."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.weights.language_model import language_model_template, save_language_model

PROGRAM = pathlib.Path(__file__).parents[1] / "helpers" / "start_program.py"
SLACK = 48  # MiB: a piece of a file, compiled programs, threads


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tokenizer, and a language model of 180 MiB whose largest array has 64."""
    folder = tmp_path_factory.mktemp("start")
    lm = LMConfig(65536, 256, 2, 8, 2, 8192, qkv_bias=True)
    rng = np.random.default_rng(0)
    shapes = language_model_template(lm)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    save_language_model(folder / "lm", lm, params)
    return str(tiny.write_tokenizer(folder / "tokenizer")), str(folder / "lm")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage,processes", [("understanding", 2), ("understanding", 4), ("generation", 2)]
)
def test_no_process_holds_what_its_devices_do_not(stage, processes, places):
    tokenizer, folder = places
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(8 // processes),
        "TOKENIZER": tokenizer,
    }
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, stage, folder, f"--coordinator=localhost:{port}",
             f"--num_processes={processes}", f"--process_id={number}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [p.returncode for p in started] == [0] * processes, "\n".join(outputs)
    for number, output in enumerate(outputs):
        found = re.search(rf"process {number} took (\d+) of (\d+), largest (\d+)", output)
        took, share, largest = map(int, found.groups())
        print(f"{stage}, {processes} processes: {found[0]} MiB")
        assert took < share + largest + SLACK, output
