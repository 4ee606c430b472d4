"""What contenders computed in, and how they compare with TandemRT in the same."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from .schema import Column, Report, Row, Section

# Sections whose rows are contenders, and the figure that compares them.
_COMPARED = {"pictures": "total", "cold": "first"}
_NAMES = {"float32": "fp32", "f32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_OWN, _GRAPHS = "tandemrt ", "the graphs'"


def precisions_of(report: Report) -> dict[str, str]:
    """The precision of each contender that "What ran" lists, in one spelling; of one that is not known, none.

    TandemRT's is its target's and, where that names none, the graphs': what the table of models says or, without one,
    what a preset was exported in. A peer's is what it told; one that runs the bundle's graphs computes in theirs.
    """
    ran, graphs = report.section("contenders"), _graphs(report)
    found = {}
    for row in ran.rows if ran is not None else ():
        target = row.name.removeprefix(_OWN).split(":")[2:] if row.name.startswith(_OWN) else []
        told = row.words.get("precision", "") or ":".join(target) or (_GRAPHS if row.name.startswith(_OWN) else "")
        precision, comma, more = (graphs if told == _GRAPHS else told).partition(", ")
        found[row.name] = f"{_NAMES.get(precision, precision)}{comma}{more}"
    return {name: precision for name, precision in found.items() if precision}


def with_precisions(report: Report) -> Report:
    """The report, its contenders beside what they computed in, and peers compared with TandemRT's first in the same."""
    known = precisions_of(report)
    if not known:
        return report
    sections = tuple(_told(one, known) if one.key in _COMPARED else one for one in report.sections)
    return msgspec.structs.replace(report, sections=sections)


def _told(section: Section, known: Mapping[str, str]) -> Section:
    figure, first = _COMPARED[section.key], dict[str, Row]()
    for row in section.rows:
        if row.name.startswith(_OWN) and figure in row.figures and row.name in known:
            first.setdefault(known[row.name], row)
    rows = []
    for row in section.rows:
        own, figures = first.get(known.get(row.name, "")), {}
        if own is not None and not row.name.startswith(_OWN) and figure in row.figures:
            ratios = msgspec.structs.replace(section, baseline=own.name).ratios(row, figure)
            figures = {} if ratios is None else {"alike": ratios}
        words = {**row.words, **({"precision": known[row.name]} if row.name in known else {})}
        rows.append(msgspec.structs.replace(row, words=words, figures={**row.figures, **figures}))
    columns = list(section.columns)
    if any("alike" in row.figures for row in rows):
        after = next((at for at, column in enumerate(columns, 1) if column.shown == "ratio"), len(columns))
        columns.insert(after, Column(of="alike", title="times TandemRT in the same precision"))
    columns.insert(0, Column(of="precision", title="computes in", shown="words"))
    return msgspec.structs.replace(section, rows=tuple(rows), columns=tuple(columns))


def _graphs(report: Report) -> str:
    """What the bundle's graphs compute in, joined where they differ; empty where the report does not tell."""
    models = report.section("models")
    found = dict.fromkeys(row.words.get("precision", "") for row in models.rows) if models is not None else {}
    preset, *of_it = report.request.get("of", "").split(" ")
    return ", ".join(filter(None, found)) or (of_it[-1] if preset == "preset" and of_it else "")
