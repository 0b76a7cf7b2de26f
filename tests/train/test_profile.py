"""Traces of some steps."""

import pytest
import toy_stage

from tokenflow_jax.train import profile


@pytest.mark.parametrize("text", ["5", "0:3", "5:0", "5:-1", "a:b", "1:2:3"])
def test_wrong_steps_are_explained(text):
    with pytest.raises(ValueError, match="START:COUNT such as 100:5"):
        profile.parse_steps(text)


def test_the_steps_asked_for_are_traced(tmp_path, caplog):
    toy_stage.run(tmp_path, profile_steps=profile.parse_steps("3:2"), total_steps=6)
    assert f"steps 3 to 4 are traced in {tmp_path / 'profile'}" in caplog.text
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))


def test_a_run_that_ends_before_the_last_step_keeps_what_it_traced(tmp_path):
    toy_stage.run(tmp_path, profile_steps=(5, 10), total_steps=6)
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))
