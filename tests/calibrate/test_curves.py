"""Discrepancy curves: what follows from them is what the runtime does with the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandemrt.calibrate.curves import Curve, guided_rows, opened, slopes
from tandemrt.runtime.adaptive import AdaptiveGuidance, AdaptiveRule
from tandemrt.runtime.discrepancy import Discrepancy, Taus
from tandemrt.runtime.errors import PlanError
from tandemrt.runtime.plan import RowGuidance

ONE = np.ones((1, 1, 2, 2), np.float32)
distances = st.floats(0, 2) | st.sampled_from([0.0, 0.1, 0.1004, 0.1008])
growths = st.sampled_from([0.6, 0.9, 1.0, 1.1, 1.7])


def curve_of(discrepancy: list[float], growth: list[float] | None = None, denoisers: str = "") -> Curve:
    growth = [1.0] * len(discrepancy) if growth is None else growth
    names = tuple(denoisers) or ("unet",) * len(discrepancy)
    first = [row == 0 or names[row] != names[row - 1] for row in range(len(names))]
    known = tuple(None if new else factor for new, factor in zip(first, growth, strict=True))
    return Curve(discrepancy=tuple(discrepancy), growth=known, denoisers=names)


@st.composite
def windows(draw: Any) -> tuple[list[float], Taus]:
    values = draw(st.lists(distances, min_size=4, max_size=40))
    k = draw(st.integers(1, len(values) - 2))
    cap = draw(st.integers(1, len(values) - 1 - k))
    slope, epsilon = draw(st.integers(1, len(values))), draw(st.sampled_from([1e-4, 1e-3, 0.1, 3.0]))
    return values, Taus(l_slope=slope, eps_slope=epsilon, k=k, tau_cap=cap)


@given(windows())
def test_the_window_is_the_one_that_a_run_has(drawn: tuple[list[float], Taus]) -> None:
    values, taus = drawn
    run, within = Discrepancy(taus, len(values)), []
    for row, value in enumerate(values):
        if run.phase(row) == "branches":
            run.record(row, value)
        else:
            within.append(row)
    window = opened(curve_of(values), taus)
    assert (window.tau1, window.tau2) == run.found
    assert list(window.steps) == within
    assert window.branches == 1 + len(within)
    assert window.tau1 <= taus.tau_cap


def test_a_window_opens_at_the_first_slope_that_is_small() -> None:
    values = [1.0, 0.5, 0.3, 0.2, 0.195, 0.19, 0.1, 0.1]
    assert list(slopes(curve_of(values), 2)) == pytest.approx([0.1, 0.05, 0.0025, 0.0025, 0.045, 0.0])
    assert opened(curve_of(values), Taus(l_slope=2, eps_slope=0.01, k=2, tau_cap=5)).tau1 == 4
    assert opened(curve_of(values), Taus(l_slope=2, eps_slope=0.001, k=2, tau_cap=5)).tau1 == 5
    with pytest.raises(PlanError, match="tau_cap"):
        opened(curve_of(values), Taus(l_slope=2, eps_slope=0.01, k=2, tau_cap=6))


@given(
    rows=st.lists(st.tuples(st.floats(0, 0.3), growths, st.sampled_from("ls")), min_size=1, max_size=30),
    rule=st.builds(
        lambda threshold, times, probe, steady: AdaptiveRule(threshold, threshold * times, probe, steady),
        st.sampled_from([0.05, 0.15, 0.4]),
        st.sampled_from([1.0, 1.5]),
        st.integers(2, 6),
        st.sampled_from([1.05, 1.3, 2.0]),
    ),
)
def test_rows_are_guided_as_in_a_run_that_stays_on_course(
    rows: list[tuple[float, float, str]], rule: AdaptiveRule
) -> None:
    curve = curve_of([row[0] for row in rows], [row[1] for row in rows], "".join(row[2] for row in rows))
    guidance, expected, difference = AdaptiveGuidance(rule), [], ONE
    for (distance, growth, name), known in zip(rows, curve.growth, strict=True):
        difference = (difference if known is None else difference * np.float32(growth)).astype(np.float32)
        expected.append(guidance.wanted(name))
        if expected[-1]:
            guidance.saw(ONE + difference, ONE, distance)
        else:
            guidance.guide(ONE.copy(), 2.0, np.empty_like(ONE))
    assert guided_rows(curve, rule) == tuple(expected)


def test_a_curve_is_of_rows_that_all_ran_both_branches() -> None:
    rows = [RowGuidance(True, "batched", "guided", 0.5), RowGuidance(True, "batched", "guided", 0.25, growth=0.9)]
    curve = Curve.of(rows, ("unet", "unet"))
    assert (curve.discrepancy, curve.growth) == ((0.5, 0.25), (None, 0.9))
    with pytest.raises(ValueError, match="1 of 2 without both branches"):
        Curve.of([rows[0], RowGuidance(False, "batched", "the branches agree")], ("unet", "unet"))
