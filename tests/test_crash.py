"""Flipped bits of checkpoints; `python -m tests.crash` flips more, and kills runs."""

import random

import crash
import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")  # TensorStore's
def test_no_flipped_bit_of_a_checkpoint_is_silent(tmp_path):
    outcomes = crash.flip(tmp_path, 100, random.Random(17))
    assert sum(outcomes.values()) >= 180
    assert not [name for name in outcomes if "silent" in name or "without its name" in name]
    assert outcomes["restore: refused"] > 10 and outcomes["restore: right"] > 10
