"""Settings of all tests: the CPU backend, and the run's log where pytest captures it."""

import logging
import os
import pathlib

# Before any test imports jax: the suite must give the same figures on every machine.
os.environ["JAX_PLATFORMS"] = "cpu"
# Half of the suite's time would be LLVM optimizing programs that run once. Tests that start
# processes pass this on.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Programs that tests start import the package, the golden vectors and the helpers.
_TESTS = pathlib.Path(__file__).parent
_PATHS = map(str, (_TESTS.parent, _TESTS, _TESTS / "helpers"))
os.environ["PYTHONPATH"] = os.pathsep.join((*_PATHS, os.environ.get("PYTHONPATH", "")))

import pytest  # noqa: E402 - after the environment is set


@pytest.fixture(autouse=True)
def run_log(caplog, monkeypatch):
    """Lets pytest capture the progress lines of a run, also after a program took the log over."""
    monkeypatch.setattr(logging.getLogger("tokenflow_jax"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="tokenflow_jax"):
        yield
