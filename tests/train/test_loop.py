"""The promises of the loop, kept on a small real stage (toy_stage.py)."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
import toy_stage
from toy_runs import arrays_of, assert_same_end, start, wait_for_step

from tokenflow_jax.train import checkpoint, curves, loop, metrics, workdir


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Workdir of a run of 40 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    toy_stage.run(workdir)
    return workdir


def test_a_run_learns_and_leaves_everything_behind(uninterrupted):
    history = curves.read_history(uninterrupted / "metrics.jsonl")
    losses = [line["loss/total"] for line in history if "loss/total" in line]
    assert len(losses) == 40 // 5
    assert losses[-1] < 0.7 * losses[0]
    assert [line["step"] for line in history if "eval/l2" in line] == [20, 40]
    assert {p.name for p in (uninterrupted / "images").iterdir()} == {
        "reconstructions_0000020.png",
        "reconstructions_0000040.png",
    }
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == ["30", "40"]
    assert list((uninterrupted / "tensorboard").glob("events*"))
    page = (uninterrupted / "report.html").read_text()
    assert "a toy: it learns nothing of use" in page
    assert "eval/l2" in page and "data:image/png;base64," in page
    waits = [v for line in history for k, v in line.items() if k == "perf/data_wait_fraction"]
    assert waits and all(0 <= wait <= 1 for wait in waits)


def test_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path):
    # Neither step falls on an interval or an epoch of the data (50 / 8 pictures).
    toy_stage.run(tmp_path, total_steps=17)
    toy_stage.run(tmp_path, total_steps=33)
    toy_stage.run(tmp_path)
    assert_same_end(tmp_path, uninterrupted)


def test_the_position_in_the_data_matters(uninterrupted, tmp_path):
    """Guards the test above: with another data order the parameters do differ."""
    toy_stage.run(tmp_path, **{"data.images": 51})
    mine, theirs = arrays_of(tmp_path), arrays_of(uninterrupted)
    assert any(not np.array_equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "reached_steps", [(15,), pytest.param((5, 15, 25), marks=pytest.mark.slow)]
)
def test_kill_9_at_random_moments(uninterrupted, tmp_path, caplog, reached_steps):
    for reached in reached_steps:
        process = start(tmp_path, "step_delay=0.1")
        wait_for_step(tmp_path, reached, process)
        time.sleep(random.random() * 0.3)
        process.kill()
        process.communicate()
    toy_stage.run(tmp_path)
    assert "continued from checkpoint" in caplog.text
    assert_same_end(tmp_path, uninterrupted)
    history = curves.read_history(tmp_path / "metrics.jsonl")
    logged = [line["step"] for line in history if "loss/total" in line]
    assert logged == list(range(5, 41, 5))  # neither doubled nor lost
    assert [line["step"] for line in history if "eval/l2" in line] == [20, 40]


def test_sigterm_saves_and_the_run_goes_on(uninterrupted, tmp_path):
    process = start(tmp_path, "step_delay=0.1", "checkpoint_every=0")
    wait_for_step(tmp_path, 15, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert "stopped by SIGTERM at step" in output and "run the same command again" in output
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert 15 <= int(saved.name) < 40
    assert (tmp_path / "report.html").exists()
    toy_stage.run(tmp_path)
    assert_same_end(tmp_path, uninterrupted)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(metrics.NonFiniteError) as caught:
        toy_stage.run(tmp_path, nan_at=23)
    message = str(caught.value)
    assert "step 23: loss/total not finite" in message and "loss/total = nan" in message
    assert str(tmp_path / "checkpoints" / "20") in message
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]
    assert "step 24 of 40" in (tmp_path / "report.html").read_text()  # 23 was being looked at


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    # The loss of step 20 is computed before its update, and the update has a NaN in it: when the
    # step to be saved is the very one, its own loss must be looked at first.
    with pytest.raises(metrics.NonFiniteError, match=r"step 20: .*checkpoints/10"):
        toy_stage.run(tmp_path, nan_at=20)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["10"]


def test_nan_in_the_state_alone_is_found(tmp_path):
    with pytest.raises(metrics.NonFiniteError, match=r"not finite in the state: params/"):
        toy_stage.run(tmp_path, learning_rate=float("inf"), checkpoint_every=1)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_process_reports_a_nan_with_an_exit_code(tmp_path):
    process = start(tmp_path, "nan_at=3")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 1
    assert "Traceback" not in output and "there is no checkpoint yet" in output


def test_warm_start_from_another_run(uninterrupted, tmp_path, caplog):
    toy_stage.run(tmp_path, total_steps=5, init_from=str(uninterrupted))
    assert f"warm start: params of {uninterrupted}" in caplog.text
    history = curves.read_history(tmp_path / "metrics.jsonl")
    scratch = curves.read_history(uninterrupted / "metrics.jsonl")
    assert history[0]["loss/total"] < 0.7 * scratch[0]["loss/total"]
    # Its own checkpoint comes before init_from.
    toy_stage.run(tmp_path, total_steps=6, init_from=str(uninterrupted))
    assert "continued from checkpoint" in caplog.text


def test_another_model_or_data_is_refused_on_resume(tmp_path):
    toy_stage.run(tmp_path, total_steps=5)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        toy_stage.run(tmp_path, total_steps=9, seed=4, **{"model.width": 13, "data.images": 60})
    message = str(caught.value)
    for text in ("config.model.width: 12 -> 13", "config.data.images: 50 -> 60", "config.seed: 3"):
        assert text in message
    assert "--config.init_from=" in message


def test_other_changes_are_named_in_a_warning(tmp_path, caplog):
    toy_stage.run(tmp_path, total_steps=5)
    toy_stage.run(tmp_path, total_steps=6, learning_rate=0.01, log_every=1)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    (warning,) = [w for w in warnings if "config." in w]
    assert "config.learning_rate: 0.02 -> 0.01" in warning
    assert "config.log_every" not in warning
    assert "config.log_every: 5 -> 1" in caplog.text


def test_a_finished_run_only_writes_its_report_again(uninterrupted, caplog):
    before = arrays_of(uninterrupted)
    (uninterrupted / "report.html").unlink()
    toy_stage.run(uninterrupted)
    assert "done at step 40" in caplog.text
    assert (uninterrupted / "report.html").exists()
    for name, array in arrays_of(uninterrupted).items():
        np.testing.assert_array_equal(array, before[name])
    history = curves.read_history(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in history if "eval/l2" in line] == [20, 40]


@pytest.mark.parametrize(
    "change,finished",
    [
        ({}, True),
        ({"log_every": 7, "data_delay": 0.0}, True),
        ({"total_steps": 41}, False),
        ({"total_steps": 30}, False),
        ({"seed": 1}, False),
        ({"learning_rate": 1e-4}, False),
        ({"learning_rate": 0.0}, False),  # no value that a stage fills in
    ],
)
def test_a_finished_run_is_known_before_anything_is_loaded(uninterrupted, change, finished):
    config = toy_stage.get_config()
    config.update(change)
    assert loop.is_finished(config, uninterrupted) is finished


@pytest.mark.parametrize("lost", ["images", "metrics.jsonl", "checkpoints/40/info"])
def test_a_run_without_its_last_figures_is_not_finished(uninterrupted, tmp_path, lost):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    assert loop.is_finished(toy_stage.get_config(), run)
    (shutil.rmtree if (run / lost).is_dir() else os.remove)(run / lost)
    assert not loop.is_finished(toy_stage.get_config(), run)


def test_the_share_of_training_and_step_times_are_reported(tmp_path, caplog):
    toy_stage.run(tmp_path, total_steps=6, log_every=2)
    lines = [n for n in curves.read_history(tmp_path / "metrics.jsonl") if "loss/total" in n]
    assert 0 < lines[-1]["perf/step_seconds_p50"] <= lines[-1]["perf/step_seconds_p99"]
    assert re.search(r"share of training in the time: \d+\.\d% of \S+ \(.*compiling", caplog.text)
    page = (tmp_path / "report.html").read_text()
    assert "share of training in the time" in page and "step seconds p50" in page
    assert "GiB of this process" in page


def test_data_is_fetched_while_the_step_runs(tmp_path):
    """A source that takes 16 ms a batch is hidden behind steps of 30 ms."""
    toy_stage.run(tmp_path, data_delay=0.002, step_delay=0.03)
    lines = curves.read_history(tmp_path / "metrics.jsonl")
    waits = [v for line in lines for k, v in line.items() if k == "perf/data_wait_fraction"]
    assert np.median(waits) < 0.05


def test_slow_data_shows_in_the_data_wait(tmp_path):
    toy_stage.run(tmp_path, total_steps=15, data_delay=0.005)
    lines = curves.read_history(tmp_path / "metrics.jsonl")
    assert lines[-2]["perf/data_wait_fraction"] > 0.5


def test_data_that_ends_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="repeat it forever"):
        toy_stage.run(tmp_path, **{"data.end": True})


def test_bad_options_are_reported_together(tmp_path):
    with pytest.raises(ValueError) as caught:
        toy_stage.run(tmp_path, log_every=0, keep_checkpoints=-1)
    assert "log_every=0" in str(caught.value) and "keep_checkpoints=-1" in str(caught.value)


def test_two_runs_cannot_share_a_workdir(tmp_path):
    with (
        workdir.lock(tmp_path),
        pytest.raises(checkpoint.CheckpointError, match="another run is writing"),
    ):
        toy_stage.run(tmp_path)


def test_metrics_file_is_json_lines(uninterrupted):
    for line in (uninterrupted / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line)["step"], int)


def test_a_failing_last_evaluation_loses_nothing_else(tmp_path, monkeypatch, caplog):
    def fail(stage, state):
        raise RuntimeError("no such label")

    with monkeypatch.context() as patched:
        patched.setattr(toy_stage.ToyStage, "evaluate", fail)
        assert not toy_stage.run(tmp_path, eval_every=0).stopped_by
    assert (tmp_path / "checkpoints" / "40").exists()
    assert "step 40: the evaluation failed: no such label" in caplog.text
    assert "step 40: the evaluation failed: no such label" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "images" / "reconstructions_0000040.png").exists()
    toy_stage.run(tmp_path, eval_every=0)  # only evaluates
    history = curves.read_history(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in history if "eval/l2" in line] == [40]


def test_a_resumed_run_computes_no_first_state(tmp_path, monkeypatch):
    """It can cost a k-means of the data, and memory for a second state."""
    toy_stage.run(tmp_path, total_steps=2)
    monkeypatch.setattr(toy_stage.ToyStage, "init", None)
    assert int(toy_stage.run(tmp_path, total_steps=4).state.step) == 4


def of_curves(workdir):
    """Returns the curves without what depends on the machine's speed."""
    history = curves.read_history(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k[:5] != "perf/"} for line in history]


