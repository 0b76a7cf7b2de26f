"""The pipeline measured alone: the parts, what limits it, and what a pod needs."""

import time

import numpy as np
import pytest
from config_files import tokenizer
from picture_files import encode

from tokenflow_jax import stages
from tokenflow_jax.data import images, measure
from tokenflow_jax.parallel import chips, mesh


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        noise = rng.integers(0, 256, (300, 300, 3), np.uint8)
        (tmp_path / f"{i}.png").write_bytes(encode(noise))
    return str(tmp_path)


def stage_of(folder, monkeypatch):
    config = tokenizer.get_config()
    config.batch_size, config.data.name, config.data.path = 4, "folder", folder
    stage = stages.make_stage(config, mesh.make_mesh({}))
    monkeypatch.setattr(stage.data_set, "_cache", None)  # as of a large data set
    return stage


def test_parts_are_timed_and_functions_restored(folder, monkeypatch):
    monkeypatch.setattr(measure, "_WARM_UP_S", 0.0)
    stage, before = stage_of(folder, monkeypatch), (images.decode, images.random_crop)
    source = stage.data_set.source
    found = measure.measure(stage, 0.5)
    assert (images.decode, images.random_crop) == before and stage.data_set.source is source
    assert found.cpu.keys() >= {"read", "decode", "crop", "other"}
    assert found.cpu["decode"] > found.cpu["read"] > 0  # noise hardly compresses
    assert found.rate > 0 and 0 < found.cores < 3
    text = "\n".join(measure.describe(found, 1))
    assert "examples/s with" in text and "decode" in text
    assert "waiting for the storage" not in text


def test_a_slow_storage_is_named(folder, monkeypatch):
    monkeypatch.setattr(measure, "_WARM_UP_S", 0.0)
    read = images.read_file
    monkeypatch.setattr(images, "read_file", lambda *args: time.sleep(0.1) or read(*args))
    found = measure.measure(stage_of(folder, monkeypatch), 0.5)
    assert found.waiting["read"] == pytest.approx(0.1, rel=0.3)
    assert "waiting for the storage" in measure.describe(found, 8)[-1]


def test_inner_parts_do_not_count_twice():
    clock = measure._Clock()
    inner = clock.timed("inner", lambda: time.sleep(0.05))
    clock.timed("outer", lambda: (inner(), time.sleep(0.02)))()
    assert clock.wall["inner"] == pytest.approx(0.05, abs=0.02)
    assert clock.wall["outer"] == pytest.approx(0.02, abs=0.02)


def test_what_a_pod_needs():
    enough = measure.demand(1000.0, 256, 0.1, 4, "v5e:4x4")
    assert "needs 2,560 examples/s" in enough[0]
    assert "4 hosts like this one: 4,000 examples/s, enough, 1.6 times" in enough[1]
    short = measure.demand(500.0, 256, 0.1, 4, "v5e:4x4")
    assert "NOT enough: 6 hosts are, or ones 1.3 times as fast" in short[1]
    assert chips.parse_topology("v5p:4x4x4").hosts == 16
    assert chips.parse_topology("h100:64").hosts == 8


def test_the_floor_is_that_of_the_arithmetic():
    config = tokenizer.get_config()
    one = measure.floor_of_step(config, chips.parse_topology("v5e:2x2"))
    two = measure.floor_of_step(config, chips.parse_topology("v5p:2x2x1"))
    assert one / two == pytest.approx(459 / 197) and 0 < one < 1
