"""Grouped sampling: the reference's order for the reference's permutations."""

import json
import pathlib

import numpy as np
import pytest

from tokenflow_jax.data.chat import grouping

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "golden" / "i2t_sampler.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["grouped"], ids=lambda c: str(len(c["lengths"])))
def test_order(case):
    permutations = iter(case["permutations_in_call_order"])

    def permute(count):
        permutation = next(permutations)
        assert len(permutation) == count
        return permutation

    order = grouping.grouped_order(case["lengths"], case["batch_size"], case["world_size"], permute)
    assert order.tolist() == case["indices"]
    assert next(permutations, None) is None


@pytest.mark.parametrize("case", GOLDEN["even_chunks"], ids=lambda c: str(c["num_chunks"]))
def test_dealing(case):
    chunks = grouping.even_chunks(case["indices"], case["lengths"], case["num_chunks"])
    assert chunks == case["chunks"]


def test_every_sample_once_and_reproducible():
    lengths = [(i % 7 + 1) * (-1 if i % 3 == 0 else 1) for i in range(101)]
    orders = [
        grouping.grouped_order(lengths, 4, 2, np.random.default_rng([seed]).permutation).tolist()
        for seed in (0, 0, 1)
    ]
    assert sorted(orders[0]) == list(range(101))
    assert orders[0] == orders[1] != orders[2]


def test_zero_length():
    with pytest.raises(ValueError, match="length 0"):
        grouping.grouped_order([3, 0, 1], 1, 1, np.random.default_rng([0]).permutation)
