"""The Frechet distance against Gaussians whose distance is known, and against SciPy's square root of a matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from tandemrt.calibrate.frechet import FeatureStatistics, frechet_distance


def statistics_of(features: np.ndarray, parts: int = 1) -> FeatureStatistics:
    found = FeatureStatistics()
    for part in np.array_split(features, parts):
        found.add(part)
    return found


def of_exact(mean: np.ndarray, covariance: np.ndarray, count: int = 400) -> np.ndarray:
    """Features of exactly this mean and covariance."""
    width = len(mean)
    drawn = np.random.default_rng(3).standard_normal((count, width))
    drawn -= drawn.mean(axis=0)
    drawn = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn, rowvar=False).reshape(width, width))).T
    return drawn @ np.linalg.cholesky(covariance).T + mean


def test_gaussians_of_one_number() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2 of two normal distributions on a line."""
    first, second = of_exact(np.array([1.0]), np.array([[4.0]])), of_exact(np.array([4.0]), np.array([[25.0]]))
    distance = frechet_distance(statistics_of(first), statistics_of(second))
    assert distance == pytest.approx(3**2 + (5 - 2) ** 2, rel=1e-9)


def test_gaussians_that_share_their_axes() -> None:
    """On shared axes the distance is the sum over these."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    widths = np.array([0.1, 1, 2, 3, 10.0]), np.array([3, 0.5, 2, 9, 1.0])
    first, second = (of_exact(np.zeros(5), turn @ np.diag(width**2) @ turn.T) for width in widths)
    expected = float(np.square(widths[0] - widths[1]).sum())
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, rel=1e-9)


def test_as_the_definition_has_it() -> None:
    """The formula of Heusel et al. 2017 with SciPy's square root of the product."""
    rng = np.random.default_rng(1)
    first = rng.standard_normal((300, 16)) @ rng.standard_normal((16, 16)) + 2
    second = rng.standard_normal((200, 16)) @ rng.standard_normal((16, 16))
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    apart = np.square(first.mean(0) - second.mean(0)).sum()
    expected = apart + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(float(expected), rel=1e-9)


@settings(max_examples=25)
@given(parts=st.integers(1, 9), width=st.integers(1, 12), far=st.floats(-1e6, 1e6))
def test_parts_make_the_statistics_of_the_whole(parts: int, width: int, far: float) -> None:
    features = np.random.default_rng(parts).standard_normal((40, width)) + far
    found = statistics_of(features.astype(np.float64), parts)
    assert found.count == 40
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False).reshape(width, width), atol=1e-8)


@settings(max_examples=25)
@given(width=st.integers(1, 20), count=st.integers(2, 12))
def test_symmetric_zero_for_equal_ones_and_never_less(width: int, count: int) -> None:
    """Also with fewer pictures than features, where covariances have no inverse."""
    rng = np.random.default_rng(width)
    first, second = statistics_of(rng.standard_normal((count, width))), statistics_of(rng.random((count, width)))
    distance = frechet_distance(first, second)
    assert distance > 0
    assert distance == pytest.approx(frechet_distance(second, first), rel=1e-6, abs=1e-7)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "features", [np.zeros((0, 3)), np.zeros(3), np.zeros((2, 4)), np.array([[1, math.nan, 0]]), np.zeros((1, 3, 1))]
)
def test_what_are_no_features_is_refused(features: np.ndarray) -> None:
    found = statistics_of(np.ones((2, 3)))
    with pytest.raises(ValueError, match="features: "):
        found.add(features)
    assert found.count == 2


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1, expected 2 or more"):
        frechet_distance(statistics_of(np.ones((1, 3))), statistics_of(np.ones((2, 3))))
    with pytest.raises(ValueError, match="expected one number of them"):
        frechet_distance(statistics_of(np.ones((2, 4))), statistics_of(np.ones((2, 3))))
