"""`tandemrt bench BUNDLE`: measures a bundle, beside its peers, and writes a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tandemrt.runtime.cli.reporter import Reporter

from .entrants import every_entrant, own_name
from .part_sections import parts_section, peaks_section
from .peer_pictures import other_pictures
from .picture_limits import add_limits, limits_by_target, machine_options, rates_by_target
from .published import opened, plan_facts, publish, summary
from .rounds import in_rounds
from .run_arguments import RunPlan, plan_from_arguments
from .run_arguments import add_arguments as add_picture_arguments
from .sections import contenders_section, models_section, otherwise, pictures_section, start_section

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench run`."""
    add_picture_arguments(parser)
    add_limits(parser)


def run(plan: RunPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BundleError, ExportError: the bundle is damaged, or the preset cannot be exported.
        PlanError, RequestError: the bundle cannot do what is asked for.
        BenchmarkError: the report's folder is taken or cannot be written, or TandemRT failed on the first target.
    """
    shared = plan.shared
    measured = opened(shared, reporter, plan.checkpoint, plan.sources)
    compiled = measured.plan(shared, plan.steps, plan.placement)
    work = measured.work(shared, compiled, plan.decoder, plan.num_images_per_prompt)
    entrants = every_entrant(work, shared.targets, plan.peers)
    held, guided = shared.targets if plan.limits else (), any(compiled.guided)
    options = machine_options(shared.threads)
    before, untold = rates_by_target(work, held, options, reporter.progress)
    with TemporaryDirectory() as pictures:
        taken = in_rounds(entrants, shared.rounds, Path(pictures), reporter.progress, measured.watch.probes)
    by_target, unsteady = limits_by_target(work, before, options, reporter.progress, guided=guided)
    limits = {own_name(target): one for target, one in by_target.items()}
    sections = [
        pictures_section(taken, plan.num_images_per_prompt, limits),
        parts_section(taken, limits, plan.num_images_per_prompt),
        *([peaks_section(limits)] if limits else []),
        start_section(taken),
        contenders_section(taken),
        models_section(measured.bundle, taken),
    ]
    told = (*other_pictures(taken), *otherwise(taken), *untold, *unsteady)
    return publish("a benchmark", shared, measured, work.resolved(plan.facts), sections, told)
