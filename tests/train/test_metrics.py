"""The finite check, averages, the clock and the progress line."""

import math

import pytest

from tokenflow_jax.log import duration
from tokenflow_jax.train import metrics


def test_non_finite_looks_at_losses_only():
    scalars = {"loss/total": 1.0, "loss/gan": math.nan, "loss/l2": math.inf, "ratio": math.nan}
    assert set(metrics.non_finite(scalars)) == {"loss/gan", "loss/l2"}


def test_averages_count_each_key_by_itself():
    averages = metrics.Averages()
    averages.add({"a": 1.0, "b": 4.0})
    averages.add({"a": 3.0})
    assert averages.pop() == {"a": 2.0, "b": 4.0}
    assert averages.pop() == {}


def test_stopwatch_leaves_out_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    watch = metrics.Stopwatch(total_steps=100, images_per_step=4)
    assert watch.pop(0) == {}
    watch.start()
    now[0] += 2.0
    watch.waited(1.0)
    watch.step()
    watch.step()
    watch.pause()
    now[0] += 10.0  # an evaluation
    watch.waited(9.0)  # outside of training time: not counted
    watch.start()
    now[0] += 2.0
    watch.step()
    watch.step()
    figures = watch.pop(4)
    assert figures["perf/steps_per_second"] == pytest.approx(1.0)
    assert figures["perf/images_per_second"] == pytest.approx(4.0)
    assert figures["perf/data_wait_fraction"] == pytest.approx(0.25)
    assert figures["perf/eta_seconds"] == pytest.approx(14.0 / 4 * 96)
    now[0] += 1.0
    watch.waited(1.0)
    watch.step()
    assert watch.pop(5)["perf/data_wait_fraction"] == pytest.approx(1.0)
    assert watch.summary()["perf/steps_per_second"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (61, "1m01s"), (7620, "2h07m"), (273600, "3d04h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_progress_line_shows_the_total_first_and_stays_on_one_line():
    scalars = {
        "loss/l2": 0.03125,
        "loss/total": 0.5,
        "grad_norm": 3.0,
        "perf/steps_per_second": 4.0,
        "perf/images_per_second": 256.0,
        "perf/eta_seconds": 208.0,
        "perf/data_wait_fraction": 0.004,
    }
    assert metrics.progress_line(120, 1000, scalars) == (
        "step  120/1000  total 0.5  l2 0.03125  4 steps/s  256 images/s  eta 3m28s  data wait 0.4%"
    )
    assert "grad_norm 3" in metrics.progress_line(1, 10, scalars, ("grad_norm",))
