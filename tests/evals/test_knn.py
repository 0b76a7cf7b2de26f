"""k-NN against a brute-force computation."""

import numpy as np
import pytest

from tokenflow_jax.evals.knn import knn_accuracy, knn_predict


def _brute_force(bank, labels, queries, k, temperature, center):
    mean = bank.mean(0) if center else 0
    bank, queries = bank - mean, queries - mean
    answer = []
    for query in queries:
        cosine = np.array(
            [query @ row / (np.linalg.norm(query) * np.linalg.norm(row)) for row in bank]
        )
        votes = np.zeros(labels.max() + 1)
        for i in np.argsort(-cosine, kind="stable")[:k]:
            votes[labels[i]] += 1 if temperature is None else np.exp(cosine[i] / temperature)
        answer.append(votes.argmax())
    return np.array(answer)


@pytest.mark.parametrize("temperature", [None, 0.07])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("k", [1, 20])
def test_equals_brute_force(k, center, temperature):
    rng = np.random.default_rng(k)
    bank = rng.normal(size=(203, 7)).astype(np.float32) + 1
    queries = rng.normal(size=(101, 7)).astype(np.float32) + 1
    labels = rng.integers(0, 5, 203)
    expected = _brute_force(bank, labels, queries, k, temperature, center)
    got = knn_predict(bank, labels, queries, k=k, temperature=temperature, center=center, chunk=40)
    np.testing.assert_array_equal(got, expected)


def test_accuracy_of_separable_and_of_shuffled_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    features = 4 * np.eye(4)[labels] + 0.3 * rng.normal(size=(400, 4))
    assert knn_accuracy(features[:300], labels[:300], features[300:], labels[300:]) == 1.0
    chance = knn_accuracy(features[:300], rng.permutation(labels[:300]), features[300:],
                          labels[300:])  # fmt: skip
    assert 0.1 < chance < 0.45


def test_small_temperatures_do_not_overflow():
    bank, labels = np.eye(3, dtype=np.float32), np.arange(3)
    got = knn_predict(bank, labels, bank, k=3, temperature=1e-3, center=False)
    np.testing.assert_array_equal(got, labels)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"queries_QD": np.zeros((2, 4))}, "queries"),
        ({"bank_labels_N": np.zeros(3, int)}, "labels"),
        ({"bank_labels_N": -np.ones(30, int)}, "labels"),
        ({"k": 31}, "k = 31"),
        ({"k": 0}, "k = 0"),
    ],
)
def test_refuses_what_does_not_fit(change, match):
    good = {
        "bank_ND": np.ones((30, 5)), "bank_labels_N": np.zeros(30, int),
        "queries_QD": np.ones((2, 5)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        knn_predict(**(good | change))


def test_accuracy_needs_queries():
    with pytest.raises(ValueError, match="queries"):
        knn_accuracy(np.ones((30, 5)), np.zeros(30, int), np.ones((0, 5)), np.zeros(0))
