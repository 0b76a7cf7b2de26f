"""The file of the shipped teacher: damage, wrong types and other shapes are named."""

import json

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from tokenflow_jax.tokenizer import teacher
from tokenflow_jax.weights.rules import flatten

VIT = {"image_size": 8, "patch_size": 4, "width": 4, "depth": 1, "heads": 2}
NUMBERS = {"mean": [0.5] * 3, "std": [0.5] * 3}
SHIPPED = ml_collections.ConfigDict({"source": "shipped"})


@pytest.fixture(name="asset")
def _asset(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "ASSET", tmp_path / "teacher.safetensors")
    return teacher.ASSET


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "", "null", '{"vit": '])
def test_metadata_that_are_no_json_object_are_named(asset, text):
    tensors = {"a": np.ones(2, np.float16)}
    asset.write_bytes(safetensors.numpy.save(tensors, {"teacher": text}))
    with pytest.raises(ValueError, match=r"teacher\.safetensors.*no file of tools/teacher"):
        teacher.load_shipped()


@pytest.mark.parametrize(
    "change",
    [
        {"vit": 3},
        {"vit": {"width": "abc"}},
        {"vit": {"width": 1e30}},
        {"vit": {"width": 2**40}},
        {"vit": {"width": -4}},
        {"vit": {"width": None}},
        {"vit": {"\x1b": 1}},
        {"mean": [0.5]},
        {"std": ["a", "b", "c"]},
        {"mean": None},
    ],
)
def test_values_of_wrong_types_are_named(asset, change):
    about = {"vit": VIT, **NUMBERS, **change}
    asset.write_bytes(safetensors.numpy.save({}, {"teacher": json.dumps(about)}))
    with pytest.raises(ValueError, match=r"teacher\.safetensors.*damaged") as error:
        teacher.make_teacher(SHIPPED, "clip", jnp.float32)
    assert "\x1b" not in str(error.value)


def test_weights_that_do_not_fit_the_metadata_are_named(asset):
    teacher.save_shipped(asset, {}, {"vit": VIT, **NUMBERS})
    made = teacher.make_teacher(SHIPPED, "clip", jnp.float32)
    params = {name: np.zeros(leaf.shape) for name, leaf in flatten(made.parameters).items()}
    teacher.save_shipped(asset, params, {"vit": VIT, **NUMBERS})
    assert flatten(teacher.load_teacher(SHIPPED, made)).keys() == params.keys()
    params["class_embedding"] = np.zeros(5)
    teacher.save_shipped(asset, params, {"vit": VIT, **NUMBERS})
    with pytest.raises(ValueError, match=r"(?s)teacher\.safetensors does not fit.*class_embedding"):
        teacher.load_teacher(SHIPPED, made)
