"""Plans to try, which of them no other beats, and the best within a budget."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandemrt.calibrate.split_plans import (
    QUALITIES,
    SplitPlan,
    best_within,
    merged,
    pareto_front,
    plan_cost,
    require_affordable,
    split_plans,
    unsure_plans,
)
from tandemrt.runtime.calibrations import SplitPoint
from tandemrt.runtime.errors import ArgumentError, CalibrationError

TOTALS = st.integers(1, 60)
# Few values, so that plans often cost the same or are as good.
POINTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda pair: (pair[0] / 6, float(pair[1]))), min_size=1
)


def point(cost: float, latent_error: float, psnr_db: float = 30.0, right: int | None = None) -> SplitPoint:
    return SplitPoint(steps=(), cost=cost, latent_error=latent_error, psnr_db=psnr_db, ssim=0.9, right=right)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] >= other[1]


def test_each_order_shares_the_steps_its_way() -> None:
    plans = {plan.name: plan.order for plan in split_plans("a", "b", 6, (0, 2))}
    assert plans == {
        "a:6": "large first",
        "a:2,b:4": "large first",
        "b:6": "large first",
        "b:4,a:2": "small first",
        "a:1,b:2,a:1,b:2": "interleaved",
    }


@given(TOTALS, st.data())
def test_every_plan_has_all_steps_and_the_large_denoiser_as_many_as_asked(total: int, data: st.DataObject) -> None:
    asked = data.draw(st.sets(st.integers(0, total), min_size=1))
    plans = split_plans("a", "b", total, sorted(asked))
    assert plans[0].runs == (("a", total),)
    assert len({plan.runs for plan in plans}) == len(plans)
    for plan in plans:
        counts = [count for _, count in plan.runs]
        assert sum(counts) == total and min(counts) > 0
        assert merged(plan.runs) == plan.runs
        assert sum(count for name, count in plan.runs if name == "a") in asked | {total}


@given(TOTALS, st.data())
def test_interleaved_steps_are_spread_evenly(total: int, data: st.DataObject) -> None:
    large = data.draw(st.integers(1, total))
    plans = split_plans("a", "b", total, (large,))
    runs = next((plan.runs for plan in plans if plan.order == "interleaved"), plans[-1].runs)
    by_step = [name for name, count in runs for _ in range(count)]
    if runs[0][0] == "a" and {plan.order for plan in plans} >= {"interleaved"}:
        # Wherever it is looked, there are as many large steps as the share says, or one more.
        assert all(0 <= by_step[:end].count("a") - end * large / total < 1 for end in range(1, total + 1))


def test_plans_of_ones_own_come_last_and_once() -> None:
    runs = (("a", 1), ("b", 4), ("a", 1))
    plans = split_plans("a", "b", 6, (3,), [runs, (("a", 3), ("b", 3))])
    assert [plan.order for plan in plans] == ["large first", "large first", "small first", "interleaved", "given"]
    assert plans[-1] == SplitPlan(runs, "given")
    assert merged((("a", 1), ("a", 2), ("b", 3))) == (("a", 3), ("b", 3))


@pytest.mark.parametrize("asked", [-1, 7])
def test_more_steps_than_there_are_cannot_be_given(asked: int) -> None:
    with pytest.raises(ArgumentError, match=f"steps of the large denoiser, got {asked}, expected 0 to 6"):
        split_plans("a", "b", 6, (asked,))


def test_a_plan_costs_what_its_rows_take() -> None:
    assert plan_cost(["a", "b", "b", "b"], ["a"] * 4, {"a": 10.0, "b": 4.0}) == pytest.approx(0.55)
    # Some solvers call a denoiser twice in a step, and guidance may be off in some.
    assert plan_cost(["a", "b unguided"], ["a", "a"], {"a": 10.0, "b unguided": 2.0}) == pytest.approx(0.6)


@given(POINTS)
def test_the_front_is_what_no_other_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    for one, on in zip(points, front, strict=True):
        assert on == (not any(beats(other, one) for other in points))
    ahead = [one for one, on in zip(points, front, strict=True) if on]
    # Whatever is not on it, something on it beats.
    assert all(on or any(beats(one, other) for one in ahead) for other, on in zip(points, front, strict=True))
    # On it, more quality costs more.
    ordered = sorted(set(ahead))
    assert [quality for _, quality in ordered] == sorted({quality for _, quality in ahead})


@given(POINTS, st.randoms())
def test_the_front_is_the_same_in_any_order(points: list[tuple[float, float]], random: object) -> None:
    expected = dict(zip(points, pareto_front(points), strict=True))
    random.shuffle(points)
    assert dict(zip(points, pareto_front(points), strict=True)) == expected


@given(POINTS, st.floats(0, 1))
def test_the_best_is_affordable_and_on_the_front(points: list[tuple[float, float]], budget: float) -> None:
    measured = [point(cost, -quality) for cost, quality in points]
    affordable = [one for one in measured if one.cost <= budget]
    if affordable:
        best = best_within(measured, budget, QUALITIES["latent_error"])
        assert best.cost <= budget
        assert best.latent_error == min(one.latent_error for one in affordable)
        assert best.cost == min(one.cost for one in affordable if one.latent_error == best.latent_error)


def test_psnr_breaks_the_ties_of_a_scorer() -> None:
    points = [point(1.0, 0.0, 99.0, 9), point(0.6, 0.1, 30.0, 8), point(0.5, 0.2, 31.0, 8), point(0.4, 0.3, 40.0, 7)]
    assert best_within(points, 0.6, QUALITIES["accuracy"]) is points[2]
    assert best_within(points, 0.6, QUALITIES["psnr_db"]) is points[3]
    assert best_within(points, 0.6, QUALITIES["latent_error"]) is points[1]
    assert best_within(points, 1.0, QUALITIES["accuracy"]) is points[0]


def test_a_budget_that_no_plan_meets_names_the_nearest() -> None:
    plans = split_plans("a", "b", 6, (0, 3))
    costs = [1.0, 0.7, 0.4, 0.7, 0.7]
    require_affordable(plans, costs, 0.4)
    with pytest.raises(
        CalibrationError, match=r"got 0\.3, expected 0\.400 or more, which b:6 costs\. Nothing was stored"
    ):
        require_affordable(plans, costs, 0.3)


def test_plans_on_either_side_of_a_budget_may_be_unsure() -> None:
    """Whether they are within it by their medians or not; one that ends at the budget is not."""
    within, beyond, certain, ends = (
        msgspec.structs.replace(point(cost, 0.1), cost_interval=interval)
        for cost, interval in ((0.55, (0.5, 0.65)), (0.62, (0.58, 0.7)), (0.4, (0.3, 0.5)), (0.6, (0.6, 0.7)))
    )
    assert unsure_plans([within, beyond, certain, ends, point(0.6, 0.1)], 0.6) == [within, beyond]
