"""Plans that share the steps between two denoisers, which of them no other beats, and the best within a budget."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ..runtime.calibrations import SplitPoint
from ..runtime.errors import ArgumentError, CalibrationError
from .strata import Runs

Order = Literal["large first", "small first", "interleaved", "given"]
ORDERS: tuple[Order, ...] = ("large first", "small first", "interleaved")


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A plan to try: its runs of steps, and how they are ordered, which groups it with others in the picture."""

    runs: Runs
    order: Order

    @property
    def name(self) -> str:
        """As `--steps` is given it, such as `unet:10,unet_small:15`."""
        return name_of(self.runs)


def name_of(runs: Runs) -> str:
    """Runs of steps as `--steps` is given them."""
    return ",".join(f"{name}:{count}" for name, count in runs)


def merged(runs: Runs) -> Runs:
    """Runs of which no two neighbours are of one denoiser."""
    return tuple((name, sum(count for _, count in same)) for name, same in groupby(runs, key=operator.itemgetter(0)))


def split_plans(
    large: str, small: str, total: int, points: Sequence[int], given: Sequence[Runs] = ()
) -> tuple[SplitPlan, ...]:
    """The plans that give the large denoiser each of `points` of `total` steps in every order, then those `given`.

    The large denoiser alone comes first, whether it is asked for or not: all others are compared with it. A plan that
    is another order's too comes once.

    Raises:
        ArgumentError: a point outside 0..total.
    """
    for point in points:
        if not 0 <= point <= total:
            raise ArgumentError("--points", "steps of the large denoiser", got=point, expected=f"0 to {total}")
    made: dict[Runs, SplitPlan] = {}
    for order in ORDERS:
        for point in sorted({total, *points}, reverse=True):
            large_steps = _ordered(order, point, total)
            runs = merged(tuple((large if is_large else small, 1) for is_large in large_steps))
            made.setdefault(runs, SplitPlan(runs, order))
    for runs in given:
        made.setdefault(runs, SplitPlan(runs, "given"))
    return tuple(made.values())


def _ordered(order: Order, point: int, total: int) -> list[bool]:
    """Of each step whether it is the large denoiser's, which takes `point` of them."""
    if order == "large first":
        return [step < point for step in range(total)]
    if order == "small first":
        return [step >= total - point for step in range(total)]
    # Spread evenly, and the first step is a large one.
    return [-(-(step + 1) * point // total) > -(-step * point // total) for step in range(total)]


def plan_cost(rows: Sequence[str], large: Sequence[str], row_ms: Mapping[str, float]) -> float:
    """What a plan's rows take as a share of those of the large denoiser alone; each row by its kind in `row_ms`."""
    return sum(row_ms[kind] for kind in rows) / sum(row_ms[kind] for kind in large)


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """Of each (cost, quality) whether no other has at most its cost and at least its quality, and one of them better.

    Quality is better the higher it is.
    """
    return tuple(
        not any(other[0] <= cost and other[1] >= quality and other != (cost, quality) for other in points)
        for cost, quality in points
    )


Quality = Callable[[SplitPoint], tuple[float, ...]]

QUALITIES: Mapping[str, Quality] = {
    "latent_error": lambda point: (-point.latent_error,),
    "psnr_db": lambda point: (point.psnr_db,),
    "ssim": lambda point: (point.ssim,),
    # PSNR breaks ties, of which few pictures make many.
    "accuracy": lambda point: (float(point.right or 0), point.psnr_db),
}


def require_affordable(plans: Sequence[SplitPlan], costs: Sequence[float], budget: float) -> None:
    """Raise CalibrationError, which names the nearest plan, when none of the plans costs `budget` or less."""
    cost, name = min((cost, plan.name) for cost, plan in zip(costs, plans, strict=True))
    if cost > budget:
        raise CalibrationError(
            "--budget",
            "no plan costs so little",
            got=budget,
            expected=f"{cost:.3f} or more, which {name} costs",
            remedy="Nothing was stored. Give a larger budget, or other plans.",
        )


def unsure_plans(points: Sequence[SplitPoint], budget: float) -> list[SplitPoint]:
    """Those of which it is not certain whether they cost `budget` or less, as rows differ between rounds."""
    return [
        point
        for point in points
        if point.cost_interval is not None and point.cost_interval[0] < budget < point.cost_interval[1]
    ]


def best_within(points: Sequence[SplitPoint], budget: float, quality: Quality) -> SplitPoint:
    """The point of the best quality that costs `budget` or less; the cheapest of several that are as good.

    There must be one: see `require_affordable`.
    """
    affordable = [point for point in points if point.cost <= budget]
    return max(affordable, key=lambda point: (quality(point), -point.cost))
