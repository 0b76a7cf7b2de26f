"""The comparison with the original: what is missing is named before anything runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "torch, problem", [(False, "tokenflow_jax[parity]"), (True, "no tokenflow/")]
)
def test_what_is_missing_is_named(tmp_path, torch, problem):
    if torch:
        (tmp_path / "torch.py").touch()
    program = (
        "import sys; sys.path = [p for p in sys.path if 'torch' not in p]\n"
        f"sys.path.append({str(tmp_path)!r}); sys.argv[1:] = ['--original=elsewhere']\n"
        "import benchmarks.versus; benchmarks.versus.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and problem in done.stderr
    assert "Traceback" not in done.stderr
