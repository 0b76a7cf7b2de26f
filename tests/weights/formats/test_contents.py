"""Files are opened by what they hold, not by their names; what holds no weights is named."""

import json
import os

import numpy as np
import pytest
import tiny
from pickled_tensors import write_torch
from torch_states import random_state

import tokenflow_jax as tfx
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.weights import conversion
from tokenflow_jax.weights.formats.gguf import is_gguf, read_gguf
from tokenflow_jax.weights.formats.pickles import load_numpy_pickle
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.formats.torch import NoSuchKey, find_weights, open_state_dict
from tokenflow_jax.weights.formats.torch import open_state_dicts as open_all

STATE = {"a.w": np.arange(6, dtype=np.float32).reshape(2, 3), "a.b": np.ones(2, np.float32)}
OTHER = {name: array + 1 for name, array in STATE.items()}


@pytest.mark.parametrize("name", ["m.ckpt", "m.pth.tar", "m.SAFETENSORS", "m.pt", "m", "m.txt"])
@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_the_name_does_not_matter(tmp_path, name, write):
    write(tmp_path / name, STATE)
    assert conversion.is_torch(tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        if path.is_file() or name not in ("m", "m.txt"):
            state = open_state_dict(path)
            np.testing.assert_array_equal(state["a.w"].read(), STATE["a.w"])


def test_an_index_of_any_name(tmp_path):
    write_safetensors(tmp_path / "part", STATE)
    index = {"weight_map": dict.fromkeys(STATE, "part")}
    (tmp_path / "index").write_text(json.dumps(index))
    assert open_state_dict(tmp_path / "index").keys() == STATE.keys()


def test_a_tokenizer_loads_from_a_file_of_any_name(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "last.ckpt", random_state(tiny.TINY))
    monkeypatch.setitem(PART.variants, "tiny", tiny.TINY)
    assert tfx.Tokenizer.load(tmp_path / "last.ckpt", "tiny").config == tiny.TINY


def test_a_folder_with_a_checkpoint_of_ours_is_ours(tmp_path):
    tiny.write_tokenizer(tmp_path)
    write_safetensors(tmp_path / "export.safetensors", STATE)
    assert not conversion.is_torch(tmp_path)
    assert tfx.Tokenizer.load(tmp_path).config == tiny.TINY


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "web page"),
        (b"<html><body>Not found", "web page"),
        (b"GGUF\3\0\0\0" + bytes(16), "GGUF file, which can only be a language model"),
        (b"x" * 999, "neither|damaged"),
        (b'{"weight_map": {', "not JSON"),
        (b"{" * 100_000, "not JSON"),
        (b'{"weight_map": ["a"]}', "weight_map"),
        (b'{"weight_map": {"a": 1}}', "weight_map"),
        (b'{"weights": {}}', "lacks 'weight_map'"),
        (b'{"weight_map": {}}', "no shards"),
        (b'{"weight_map": {"a": "../m.pt"}}', "outside"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "outside"),
        (b'{"weight_map": {"a": "m.pt"}}', "an index of shards, where"),  # itself
        (b'{"weight_map": {"a": "n\\ud800\\u001b"}}', r"n\\ud800\\x1b: missing"),
    ],
)
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_what_holds_no_weights_is_named(tmp_path, content, error, name):
    (tmp_path / name).write_bytes(content.replace(b"m.pt", name.encode()))
    with pytest.raises(ValueError, match=error) as caught:
        open_state_dict(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("reader", [open_state_dict, read_gguf, load_numpy_pickle])
def test_pipes_and_devices_are_refused_at_once(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert conversion.is_torch(path) and not is_gguf(path)
        with pytest.raises(ValueError, match="regular"):
            reader(path)


NESTED = [
    {"state": {"model": STATE, "ema": OTHER}},
    {"model": STATE, "optimizer": {"state": {0: OTHER}}, "model_ema": {"module": OTHER}},
    {"state_dict": STATE, "callbacks": {"EMA": {"ema_model": OTHER}}, "epoch": 3},
    {"model": STATE, "model_ema": {f"module.{name}": array for name, array in OTHER.items()}},
]


@pytest.mark.parametrize("tree", NESTED)
def test_a_nested_average_is_found(tmp_path, tree):
    path = write_torch(tmp_path / "m.pt", tree)
    found = find_weights(open_all(path))
    for name, state in (("raw", STATE), ("ema", OTHER)):
        np.testing.assert_array_equal(found[name]["a.w"].read(), state["a.w"])


def test_an_average_of_other_names_is_none(tmp_path):
    path = write_torch(tmp_path / "m.pt", {"model": STATE, "head": {"ema": {"c": STATE["a.w"]}}})
    assert find_weights(open_all(path))["ema"] is None
    with pytest.raises(NoSuchKey, match=r"no state_dict under key 'ema'; there are .*'head\.ema'"):
        open_state_dict(path, "ema")
    assert open_state_dict(path, "head.ema").keys() == {"c"}


def test_a_converted_checkpoint_takes_its_nested_average(tmp_path):
    states = [random_state(tiny.TINY, seed=seed) for seed in (0, 1)]
    path = write_torch(tmp_path / "m.pt", {"state": {"model": states[0], "ema": states[1]}})
    for weights, state in (("raw", states[0]), (None, states[1])):
        source = conversion.open_source(path, PART, tiny.TINY, weights=weights)
        assert source.weights == (weights or "ema")
        codebook = source.arrays["pixel_codebook"].read()
        np.testing.assert_array_equal(codebook, state["quantize.embedding_vqgan.weight"])


def test_one_dict_under_two_keys_is_in_both(tmp_path):
    path = write_torch(tmp_path / "m.pt", {"model": STATE, "ema": STATE})
    assert open_all(path).keys() == {"model", "ema"}


def test_long_lists_in_errors_are_cut(tmp_path):
    state = {f"name{i}\x1b": np.ones(1, np.float32) for i in range(999)}
    for file in ("a.safetensors", "b.safetensors"):
        write_safetensors(tmp_path / file, state)
    with pytest.raises(ValueError, match="and 989 more") as caught:
        open_state_dict(tmp_path)
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)
