"""Fixtures of the tests of launch/."""

import os
import shlex
import subprocess

import pytest
from fakes import LAUNCH, Machine


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A git repository that holds launch/ only, committed."""
    folder = tmp_path_factory.mktemp("checkout")
    commands = f"""
        cp -r {shlex.quote(str(LAUNCH))} . && git init -q . && git add . &&
        git -c user.name=a -c user.email=a@b.c commit -q -m all
    """
    subprocess.run(["sh", "-c", commands], cwd=folder, check=True, env=dict(os.environ))
    return folder
