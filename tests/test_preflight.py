"""Preflight: topologies, the arithmetic for GPUs, and a small step compiled for real TPUs."""

import json
import pathlib
import subprocess
import sys

import pytest

from tokenflow_jax import preflight as command
from tokenflow_jax.parallel import chips, compiling, costs, hlo

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"--config={ROOT}/configs/tokenizer.py"


@pytest.fixture
def preflight(capsys, monkeypatch):
    """The command in this process: exit code, output and messages."""
    for name, value in chips.COMPILER_ONLY.items():
        monkeypatch.setenv(name, value)  # the command would set it for good

    def run(*arguments):
        code = command.run([*arguments])
        return code, *capsys.readouterr()

    return run


def test_gpus_by_arithmetic(preflight):
    code, text, _ = preflight(f"{CONFIG}:b", "--topology=h100:8", "--nocompile")
    assert code == 0 and "181.9 million" in text and ": fits" in text
    large = ("--config.batch_size=512", "--nocompile")
    code, text, _ = preflight(f"{CONFIG}:xl", "--topology=h100:2", *large)
    assert code == 1 and "does NOT fit" in text
    for lever in ("--config.batch_size=", "--config.accumulate=", "--config.mesh.fsdp=2"):
        assert lever in text


def test_estimated_times_are_the_sum_of_what_takes_them():
    operations = costs.Operations(computed=64 * 459e12, needed=48 * 459e12, kernels=64 * 45.9e12)
    program = hlo.Costs(cycles=1_750_000_000, waiting=54 * 10**9, beside=0)
    compiled = compiling.Compiled(10**9, 5, costs=program)
    pod = chips.parse_topology("v5p:4x4x4")
    found = command._figures(operations, 10**9, compiled, pod)
    assert found["arithmetic"] == found["floor"] == 1 and found["bytes"] == 2 * 10**9 + 5
    parts = {"instructions": 1.0, "kernels": 0.1 / command.KERNEL_RATE, "waiting": 0.1}
    assert found["step"] == pytest.approx(sum(parts.values()))
    assert {name: found[name] for name in parts} == pytest.approx(parts)
    assert found["mfu"] == pytest.approx(0.75 / found["step"])
    # Beside the work, 1.5 s of traffic leave the rest to wait for.
    program.waiting, program.beside = 0, 810 * 10**9
    again = command._figures(operations, 10**9, compiled, pod)
    assert again["waiting"] == pytest.approx(1.5 - parts["instructions"] - parts["kernels"])
    # Nobody estimates instructions of GPUs: they take the floor, at least.
    machine = chips.parse_topology("h100:8")
    found = command._figures(operations, 10**9, compiled, machine)
    assert found["step"] >= found["instructions"] == found["floor"] and found["kernels"] == 0


def test_wrong_arguments_are_one_line(preflight):
    for arguments, message in (
        (("--topology=v9:2x2",), "write CHIP:SHAPE"),
        (("--topology=v5e:2x2", "--config.mesh.data=3"), "does not fill the 4 devices"),
        (("--topology=v5e:2x2", "--config.batch_size=6"), "cannot be split over 4 devices"),
    ):
        code, _, error = preflight(CONFIG, *arguments)
        assert code == 2 and message in error and error.count("\n") == 1, error


@pytest.mark.slow
def test_a_small_quickstart_compiles_for_a_tpu(tmp_path):
    """All but the teacher and LPIPS; needs libtpu: pip install -e '.[test,preflight]'."""
    path = tmp_path / "figures.json"
    small = ("image_size=16", "vit.image_size=16", "vit.patch_size=2", "scales=(1,2,8)",
             "multipliers=(1,1)")  # fmt: skip
    program = [sys.executable, "-m", "tokenflow_jax.preflight", CONFIG, "--topology=v5e:2x2",
               "--config.mesh.fsdp=2", "--config.losses.perceptual_weight=0",
               "--config.losses.distillation_weight=0", "--config.teacher.source=none",
               "--config.teacher.init_encoder=False", f"--figures={path}",
               *(f"--config.model.{change}" for change in small)]  # fmt: skip
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    figures = json.loads(path.read_text())
    parts = ("instructions", "kernels", "waiting")
    assert figures["step"] == pytest.approx(sum(figures[part] for part in parts))
    assert figures["instructions"] > 0 and figures["waiting"] > 0
    assert 0 < figures["mfu"] < 1 and figures["step"] > figures["arithmetic"]
    for line in ("estimated MFU", "all-reduce", "whole on every device", ": fits"):
        assert line in text
    assert "compiling for v5e:2x2 ..." in text
    assert "compiler flags: xla_tpu_run_space_to_batch=false" in text
