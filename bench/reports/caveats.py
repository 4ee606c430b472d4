"""What a reader has to know before any figure: what was noisy, drifted, or ran otherwise than it was asked to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .schema import FEW_ROUNDS, TIMES, Figure, Machine, Row, Section, Subject

SPREAD, DRIFT, CLOCK, SMALL = 0.10, 0.05, 0.05, 0.05
# Of the cores: when it began, of the load average, which is slow; and meanwhile.
BUSY_BEFORE, BUSY = 0.3, 0.1
_ROUNDS_TO_TELL, _FEWEST_OTHERS = 4, 2


def caveats(
    machine: Machine, subjects: Sequence[Subject], sections: Sequence[Section], asked: Sequence[str], rounds: int
) -> tuple[str, ...]:
    """The sentences, the gravest first.

    asked: what ran otherwise than it was asked to, a sentence each. rounds: how many count.
    """
    few = (f"Rounds: {rounds}. Medians of so few tell little.",) if rounds < FEW_ROUNDS else ()
    return (*asked, *_failed(sections), *few, *_machine(machine), *_noisy(sections), *_random(subjects))


def spread_share(figure: Figure) -> float:
    """How far the ends of the spread are apart, as a share of the median."""
    low, median, high = figure.spread
    return (high - low) / median if median else 0.0


def drift_share(figure: Figure) -> float:
    """By how much the median of the last half of the rounds exceeds that of the first half, as a share of it."""
    first, last = np.array_split(figure.values, 2)
    before = float(np.median(first))
    return float(np.median(last)) / before - 1 if before else 0.0


def warming_share(figure: Figure) -> float:
    """By how much the first round exceeds the median of the others, as a share of it; 0 where another was as long."""
    first, *others = figure.samples
    if len(others) < _FEWEST_OTHERS or first <= max(others):
        return 0.0
    after = float(np.median(others))
    return first / after - 1 if after else 0.0


def _failed(sections: Sequence[Section]) -> Iterator[str]:
    failed = {row.name: row.failed for section in sections for row in section.rows if row.failed}
    for name, why in failed.items():
        yield f"Not measured: {name}, {why}"


def _machine(machine: Machine) -> Iterator[str]:
    before, after = machine.clock_mhz
    if before is not None and after is not None and after < (1 - CLOCK) * before:
        yield f"The clock fell from {before:,.0f} to {after:,.0f} MHz while it was measured."
    # Of the benchmark before this one it tells as well: what other work had is known better where it was measured.
    if machine.other_cores is None and machine.load_average[0] > BUSY_BEFORE * machine.cores:
        yield (
            f"The machine was not at rest: the load average was {machine.load_average[0]:.1f} on {machine.cores} cores "
            "when it began."
        )
    if machine.other_cores is not None and machine.other_cores > BUSY * machine.cores:
        yield (
            f"Other work ran beside: it had {machine.other_cores:.1f} of {machine.cores} cores on average while it was "
            "measured. Ratios suffer as well as times: it slows contenders unevenly."
        )


def _noisy(sections: Sequence[Section]) -> Iterator[str]:
    """A sentence for each section with rounds that differ, began slow, or drift by more than that."""
    for section in sections:
        spreads, drifts, warming = {}, {}, {}
        for row in section.rows:
            times = [one for one in row.figures.values() if one.unit in TIMES and _counts(row)]
            spreads[row.name] = max(map(spread_share, times), default=0.0)
            warming[row.name] = max(map(warming_share, times), default=0.0)
            long = [drift_share(one) for one in times if len(one.samples) >= _ROUNDS_TO_TELL]
            drifts[row.name] = max(long, default=0.0) if spreads[row.name] <= SPREAD else 0.0
        yield from _sentence(f"{section.title}: rounds differ by more than {SPREAD:.0%}", spreads, SPREAD)
        began = "the first round that counts was the slowest, as while warming up"
        yield from _sentence(f"{section.title}: {began}", warming, SPREAD)
        yield from _sentence(f"{section.title}: the later rounds took longer", drifts, DRIFT)


def _counts(row: Row) -> bool:
    """Whether a row is no small share of what it is a part of."""
    share = row.figures.get("share")
    return share is None or share.median >= SMALL


def _sentence(what: str, shares: Mapping[str, float], most: float) -> Iterator[str]:
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > most)
    if told:
        yield f"{what}: {told}."


def _random(subjects: Sequence[Subject]) -> Iterator[str]:
    names = [subject.name for subject in subjects if subject.random_weights]
    if names:
        yield f"Random weights ({', '.join(names)}): times are those of trained ones, pictures show nothing."
