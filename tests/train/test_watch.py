"""The watch names what takes too long, and only that."""

import time

import pytest

from tokenflow_jax.train import watch


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.2)
    shown = []
    monkeypatch.setattr(watch.faulthandler, "dump_traceback", lambda file: shown.append(file))
    return shown


def wait_for(condition, seconds=10.0):
    began = time.monotonic()
    while not condition() and time.monotonic() - began < seconds:
        time.sleep(0.02)
    assert condition()


def test_a_step_that_hangs_is_named_once_and_again_after_twice_the_time(impatient, caplog):
    watching = watch.Watch(lambda: 0.001)
    watching.doing("step 11")
    watching.doing("step 12")
    wait_for(lambda: len(caplog.messages) == 1)
    assert "process 0: step 12 has taken" in caplog.text and "usually 0.001 s" in caplog.text
    assert len(impatient) == 1
    wait_for(lambda: len(caplog.messages) == 2)
    watching.close()
    assert len(impatient) == 1  # where Python waits has not changed


def test_slow_steps_and_evaluations_are_not_hung(impatient, caplog):
    usual = [5.0]
    watching = watch.Watch(lambda: usual[0])
    watching.doing("step 3")  # usual steps take five seconds
    time.sleep(0.5)
    usual[0] = 0.001
    watching.doing("")  # an evaluation
    time.sleep(0.5)
    watching.close()
    assert not caplog.messages and not impatient
