"""What differs between two reports beyond what their rounds differ by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .schema import MORE_IS_BETTER, TIMES, Figure, Report, Section

DRAWS, CONFIDENCE = 4000, 0.95
# Between two runs a quiet machine differs by so much: what is less is no change, however even the rounds.
LEAST = 0.02
FEWEST = 3


@dataclass(frozen=True, slots=True)
class Change:
    """A figure in both reports.

    times: the second's median by the first's, `low` to `high` its 95% confidence interval (bootstrap over rounds; of
    figures that were taken once, the quotient itself). against: the row that the figures were divided by, round by
    round, before; empty where they stand alone. verdict: `better`, `worse`, `same` or, of too few rounds, `unsure`.
    """

    where: str
    figure: str
    before: float
    after: float
    unit: str
    times: float
    low: float
    high: float
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


def changes(before: Report, after: Report) -> Iterator[Change]:
    """Every figure that both have, in the order of the first.

    Where a section has a baseline, times of its other rows are compared by their ratios to it, which a busier or
    slower machine leaves alone.
    """
    random = np.random.default_rng(0)
    for section in before.sections:
        other = next((one for one in after.sections if one.key == section.key), None)
        for row in section.rows if other is not None else ():
            match = other.row(row.name) if other is not None else None
            for name, figure in row.figures.items() if match is not None else ():
                if other is not None and match is not None and name in match.figures:
                    against = _against(section, other, row.name, name)
                    ends = (figure, match.figures[name]) if against is None else against
                    yield _change(
                        f"{section.title}, {row.name}", name, ends, section.baseline if against else "", random
                    )


def _against(before: Section, after: Section, row: str, figure: str) -> tuple[Figure, Figure] | None:
    """The row's figures by its section's baseline's; None where they stand alone."""
    if not before.baseline or before.baseline != after.baseline or row == before.baseline:
        return None
    found = []
    for section in (before, after):
        own = section.row(row)
        ratios = None if own is None else section.ratios(own, figure)
        if ratios is None or own is None or own.figures[figure].unit not in TIMES:
            return None
        found.append(Figure(unit="times", samples=tuple(ratios.tolist())))
    return found[0], found[1]


def _change(where: str, name: str, ends: tuple[Figure, Figure], against: str, random: np.random.Generator) -> Change:
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
        against,
        _verdict(before, (low, high), few=min(counts) < FEWEST and before.unit in TIMES),
    )


def _verdict(figure: Figure, interval: tuple[float, float], *, few: bool) -> str:
    low, high = interval
    if low <= 1 + LEAST and high >= 1 - LEAST:
        return "same"
    if few:
        return "unsure"
    return "better" if (low > 1) == (figure.unit in MORE_IS_BETTER) else "worse"