def stopping_at(stop):
    class Stopping(toy_stage.ToyStage):
        """Is told to stop in a step."""

        def step(self, state, batch):
            if int(state.step) + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(state, batch)

    return Stopping


def test_the_curves_of_a_resumed_run_equal_those_of_an_uninterrupted_one(
    uninterrupted, tmp_path, monkeypatch
):
    for stop in (17, 33, 0):  # within an interval of the log, twice
        with monkeypatch.context() as patched:
            patched.setattr(toy_stage, "ToyStage", stopping_at(stop))
            toy_stage.run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()].count("33") == 1
    assert of_curves(tmp_path) == of_curves(uninterrupted)


class Slow(toy_stage.ToyStage):
    """Its evaluation has a hundred batches, in the third of which SIGTERM arrives."""

    def evaluate(self, state):
        for batch in range(100):
            if batch == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            assert batch < 4, "the evaluation went on"
            self.between_batches()
        raise AssertionError


@pytest.mark.parametrize("total", [25, 20])  # an evaluation on the way, and the last one
def test_a_stop_request_ends_an_evaluation(tmp_path, monkeypatch, caplog, total):
    with monkeypatch.context() as patched:
        patched.setattr(toy_stage, "ToyStage", Slow)
        result = toy_stage.run(tmp_path, total_steps=total)
    assert result.stopped_by == "SIGTERM" and not result.complete
    assert "step 20: the evaluation is left out" in caplog.text
    assert "run the same command again to continue" in caplog.text
    assert (tmp_path / "checkpoints" / "20").exists()
    assert toy_stage.run(tmp_path, total_steps=total).complete
    history = curves.read_history(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in history if "eval/l2" in line] == sorted({20, total})


