"""The finite check, averages and the progress line."""

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
    averages.add({"kind/draw": 2.0, "accuracy/codes": math.nan, "loss/total": 1.0})
    averages.add({"kind/draw": math.nan, "accuracy/codes": 0.5, "loss/total": 3.0})
    assert averages.pop() == {"kind/draw": 2.0, "accuracy/codes": 0.5, "loss/total": 2.0}


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
