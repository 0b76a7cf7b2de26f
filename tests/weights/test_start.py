"""Starts in several processes: each reads and holds what its own devices do."""

import re

import jax
import numpy as np
import pytest
import tiny
from processes import finish, start

from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.weights.language_model import language_model_template, save_language_model

SLACK = 48  # MiB: a piece of a file, compiled programs, threads


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tokenizer, and a language model of 180 MiB whose largest array has 64."""
    folder = tmp_path_factory.mktemp("start")
    lm = LMConfig(65536, 256, 2, 8, 2, 8192, qkv_bias=True)
    rng = np.random.default_rng(0)
    shapes = language_model_template(lm)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    save_language_model(folder / "lm", lm, params)
    return str(tiny.write_tokenizer(folder / "tokenizer")), str(folder / "lm")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage,processes",
    [("understanding", 4), ("generation", 2), ("unified", 2)],
)
def test_no_process_holds_what_its_devices_do_not(stage, processes, places):
    tokenizer, folder = places
    started = start("start_program.py", stage, folder, processes=processes, TOKENIZER=tokenizer)
    outputs = finish(started)
    for number, output in enumerate(outputs):
        found = re.search(rf"process {number} took (\d+) of (\d+), largest (\d+)", output)
        took, share, largest = map(int, found.groups())
        print(f"{stage}, {processes} processes: {found[0]} MiB")
        assert took < share + largest + SLACK, output
