"""The Fréchet distance of two sets of features, each summed up as it is read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]


@dataclass(slots=True)
class FeatureStatistics:
    """Mean and covariance of (N, F) features that come in parts; F x F numbers are kept, however large N is.

    The first part's mean is taken off before the sums, which otherwise lose digits where it is far from 0.
    """

    count: int = 0
    _origin: Float64 = field(default_factory=lambda: np.zeros(0))
    _sum: Float64 = field(default_factory=lambda: np.zeros(0))
    _products: Float64 = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, features: Features) -> None:
        """Take (n, F) features in; F is that of the first part.

        Raises:
            ValueError: they are of another shape, or hold NaN or Inf.
        """
        if features.ndim != 2 or not len(features) or (self.count and features.shape[1] != len(self._sum)):
            expected = f"(n, {len(self._sum)})" if self.count else "(n, features)"
            raise ValueError(f"features: got shape {features.shape}, expected {expected}")
        if not np.isfinite(features).all():
            raise ValueError("features: hold NaN or Inf")
        if not self.count:
            width = features.shape[1]
            self._origin = features.mean(axis=0, dtype=np.float64)
            self._sum, self._products = np.zeros(width), np.zeros((width, width))
        centred = features - self._origin
        self.count += len(features)
        self._sum += centred.sum(axis=0)
        self._products += centred.T @ centred

    @property
    def mean(self) -> Float64:
        """(F,)"""
        return self._origin + self._sum / self.count

    @property
    def covariance(self) -> Float64:
        """(F, F), divided by N - 1; ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"features: got {self.count}, expected 2 or more")
        covariance: Float64 = (self._products - np.outer(self._sum, self._sum) / self.count) / (self.count - 1)
        return covariance


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The squared Fréchet distance of the Gaussians with these means and covariances, 0 for equal ones.

    |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)): Dowson and Landau 1982; of Inception's features it is FID, Heusel et
    al. 2017. The trace of the root is taken from the symmetric C1^(1/2) C2 C1^(1/2), which has the eigenvalues of
    C1 C2, but exactly real ones from 0 on even where there are fewer pictures than features.

    Raises:
        ValueError: the features differ in number, or there are fewer than two in a set.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features: got {first.mean.shape} and {second.mean.shape}, expected one number of them")
    cov1, cov2 = first.covariance, second.covariance
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov2 @ root), 0, None)).sum()
    apart = float(np.square(first.mean - second.mean).sum())
    return max(0.0, apart + float(np.trace(cov1) + np.trace(cov2) - 2 * shared))
