"""Where to clip activations for eight bits: pure functions of a histogram of their magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ..runtime.errors import ArgumentError

LEVELS = 127  # of symmetric int8 on either side of zero
BINS = 8192
# Thresholds that are tried stand a sixteenth of an octave apart, down to a thousandth of the largest magnitude.
_OCTAVES, _PER_OCTAVE = 10, 16
_LEAST_BINS = LEVELS + 1  # of which levels are made; fewer tell nothing of what rounding does

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often magnitudes were seen: `counts[i]` of them from `i * width` up to `(i + 1) * width`.

    largest: the largest magnitude, exactly. Above 0.
    """

    counts: Counts
    width: float
    largest: float

    @property
    def used(self) -> int:
        """How many bins there are up to the last that holds something."""
        return int(np.flatnonzero(self.counts)[-1]) + 1


def clipping_threshold(histogram: Histogram, observer: str, percentile: float) -> float:
    """The magnitude that becomes 127; larger ones are clipped to it. In (0, `histogram.largest`].

    percentile: of the magnitudes, in (0, 100], for the observer of that name.

    Raises:
        ArgumentError: an observer of no such name, or a percentile out of range.
    """
    require_observer(observer, percentile)
    return min(OBSERVERS[observer](histogram, percentile), histogram.largest)


def require_observer(observer: str, percentile: float) -> None:
    """Raise ArgumentError where there is no such observer, or the percentile is out of range."""
    if observer not in OBSERVERS:
        raise ArgumentError("observer", "unknown", got=observer, expected=f"one of {', '.join(OBSERVERS)}")
    if not 0 < percentile <= 100:
        raise ArgumentError("percentile", "out of range", got=percentile, expected="above 0, up to 100")


def _minmax(histogram: Histogram, percentile: float) -> float:
    return histogram.largest


def _percentile(histogram: Histogram, percentile: float) -> float:
    """The upper edge of the bin that the percentile lies in."""
    seen = np.cumsum(histogram.counts)
    return float(np.searchsorted(seen, seen[-1] * (percentile / 100)) + 1) * histogram.width


def _mse(histogram: Histogram, percentile: float) -> float:
    """What makes the mean squared error of rounding and clipping least, magnitudes being in the middle of their bin."""
    used = histogram.used
    middles = (np.arange(used) + 0.5) * histogram.width
    counts = histogram.counts[:used]

    def error(threshold: float) -> float:
        scale = threshold / LEVELS
        rounded = np.minimum(np.rint(middles / scale), LEVELS) * scale
        return float(counts @ np.square(middles - rounded))

    return min(_candidates(histogram), key=error)


def _entropy(histogram: Histogram, percentile: float) -> float:
    """What makes least the Kullback-Leibler divergence of the clipped distribution from its 128 levels.

    S. Migacz, "8-bit Inference with TensorRT", GTC 2017: what is clipped counts in the last bin of the distribution
    that is kept, and not in its levels, which spread evenly over those of their bins that hold anything.
    """
    edges = {int(np.ceil(threshold / histogram.width)) for threshold in _candidates(histogram)}
    kept = sorted({max(_LEAST_BINS, min(edge, len(histogram.counts))) for edge in edges})
    return min(kept, key=lambda bins: _divergence(histogram.counts, bins)) * histogram.width


def _divergence(counts: Counts, bins: int) -> float:
    distribution = counts[:bins].astype(np.float64)
    starts = np.arange(_LEAST_BINS) * bins // _LEAST_BINS
    levels = np.add.reduceat(distribution, starts)
    filled = np.add.reduceat((distribution > 0).astype(np.float64), starts)
    spread = np.repeat(levels / np.maximum(filled, 1), np.diff(np.append(starts, bins)))
    spread[distribution == 0] = 0
    distribution[-1] += counts[bins:].sum()
    # Where only what was clipped counts, nothing of the levels lies; a small share keeps the divergence finite.
    shares, approximated = (_smoothed(one) for one in (distribution, spread))
    held = shares > 0
    return float(np.sum(shares[held] * np.log(shares[held] / approximated[held])))


def _smoothed(distribution: Floats, share: float = 1e-4) -> Floats:
    """Shares that add up to 1; empty bins get a small one together, which the others give."""
    empty = distribution == 0
    total = distribution.sum()
    if not empty.any() or total == 0:
        return np.full_like(distribution, 1 / distribution.size) if total == 0 else distribution / total
    shares: Floats = np.where(empty, share / empty.sum(), distribution / total * (1 - share))
    return shares


def _candidates(histogram: Histogram) -> list[float]:
    """Thresholds to try, the largest first, so that of equal ones it is taken."""
    steps = np.arange(_OCTAVES * _PER_OCTAVE + 1) / _PER_OCTAVE
    thresholds = histogram.largest * np.exp2(-steps)
    return [float(one) for one in thresholds if one >= histogram.width] or [histogram.largest]


OBSERVERS: Mapping[str, Callable[[Histogram, float], float]] = MappingProxyType(
    {"minmax": _minmax, "percentile": _percentile, "entropy": _entropy, "mse": _mse}
)
