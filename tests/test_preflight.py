"""Preflight: topologies, the arithmetic for GPUs, and a small step compiled for real TPUs."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def preflight(*arguments):
    command = [sys.executable, "-m", "tokenflow_jax.preflight", "--config=configs/tokenizer.py"]
    command[-1] += arguments[0]
    done = subprocess.run(
        [*command, *arguments[1:]], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    return done.returncode, done.stdout, done.stderr


def test_gpus_by_arithmetic():
    code, text, _ = preflight(":b", "--topology=h100:8", "--nocompile")
    assert code == 0 and "181.9 million" in text and ": fits" in text
    code, text, _ = preflight(":xl", "--topology=h100:2", "--config.batch_size=512", "--nocompile")
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


@pytest.mark.slow
def test_the_quickstart_compiles_for_a_tpu():
    """Needs libtpu: pip install -e '.[test,preflight]'."""
    code, text, error = preflight("", "--topology=v5e:2x2", "--config.mesh.fsdp=2")
    assert code == 0, error
    assert "all-reduce" in text and "whole on every device" in text and ": fits" in text
