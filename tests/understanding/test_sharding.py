"""Eight fake devices against one: the same losses and the same answers."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HELPERS = pathlib.Path(__file__).parents[1] / "helpers"
MESHES = ("1,8,1,1", "1,1,8,1", "1,2,2,2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "meshes"),
    [("", MESHES), (":nf4", MESHES), (":int8", MESHES[-1:]), (":auto", MESHES[-1:])],
)
def test_steps_and_answers_are_the_same(kind, meshes):
    """Also with adapters beside frozen weights, quantized or not, that come as in a stage."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    names = [name + kind for name in ("one", *meshes)]
    command = [sys.executable, str(HELPERS / "understanding_sharding_program.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = json.loads(done.stdout.splitlines()[-1])
    assert one["losses"][2] < one["losses"][0]
    for name, result in zip(meshes, others, strict=True):
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5, err_msg=name)
        assert result["ids"] == one["ids"], name
        assert (result["split"] > 0.5) == (name != "1,8,1,1"), name
