"""Hybridiff's log and its taus, against numbers computed by hand."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from tandemrt.runtime.discrepancy import TRANSFORMER, UNET, Discrepancy, Taus, default_taus, relative_mae
from tandemrt.runtime.errors import PlanError
from tandemrt.runtime.manifest import TensorSpec

TAUS = Taus(l_slope=2, eps_slope=0.125, k=3, tau_cap=5)


def recorded(values: Sequence[float], taus: Taus = TAUS, steps: int = 10) -> Discrepancy:
    log = Discrepancy(taus, steps)
    for step, value in enumerate(values):
        log.record(step, value)
    return log


def test_the_error_is_relative_to_the_unconditional_branch() -> None:
    scratch = np.empty((2, 2), np.float32)
    conditional = np.array([[1.0, -3.0], [2.0, 0.5]], np.float32)
    unconditional = np.array([[2.0, -1.0], [2.0, -3.0]], np.float32)
    # |1 − 2| + |−3 + 1| + 0 + |0.5 + 3| = 6.5, of 2 + 1 + 2 + 3 = 8
    assert relative_mae(conditional, unconditional, scratch) == pytest.approx(6.5 / 8)
    assert relative_mae(conditional, conditional, scratch) == 0
    assert relative_mae(conditional, np.zeros_like(conditional), scratch) == pytest.approx(1.625 / 1e-12)


@pytest.mark.parametrize(
    ("values", "tau1", "first"),
    [
        # Slopes need more than two values: at step 2 (0.9 − 0.8) / 2 = 0.05, of the last two of three.
        ((1.0, 0.9, 0.8), 2, 3),
        # At step 2 (0.9 − 0.6) / 2 = 0.15; at step 3 (0.6 − 0.5) / 2 = 0.05.
        ((1.0, 0.9, 0.6, 0.5), 3, 4),
        # A rising error has a slope below 0, an even one of 0.
        ((1.0, 0.9, 1.0, 1.0), 3, 4),
        # 0.125 throughout: a slope of eps_slope itself does not count; the cap decides a step before.
        ((2.0, 1.75, 1.5, 1.25, 1.0), 5, 5),
        # Undecided at step 3, though the slope of the first values was small.
        ((1.0, 1.0, 0.7, 0.3), None, None),
    ],
)
def test_tau1_is_the_first_small_slope_or_the_cap(values: Sequence[float], tau1: int | None, first: int | None) -> None:
    log = recorded(values)
    assert log.found == (None if tau1 is None else (tau1, tau1 + 3))
    assert log.steps == (range(0) if tau1 is None or first is None else range(first, tau1 + 4))


def test_a_window_begins_whole_and_ends_with_tau2() -> None:
    log = recorded((1.0, 0.9, 0.8))
    phases = [log.phase(step) for step in range(10)]
    assert phases == ["branches"] * 3 + ["fill"] + ["pipelined"] * 2 + ["branches"] * 4
    log.record(6, 0.1)
    log.record(7, 0.1)
    assert log.found == (2, 5)


def test_a_capped_window_begins_at_the_cap() -> None:
    log = recorded((2.0, 1.75, 1.5, 1.25, 1.0))
    phases = [log.phase(step) for step in range(10)]
    assert phases == ["branches"] * 5 + ["fill"] + ["pipelined"] * 3 + ["branches"]


def test_nothing_is_decided_without_a_log() -> None:
    log = Discrepancy(TAUS, 10)
    assert {log.phase(step) for step in range(10)} == {"branches"}


def test_defaults_are_those_of_the_families() -> None:
    def inputs(latent: str) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=latent, dtype="float32", shape=("batch", 4, "height", "width")),)

    assert default_taus(inputs("sample")) == UNET == Taus(12, 4e-4, 5, 15)
    assert default_taus(inputs("hidden_states")) == TRANSFORMER == Taus(15, 5e-4, 5, 40)
    for taus in (UNET, TRANSFORMER):
        Discrepancy(taus, 50)


def test_what_makes_no_window_is_refused_before_the_run() -> None:
    with pytest.raises(PlanError, match=r"tau_cap \+ k: the window's last step, of 45 from 0 on, got 45, expected"):
        Discrepancy(TRANSFORMER, 45)
    Discrepancy(TRANSFORMER, 46)
    with pytest.raises(PlanError, match="placement_config: L_slope: out of range, got 0"):
        Taus(l_slope=0)
    with pytest.raises(PlanError, match="placement_config: k: out of range, got 0, expected 1 or more"):
        Taus(k=0)
    with pytest.raises(PlanError, match="placement_config: tau_cap: out of range, got 0"):
        Taus(tau_cap=0)
    for eps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="placement_config: eps_slope: out of range"):
            Taus(eps_slope=eps)


def test_nothing_is_allocated_after_the_first_step() -> None:
    log = Discrepancy(Taus(tau_cap=90), 100)
    random = np.random.default_rng(1)
    one, other, scratch = (random.standard_normal((1, 4, 64, 64)).astype(np.float32) for _ in range(3))
    log.record(0, relative_mae(one, other, scratch))
    tracemalloc.start()
    try:
        for step in range(1, 50):
            log.record(step, relative_mae(one, other, scratch))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < one.nbytes / 4
