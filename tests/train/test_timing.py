"""Throughput, step times, and what takes time beside training."""

import pytest

from tokenflow_jax.train import timing


def test_stopwatch_leaves_out_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    watch = timing.Stopwatch(total_steps=100, images_per_step=4)
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


def test_steps_have_percentiles_and_the_rest_has_names(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    watch = timing.Stopwatch(total_steps=1000, images_per_step=2, peak_rate=400.0)
    assert watch.goodput() == "unknown" and watch.usual_step == 0

    def spend(seconds):
        now[0] += seconds

    with watch.beside("compiling"):
        spend(20)
    watch.start()
    for i in range(100):
        spend(3.0 if i == 50 else 0.5)  # one straggler
        watch.step(tokens=10, operations=105.0)
        if i == 70:
            with watch.beside("saving"):  # no part of the next step
                spend(7.5)
    figures = watch.pop(100)
    assert figures["perf/step_seconds_p50"] == figures["perf/step_seconds_p90"] == 0.5
    assert 0.5 < figures["perf/step_seconds_p99"] <= 3.0
    assert figures["perf/tokens_per_second"] == pytest.approx(1000 / 52.5)
    assert figures["perf/mfu"] == pytest.approx(0.5)
    watch.waited(2.5)
    spend(2.5)
    watch.step()
    assert watch.usual_step == 0.5
    assert watch.summary()["perf/steps_per_second"] == pytest.approx(101 / 55)
    text = "63.6% of 1m22s (compiling 24.2%, saving 9.1%, waiting for data 3.0%)"
    assert watch.goodput() == text


def test_a_block_that_fails_counts_too(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    watch = timing.Stopwatch(10, 1)
    watch.start()
    with pytest.raises(OSError), watch.beside("saving"):
        now[0] += 3.0
        raise OSError
    now[0] += 1.0
    watch.step()
    assert watch.goodput() == "25.0% of 4s (saving 75.0%)"
