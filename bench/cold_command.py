"""`tandemrt bench cold`: what a fresh interpreter takes to its first picture, again and again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tandemrt.runtime.cli.reporter import Reporter

from .entrants import every_entrant
from .probes import Probes
from .published import opened, plan_facts, publish, summary
from .rounds import Entrant, Progress, Rounds, Taken, failing, in_rounds, rotated
from .run_arguments import RunPlan, plan_from_arguments
from .run_arguments import add_arguments as add_picture_arguments
from .sections import cold_section, contenders_section, models_section, otherwise

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench cold`."""
    add_picture_arguments(parser)
    parser.description = (
        "Start TandemRT and its peers anew in each round, for one picture: measure the seconds until the library is "
        "imported, the models are open and the picture is painted, and write a report."
    )
    parser.epilog = """\
examples:
  tandemrt bench cold bundle/ --target openvino:cpu --out cold/
  tandemrt bench cold bundle/ --checkpoint sd15/ --peer diffusers --rounds 4 --out cold/
"""


def run(plan: RunPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BenchmarkError: TandemRT failed on the first target, or the report's folder is taken or cannot be written.
        BundleError, ExportError, PlanError, RequestError: as `bench run`.
    """
    shared = plan.shared
    measured = opened(shared, reporter, plan.checkpoint, plan.sources)
    compiled = measured.plan(shared, plan.steps, plan.placement)
    work = measured.work(shared, compiled, plan.decoder, plan.num_images_per_prompt)
    entrants = every_entrant(work, shared.targets, plan.peers)
    taken = in_fresh(entrants, shared.rounds, reporter.progress, measured.watch.probes)
    sections = (cold_section(taken), contenders_section(taken), models_section(measured.bundle, taken))
    told = tuple(otherwise(taken))
    return publish("from a fresh start", shared, measured, work.resolved(plan.facts), sections, told)


def in_fresh(entrants: Mapping[str, Entrant], rounds: Rounds, progress: Progress, probes: Probes) -> dict[str, Taken]:
    """Each round starts every entrant anew, one after the other, for one picture; `rounds` of it hold that picture.

    The seconds until it was opened are added to its figures. probes: as of `in_rounds`.

    Raises:
        BenchmarkError: the first entrant failed.
    """
    taken = {name: Taken() for name in entrants}
    for round_ in range(rounds.total):
        progress("rounds of fresh starts", round_, rounds.total)
        for name in rotated(tuple(entrants), round_):
            if taken[name].failed:
                continue
            one = Rounds(0, 1, rounds.seed + round_)
            with failing(taken, name), TemporaryDirectory() as pictures:
                made = in_rounds({name: entrants[name]}, one, Path(pictures), lambda *_: None, probes)
                if round_ >= rounds.warm_up:
                    taken[name].add(made[name])
    progress("rounds of fresh starts", rounds.total, rounds.total)
    return taken
