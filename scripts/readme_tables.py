"""Write what is made of measured figures from their evidence: `scripts/readme-tables [--check]`.

That is the Markdown and the page of every report in docs/report, and the figures in README.md and the documents. Such a
figure stands between two comments, the first of which names where it comes from, from the root of the repository:

    <!-- bench/evidence/score.json | 2 -->            the second paragraph or table of what its own writer makes of it
    <!-- docs/report/sdxs/report.json | pictures -->  a section of a report of `tandemrt bench`
    <!-- docs/report/*/report.json | pictures -->     whole pictures of all these reports, in one table
    <!-- bench/evidence/export.json | 1 | sd15 unet | fp16 | peak, GiB -->  a cell: how its row begins, and its column

The second is `<!-- end -->`. A cell's may stand within a sentence, where no line begins with a comment: Markdown takes
such a line for HTML.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from tandemrt.bench.figures import markdown_table, write_text
from tandemrt.bench.program import run_program
from tandemrt.bench.reports.markdown import markdown, section_table
from tandemrt.bench.reports.page import page
from tandemrt.bench.reports.precision import with_precisions
from tandemrt.bench.reports.schema import FORMAT, Report, Row, Section, read_report
from tandemrt.bench.reports.told import SPREAD, with_spread
from tandemrt.runtime.errors import BenchmarkError

ROOT = Path(__file__).resolve().parent.parent
# By the beginning of a file's name: the function of tandemrt.bench that writes such evidence as Markdown.
WRITERS = {
    "adaptive": "adaptive:table",
    "demo": "demo:markdown",
    "export": "export_memory:markdown",
    "handoff": "handoff:markdown",
    "host": "host:markdown",
    "links": "links:markdown",
    "precisions": "precisions:markdown",
    "score": "shapes.score:markdown",
    "serve_load": "serve_load:markdown",
}
_END = "<!-- end -->"
_BEGIN = re.compile(r"<!-- (\S+\.json) \| ([^\n]+?) -->")
_REGION = re.compile(rf"({_BEGIN.pattern})(.*?){_END}", re.DOTALL)


def written(document: Path, root: Path = ROOT) -> str:
    """A document's text with the figures of its evidence.

    Raises:
        BenchmarkError: a region has no end, or names evidence, a section, a row or a column that is not there.
    """
    text = document.read_text(encoding="utf-8")

    def redrawn(region: re.Match[str]) -> str:
        begin, source, what, before = region.groups()
        if _BEGIN.search(before):
            raise BenchmarkError(document.name, f"a region of {source} has no end", expected=_END)
        figures = shown(source, what, document.parent, root).strip("\n")
        if before.startswith("\n"):
            figures = f"\n\n{figures}\n\n"
        return f"{begin}{figures}{_END}"

    drawn, regions = _REGION.subn(redrawn, text)
    if regions != text.count(_END) or regions != len(_BEGIN.findall(text)):
        raise BenchmarkError(document.name, "a region has no beginning, or no end", expected=f"<!-- … -->…{_END}")
    return drawn


def shown(source: str, what: str, folder: Path, root: Path) -> str:
    """What a region shows. folder: where the document is, which links to reports."""
    block, *cell = what.split(" | ")
    if "*" in source:
        return whole_pictures(source, block, folder, root)
    blocks = blocks_of(root / source)
    text = _named(blocks, block, source)
    if not cell:
        return text
    *row, head = cell
    heads, _, *rows = (line[2:-2].split(" | ") for line in text.splitlines())
    found = [dict(zip(heads, one, strict=True)) for one in rows if one[: len(row)] == row]
    if len(found) != 1:
        raise BenchmarkError(source, "rows that begin so", got=f"{len(found)} of {' | '.join(row)}", expected="one")
    return _named(found[0], head, source)


def blocks_of(path: Path) -> Mapping[str, str]:
    """Evidence as Markdown: a report's tables by their sections' keys, other evidence's paragraphs by their numbers."""
    facts = json.loads(path.read_bytes())
    if facts.get("format") == FORMAT:
        return {section.key: section_table(section) for section in with_precisions(read_report(path)).sections}
    kind = next((name for name in WRITERS if f"{path.stem}_".startswith(f"{name}_")), path.stem)
    module, _, function = _named(WRITERS, kind, path.name).partition(":")
    text = getattr(import_module(f"tandemrt.bench.{module}"), function)(facts)
    return {str(number): block for number, block in enumerate(text.strip("\n").split("\n\n"), 1)}


def whole_pictures(source: str, key: str, folder: Path, root: Path) -> str:
    """A section of several reports in one table: a contender's seconds, and how they compare with the first's."""
    every = [(path, with_precisions(read_report(path))) for path in sorted(root.glob(source))]
    found = [(path, report, one) for path, report in every for one in report.sections if one.key == key]
    if not found:
        remedy = "Measure one, or take the region out."
        raise BenchmarkError(source, "no report there has this section", got=key, remedy=remedy)
    rows = [row for path, report, section in found for row in _picture_rows(path, report, section, folder)]
    heads = (
        "",
        "computes in",
        "s a call",
        "times the first's",
        "times TandemRT in the same precision",
        "peak memory, MiB",
        "PSNR to the first, dB",
    )
    machines = "; ".join(dict.fromkeys(f"{one.machine.processor}, {one.machine.cores} cores" for _, one, _ in found))
    random = " Random weights." if any(one.random_weights for _, report, _ in found for one in report.subjects) else ""
    return f"{markdown_table(heads, rows, frozenset({1}))}\n{SPREAD}{random} {machines}."


def _picture_rows(path: Path, report: Report, section: Section, folder: Path) -> Iterator[tuple[str, ...]]:
    subject = ", ".join(filter(None, (report.subjects[0].name, report.request.get("steps"))))
    link = f"[{subject}]({Path(os.path.relpath(path.with_suffix('.md'), folder)).as_posix()})"
    for row in section.rows:
        ratios = section.ratios(row, "total")
        compared = "" if ratios is None or row.name == section.baseline else with_spread(ratios)
        others = (_figure(row, "alike"), _figure(row, "peak"), _figure(row, "psnr"))
        yield f"{link}: {row.name}", row.words.get("precision", ""), _figure(row, "total"), compared, *others


def _figure(row: Row, name: str) -> str:
    if name not in row.figures:
        return "not measured" if row.failed and name == "total" else ""
    return with_spread(row.figures[name])


def _named(found: Mapping[str, str], name: str, source: str) -> str:
    if name not in found:
        raise BenchmarkError(source, "does not have it", got=name, expected=f"one of {', '.join(found)}")
    return found[name]


def documents(root: Path = ROOT) -> Iterator[Path]:
    """What figures are written into."""
    yield root / "README.md"
    yield from sorted((root / "docs").glob("*.md"))
    yield from sorted((root / "docs" / "report").glob("*.md"))


def made(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Every file that is made of evidence, and its text. BenchmarkError: as `written`."""
    yield from ((path, written(path, root)) for path in documents(root))
    for path in sorted(root.glob("docs/report/*/report.json")):
        report = read_report(path)
        yield path.with_suffix(".md"), markdown(report)
        yield path.with_suffix(".html"), page(report)


def is_made(path: Path, text: str) -> bool:
    """Whether a file has this text."""
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where one differs")
    check = parser.parse_args().check
    stale = {path: text for path, text in made() if not is_made(path, text)}
    for path, text in stale.items():
        done = "differs from its evidence. Run scripts/readme-tables" if check else "written"
        print(f"{path.relative_to(ROOT)}: {done}")
        if not check:
            write_text(path, text)
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    run_program(main)
