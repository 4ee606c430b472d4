"""Discrepancy curves of prompts under full guidance, and what follows from them alone, without running anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from ..runtime.adaptive import AdaptiveRule, Agreement
from ..runtime.discrepancy import Discrepancy, Taus
from ..runtime.plan import RowGuidance


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt's: for each row of the plan, which all ran both branches.

    discrepancy: see `relative_mae`. growth: what the branches' difference grew by since the row before; None where the
    row is its denoiser's first. denoisers: which component ran.
    """

    discrepancy: tuple[float, ...]
    growth: tuple[float | None, ...]
    denoisers: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[RowGuidance], denoisers: Sequence[str]) -> Curve:
        """The curve that a generation with adaptive guidance, which never left a branch out, reported."""
        discrepancy = tuple(row.discrepancy for row in rows if row.discrepancy is not None)
        if len(discrepancy) != len(rows):
            raise ValueError(f"rows: got {len(rows) - len(discrepancy)} of {len(rows)} without both branches")
        return cls(discrepancy=discrepancy, growth=tuple(row.growth for row in rows), denoisers=tuple(denoisers))


# Both limits of it are below everything that is measured.
ALWAYS = {"threshold": 1e-300, "steady": 1 + 1e-12}


@dataclass(frozen=True, slots=True)
class Opened:
    """Hybridiff's window on one prompt: its taus and which rows lie in it, the first of which is whole."""

    tau1: int
    tau2: int
    steps: range

    @property
    def branches(self) -> int:
        """How many runs of one branch the window takes: both in its first row, then all stages once a row."""
        return 1 + len(self.steps)


def opened(curve: Curve, taus: Taus) -> Opened:
    """The window that a run with these numbers has: rows before it are those of the recorded one.

    Raises:
        PlanError: the window could close behind the last row.
    """
    seen = Discrepancy(taus, len(curve.discrepancy))
    for row, value in enumerate(curve.discrepancy):
        seen.record(row, value)
        if seen.found is not None:
            return Opened(*seen.found, seen.steps)
    raise AssertionError("tau_cap lies before the last row")


def slopes(curve: Curve, l_slope: int) -> Iterator[float]:
    """The curve's slopes over so many rows, as `Discrepancy.record` takes them."""
    values = curve.discrepancy
    for count in range(l_slope + 1, len(values) + 1):
        yield (values[count - l_slope] - values[count - 1]) / l_slope


def guided_rows(curve: Curve, rule: AdaptiveRule) -> tuple[bool, ...]:
    """Which rows would run both branches under a rule.

    A forecast: it takes the rows behind one that left a branch out to be as they were under full guidance.
    """
    agreement, guided = Agreement(rule), []
    for row, denoiser in enumerate(curve.denoisers):
        guided.append(agreement.wanted(denoiser))
        if guided[-1]:
            agreement.saw(curve.discrepancy[row], _growth_a_row(curve.growth[row - agreement.skipped : row + 1]))
        else:
            agreement.skipped += 1
    return tuple(guided)


def _growth_a_row(growths: Sequence[float | None]) -> float | None:
    """The factor a row over several; None behind the first row of a denoiser."""
    product = 1.0
    for growth in growths:
        if growth is None:
            return None
        product *= growth
    return float(product ** (1 / len(growths)))
