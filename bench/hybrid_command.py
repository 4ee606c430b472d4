"""`tandemrt bench hybrid`: what handing over from the large denoiser to the small one costs, and what it does."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import ArgumentError, BenchmarkError

from .published import opened, plan_facts, publish, summary
from .reports.schema import Plot
from .room import weights_of
from .sections import otherwise, variants_section
from .shared_arguments import Shared, add_shared, require_least, shared_from
from .ways import flattened, in_ways

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]

STEPS, POINTS = 25, "25,20,15,10,5,0"
NOTE = (
    "Steps of the large denoiser, then of the small one; the PSNR is to the picture of the large one alone, from the "
    "same noise. Every plan runs in every round, in one process."
)


@dataclass(frozen=True, slots=True)
class HybridPlan:
    """The steps of a picture, and how many of them the large denoiser runs, plan by plan."""

    shared: Shared
    steps: int
    points: tuple[int, ...]

    @property
    def facts(self) -> Mapping[str, str]:
        """What was asked for, for the report."""
        return {**self.shared.facts, "steps": str(self.steps), "of the large one": ", ".join(map(str, self.points))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench hybrid`."""
    parser.description = (
        "Measure whole pictures of plans from the large denoiser alone to the small one alone, in the same rounds, and "
        "how far their pictures are from the large one's. `tandemrt calibrate split` chooses a plan by quality."
    )
    add_shared(parser)
    how = parser.add_argument_group("how it is painted")
    how.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of a picture ({STEPS})")
    how.add_argument("--points", default=POINTS, metavar="N,N,...", help=f"of the large denoiser ({POINTS})")


def plan_from_arguments(namespace: argparse.Namespace) -> HybridPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    require_least("--steps", namespace.steps, 1)
    try:
        points = {int(part) for part in namespace.points.split(",")}
    except ValueError as error:
        raise ArgumentError("--points", "not numbers of steps", got=namespace.points, expected=POINTS) from error
    if not all(0 <= point <= namespace.steps for point in points):
        expected = f"0 to {namespace.steps}, which --steps says"
        raise ArgumentError("--points", "more or fewer steps than there are", got=namespace.points, expected=expected)
    return HybridPlan(shared_from(namespace), namespace.steps, tuple(sorted({*points, namespace.steps}, reverse=True)))


def run(plan: HybridPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BenchmarkError: the bundle has one denoiser, or the report's folder is taken or cannot be written.
        BundleError, ExportError, PlanError, RequestError: as `bench run`.
    """
    shared = plan.shared
    measured = opened(shared, reporter)
    denoisers = measured.bundle.manifest.names("denoiser")
    if len(denoisers) < 2:
        remedy = "Export one with `tandemrt export --small`."
        raise BenchmarkError(measured.bundle.path.name, "has one denoiser, nothing to hand over to", remedy=remedy)
    large, small = denoisers[:2]
    by_name = {f"{point}/{plan.steps - point}": {large: point, small: plan.steps - point} for point in plan.points}
    plans = {name: measured.plan(shared, steps) for name, steps in by_name.items()}
    # One process runs all of them.
    models = measured.models(name for one in plans.values() for name, _ in one.steps)
    work = replace(measured.work(shared, next(iter(plans.values()))), weights=weights_of(measured.bundle, models))
    ways = {name: {"steps": one.steps} for name, one in plans.items()}
    front = Plot(title="Time and closeness to the large model's picture", x="total", y="psnr")
    by_target = in_ways(work, shared, ways, reporter.progress, measured.watch.probes)
    sections = []
    for target, taken in by_target.items():
        section = variants_section(f"hybrid {target}", f"{large} to {small} on {target}", taken, NOTE)
        sections.append(msgspec.structs.replace(section, plots=(*section.plots, front)))
    request, told = work.resolved(plan.facts), tuple(otherwise(flattened(by_target)))
    return publish("from large to small", shared, measured, request, sections, told)
