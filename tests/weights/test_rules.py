"""Rule tables: exact inverses, and every problem of a checkpoint at once."""

import dataclasses

import numpy as np
import pytest
from torch_states import read_buffers, to_torch

from tokenflow_jax.weights import rules
from tokenflow_jax.weights.rules import Rule, RuleTable
from tokenflow_jax.weights.transforms import CONV, CONV1X1_DENSE, COPY, DENSE, Transform

TABLE = RuleTable(
    "toy",
    (
        Rule("level_{i}_block_{j}/conv/kernel", "blocks.{i}.res.{j}.weight", CONV),
        Rule("layers/fc/kernel", "layers.{layer}.fc.weight", DENSE),
        Rule("layers/fc/bias", "layers.{layer}.fc.bias"),
        Rule("class", "cls", Transform(squeeze=(0, 1))),
    ),
    buffers=("history",),
    ignored=("text.*",),
)


def array(*shape, dtype=np.float32):
    return np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape) + sum(shape)


def toy_state():
    return {
        "blocks.10.res.2.weight": array(4, 3, 2, 2),
        **{f"layers.{i}.fc.weight": array(5, 3) * (i + 1) for i in range(12)},
        **{f"layers.{i}.fc.bias": array(5) * (i + 1) for i in range(12)},
        "cls": array(1, 1, 6),
        "history": array(9),
        "text.ln": array(2),
    }


def toy_template(depth=12, dtype=np.float32):
    return {
        "level_10_block_2": {"conv": {"kernel": np.zeros((2, 2, 3, 4), dtype)}},
        "layers": {"fc": {"kernel": np.zeros((depth, 3, 5)), "bias": np.zeros((depth, 5))}},
        "class": np.zeros(6, dtype),
    }


@pytest.mark.parametrize(
    ("transform", "torch", "ours"),
    [
        (COPY, (3, 2), (3, 2)),
        (DENSE, (3, 2), (2, 3)),
        (CONV, (5, 4, 3, 2), (3, 2, 4, 5)),
        (CONV1X1_DENSE, (5, 4, 1, 1), (4, 5)),
        (Transform(squeeze=(0, 1)), (1, 1, 7), (7,)),
        (Transform(squeeze=(0, 2, 3)), (1, 7, 1, 1), (7,)),
    ],
)
def test_transforms_are_inverses(transform, torch, ours):
    value = array(*torch)
    converted = transform.to_flax(value)
    assert converted.shape == ours
    assert transform.torch_shape(ours) == torch
    np.testing.assert_array_equal(transform.to_torch(converted), value)


def test_layouts_are_transposed_correctly():
    state = toy_state()
    tree = rules.to_flax(state, TABLE, toy_template())
    kernel = tree["level_10_block_2"]["conv"]["kernel"]
    weight = state["blocks.10.res.2.weight"]
    assert kernel[1, 0, 2, 3] == weight[3, 2, 1, 0]
    # Layer 10 comes after layer 9, not after layer 1.
    np.testing.assert_array_equal(
        tree["layers"]["fc"]["kernel"][10], state["layers.10.fc.weight"].T
    )
    np.testing.assert_array_equal(tree["class"], state["cls"][0, 0])


def test_round_trip_is_exact():
    state = toy_state()
    arrays = rules.flax_arrays(state, TABLE, toy_template())
    tree = rules.unflatten({path: array.read() for path, array in arrays.items()})
    back = to_torch(tree, TABLE, read_buffers(state, TABLE))
    del state["text.ln"]
    assert back.keys() == state.keys()
    for name in state:
        assert back[name].dtype == state[name].dtype and back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name], state[name])


def test_to_flax_casts_and_flax_arrays_keep_the_dtype():
    state = {name: value.astype(np.float16) for name, value in toy_state().items()}
    assert rules.to_flax(state, TABLE, toy_template())["class"].dtype == np.float32
    kept = rules.flax_arrays(state, TABLE, toy_template())["class"]
    assert kept.dtype == kept.read().dtype == np.float16


def test_arrays_own_their_memory():
    state = toy_state()
    tree = rules.to_flax(state, TABLE, toy_template())
    assert not np.shares_memory(tree["class"], state["cls"])
    assert tree["class"].flags.owndata and tree["class"].flags.writeable


def test_all_problems_are_listed_at_once():
    state = toy_state()
    del state["layers.3.fc.bias"]
    state["layers.12.fc.bias"] = array(5)
    state["stranger"] = array(1)
    state["blocks.10.res.2.weight"] = array(4, 3, 3, 3)
    state["layers.0.fc.weight"] = array(3, 5)
    state["cls"] = array(1, 1, 6, dtype=np.int64)
    with pytest.raises(rules.CheckpointMismatch) as caught:
        rules.to_flax(state, TABLE, toy_template())
    problems = caught.value.problems
    assert problems.missing == ("layers.3.fc.bias",)
    assert problems.unexpected == ("layers.12.fc.bias", "stranger")
    assert len(problems.mismatched) == 3 and len(problems) == 6
    text = str(caught.value)
    for part in (
        "toy",
        "6 problems",
        "blocks.10.res.2.weight: (4, 3, 3, 3) in the checkpoint, (4, 3, 2, 2) in the model",
        "layers.0.fc.weight: (3, 5) in the checkpoint, (5, 3) in the model",
        "cls: int64 in the checkpoint, float32 in the model",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("missing", "unexpected", "lines"), [(500, 1, (9, 1)), (1, 500, (1, 9)), (500, 500, (5, 5))]
)
def test_ten_problems_are_shown_some_of_each_kind(missing, unexpected, lines):
    names = [f"a{i}" for i in range(missing)], [f"b{i}\x1b" for i in range(unexpected)]
    text = str(rules.CheckpointMismatch("toy", rules.Problems(*map(tuple, names)), path="x.pt"))
    found = text.count(": missing from the checkpoint\n"), text.count(": not in the model\n")
    assert found == lines and text.count("\n  - ") == 11
    assert f"and {missing + unexpected - 10:,} more" in text
    assert "checkpoint x.pt does not fit" in text and "\x1b" not in text and len(text) < 2000


def test_ignored_names_are_patterns():
    state = toy_state() | {"decoder.a": array(1), "decoder.b": array(1)}
    assert rules.check(state, TABLE, toy_template()).unexpected == ("decoder.a", "decoder.b")
    table = dataclasses.replace(TABLE, ignored=(*TABLE.ignored, "decoder.*"))
    assert not rules.check(state, table, toy_template())


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="toy: no conversion rule for the parameter new/kernel"):
        rules.check({}, TABLE, {"new": {"kernel": np.zeros(1)}})


def test_two_parameters_for_one_name_are_an_error():
    table = RuleTable("toy", (Rule("a", "x"), Rule("b", "x")))
    with pytest.raises(ValueError, match=r"several parameters would become \['x'\]"):
        to_torch({"a": array(1), "b": array(1)}, table)
