"""Runs whose workdir is in a bucket: equal to those on a disk, killed or copied as may be."""

import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy_stage
from read_weights import load_for_inference
from toy_runs import assert_same_end, start

from tokenflow_jax import remote
from tokenflow_jax.train import checkpoint, curves, workdir
from tokenflow_jax.train.checkpoint_info import CheckpointError, find_checkpoint


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_disk")
    toy_stage.run(folder)
    return folder


def lines(folder):
    """Return metrics without those of time."""
    history = curves.read_history(f"{folder}/metrics.jsonl")
    return [{k: v for k, v in line.items() if k[:5] != "perf/"} for line in history]


def test_a_killed_run_in_a_bucket_equals_one_on_a_disk(bucket, on_disk, caplog):
    run = f"{bucket}/run"
    process = start(run, "step_delay=0.1", "log_every=1")
    began = time.monotonic()
    while not any("checkpoints/10/commit" in name for name in remote.files_below(run)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < 120
        time.sleep(0.1)
    process.kill()
    process.communicate()
    toy_stage.run(run, total_steps=25)
    assert "continued from checkpoint gs://" in caplog.text
    toy_stage.run(run)
    assert_same_end(run, on_disk)
    ours, theirs = ([line for line in lines(f) if line["step"] > 25] for f in (run, on_disk))
    assert ours == theirs and len(ours) == 4
    below = remote.files_below(run)
    steps = {name.split("/")[1] for name in below if name.startswith("checkpoints/")}
    assert steps == {"30", "40"}
    assert "report.html" in below and "images/reconstructions_0000040.png" in below
    events = [name for name in below if name.startswith("tensorboard/events")]
    assert len(events) == 3 and all(remote.RemoteFile(f"{run}/{n}").size for n in events)


def test_a_save_that_was_killed_is_no_checkpoint(bucket, tmp_path):
    run = f"{bucket}/run"
    toy_stage.run(run, total_steps=20)
    for name in ("20/commit_success.txt", "20/_CHECKPOINT_METADATA"):
        remote.remove(f"{run}/checkpoints/{name}")
    assert find_checkpoint(run).name == "10"
    toy_stage.run(run, total_steps=15)
    assert find_checkpoint(run).name == "15"
    assert not remote.kind_of(f"{run}/checkpoints/20")


def test_a_run_copied_into_a_bucket_goes_on(bucket, on_disk, tmp_path):
    toy_stage.run(tmp_path / "begun", total_steps=17)
    remote.upload(tmp_path / "begun", f"{bucket}/run")
    assert find_checkpoint(f"{bucket}/run").name == "17"
    _, there = load_for_inference(f"{bucket}/run")
    _, here = load_for_inference(tmp_path / "begun")
    np.testing.assert_array_equal(
        there["params"]["encode"]["kernel"], here["params"]["encode"]["kernel"]
    )
    toy_stage.run(f"{bucket}/run")
    assert_same_end(f"{bucket}/run", on_disk)


def test_only_gs_holds_checkpoints(bucket):
    with pytest.raises(CheckpointError, match="disks and gs://"):
        workdir.check_path("s3://bucket/run")
    with pytest.raises(CheckpointError, match="choose another folder"):
        workdir.check_path(f"{bucket}/run[1]")
    with pytest.raises(CheckpointError, match=f"{bucket}/none holds no checkpoint"):
        find_checkpoint(f"{bucket}/none")


def test_a_save_that_the_store_refuses_is_tried_again(bucket, on_disk, monkeypatch, caplog):
    save, failures = ocp.CheckpointManager.save, []

    def fail_twice(self, step, **options):
        if step == 20 and len(failures) < 2:
            failures.append(step)
            remote.write(f"{self.directory}/20/state/left", b"half")
            raise ValueError("503 try again")
        return save(self, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail_twice)
    toy_stage.run(f"{bucket}/run")
    assert failures == [20, 20] and "saving step 20 is tried again (503 try again)" in caplog.text
    assert_same_end(f"{bucket}/run", on_disk)
    monkeypatch.setattr(checkpoint, "_TRIES", 1)
    failures.clear()
    with pytest.raises(ValueError, match="503"):
        toy_stage.run(f"{bucket}/other")
