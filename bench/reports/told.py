"""Figures as a reader is told them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .schema import FEW_ROUNDS, SHARES, Column, Figure, Report, Row, Section

SPREAD = (
    "In brackets the 10th to the 90th percentile of the rounds, of fewer than "
    f"{FEW_ROUNDS} rounds and of PSNR the least and the greatest; ratios are of the same round. Percentiles are "
    "interpolated between rounds: of few, the 99th lies just under the longest."
)
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Table:
    """Heads, and as many cells of text in each row. words: the columns, besides the first, that hold no figures."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int]


def number(value: float) -> str:
    """A number in three digits that count, without an exponent; thousands are parted."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{min(digits, 6)}f}"


def with_spread(figure: Figure, told: Callable[[float], str] = number) -> str:
    """The median and, of several samples, what is around it."""
    low, median, high = map(told, figure.spread)
    return median if len(figure.samples) == 1 else f"{median} ({low}–{high})"


def table_of(section: Section) -> Table:
    """A section's rows by its columns; a cell that a row has nothing for is empty, one that failed says so."""
    heads = ["", *(head for column in section.columns for head in heads_of(column))]
    rows = []
    for row in section.rows:
        cells = [cell for column in section.columns for cell in _cells(section, column, row)]
        if row.failed:
            cells = ["not measured", *("" for _ in cells[1:])]
        rows.append((row.name, *cells))
    kinds = ["", *(column.shown for column in section.columns for _ in heads_of(column))]
    return Table(tuple(heads), tuple(rows), frozenset(at for at, kind in enumerate(kinds) if kind == "words"))


def failures(section: Section) -> Iterator[str]:
    """Why rows have no figures, a sentence each."""
    for row in section.rows:
        if row.failed:
            yield f"{row.name}: {row.failed}"


def setting_lines(report: Report) -> Iterator[tuple[str, str]]:
    """What and how it was measured, as pairs of what is told and its value."""
    machine, method = report.machine, report.method
    devices = ", ".join(device["name"] for device in machine.devices)
    memory = "" if machine.memory_gib is None else f", {machine.memory_gib:g} GiB"
    yield "measured", report.began.replace("T", " ").replace("+00:00", " UTC")
    yield "machine", f"{machine.processor}, {machine.cores} cores{memory}{', ' + devices if devices else ''}"
    yield "system", f"{machine.system}, Python {machine.python}"
    yield "clock, load average", f"{_pair(machine.clock_mhz, ' MHz')}; {_pair(machine.load_average, '')}"
    if machine.other_cores is not None:
        yield "other work", f"{machine.other_cores:.2f} of {machine.cores} cores on average"
    if machine.energy:
        yield "energy", machine.energy
    yield "versions", _listed(machine.versions)
    threads = "the backend's choice" if method.threads is None else str(method.threads)
    yield "rounds", f"{method.rounds} that count, {method.warm_up} before; {method.order}"
    yield "threads of a model, first seed", f"{threads}, {method.seed}"
    for subject in report.subjects:
        weights = ", random weights: the pictures show nothing" if subject.random_weights else ""
        yield subject.name, f"digest {subject.digest[:16]}{weights}"
    yield "asked for", _listed(report.request)


def heads_of(column: Column) -> tuple[str, ...]:
    """The heads of a column: one, or one for each percentile."""
    if column.shown == "percentiles":
        return tuple(f"{column.title}, p{percent}" for percent in _PERCENTILES)
    return (column.title,)


def _cells(section: Section, column: Column, row: Row) -> tuple[str, ...]:
    figure = row.figures.get(column.of)
    if column.shown == "words":
        return (row.words.get(column.of, ""),)
    if column.shown == "ratio":
        ratios = section.ratios(row, column.of)
        return ("" if ratios is None else with_spread(ratios),)
    if column.shown == "percentiles":
        return tuple("" if figure is None else number(figure.at(percent)) for percent in _PERCENTILES)
    return ("" if figure is None else _shown(figure),)


def _shown(figure: Figure) -> str:
    return with_spread(figure, "{:.1%}".format if figure.unit in SHARES else number)


def _pair(values: Sequence[float | None], unit: str) -> str:
    before, after = ("not told" if value is None else f"{value:,.4g}{unit}" for value in values)
    return f"{before} at first, {after} at last"


def _listed(pairs: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items())
