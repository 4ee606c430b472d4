"""What differs between two reports beyond what their rounds differ by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .caveats import spread_share
from .schema import MORE_IS_BETTER, TIMED, TIMES, Figure, Report, Row, Section, Unit

DRAWS, CONFIDENCE = 4000, 0.95
# What is less is no change, however even the rounds. What is timed differs more from run to run than the rounds of one
# run tell: of the same work on the same two-core virtual machine, ratios of whole pictures moved by 17% within a day,
# in rounds whose 10th to 90th percentile spanned 40%.
LEAST, LEAST_TIMED = 0.02, 0.15
FEWEST = 3
# What follows from a time alone: where a row has one, its change is that of the time.
_FOLLOWS: frozenset[Unit] = frozenset({"images/s", "GFLOP/s", "GB/s", "limit"})


@dataclass(frozen=True, slots=True)
class Change:
    """A figure in both reports.

    times: the second's median by the first's, `low` to `high` its 95% confidence interval (bootstrap over rounds; of
    figures that were taken once, the quotient itself). allowed: by what share more or less than once is no change, as
    two runs differ. against: the row that the figures were divided by, round by round, before; empty where they stand
    alone. verdict: `better`, `worse`, `same` or, of too few rounds, `unsure`.
    """

    where: str
    figure: str
    before: float
    after: float
    unit: str
    times: float
    low: float
    high: float
    allowed: float
    against: str
    verdict: str


def changes(before: Report, after: Report) -> Iterator[Change]:
    """Every figure that both have, in the order of the first.

    Where a section has a baseline, times of its other rows, and what follows from times, are compared by their ratios
    to it, without what slows all alike, such as a lower clock; parts of other contenders by theirs to the baseline's
    whole picture. What follows from a row's times alone is left out, and so are shares of a whole: the one grows when
    another part gets faster, whose own time is compared.
    """
    random = np.random.default_rng(0)
    for ends, rows in _matched(before, after):
        row, match = rows
        timed = any(figure.unit in TIMES for figure in row.figures.values())
        for name, figure in row.figures.items():
            if name in match.figures and figure.unit != "share" and not (timed and figure.unit in _FOLLOWS):
                against, ratios = _ratios((before, after), ends, rows, name) or ("", None)
                yield _change(
                    f"{ends[0].title}, {row.name}",
                    name,
                    figure.unit,
                    ratios or (figure, match.figures[name]),
                    against,
                    random,
                )


def _matched(before: Report, after: Report) -> Iterator[tuple[tuple[Section, Section], tuple[Row, Row]]]:
    """Rows that both have, with their sections, in the order of the first."""
    for section in before.sections:
        other = after.section(section.key)
        if other is None:
            continue
        for row in section.rows:
            match = other.row(row.name)
            if match is not None:
                yield (section, other), (row, match)


def _ratios(
    reports: tuple[Report, Report], ends: tuple[Section, Section], rows: tuple[Row, Row], figure: str
) -> tuple[str, tuple[Figure, Figure]] | None:
    """What the rows' figures are compared with, and their ratios to it; None where they stand alone."""
    found = []
    for report, section, row in zip(reports, ends, rows, strict=True):
        own, (against, base) = row.figures[figure], _base(report, section, row, figure)
        if base is None or own.unit not in TIMED or len(own.samples) != len(base.samples):
            return None
        scale = 1e-3 if (own.unit, base.unit) == ("ms", "s") else 1.0
        ratios = tuple((scale * own.values / base.values).tolist())
        found.append((against, Figure(unit="times", samples=ratios)))
    (against, before), (other, after) = found
    return (against, (before, after)) if against == other else None


def _base(report: Report, section: Section, row: Row, figure: str) -> tuple[str, Figure | None]:
    """The row that a row is compared with, and its figure; of another contender's part the baseline's whole picture."""
    if section.key == "parts":
        whole = report.section("pictures")
        base = None if whole is None else whole.row(whole.baseline)
        own, figure = base is not None and row.name.startswith(f"{base.name}: "), "total"
    else:
        base = section.row(section.baseline)
        own = row.name == section.baseline
    return ("", None) if base is None or own else (base.name, base.figures.get(figure))


def _change(
    where: str, name: str, unit: Unit, ends: tuple[Figure, Figure], against: str, random: np.random.Generator
) -> Change:
    """unit: of the figure itself, where `ends` are ratios of it."""
    before, after = ends
    times = after.median / before.median if before.median else float(after.median != 0) + 1
    counts = len(before.samples), len(after.samples)
    low = high = times
    if max(counts) > 1 and before.median:
        draws = [np.median(random.choice(one.values, (DRAWS, one.values.size)), axis=1) for one in (after, before)]
        tail = 50 * (1 - CONFIDENCE)
        low, high = (float(value) for value in np.percentile(draws[0] / draws[1], (tail, 100 - tail)))
    return Change(
        where,
        name,
        before.median,
        after.median,
        before.unit,
        times,
        low,
        high,
        allowed := _allowed(unit, ends),
        against,
        _verdict(unit, (low, high), allowed, few=min(counts) < FEWEST and unit in TIMED),
    )


def _allowed(unit: Unit, ends: tuple[Figure, Figure]) -> float:
    """By what share a figure of two runs may differ: of what is timed, half of what its rounds span where that is more.

    unit: as of `_change`.
    """
    if unit not in TIMED:
        return LEAST
    return max(LEAST_TIMED, *(spread_share(one) / 2 for one in ends))


def _verdict(unit: Unit, interval: tuple[float, float], allowed: float, *, few: bool) -> str:
    low, high = interval
    if low <= 1 + allowed and high >= 1 / (1 + allowed):
        return "same"
    if few:
        return "unsure"
    return "better" if (low > 1) == (unit in MORE_IS_BETTER) else "worse"
