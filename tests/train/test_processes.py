"""Several processes: the same run as in one, losing one, and going on with another number."""

import signal
import time

import numpy as np
import processes as helper
import pytest
from processes import finish

from tokenflow_jax.train import checkpoint_info, curves
from tokenflow_jax.weights.formats import orbax as orbax_files

# Sums over devices are taken in another order, and Adam divides by their square roots: after 12
# steps at a learning rate of 1e-3 that is what single parameters differ by.
TOLERANCE = 2e-4


def start(stage, workdir, processes=1, sizes="1,8,1,1", delay=0.0):
    """Starts a run on eight devices in so many processes."""
    return helper.start("process_program.py", stage, workdir, delay, sizes, processes=processes)


def wait_for_checkpoint(workdir, step, processes, limit=240):
    began = time.time()
    while not (workdir / "checkpoints" / str(step) / "info").exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.time() - began < limit, "the run does not get on"
        time.sleep(0.05)


def assert_same_run(workdir, reference):
    """The same parameters, optimizer and codes used, and the same curve."""
    fields = ("step", "params", "opt_state", "usage")
    ours, theirs = (
        orbax_files.open_checkpoint(w, subtrees=fields)[1] for w in (workdir, reference)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("k/bias"):
            continue  # no loss depends on it: its gradient is rounding, which Adam makes steps of
        mine, other = ours[name].read(), theirs[name].read()
        if np.issubdtype(mine.dtype, np.integer):
            np.testing.assert_array_equal(mine, other, err_msg=name)
        else:
            np.testing.assert_allclose(mine, other, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    histories = [curves.read_history(f"{w}/metrics.jsonl") for w in (workdir, reference)]
    losses = [
        {line["step"]: line["loss/total"] for line in curve if "loss/total" in line}
        for curve in histories
    ]
    assert losses[0].keys() == losses[1].keys() == set(range(1, 13))
    for step, loss in losses[0].items():
        np.testing.assert_allclose(loss, losses[1][step], rtol=1e-5, err_msg=f"step {step}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A toy run in one process."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    (output,) = finish(start("toy", workdir))
    assert "slices: 0;" in output  # eight devices have small arrays, one of them writes them
    return workdir


def test_two_processes_are_the_same_run(uninterrupted, tmp_path):
    outputs = finish(start("toy", tmp_path, processes=2))
    assert_same_run(tmp_path, uninterrupted)
    assert "done at step 12" in outputs[0]
    assert "step" not in outputs[1]  # one of them keeps the log
    assert all("evaluates" in output for output in outputs)
    # Started again, only one of them has the curves that say that nothing is left to do.
    assert not any("evaluates" in o for o in finish(start("toy", tmp_path, processes=2)))


@pytest.mark.slow
def test_a_lost_process_is_told_and_one_process_on_another_mesh_goes_on(tmp_path):
    """The real stage: two processes until one is killed, then one process on another mesh."""
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    finish(start("tokenizer", reference))
    both = start("tokenizer", workdir, processes=2, delay=0.3)
    wait_for_checkpoint(workdir, 8, both)
    both[1].kill()
    began = time.time()
    output, _ = both[0].communicate(timeout=120)
    print(f"the other process ended after {time.time() - began:.0f} s")
    assert both[0].returncode == 1, output
    assert "process 0 of 2 ends: it failed" in output and "Start the same command again" in output
    both[1].communicate()
    # Tensor parallel now, which also reads the batch another way.
    (output,) = finish(start("tokenizer", workdir, sizes="1,2,2,2"))
    assert "continued from checkpoint" in output and "config.mesh.fsdp: 1 -> 2" in output
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_sigterm_saves_everywhere_and_a_process_that_hangs_is_told(uninterrupted, tmp_path):
    both = start("toy", tmp_path, processes=2, delay=0.5, sizes="1,1,1,8")
    wait_for_checkpoint(tmp_path, 4, both)
    both[1].send_signal(signal.SIGTERM)  # to one of them only
    outputs = finish(both)
    assert "stopped by SIGTERM" in outputs[0]
    assert 4 < int(checkpoint_info.find_checkpoint(tmp_path).name) < 12
    both = start("toy", tmp_path, processes=2, delay=0.5)
    wait_for_checkpoint(tmp_path, 8, both)
    both[1].send_signal(signal.SIGSTOP)
    began = time.time()
    output, _ = both[0].communicate(timeout=120)
    print(f"the other process ended after {time.time() - began:.0f} s")
    assert both[0].returncode != 0
    # JAX either aborts the process or fails its collective, whichever notices first.
    assert "ended unexpectedly" in output or "process 0 of 2 ends: it failed" in output
    assert "Start the same command again" in output
    both[1].kill()
    both[1].communicate()
    finish(start("toy", tmp_path, processes=4))
    assert_same_run(tmp_path, uninterrupted)


def test_two_processes_keep_their_run_in_a_bucket(uninterrupted, bucket):
    finish(start("toy", f"{bucket}/run", processes=2))
    assert_same_run(f"{bucket}/run", uninterrupted)
