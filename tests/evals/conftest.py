"""The Inception network on the golden stand-in weights, made once for all evaluation tests."""

import os
import pathlib
import subprocess
import sys

import pytest
from golden import weights
from golden.loading import manifest

from tokenflow_jax.evals.fid_network import Network
from tokenflow_jax.weights.formats.safetensors import write_safetensors

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    write_safetensors(str(path), weights.state_dict(manifest("parts.inception"), 0))
    return path


@pytest.fixture(scope="session")
def network(inception_file):
    return Network(inception_file)


@pytest.fixture(scope="session")
def command():
    """Run a module as a user does; return (exit code, stdout, stderr)."""

    def run(module, *arguments, cwd=REPOSITORY, **environment):
        result = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            timeout=300,
        )
        return result.returncode, result.stdout, result.stderr

    return run
