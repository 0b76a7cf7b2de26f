"""Settings of all tests: the CPU backend, and the run's log where pytest captures it."""

import logging
import os

# Before any test imports jax: the suite must give the same figures on every machine.
os.environ["JAX_PLATFORMS"] = "cpu"

import pytest


@pytest.fixture(autouse=True)
def run_log(caplog):
    """Lets pytest capture the progress lines of a run."""
    with caplog.at_level(logging.INFO, logger="tokenflow_jax"):
        yield
