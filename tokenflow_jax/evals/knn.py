"""k-nearest-neighbor classification: what a feature space knows, without training anything on it.

Neighbors are the k features of a labeled bank with the largest cosine similarity; each votes for
its class with weight exp(similarity / temperature), the weighting of Wu et al. 2018
(arXiv 1805.01978, section 3.4), or with weight one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnames=("classes", "k", "temperature"))
def _predict(queries_QD, bank_ND, labels_N, *, classes: int, k: int, temperature: float | None):
    similarity_QN = jnp.dot(queries_QD, bank_ND.T, precision="highest")
    best_QK, index_QK = jax.lax.top_k(similarity_QN, k)
    if temperature is None:
        votes_QK = jnp.ones_like(best_QK)
    else:  # relative to the nearest, so that a small temperature does not overflow
        votes_QK = jnp.exp((best_QK - best_QK[:, :1]) / temperature)
    votes_QC = jnp.einsum("qk,qkc->qc", votes_QK, jax.nn.one_hot(labels_N[index_QK], classes))
    return votes_QC.argmax(-1)


def _unit(features_ND: np.ndarray, center_D: np.ndarray | float) -> np.ndarray:
    features_ND = np.asarray(features_ND, np.float32) - center_D
    norm_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND / np.maximum(norm_N1, 1e-12)


def knn_predict(
    bank_ND: np.ndarray,
    bank_labels_N: np.ndarray,
    queries_QD: np.ndarray,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    center: bool = True,
    chunk: int = 500,
) -> np.ndarray:
    """Return the classes (Q,) of queries; ties go to the lower class number.

    Args:
      bank_ND, bank_labels_N: features and their classes, 0 or more.
      temperature: votes weigh exp(cosine / temperature); None gives every neighbor one vote.
      center: subtract the bank's mean from both before normalizing.
      chunk: queries handled at once; memory grows with chunk * N.
    """
    bank_ND, queries_QD = np.asarray(bank_ND), np.asarray(queries_QD)
    labels_N = np.asarray(bank_labels_N)
    if bank_ND.ndim != 2 or queries_QD.ndim != 2 or bank_ND.shape[1] != queries_QD.shape[1]:
        raise ValueError(
            f"bank {bank_ND.shape} and queries {queries_QD.shape} must be (N, D) and (Q, D)"
        )
    if labels_N.shape != bank_ND.shape[:1] or (labels_N.size and labels_N.min() < 0):
        raise ValueError(
            f"labels {labels_N.shape} for a bank of {len(bank_ND)}: one class number >= 0 for each"
        )
    if not 1 <= k <= len(bank_ND):
        raise ValueError(f"k = {k} must be between 1 and the bank's size, {len(bank_ND)}")
    center_D = bank_ND.astype(np.float32).mean(0) if center else 0.0
    bank, queries_QD = jnp.asarray(_unit(bank_ND, center_D)), _unit(queries_QD, center_D)
    known = {"classes": int(labels_N.max()) + 1, "k": int(k), "temperature": temperature}
    labels = jnp.asarray(labels_N, jnp.int32)
    parts = [
        np.asarray(_predict(queries_QD[start : start + chunk], bank, labels, **known))
        for start in range(0, len(queries_QD), chunk)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def knn_accuracy(
    bank_ND: np.ndarray,
    bank_labels_N: np.ndarray,
    queries_QD: np.ndarray,
    query_labels_Q: np.ndarray,
    **options,
) -> float:
    """Return the share of queries whose true class `knn_predict`, with its options, finds."""
    labels_Q = np.asarray(query_labels_Q)
    if not len(labels_Q) or labels_Q.shape != np.shape(queries_QD)[:1]:
        raise ValueError(
            f"{labels_Q.shape} labels for {np.shape(queries_QD)} queries: one for each"
        )
    return float(np.mean(knn_predict(bank_ND, bank_labels_N, queries_QD, **options) == labels_Q))
