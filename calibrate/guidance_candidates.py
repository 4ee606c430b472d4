"""Settings that leave calls of the unconditional branch out, with what each is forecast to cost, out of curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal, TypeVar

import numpy as np

from ..runtime.adaptive import AdaptiveRule
from ..runtime.discrepancy import Taus
from .curves import Curve, guided_rows, opened, slopes

Kind = Literal["interval", "adaptive", "hybridiff"]
KINDS: tuple[Kind, ...] = ("interval", "adaptive", "hybridiff")
T = TypeVar("T")

_STEADY, _RELEASE, _PROBE = (1.1, 1.25, 1.5, 2.0), (1.0, 1.5, 2.5), (2, 3, 4, 6, 8)
_THRESHOLDS, _EPSILONS, _CAPS, _KS, _SLOPES = 10, 6, 6, 8, 6


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting.

    numbers: its own, JSON-able. branches: how many runs of one branch of the denoiser it takes a picture, forecast, the
    mean over the prompts. forecast: what else the curves tell of it.
    """

    kind: Kind
    numbers: Mapping[str, float]
    branches: float
    forecast: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `Request` that ask for it."""
        if self.kind == "interval":
            return {"guidance_interval": (self.numbers["start"], self.numbers["end"])}
        if self.kind == "adaptive":
            return {"guidance": "adaptive", "guidance_config": dict(self.numbers)}
        return {"placement": "hybridiff", "placement_config": dict(self.numbers)}

    @property
    def name(self) -> str:
        return f"{self.kind} {', '.join(f'{key} {value:g}' for key, value in self.numbers.items())}"

    def facts(self) -> dict[str, Any]:
        """What the curves tell of it, JSON-able."""
        numbers = dict(self.numbers)
        return {"kind": self.kind, "numbers": numbers, "forecast_branches": self.branches, **self.forecast}


def interval_candidates(steps: Sequence[int], limit: int) -> list[Candidate]:
    """Intervals that begin in the first half of the steps; steps: the inference step of each row, rising from 0."""
    count = steps[-1] + 1
    starts = spread(range(count // 2 + 1), max(1, math.isqrt(limit) // 2))
    ends = spread(range(1, count + 1), max(1, limit // len(starts)))
    return [
        Candidate(
            "interval",
            {"start": start / count, "end": end / count},
            len(steps) + sum(start <= step < end for step in steps),
        )
        for start, end in product(starts, ends)
        if start < end and (start, end) != (0, count)
    ]


def adaptive_candidate(curves: Sequence[Curve], rule: AdaptiveRule) -> Candidate:
    """Adaptive guidance under a rule."""
    guided = [guided_rows(curve, rule) for curve in curves]
    branches = float(np.mean([len(rows) + sum(rows) for rows in guided]))
    return Candidate("adaptive", asdict(rule), branches)


def adaptive_candidates(curves: Sequence[Curve], limit: int) -> list[Candidate]:
    """Rules with thresholds where the curves lie, one of those that the curves do not tell apart."""
    values = [value for curve in curves for value in curve.discrepancy]
    thresholds = {_rounded(value) for value in np.quantile(values, np.linspace(0.05, 0.95, _THRESHOLDS)) if value > 0}
    rules = [
        AdaptiveRule(threshold=threshold, release=_rounded(threshold * release), probe=probe, steady=steady)
        for threshold, steady, release, probe in product(sorted(thresholds), _STEADY, _RELEASE, _PROBE)
    ]
    told_apart = unlike(rules, lambda rule: tuple(guided_rows(curve, rule) for curve in curves))
    return _thinned([adaptive_candidate(curves, rule) for rule in told_apart], limit)


def hybridiff_candidate(curves: Sequence[Curve], taus: Taus) -> Candidate:
    """Hybridiff's window; the forecast has tau1 of every prompt, which a run has too."""
    windows = [opened(curve, taus) for curve in curves]
    rows = len(curves[0].discrepancy)
    branches = float(np.mean([2 * (rows - len(window.steps)) + window.branches for window in windows]))
    numbers = {"L_slope": taus.l_slope, "eps_slope": taus.eps_slope, "k": taus.k, "tau_cap": taus.tau_cap}
    return Candidate("hybridiff", numbers, branches, {"tau1": [window.tau1 for window in windows]})


def hybridiff_candidates(curves: Sequence[Curve], limit: int) -> list[Candidate]:
    """Windows that the curves tell apart, opening from the first third of the rows on; none where rows are too few."""
    rows = len(curves[0].discrepancy)
    settings = []
    for l_slope in spread(range(2, max(3, rows // 2 + 1)), _SLOPES):
        found = [slope for curve in curves for slope in slopes(curve, l_slope) if slope > 0]
        epsilons = {_rounded(value) for value in np.quantile(found, np.linspace(0.1, 0.9, _EPSILONS))} if found else ()
        settings += [
            Taus(l_slope=l_slope, eps_slope=eps_slope, k=k, tau_cap=tau_cap)
            for eps_slope in sorted(epsilons)
            for tau_cap in spread(range(max(2, rows // 5), rows - 1), _CAPS)
            for k in spread(range(2, rows), _KS)
            if tau_cap + k < rows
        ]
    told_apart = unlike(settings, lambda taus: tuple(opened(curve, taus) for curve in curves))
    return _thinned([hybridiff_candidate(curves, taus) for taus in told_apart], limit)


def unlike(items: Iterable[T], behaviour: Callable[[T], Hashable]) -> list[T]:
    """The items that behave otherwise than all before them."""
    found: dict[Hashable, T] = {}
    for item in items:
        found.setdefault(behaviour(item), item)
    return list(found.values())


def spread(values: Sequence[T], count: int) -> list[T]:
    """At most so many of the values, evenly, with the first and the last of them."""
    if len(values) <= count:
        return list(values)
    return [values[index] for index in np.linspace(0, len(values) - 1, count).round().astype(int)]


def _thinned(candidates: Iterable[Candidate], limit: int) -> list[Candidate]:
    """At most so many, from the cheapest to the dearest; of windows as dear as each other, of early and late ones."""
    return spread(sorted(candidates, key=lambda one: (one.branches, sum(one.forecast.get("tau1", ())))), limit)


def _rounded(value: float) -> float:
    """To two significant digits: what is told is what is stored."""
    return float(f"{value:.2g}")
