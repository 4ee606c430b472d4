"""`tandemrt bench cfg`: what the ways of running guidance's branches cost, and what they do to the picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import BenchmarkError

from .published import opened, plan_facts, publish, summary
from .sections import otherwise, variants_section
from .shared_arguments import BUNDLES, Shared, add_shared, shared_from
from .ways import flattened, in_ways

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]

WAYS: Mapping[str, Mapping[str, Any]] = {
    "batched": {},
    "sequential": {"placement": "sequential"},
    "parallel": {"placement": "parallel"},
    "adaptive": {"guidance": "adaptive"},
    "hybridiff": {"placement": "hybridiff"},
}
NOTE = (
    "Batched, sequential and parallel paint the same picture; adaptive guidance leaves the branch without the prompt "
    "out of rows where the two agree, and Hybridiff's window runs stages of the denoiser at once: both are close. The "
    "PSNR is to the batched picture. Every way runs in every round, in one process."
)


@dataclass(frozen=True, slots=True)
class CfgPlan:
    """The steps of a picture; None stands for the bundle's."""

    shared: Shared
    steps: str | None

    @property
    def facts(self) -> Mapping[str, str]:
        """What was asked for, for the report."""
        return {**self.shared.facts, "steps": self.steps or BUNDLES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench cfg`."""
    parser.description = (
        "Measure whole pictures with the branches of guidance batched, one after the other, in parallel, with adaptive "
        "guidance and with Hybridiff's window, in the same rounds. The window needs stage engines: `tandemrt "
        "build-engine --stages 2`."
    )
    add_shared(parser)
    parser.add_argument("--steps", metavar="STEPS", help="25, or 10,15 where the bundle has two denoisers")


def plan_from_arguments(namespace: argparse.Namespace) -> CfgPlan:
    """The command line as a plan. ArgumentError: an option's value cannot be used."""
    return CfgPlan(shared_from(namespace), namespace.steps)


def run(plan: CfgPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BenchmarkError: no row has guidance, or the report's folder is taken or cannot be written.
        BundleError, ExportError, PlanError, RequestError: as `bench run`.
    """
    shared = plan.shared
    measured = opened(shared, reporter)
    compiled = measured.plan(shared, plan.steps)
    if not any(compiled.guided):
        remedy = "Give a --guidance-scale above 1, or a bundle that takes one."
        raise BenchmarkError(measured.bundle.path.name, f"runs no guidance: {compiled.why(0)}", remedy=remedy)
    work = measured.work(shared, compiled)
    by_target = in_ways(work, shared, WAYS, reporter.progress, measured.watch.probes)
    sections = [
        variants_section(f"cfg {target}", f"Guidance on {target}", taken, NOTE) for target, taken in by_target.items()
    ]
    told = tuple(otherwise(flattened(by_target)))
    return publish("guidance", shared, measured, work.resolved(plan.facts), sections, told)
