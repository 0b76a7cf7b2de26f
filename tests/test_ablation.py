"""The ablations: the rule that decides on claims, and a small run of the matrix."""

import math

import pytest

from benchmarks.ablation import claims
from benchmarks.ablation.claims import Claim

BETTER = Claim("a is larger", "us", "a", "b", "figure")


def rows(a, b):
    return {name: [{"figure": x} for x in values] for name, values in (("a", a), ("b", b))}


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((3.0, 3.1, 2.9), (1.0, 1.1, 0.9), "held here"),
        ((1.0, 1.1, 0.9), (3.0, 3.1, 2.9), "did not hold here"),
        ((1.0, 1.2, 1.4), (1.0, 1.1, 1.3), "cannot tell at this size"),
        ((3.0,), (1.0, 1.1, 0.9), "cannot tell: too few runs"),
        ((1.0, 1.0), (2.0, 2.0), "cannot tell: no spread"),
    ],
)
def test_the_rule(a, b, words):
    assert claims.decide(BETTER, rows(a, b)).words == words


def test_smaller_may_be_better_and_the_interval_is_welch_s():
    smaller = Claim("a is smaller", "us", "a", "b", "figure", -1)
    found = claims.decide(smaller, rows((1.0, 1.1, 0.9), (3.0, 3.2, 2.8)))
    assert found.words == "held here" and found.difference == pytest.approx(2.0)
    # By hand: variances 0.01 and 0.04 of 3 each, 2.94 degrees of freedom, quantile 3.22.
    assert found.half_width == pytest.approx(3.22 * math.sqrt(0.05 / 3), rel=0.01)


def test_figures_that_a_row_lacks_decide_nothing():
    found = claims.decide(BETTER, {"a": [{"figure": 1.0}], "b": [{"other": 1.0}] * 3})
    assert found.words == "cannot tell: too few runs"
