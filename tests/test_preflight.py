"""Preflight: topologies, the arithmetic for GPUs, and a small step compiled for real TPUs."""

import os
import pathlib
import subprocess
import sys

import pytest

from tokenflow_jax import preflight as command
from tokenflow_jax.parallel import chips

ROOT = pathlib.Path(__file__).parents[1]


def preflight(*arguments):
    command = [sys.executable, "-m", "tokenflow_jax.preflight", "--config=configs/tokenizer.py"]
    command[-1] += arguments[0]
    done = subprocess.run(
        [*command, *arguments[1:]], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    return done.returncode, done.stdout, done.stderr


def test_topologies():
    topology = chips.parse_topology("2*v5e:16x16")
    assert (topology.chips, topology.devices, str(topology)) == (512, 512, "2*v5e:16x16")
    assert chips.parse_topology("tpu7x:2x2x1").devices == 8
    assert chips.parse_topology("h100:64").chip.memory_bytes == 80e9
    for wrong in ("v5p", "v9:2x2", "v5e:4x0", "4x4", "v5e:4x4:2"):
        with pytest.raises(ValueError, match=r"has no chips|write CHIP:SHAPE"):
            chips.parse_topology(wrong)


def test_gpus_by_arithmetic():
    code, text, _ = preflight(":b", "--topology=h100:8")
    assert code == 0 and "181.9 million" in text and ": fits" in text
    code, text, _ = preflight(":xl", "--topology=h100:2", "--config.batch_size=512")
    assert code == 1 and "does NOT fit" in text
    for lever in ("--config.batch_size=", "--config.accumulate=", "--config.mesh.fsdp=2"):
        assert lever in text


def test_wrong_arguments_are_one_line():
    for arguments, message in (
        (("", "--topology=v9:2x2"), "write CHIP:SHAPE"),
        (("", "--topology=v5e:2x2", "--config.mesh.data=3"), "does not fill the 4 devices"),
        (("", "--topology=v5e:2x2", "--config.batch_size=6"), "cannot be split over 4 devices"),
    ):
        code, _, error = preflight(*arguments)
        assert code == 2 and message in error and "Traceback" not in error, error


def test_both_complaints_of_the_compiler_are_understood():
    gib = 2**30
    used = "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity"
    assert command.too_large(used, 2 * gib) == (18 * gib, 0, int(4.25 * gib))
    needed = (
        "CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (57.50G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert command.too_large(needed, 2 * gib) == (int(57.5 * gib), 0, int(43.75 * gib))
    assert command.too_large("INTERNAL: something else", 0) is None


@pytest.mark.slow
def test_the_quickstart_compiles_for_a_tpu():
    """Needs libtpu: pip install -e '.[test,preflight]'."""
    code, text, error = preflight("", "--topology=v5e:2x2", "--config.mesh.fsdp=2")
    assert code == 0, error
    assert "compiler flags: xla_tpu_run_space_to_batch=false" in text
    assert "all-reduce" in text and "whole on every device" in text and ": fits" in text
