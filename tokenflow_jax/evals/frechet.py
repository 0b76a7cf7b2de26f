"""The Fréchet distance between two sets of features, from sums that can be streamed and added."""

import dataclasses

import numpy as np
from scipy.linalg.lapack import dpstrf

from tokenflow_jax.parallel import hosts


@dataclasses.dataclass
class Statistics:
    """Count, sum and sum of outer products of features, in float64.

    Inception's features are of the order of their deviation, so float64 keeps more than ten digits
    of the covariance without centring.

    Attributes:
      count: features seen.
      sum_D: their sum.
      outer_DD: the sum of their outer products.
    """

    count: int
    sum_D: np.ndarray
    outer_DD: np.ndarray

    @classmethod
    def empty(cls, width: int) -> "Statistics":
        """Statistics of no features of that many channels."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    def update(self, features_BD: np.ndarray) -> None:
        """Adds a batch of features (B, D)."""
        features = np.asarray(features_BD, np.float64)
        self.count += len(features)
        self.sum_D += features.sum(axis=0)
        self.outer_DD += features.T @ features

    def __add__(self, other: "Statistics") -> "Statistics":
        """Statistics of both sets together."""
        return Statistics(
            self.count + other.count, self.sum_D + other.sum_D, self.outer_DD + other.outer_DD
        )

    def over_processes(self) -> "Statistics":
        """Statistics of what all processes saw; each must call this."""
        sums = hosts.sum_over_processes(
            {"count": np.array(self.count), "sum": self.sum_D, "outer": self.outer_DD}
        )
        return Statistics(int(sums["count"]), sums["sum"], sums["outer"])

    @property
    def mean(self) -> np.ndarray:
        """The mean (D,)."""
        self._check(1)
        return self.sum_D / self.count

    @property
    def covariance(self) -> np.ndarray:
        """The sample covariance (D, D), divided by count - 1."""
        self._check(2)
        centred = self.outer_DD - np.outer(self.sum_D, self.mean)
        return centred / (self.count - 1)

    def _check(self, least: int) -> None:
        if self.count < least:
            raise ValueError(
                f"statistics of {self.count} images: a Fréchet distance needs 2 or more on each "
                "side, and thousands to mean something"
            )


def frechet_distance(
    mean1_D: np.ndarray, covariance1_DD: np.ndarray, mean2_D: np.ndarray, covariance2_DD: np.ndarray
) -> float:
    """|mean1 - mean2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), between two normal distributions.

    With C = L L' the last trace is the sum of the singular values of L1' L2. Unlike a square root
    of the product this needs no regularisation where a covariance is singular, as it is of no more
    images than channels, and it is quick there.

    Args:
      mean1_D, covariance1_DD, mean2_D, covariance2_DD: of the two sets.

    Returns:
      The squared distance, 0 or more.
    """
    factor1, factor2 = _factor(covariance1_DD), _factor(covariance2_DD)
    shared = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    spread = np.trace(covariance1_DD) + np.trace(covariance2_DD) - 2 * shared
    return max(0.0, float(np.sum((mean1_D - mean2_D) ** 2) + spread))


def _factor(covariance_DD: np.ndarray) -> np.ndarray:
    """L (D, R) with L L' = C, by Cholesky with pivots; ends where only rounding is left."""
    packed, pivots, rank, _ = dpstrf(covariance_DD, lower=True)
    factor = np.empty((len(packed), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor
