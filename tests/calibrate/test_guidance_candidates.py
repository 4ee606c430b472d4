"""Settings to try: within the limit, of all costs, each one that a plan takes, forecast as the plan has it."""

from __future__ import annotations

import numpy as np
import pytest

from tandemrt.calibrate.curves import Curve
from tandemrt.calibrate.guidance_candidates import (
    Candidate,
    adaptive_candidates,
    hybridiff_candidates,
    interval_candidates,
    spread,
    unlike,
)
from tandemrt.runtime.plan import Schedule, compile_plan

from ..runtime.test_plan import MANIFEST


def falling(rows: int, prompts: int = 5) -> list[Curve]:
    random = np.random.default_rng(rows)
    curves = []
    for _ in range(prompts):
        values = 0.02 + np.exp(-np.arange(rows) / 4) * random.uniform(0.2, 0.6) + random.uniform(0, 0.01, rows)
        growth = (None, *random.uniform(0.8, 1.1, rows - 1).tolist())
        curves.append(Curve(discrepancy=tuple(values.tolist()), growth=growth, denoisers=("unet",) * rows))
    return curves


@pytest.mark.parametrize(("steps", "solver"), [(25, None), (7, None), (8, "heun"), (10, "pndm")])
def test_intervals_cost_what_their_plans_do(steps: int, solver: str | None) -> None:
    whole = compile_plan(MANIFEST, Schedule(steps=steps, solver=solver, guidance_scale=2.0))
    candidates = interval_candidates(whole.table.steps.tolist(), 30)
    assert 10 <= len(candidates) <= 30
    for one in candidates:
        plan = compile_plan(MANIFEST, Schedule(steps=steps, solver=solver, guidance_scale=2.0, **one.arguments))
        assert one.branches == plan.table.rows + sum(plan.guided)
        assert not all(plan.guided)


@pytest.mark.parametrize("rows", [5, 10, 25, 50])
def test_windows_and_rules_are_such_as_a_plan_takes(rows: int) -> None:
    curves = falling(rows)
    windows, rules = hybridiff_candidates(curves, 20), adaptive_candidates(curves, 20)
    for listed in (windows, rules):
        assert 1 <= len(listed) <= 20
        assert [one.branches for one in listed] == sorted(one.branches for one in listed)
        assert len({one.name for one in listed}) == len(listed)
        for one in listed:
            compile_plan(MANIFEST, Schedule(steps=rows, guidance_scale=2.0, **one.arguments))
    assert all(rows <= one.branches < 2 * rows for one in windows)
    assert all(len(one.forecast["tau1"]) == len(curves) for one in windows)


def test_no_window_fits_few_rows() -> None:
    assert hybridiff_candidates(falling(4), 20) == []


def test_settings_that_the_curves_do_not_tell_apart_are_one() -> None:
    assert unlike([3, 14, 5, 13, 4], lambda number: number % 10) == [3, 14, 5]
    # Of curves that are one straight line every window opens as early as it can.
    flat = [Curve(discrepancy=(0.3,) * 12, growth=(None, *(1.0,) * 11), denoisers=("unet",) * 12)]
    assert {one.branches for one in adaptive_candidates(flat, 60)} <= set(np.arange(12, 25, dtype=float))


def test_values_are_spread_over_all_there_are() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 4) == [0, 1, 2]


def test_a_candidate_asks_for_itself() -> None:
    one = Candidate("hybridiff", {"L_slope": 2, "eps_slope": 0.001, "k": 3, "tau_cap": 4}, 17.0)
    assert one.name == "hybridiff L_slope 2, eps_slope 0.001, k 3, tau_cap 4"
    assert one.arguments["placement"] == "hybridiff"
