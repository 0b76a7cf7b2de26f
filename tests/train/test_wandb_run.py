"""Curves and grids on Weights & Biases, offline."""

import json
import sys
import time

import numpy as np
import pytest
import toy_stage

from tokenflow_jax.train import curves, wandb_run


def test_without_the_package_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert wandb_run.project_of({}) == wandb_run.project_of({"wandb": {"project": ""}}) == ""
    with pytest.raises(ValueError, match=r"wandb.project=mine needs .*tokenflow_jax\[wandb\]'"):
        wandb_run.project_of({"wandb": {"project": "mine"}})


def test_the_command_says_so_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    from tokenflow_jax import main

    monkeypatch.setitem(sys.modules, "wandb", None)
    config = "--config=tokenizer", "--config.wandb.project=mine", f"--workdir={tmp_path / 'w'}"
    assert main.run(config) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'tokenflow_jax[wandb]'" in error
    assert not (tmp_path / "w").exists()


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(file):
    """The records of an offline run: LevelDB's log format behind seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:  # no header fits in the rest of a block
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or its last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_a_run_and_its_continuation_are_one_run_there(offline, tmp_path):
    for steps in (20, 40):
        toy_stage.run(tmp_path, total_steps=steps, wandb={"project": "mine"})
        time.sleep(1.1)  # wandb names an offline run's folder after the second
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    found, ids, configs = [], set(), []
    for file in files:
        for record in records(file):
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                configs += [u.key for u in record.run.config.update]
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "loss/total" in items:
                found.append((json.loads(items["step"]), json.loads(items["loss/total"])))
    assert ids == {((tmp_path / "wandb_id").read_text(), "mine", tmp_path.name)}
    assert "batch_size" in configs
    history = curves.read_history(tmp_path / "metrics.jsonl")
    assert found == [(n["step"], n["loss/total"]) for n in history if "loss/total" in n]
    assert len(found) == 8
    assert len(list(tmp_path.glob("wandb/offline-*/files/media/images/*.png"))) == 2


def test_a_failure_there_does_not_end_the_training(offline, tmp_path, caplog):
    run = wandb_run.WandbRun("mine", tmp_path, {}, 0)
    run.scalars(1, {"loss/total": 1.0})
    run._run.finish()  # whatever ended it
    run.scalars(2, {"loss/total": 1.0})
    run.image(2, "grid", np.zeros((4, 4, 3), np.uint8))
    run.close()
    assert caplog.text.count("nothing more goes to Weights & Biases") == 1
