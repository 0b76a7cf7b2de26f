"""The Fréchet distance between two sets of features, from sums that can be streamed and added."""

import dataclasses

import numpy as np
from scipy.linalg.lapack import dpstrf

from tokenflow_jax.parallel import hosts


@dataclasses.dataclass
class Statistics:
    """Count, sum and sum of outer products of features, in float64."""

    # Inception's features are of the order of their deviation, so float64 keeps more than ten
    # digits of the covariance without centering.
    count: int
    sum_D: np.ndarray
    outer_DD: np.ndarray

    @classmethod
    def empty(cls, width: int) -> "Statistics":
        """Return the statistics of no features of `width` channels."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    def update(self, features_BD: np.ndarray) -> None:
        features = np.asarray(features_BD, np.float64)
        self.count += len(features)
        self.sum_D += features.sum(axis=0)
        self.outer_DD += features.T @ features

    def over_processes(self) -> "Statistics":
        """Return the statistics over all processes; each must call this."""
        sums = hosts.sum_over_processes(vars(self))
        return Statistics(**sums | {"count": int(sums["count"])})

    @property
    def mean(self) -> np.ndarray:
        self._check(1)
        return self.sum_D / self.count

    @property
    def covariance(self) -> np.ndarray:
        """The sample covariance (D, D), divided by count - 1."""
        self._check(2)
        centered = self.outer_DD - np.outer(self.sum_D, self.mean)
        return centered / (self.count - 1)

    def distance(self, other: "Statistics") -> float:
        """Return the Fréchet distance to another set; of Inception's features, FID."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def _check(self, least: int) -> None:
        if self.count < least:
            raise ValueError(
                f"statistics of {self.count} images: a Fréchet distance needs 2 or more on each "
                "side, and thousands to mean something"
            )


def frechet_distance(
    mean1_D: np.ndarray, covariance1_DD: np.ndarray, mean2_D: np.ndarray, covariance2_DD: np.ndarray
) -> float:
    """Return |mean1 - mean2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), 0 or more."""
    # With C = L L' the last trace is the sum of the singular values of L1' L2. Unlike a square root
    # of the product this needs no regularization where a covariance is singular (fewer images than
    # channels), and it is quick there.
    factor1, factor2 = _factor(covariance1_DD), _factor(covariance2_DD)
    shared = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    spread = np.trace(covariance1_DD) + np.trace(covariance2_DD) - 2 * shared
    return max(0.0, float(np.sum((mean1_D - mean2_D) ** 2) + spread))


def _factor(covariance_DD: np.ndarray) -> np.ndarray:
    """Return L (D, R) with L L' = C, by Cholesky with pivots up to the rank."""
    packed, pivots, rank, _ = dpstrf(covariance_DD, lower=True)
    factor = np.empty((len(packed), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor
