"""Conversion both ways: bit-identical round trips, the choice of weights, refusals."""

import contextlib
import dataclasses
import errno
import json
import os
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from late_writer import writing
from read_weights import load_for_inference
from torch_states import random_state, tiny_part

import tokenflow_jax as tfx
from tokenflow_jax import log
from tokenflow_jax.files import write_atomically
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.train import checkpoint, run_config
from tokenflow_jax.weights import lazy
from tokenflow_jax.weights.conversion import convert
from tokenflow_jax.weights.formats import orbax as orbax_files
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.formats.torch_zip import write_torch_zip
from tokenflow_jax.weights.lazy import in_memory
from tokenflow_jax.weights.rules import CheckpointMismatch, flatten, to_flax

TINY = tiny.TINY
USAGE = "quantize.codebook_used"


def assert_same(path, expected):
    state = open_state_dict(path)
    assert set(state) == set(expected)
    for name, array in expected.items():
        read = state[name].read()
        assert read.dtype == array.dtype and read.shape == array.shape, name
        assert read.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_bit_identical(tmp_path, kind, dtype):
    config = tiny.KINDS[kind]
    state = random_state(config, dtype)
    write_safetensors(tmp_path / "there.safetensors", state)
    written = convert(tmp_path / "there.safetensors", tmp_path / "ours", PART, config)
    assert written.weights == "raw" and written.nbytes == sum(a.nbytes for a in state.values())
    for target in ("back.pt", "back.safetensors"):
        assert convert(tmp_path / "ours", tmp_path / target, PART, config).tensors == len(state)
        assert_same(tmp_path / target, state)


@pytest.mark.parametrize("target", ["ours", "back.pt", "back.safetensors"])
def test_long_writing_tells_how_far_it_is(tmp_path, monkeypatch, caplog, target):
    monkeypatch.setattr(lazy, "_MEGABYTE", 1)
    monkeypatch.setattr(log, "_PROGRESS_S", -1.0)
    write_safetensors(tmp_path / "there.safetensors", random_state(TINY))
    written = convert(tmp_path / "there.safetensors", tmp_path / target, PART, TINY)
    form = r"writing weights: (\d+) of (\d+), [\d.]+ MB/s, eta \w+"
    lines = [tuple(map(int, match.groups())) for match in re.finditer(form, caplog.text)]
    assert len(lines) > 5 and sorted(lines) == lines
    assert all(done < total == written.nbytes for done, total in lines)


def test_shards_and_buffers_that_the_source_lacks(tmp_path):
    state = random_state(TINY)
    del state[USAGE]
    names = list(state)
    folder = tmp_path / "shards"
    folder.mkdir()
    parts = {"1.safetensors": names[:99], "2.safetensors": names[99:]}
    for file, part in parts.items():
        write_safetensors(folder / file, {name: state[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(folder, tmp_path / "ours", PART, TINY)
    convert(tmp_path / "ours", tmp_path / "back.pt", PART)
    # PyTorch's strict loading wants the history, even an empty one.
    assert_same(tmp_path / "back.pt", state | {USAGE: np.zeros(131072, np.float32)})
    info, _ = orbax_files.open_checkpoint(tmp_path / "ours")
    assert info["source"]["path"] == "shards" and set(info["source"]["sha256"]) == set(parts)


@pytest.mark.parametrize(("weights", "taken"), [(None, "ema"), ("ema", "ema"), ("raw", "raw")])
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_ema_is_the_default(tmp_path, weights, taken, key):
    states = {"raw": random_state(TINY), "ema": random_state(TINY, seed=1)}
    write_torch_zip(tmp_path / "both.pt", {key: states["raw"], "ema": states["ema"]})
    convert(tmp_path / "both.pt", tmp_path / "ours", PART, TINY, weights=weights)
    written = convert(tmp_path / "ours", tmp_path / "back.pt", PART)
    assert written.weights == "raw"  # one set of weights was written, and it has no average
    assert_same(tmp_path / "back.pt", states[taken])


@pytest.mark.parametrize(("group", "asked"), [("model", "ema"), ("ema", "raw")])
def test_missing_weights_are_refused(tmp_path, group, asked):
    write_torch_zip(tmp_path / "one.pt", {group: random_state(TINY)})
    with pytest.raises(ValueError, match=f"one.pt has no {asked} weights; it has (raw|ema)$"):
        convert(tmp_path / "one.pt", tmp_path / "ours", PART, TINY, weights=asked)
    assert not (tmp_path / "ours").exists()


def test_dtype_applies_to_parameters_not_buffers(tmp_path):
    state = random_state(TINY)
    write_safetensors(tmp_path / "there.safetensors", state)
    convert(tmp_path / "there.safetensors", tmp_path / "ours", PART, TINY, dtype="bfloat16")
    half = {n: a.astype(ml_dtypes.bfloat16) if n != USAGE else a for n, a in state.items()}
    convert(tmp_path / "ours", tmp_path / "half.pt", PART)
    assert_same(tmp_path / "half.pt", half)
    convert(tmp_path / "ours", tmp_path / "whole.pt", PART, dtype="float32")
    assert_same(tmp_path / "whole.pt", {n: a.astype(np.float32) for n, a in half.items()})


def test_values_beyond_float16_are_refused(tmp_path):
    state = random_state(TINY)
    state["quant_conv.bias"][0] = 1e5
    write_safetensors(tmp_path / "there.safetensors", state)
    for target in ("half.pt", "ours"):
        with pytest.raises(ValueError, match=r"(quant_conv.bias|pixel_in/bias) .* float16"):
            convert(tmp_path / "there.safetensors", tmp_path / target, PART, TINY, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_tokenizer_loads_converted_weights(tmp_path):
    state = random_state(TINY)
    write_safetensors(tmp_path / "there.safetensors", state)
    convert(tmp_path / "there.safetensors", tmp_path / "ours", PART, TINY)
    expected = flatten(to_flax(state, PART.table(TINY), PART.template(TINY)))
    loaded = tfx.Tokenizer.load(tmp_path / "ours")
    assert loaded.config == TINY
    for name, array in flatten(loaded.params).items():
        np.testing.assert_array_equal(array, expected[name])
    convert(tmp_path / "there.safetensors", tmp_path / "half", PART, TINY, dtype="bfloat16")
    half = tfx.Tokenizer.load(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}


class NoPosition:
    """Stands in for the data iterator."""

    def get_state(self):
        return {}


def test_a_training_run_converts_to_pytorch(tmp_path):
    config = run_config.config_to_dict({"model": dataclasses.asdict(TINY), "stage": "tokenizer"})
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", keep=2)
    for step in (3, 4):
        raw, ema = (
            to_flax(random_state(TINY, seed=seed), PART.table(TINY), PART.template(TINY))
            for seed in (step, 10 * step)
        )
        state = {"step": jnp.int32(step), "params": raw, "ema": ema, "opt_state": (raw,)}
        checkpoints.save(step, jax.tree.map(jnp.asarray, state), NoPosition(), config)
    checkpoints.close()

    def expected(seed):
        return random_state(TINY, seed=seed) | {USAGE: np.zeros(131072, np.float32)}

    convert(tmp_path / "run", tmp_path / "newest.pt", PART)
    assert_same(tmp_path / "newest.pt", expected(40))
    convert(tmp_path / "run", tmp_path / "raw.safetensors", PART, TINY, weights="raw", step=3)
    assert_same(tmp_path / "raw.safetensors", expected(3))
    # Weights alone, for use or to begin another run from.
    convert(tmp_path / "run", tmp_path / "ours", PART)
    _, state = load_for_inference(tmp_path / "ours")
    assert set(state) == {"params", "step"} and state["step"] == 0
    convert(tmp_path / "ours", tmp_path / "again.pt", PART)
    assert_same(tmp_path / "again.pt", expected(40))

    other = dataclasses.replace(TINY, codebook_size=48)
    with pytest.raises(ValueError, match=r"run does not hold .*=48.*, but .*=32"):
        convert(tmp_path / "run", tmp_path / "x.pt", PART, other)


def test_all_problems_are_reported_with_the_variant_that_fits(tmp_path):
    write_safetensors(tmp_path / "there.safetensors", random_state(TINY))
    part = tiny_part()
    with pytest.raises(CheckpointMismatch) as caught:
        convert(tmp_path / "there.safetensors", tmp_path / "ours", part, part.variants["wide"])
    text = str(caught.value)
    assert "2 problems" in text
    assert "these weights fit the variant clip and the variant clip_again" in text
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"channels": "abc"},
        {"channels": None},
        {"channels": 2**60},
        {"blocks": 10**6},
        {"vit": 3},
        {"vit": {"depth": 10**9}},
        {"scales": [1, 10**9]},
        {"\x1b": 1},
        {"vit": [[[[1]]]] * 10**5},
    ],
)
def test_a_config_that_describes_no_model_is_named(tmp_path, change):
    arrays = {"params/a": in_memory("a", np.ones(3, np.float32))}
    about = {"model": dataclasses.asdict(TINY) | change, "stage": "tokenizer"}
    orbax_files.save_weights(tmp_path / "ours", arrays, about, {"weights": "raw"})
    with pytest.raises(ValueError, match=r"ours: its config\.model is damaged") as error:
        convert(tmp_path / "ours", tmp_path / "back.pt", PART)
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value)


def test_a_flipped_byte_in_our_checkpoint_is_found(tmp_path):
    state = random_state(TINY)
    write_safetensors(tmp_path / "there.safetensors", state)
    convert(tmp_path / "there.safetensors", tmp_path / "ours", PART, TINY)
    files = [path for path in (tmp_path / "ours" / "state").rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match=r"ours.*(damaged|cannot be read)"):
        convert(tmp_path / "ours", tmp_path / "back.pt", PART)
    assert not list(tmp_path.glob("*back.pt"))


def test_an_old_target_stays_until_the_new_one_is_complete(tmp_path):
    for name in ("file", "folder"):
        target = tmp_path / name
        for content in ("old", "new"):
            with write_atomically(target, overwrite=content == "new") as partial:
                if name == "folder":
                    partial.mkdir()
                (partial / "x" if name == "folder" else partial).write_text(content)
        inside = target / "x" if name == "folder" else target
        with pytest.raises(FileExistsError, match="--overwrite"), write_atomically(target):
            raise AssertionError
        with pytest.raises(KeyboardInterrupt), write_atomically(target, overwrite=True) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
        assert inside.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_is_reported_while_threads_still_write(tmp_path):
    reason = r"target could not be written \(File too large\); free some space"
    with (
        contextlib.ExitStack() as writers,
        pytest.raises(OSError, match=reason),
        write_atomically(tmp_path / "target") as partial,
    ):
        writers.enter_context(writing(partial / "state", 1.0))
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert not list(tmp_path.iterdir())
