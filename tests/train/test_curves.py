"""The writers of curves and grids, and what they find of a run before."""

import html
import json
import math
import os
import resource
import shlex
import sys
import threading

import numpy as np
import pytest
import toy_stage
from PIL import Image

from tokenflow_jax.train import curves, report


def test_writer_drops_what_lies_beyond_the_restored_step(tmp_path):
    grid_HWC = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    writer = curves.Writer(tmp_path)
    for step in (10, 20, 30):
        writer.scalars(step, {"loss/total": step / 10, "bad": math.nan})
        writer.images(step, {"eval/grid": grid_HWC})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss/to')  # cut short by a kill
    writer = curves.Writer(tmp_path, resume_step=20)
    writer.scalars(30, {"loss/total": 9.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line["loss/total"]) for line in lines]
    assert points == [(10, 1.0), (20, 2.0), (30, 9.0)]
    assert lines[0]["bad"] is None
    assert curves.read_history(tmp_path / "metrics.jsonl") == lines
    names = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert names == ["eval-grid_0000010.png", "eval-grid_0000020.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / names[0])), grid_HWC)
    assert len(list((tmp_path / "tensorboard").glob("events*"))) >= 1


def test_a_new_run_starts_new_files(tmp_path):
    for _ in range(2):
        writer = curves.Writer(tmp_path)
        writer.scalars(1, {"a": 1.0})
        writer.close()
    assert len(curves.read_history(tmp_path / "metrics.jsonl")) == 1


def test_only_the_first_process_writes(tmp_path):
    writer = curves.Writer(tmp_path / "none", enabled=False)
    writer.scalars(1, {"a": 1.0})
    writer.images(1, {"grid": np.zeros((2, 2, 3), np.uint8)})
    writer.flush()
    writer.close()
    assert not (tmp_path / "none").exists()


def test_a_wrong_grid_is_named(tmp_path):
    writer = curves.Writer(tmp_path)
    with pytest.raises(ValueError, match=r"grid 'recon' is float32\[2, 2, 3\]"):
        writer.images(1, {"recon": np.zeros((2, 2, 3), np.float32)})
    writer.close()


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        curves.read_history(tmp_path / "metrics.jsonl")


def records_of(path):
    """The records of a TFRecord file."""
    data, records = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    return records


def test_events_can_be_read_back(tmp_path):
    from tensorboardX.proto import event_pb2

    writer = curves.Writer(tmp_path)
    writer.scalars(7, {"loss/total": 0.25})
    writer.close()
    (path,) = (tmp_path / "tensorboard").glob("events*")
    found = {}
    for record in records_of(path):
        event = event_pb2.Event.FromString(record)
        found |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
    assert found["loss/total"] == (7, 0.25)


def test_a_run_continued_within_a_second_keeps_its_first_events(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.5)  # in the files' names
    for step in (0, 5):
        writer = curves.Writer(tmp_path, resume_step=step)
        writer.scalars(step + 1, {"loss/total": 0.25})
        writer.close()
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 2


def test_command_config_and_notes_are_texts_of_tensorboard(tmp_path):
    from tensorboardX.proto import event_pb2

    toy_stage.run(tmp_path, total_steps=2)
    (path,) = (tmp_path / "tensorboard").glob("events*")
    found = {}
    for record in records_of(path):
        for value in event_pb2.Event.FromString(record).summary.value:
            if value.metadata.plugin_data.plugin_name == "text":
                found[value.tag.split("/")[0]] = value.tensor.string_val[0].decode()
    assert found.keys() == {"command", "config", "notes"}
    assert shlex.join(sys.orig_argv) in found["command"]
    assert json.loads(found["config"].strip("`\n"))["total_steps"] == 2
    assert found["notes"].endswith("\n- a toy: it learns nothing of use")
    assert html.escape(shlex.join(sys.orig_argv)) in (tmp_path / "report.html").read_text()


def test_where_files_cannot_grow_the_history_is_written_with_each_flush(bucket):
    path = f"{bucket}/metrics.jsonl"
    writer = curves.Writer(bucket)
    writer.scalars(1, {"loss/total": 2.0})
    assert curves.read_history(path) == []
    writer.flush()
    writer.scalars(2, {"loss/total": 1.0})
    writer.close()
    again = curves.Writer(bucket, resume_step=1)
    again.scalars(2, {"loss/total": 1.5})
    again.close()
    assert [(x["step"], x["loss/total"]) for x in curves.read_history(path)] == [(1, 2), (2, 1.5)]


def test_a_full_disk_is_an_error_of_the_call_not_of_a_thread(tmp_path):
    """A limit on file size stands for the full disk: the kernel refuses the write likewise."""
    threads = set(threading.enumerate())
    writer = curves.Writer(tmp_path)
    writer._file = open(os.devnull, "a")  # noqa: SIM115 - only the events grow
    assert not set(threading.enumerate()) - threads
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, previous[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            for step in range(1000):
                writer.scalars(step, {"loss/total": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    writer.scalars(1000, {"loss/total": 0.5})  # there is room again
    writer.close()


def test_a_restart_hides_what_lies_beyond_it(tmp_path):
    from tensorboardX.proto import event_pb2

    curves.Writer(tmp_path, resume_step=20).close()
    (path,) = (tmp_path / "tensorboard").glob("events*")
    events = [event_pb2.Event.FromString(record) for record in records_of(path)]
    starts = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [21]


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, "[1]", '"step"', '{"loss": 1}', '{"step": "3"}', '{"step": 3, "a": "b"}',
     '{"step": 1' + "0" * 5000 + "}", '{"step": 3, "a": 1' + "0" * 400 + "}",
     '{"step": 3, "a": NaN}', '{"step": 3, "a": 1e999}', "\x00\x00", "\x1b[2J"],
    ids=lambda line: line[:12],
)  # fmt: skip
def test_a_damaged_line_is_named_unless_nothing_good_follows(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{line[:5]}')
    assert curves.read_history(path) == [{"step": 1}]
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2") as caught:
        curves.read_history(path)
    assert len(str(caught.value)) < 600 and "\x1b" not in str(caught.value)


def test_only_grids_of_later_steps_are_removed(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    others = ["mine_2x.png", "mine_99.png", "grid_0000007.png", "_0000099.png", "a_²²²²²²².png"]
    for name in [*others, "grid_0000099.png", "a_b_12345678.png"]:
        (images / name).touch()
    curves.Writer(tmp_path, 7).close()
    assert sorted(path.name for path in images.iterdir()) == sorted(others)
    page = report.write_report(tmp_path, [{"step": 7, "loss/total": 1.0}], {}, {}, [])
    assert page.read_text().count("<img") == 1


def test_a_pipe_in_place_of_the_curves_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl' is not a regular file"):
        curves.Writer(tmp_path, 7)
