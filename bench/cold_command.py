"""`tandemrt bench cold`: what a fresh interpreter takes to its first picture, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.plan_steps import parse_steps

from .entrants import own_entrant, own_name, peer_entrant
from .probes import Probes
from .published import opened, planned, publish, summary
from .rounds import Entrant, Progress, Rounds, Taken, in_rounds, require_measured
from .run_arguments import RunPlan, add_arguments, plan_from_arguments
from .sections import cold_section, contenders_section, otherwise

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]


def plan_facts(plan: RunPlan) -> dict[str, Any]:
    """What would be measured, in JSON's types; no bundle is looked at."""
    return planned(plan.shared, plan.facts)


def run(plan: RunPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BenchmarkError: TandemRT failed on a target, or the report's folder is taken or cannot be written.
        BundleError, ExportError, PlanError, RequestError: as `bench run`.
    """
    shared = plan.shared
    measured = opened(shared, reporter, plan.checkpoint, plan.sources)
    steps = None if plan.steps is None else parse_steps(plan.steps, measured.bundle.manifest.names("denoiser"))
    work = measured.work(shared, measured.plan(shared, steps, plan.placement), plan.decoder)
    entrants = {own_name(target): own_entrant(work, target) for target in shared.targets}
    entrants |= {name: peer_entrant(work, name) for name in plan.peers}
    taken = in_fresh(entrants, shared.rounds, reporter.progress, measured.watch.probes)
    require_measured(taken, map(own_name, shared.targets))
    sections = (cold_section(taken), contenders_section(taken))
    told = tuple(otherwise(taken))
    return publish("from a fresh start", shared, measured, work.resolved(plan.facts), sections, told)


def in_fresh(entrants: Mapping[str, Entrant], rounds: Rounds, progress: Progress, probes: Probes) -> dict[str, Taken]:
    """Each round starts every entrant anew, one after the other, for one picture; `rounds` of it hold that picture.

    The seconds until it was opened are added to its figures. probes: as of `in_rounds`.
    """
    taken = {name: Taken() for name in entrants}
    for round_ in range(rounds.total):
        progress("rounds of fresh starts", round_, rounds.total)
        left = {name: entrant for name, entrant in entrants.items() if not taken[name].failed}
        for name, entrant in left.items():
            with TemporaryDirectory() as pictures:
                one = Rounds(0, 1, rounds.seed + round_)
                (made,) = in_rounds({name: entrant}, one, Path(pictures), lambda *_: None, probes).values()
            if made.failed:
                taken[name] = made
            elif round_ >= rounds.warm_up:
                taken[name].add(made)
    progress("rounds of fresh starts", rounds.total, rounds.total)
    return taken
