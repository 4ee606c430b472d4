"""What differs between two reports beyond what their rounds differ by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .caveats import spread_share
from .schema import MORE_IS_BETTER, TIMED, Figure, Report, Row, Section, Unit

DRAWS, CONFIDENCE = 4000, 0.95
# What is less is no change, however even the rounds. What is timed differs more from run to run than the rounds of one
# run tell: of the same work on the same two-core virtual machine, ratios of whole pictures moved by 17% within a day,
# in rounds whose 10th to 90th percentile spanned 40%.
LEAST, LEAST_TIMED = 0.02, 0.15
FEWEST = 3
_MEASURED = "measured"


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


def machine_changes(before: Report, after: Report) -> Iterator[str]:
    """What of the machine, the method and the subjects differs, a line each: figures of other machines say little."""
    pairs = {
        "machine": (before.machine.processor, after.machine.processor),
        "cores": (before.machine.cores, after.machine.cores),
        "devices": tuple(", ".join(one["name"] for one in each.machine.devices) for each in (before, after)),
        "system": (before.machine.system, after.machine.system),
        "Python": (before.machine.python, after.machine.python),
        "threads": (before.method.threads, after.method.threads),
        "bundles": tuple(
            ", ".join(f"{one.name} {one.digest[:12]}" for one in each.subjects) for each in (before, after)
        ),
    }
    versions = {
        name: (before.machine.versions.get(name, "none"), after.machine.versions.get(name, "none"))
        for name in {**before.machine.versions, **after.machine.versions}
    }
    asked = {name: (before.request.get(name), after.request.get(name)) for name in {**before.request, **after.request}}
    for name, (one, other) in {**pairs, **versions, **asked}.items():
        if one != other:
            yield f"{name}: {one} → {other}"


def unmatched(before: Report, after: Report) -> Iterator[str]:
    """What one of the two has measured and the other has not, a line for all rows of a section that changed alike."""
    keys = dict.fromkeys(section.key for report in (before, after) for section in report.sections)
    for key in keys:
        found = [report.section(key) for report in (before, after)]
        title = next(one.title for one in found if one is not None)
        alike: dict[str, list[str]] = {}
        for name in dict.fromkeys(row.name for one in found if one is not None for row in one.rows):
            first, second = (_state(None if one is None else one.row(name)) for one in found)
            if first != second and _MEASURED in (first, second):
                alike.setdefault(f"{first} → {second}", []).append(name)
        yield from (f"{title}, {', '.join(names)}: {change}" for change, names in alike.items())


def _state(row: Row | None) -> str:
    if row is not None and row.failed:
        return f"not measured, {row.failed}"
    return _MEASURED if row is not None and row.figures else "not there"


def changes(before: Report, after: Report) -> Iterator[Change]:
    """Every figure that both have, in the order of the first.

    Where a section has a baseline, times of its other rows, and what follows from times, are compared by their ratios
    to it, without what slows all alike, such as a lower clock. Shares of a whole are left out: the one grows when
    another part gets faster, whose own time is compared.
    """
    random = np.random.default_rng(0)
    for ends, rows in _matched(before, after):
        row, match = rows
        for name, figure in row.figures.items():
            if name in match.figures and figure.unit != "share":
                ratios = _ratios(ends, rows, name)
                yield _change(
                    f"{ends[0].title}, {row.name}",
                    name,
                    figure.unit,
                    ratios or (figure, match.figures[name]),
                    ends[0].baseline if ratios else "",
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


def _ratios(ends: tuple[Section, Section], rows: tuple[Row, Row], figure: str) -> tuple[Figure, Figure] | None:
    """The rows' figures by their sections' baseline's; None where they stand alone."""
    baseline = ends[0].baseline
    if not baseline or baseline != ends[1].baseline or rows[0].name == baseline:
        return None
    found = []
    for section, row in zip(ends, rows, strict=True):
        ratios = section.ratios(row, figure)
        if ratios is None or row.figures[figure].unit not in TIMED:
            return None
        found.append(ratios)
    return found[0], found[1]


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
