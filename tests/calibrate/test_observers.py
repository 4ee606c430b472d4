"""Clipping thresholds of known distributions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemrt.calibrate.observers import BINS, LEVELS, OBSERVERS, Histogram, clipping_threshold
from tandemrt.runtime.errors import ArgumentError


def histogram_of(magnitudes: np.ndarray, exponent: int | None = None) -> Histogram:
    largest = float(magnitudes.max())
    exponent = int(np.frexp(largest)[1]) if exponent is None else exponent
    counts = np.histogram(magnitudes, bins=BINS, range=(0, 2.0**exponent))[0]
    return Histogram(counts.astype(np.int64), 2.0**exponent / BINS, largest)


def rounding_error(magnitudes: np.ndarray, threshold: float) -> float:
    scale = threshold / LEVELS
    return float(np.mean(np.square(magnitudes - np.minimum(np.rint(magnitudes / scale), LEVELS) * scale)))


MAGNITUDES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50).map(np.array)
SOME = st.sampled_from(sorted(OBSERVERS))


@settings(max_examples=40)
@given(MAGNITUDES, SOME, st.floats(1, 100))
def test_a_threshold_is_above_0_and_up_to_the_largest(magnitudes: np.ndarray, observer: str, percentile: float) -> None:
    found = clipping_threshold(histogram_of(magnitudes), observer, percentile)
    assert 0 < found <= magnitudes.max()


@settings(max_examples=40)
@given(MAGNITUDES, SOME, st.integers(-20, 20))
def test_what_is_twice_as_large_is_clipped_at_twice_as_much(
    magnitudes: np.ndarray, observer: str, octaves: int
) -> None:
    found = clipping_threshold(histogram_of(magnitudes), observer, 99.0)
    assert clipping_threshold(histogram_of(magnitudes * 2.0**octaves), observer, 99.0) == found * 2.0**octaves


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_even_magnitudes_are_hardly_clipped(observer: str) -> None:
    magnitudes = np.linspace(0, 3, 300_000)
    assert clipping_threshold(histogram_of(magnitudes), observer, 99.0) >= 2.7


@pytest.mark.parametrize("observer", ["percentile", "entropy", "mse"])
def test_a_lone_outlier_is_clipped(observer: str) -> None:
    normal = np.abs(np.random.default_rng(0).standard_normal(1_000_000))
    found = clipping_threshold(histogram_of(np.append(normal, 40.0)), observer, 99.99)
    assert 2 < found < 10
    assert clipping_threshold(histogram_of(np.append(normal, 40.0)), "minmax", 99.99) == 40


def test_a_percentile_is_the_one_of_the_magnitudes() -> None:
    normal = np.abs(np.random.default_rng(1).standard_normal(1_000_000))
    assert clipping_threshold(histogram_of(normal), "percentile", 99.0) == pytest.approx(
        np.percentile(normal, 99), rel=2e-3
    )


def test_no_other_threshold_has_a_smaller_squared_error() -> None:
    tailed = np.abs(np.random.default_rng(2).laplace(size=200_000))
    found = clipping_threshold(histogram_of(tailed), "mse", 99.0)
    others = np.linspace(1, tailed.max(), 300)
    assert rounding_error(tailed, found) <= min(rounding_error(tailed, one) for one in others) * 1.02
    assert found < tailed.max()


def test_what_cannot_be_is_refused() -> None:
    histogram = histogram_of(np.ones(3))
    with pytest.raises(ArgumentError, match=r"observer: unknown, got 'best', expected one of minmax"):
        clipping_threshold(histogram, "best", 99.0)
    with pytest.raises(ArgumentError, match=r"percentile: out of range, got 0.0"):
        clipping_threshold(histogram, "percentile", 0.0)
