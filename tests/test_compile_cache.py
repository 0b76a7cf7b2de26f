"""Compiled programs are kept: where, and how to move or stop it."""

import os
import subprocess
import sys

import pytest

from tokenflow_jax import remote

PROGRAM = """
import os, sys
from absl import flags
from tokenflow_jax import compile_cache
import jax
compile_cache.set_up(sys.argv[1] or None, sys.argv[2] or None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 3 if "OTHER" in os.environ else x + 1)(1.0)
"""


def kept(tmp_path, choice="", workdir="", **environment):
    """Compile in a process; return the folders with programs, relative to tmp_path."""
    known = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    environment = {**known, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    subprocess.run([sys.executable, "-c", PROGRAM, choice, workdir], env=environment, check=True)
    return {str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("*-cache")}


def test_the_user_s_cache_folder_by_kind_of_processor(tmp_path):
    (folder,) = kept(tmp_path)
    assert folder.startswith("cache/tokenflow_jax/compiled-")
    assert kept(tmp_path) == {folder}


def test_the_flag_the_variable_and_jax_s_own_move_it(tmp_path):
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    assert kept(tmp_path, TOKENFLOW_COMPILE_CACHE=mine) == {"mine"}
    assert kept(tmp_path, JAX_COMPILATION_CACHE_DIR=theirs) == {"mine", "theirs"}
    assert kept(tmp_path, str(tmp_path / "flag"), TOKENFLOW_COMPILE_CACHE="off") == {
        "flag", "mine", "theirs",
    }  # fmt: skip


@pytest.mark.parametrize("how", [{"choice": "off"}, {"TOKENFLOW_COMPILE_CACHE": "off"}])
def test_off(tmp_path, how):
    assert kept(tmp_path, **how) == set()


def test_a_folder_that_cannot_be_made_costs_a_line_only(tmp_path):
    (tmp_path / "file").write_text("")
    assert kept(tmp_path, str(tmp_path / "file" / "x")) == set()


def test_programs_without_a_time_of_use_do_not_stop_others_from_being_kept(tmp_path):
    """A process leaves such programs when it is killed, or knows no limit of the folder's size."""
    kept(tmp_path, str(tmp_path / "mine"))
    programs = set((tmp_path / "mine").glob("*-cache"))
    for time in (tmp_path / "mine").glob("*-atime"):
        time.unlink()
    kept(tmp_path, str(tmp_path / "mine"), OTHER="1")
    assert set((tmp_path / "mine").glob("*-cache")) > programs


def test_a_bucket(tmp_path, bucket):
    """A pod's machines come and go: programs are kept beside the checkpoints."""
    assert kept(tmp_path, workdir=bucket) == set()
    below = remote.files_below(f"{bucket}/compiled")
    assert below and all(name.endswith("-cache") for name in below), below
    kept(tmp_path, TOKENFLOW_COMPILE_CACHE=f"{bucket}/compiled")
    assert remote.files_below(f"{bucket}/compiled") == below