def test_a_workdir_that_another_run_took_over_is_not_written(tmp_path, monkeypatch):
    home, save = tmp_path / "run", checkpoint.Checkpoints.save
    (tmp_path / "mine").mkdir()

    def replace(self, step, *rest):
        save(self, step, *rest)
        self.wait()
        if step == 10:  # somebody removes the run's folder and starts another one there
            home.rename(tmp_path / "removed")
            home.mkdir()
            (home / ".lock").touch()

    monkeypatch.setattr(checkpoint.Checkpoints, "save", replace)
    with pytest.raises(checkpoint.CheckpointError, match="was removed or replaced while this run"):
        toy_stage.run(home)
    assert [path.name for path in home.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*unused):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(workdir.fcntl, "flock", refuse)
    toy_stage.run(tmp_path, total_steps=2)
    assert f"the file system of {tmp_path} has no locks ({os.strerror(number)})" in caplog.text


def test_grids_that_cannot_be_written_do_not_end_a_run(tmp_path, monkeypatch, caplog):
    def refuse(*unused):
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", "images/x.png")

    monkeypatch.setattr(curves.Writer, "images", refuse)
    assert int(toy_stage.run(tmp_path).state.step) == 40
    assert "step 20: the drawing of pictures failed: [Errno 20] Not a directory" in caplog.text
    history = curves.read_history(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in history if "eval/l2" in line] == [20, 40]


def test_a_drawing_that_a_stop_request_ended_is_made_at_the_next_start(tmp_path, monkeypatch):
    class Stopped(toy_stage.ToyStage):
        def visualize(self, state):
            os.kill(os.getpid(), signal.SIGTERM)
            self.between_batches()
            raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(toy_stage, "ToyStage", Stopped)
        result = toy_stage.run(tmp_path, total_steps=20)
    assert result.stopped_by == "SIGTERM" and not result.complete
    assert toy_stage.run(tmp_path, total_steps=20).complete
    assert (tmp_path / "images" / "reconstructions_0000020.png").exists()
    history = curves.read_history(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in history if "eval/l2" in line] == [20]
