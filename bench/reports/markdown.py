"""A report as Markdown."""

from __future__ import annotations

from ..figures import markdown_table
from .precision import with_precisions
from .schema import Report, Section
from .told import SPREAD, failures, setting_lines, table_of


def markdown(report: Report) -> str:
    """The whole report: what to know first, the tables, and what they were measured on."""
    parts = [f"# {report.title}", *_first(report)]
    for section in with_precisions(report).sections:
        parts += _section(section)
    parts += ["## How it was measured", "\n".join(f"- {name}: {value}" for name, value in setting_lines(report))]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def section_table(section: Section) -> str:
    """A section's table alone."""
    table = table_of(section)
    return markdown_table(table.heads, table.rows, table.words)


def _first(report: Report) -> list[str]:
    if not report.caveats:
        return [SPREAD]
    return ["**Know first**\n\n" + "\n".join(f"- {caveat}" for caveat in report.caveats), SPREAD]


def _section(section: Section) -> list[str]:
    told = "\n".join(f"- {failure}" for failure in failures(section))
    return [f"## {section.title}", section.note, section_table(section), told]
