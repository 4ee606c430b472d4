"""`tandemrt bench compare`: what differs between two reports beyond what their rounds differ by."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandemrt.runtime.cli.columns import aligned
from tandemrt.runtime.cli.reporter import Reporter

from .reports.changes import CONFIDENCE, FEWEST, LEAST, LEAST_TIMED, changes
from .reports.differences import apart, machine_changes, ran_changes, unmatched
from .reports.schema import read_report
from .reports.told import number

EPILOG = f"""\
A figure is better or worse where the {CONFIDENCE:.0%} confidence interval of the quotient of medians (bootstrap over
rounds) lies beyond what two runs of the same work may differ by: {LEAST_TIMED:.0%} of what is timed, or half of what
the rounds of one of them span, as reports tell it, where that is more; {LEAST:.0%} of all else. Times of peers,
and energy, are compared by their ratios to TandemRT in the same round, their parts by those to its whole picture: that
leaves out what slows all alike, such as a lower clock. Other work slows them unevenly, and moves ratios too: compare
runs of quiet machines. What follows from a time alone, such as operations a second, is no change of its own. Fewer
than {FEWEST} rounds tell nothing of times. Where the two measured different things, such as another size, no figure is
better or worse.

example:
  tandemrt bench compare before/report.json after/report.json
"""


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """Two reports; whether figures that are the same are told too."""

    before: Path
    after: Path
    every: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench compare`."""
    parser.epilog = EPILOG
    parser.add_argument("before", type=Path, metavar="A.json", help="a report of `tandemrt bench`")
    parser.add_argument("after", type=Path, metavar="B.json", help="another one")
    parser.add_argument("--all", dest="every", action="store_true", help="tell figures that are the same too")


def plan_from_arguments(namespace: argparse.Namespace) -> ComparePlan:
    """The command line as a plan."""
    return ComparePlan(namespace.before, namespace.after, namespace.every)


def run(plan: ComparePlan, _reporter: Reporter) -> dict[str, Any]:
    """Compare them.

    Raises:
        BenchmarkError: one is no report.
    """
    before, after = read_report(plan.before), read_report(plan.after)
    different = apart(before, after)
    found = [asdict(one) for one in changes(before, after)]
    for one in found if different else ():
        if one["verdict"] in ("better", "worse"):
            one["verdict"] = "more" if one["times"] > 1 else "less"
    return {
        "apart": list(different),
        "setting": [*machine_changes(before, after), *ran_changes(before, after)],
        "unmatched": list(unmatched(before, after)),
        "compared": len(found),
        "figures": [one for one in found if plan.every or one["verdict"] != "same"],
    }


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as lines."""
    if result["apart"]:
        yield f"They measured different things ({'; '.join(result['apart'])}): no figure is better or worse"
    yield from (f"differs: {line}" for line in result["setting"])
    yield from (f"in one alone: {line}" for line in result["unmatched"])
    if not result["compared"]:
        yield "The two have no figure in common."
        return
    if result["figures"]:
        yield from aligned(
            (
                one["verdict"],
                f"{one['where']}: {one['figure']}" + (f", by {one['against']}" if one["against"] else ""),
                f"{number(one['before'])} → {number(one['after'])} {one['unit']}",
                f"times {one['times']:.3f} ({one['low']:.3f}–{one['high']:.3f})",
            )
            for one in result["figures"]
        )
    changed = sum(one["verdict"] not in ("same", "unsure") for one in result["figures"])
    yield f"{changed} of {result['compared']} figures {'differ' if result['apart'] else 'changed'} beyond noise"
