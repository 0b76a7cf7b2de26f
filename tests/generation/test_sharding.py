"""The training step on several devices."""

import json
import os
import pathlib
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).parents[1] / "helpers" / "generation_sharding_program.py"


def test_no_device_holds_the_whole_batch_s_tokens():
    """The projector's inputs have few channels: XLA would gather what it makes of them."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = json.loads(done.stdout.splitlines()[-1])
    # The gradient of the embedding's rows needs all ids' rows; the picture has 680 codes and more.
    assert not [shape for shape in whole if shape[0] >= 256], whole
