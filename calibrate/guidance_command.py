"""`tandemrt calibrate guidance`: how much of guidance can be left out for a stated loss of quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..engines.build import ensure_engine
from ..engines.plan import BuildPlan, requests_of
from ..runtime.adaptive import AdaptiveRule
from ..runtime.cache import cache_folder
from ..runtime.cli.pictures import check_folder
from ..runtime.cli.reporter import Reporter
from ..runtime.discrepancy import default_taus
from ..runtime.errors import ArgumentError, EngineError, TandemError
from ..runtime.pipeline import Pipeline
from ..runtime.plan import Plan, Schedule, compile_plan
from ..runtime.plan_steps import parse_steps
from .curves import Curve
from .grounds import ground_of
from .guidance_arguments import PROMPTS, GuidancePlan, add_arguments, plan_from_arguments
from .guidance_candidates import (
    Candidate,
    adaptive_candidate,
    adaptive_candidates,
    hybridiff_candidate,
    hybridiff_candidates,
    interval_candidates,
)
from .guidance_judged import Judgement, settled
from .guidance_loss import Loss, Painted, Tally, front_of, nearest_of, walked
from .guidance_report import write_report
from .guidance_runs import Painter, Series
from .guidance_stored import store_guidance
from .ledger import Ledger, writing
from .prompts import chosen_prompts, held_out_prompts, prompts_sha256
from .scorers import NamedScorer, scorer_of
from .shared_arguments import JUDGED
from .stored import require_storable

__all__ = ["add_arguments", "plan_from_arguments", "run", "status", "summary"]

_LEDGER = "guidance.jsonl"
_STAGES = 2
# Which stages `build-engine` makes anywhere.
_BUILT_ANYWHERE = ("onnxruntime", "openvino")


def run(plan: GuidancePlan, reporter: Reporter) -> dict[str, Any]:
    """Record curves, walk the settings of each kind from the cheapest on, judge what is found, and store it.

    Raises:
        ArgumentError: an argument cannot be used, prompts are held out too, the bundle has no guidance to leave out, or
            --out holds another measurement.
        TandemError: the bundle or the target cannot be used, a model failed, or a folder cannot be written.
    """
    with Pipeline.open(plan.bundle, plan.target, threads=plan.threads, cache=plan.cache) as pipe:
        job = _job(plan, pipe)
        check_folder((plan.out / _LEDGER,), force=True, option="--out")
        if plan.store:
            require_storable(pipe.bundle)
        with Ledger(plan.out / _LEDGER, job.ground(plan), discard=plan.discard) as ledger:
            if len(ledger):
                reporter.note(f"goes on with {len(ledger)} things measured before")
            facts, curves = _measured(plan, job, ledger, reporter)
            stored = [kind for kind in plan.store if facts["kinds"][kind]["chosen"]]
            facts |= {"to_store": list(plan.store), "stored": stored}
            chosen = {kind: facts["kinds"][kind]["chosen"] for kind in stored}
            if chosen:
                store_guidance(pipe.bundle, facts, chosen)
            with writing(plan.out):
                write_report(plan.out, facts, curves)
    for kind, one in chosen.items():
        if one["time_ratio"] >= 1:
            reporter.warn(f"{kind} is stored, but took {one['time_ratio']:.2f} of the time of full guidance here")
    return {"out": str(plan.out), **facts}


def status(result: Mapping[str, Any]) -> int:
    """The exit status: 1 where something was to be stored, and nothing was found that could be."""
    return int(bool(result["to_store"]) and not result["stored"])


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """What was found, for a person."""
    count = result["held_out"]["count"]
    yield f"{count} held-out prompts, {result['rows']} rows, guidance {result['guidance_scale']:g}"
    yield f"figures, curves and plots in {result['out']}"
    for kind, found in result["kinds"].items():
        if found["why_not"]:
            yield f"{kind}: {found['why_not']}"
        elif found["chosen"] is not None:
            yield f"{kind}: {_told(found['chosen'])}{', stored' if kind in result['stored'] else ''}"
    for one in result["built_in"]:
        yield f"{one['kind']} with the built-in numbers: {_told(one)}"


def _told(one: Mapping[str, Any]) -> str:
    numbers = ", ".join(f"{name} {value:g}" for name, value in one["numbers"].items())
    right = (
        "" if one["right"] is None else f", {one['right']} of {one['prompts']} right ({one['right_in_full']} in full)"
    )
    return (
        f"{numbers}: {one['saved']:.1%} of the branches' runs saved, {one['time_ratio']:.2f} of the time, "
        f"{one['psnr_db']:.1f} dB (worst {one['worst_psnr_db']:.1f}){right}"
    )


@dataclass(frozen=True)
class _Job:
    """What is measured. arguments: of every request. full: how many runs of one branch full guidance takes."""

    pipe: Pipeline
    compiled: Plan
    arguments: Mapping[str, Any]
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    loss: Loss
    scorer: NamedScorer | None

    @property
    def full(self) -> int:
        return self.compiled.table.rows + sum(self.compiled.guided)

    def ground(self, plan: GuidancePlan) -> dict[str, Any]:
        """All that the figures of one way rest on."""
        own = {"guidance_interval": None, "adaptive": None, "taus": None}
        return {
            **ground_of(self.pipe.bundle, self.pipe.target, plan.threads, self.scorer, **own),
            "plan": self.compiled.facts(),
            "seed": plan.seed,
            "prompts": _prompt_facts(self.prompts),
            "held_out": _prompt_facts(self.held_out),
        }


def _prompt_facts(prompts: Sequence[str]) -> dict[str, Any]:
    return {"count": len(prompts), "sha256": prompts_sha256(prompts)}


def _job(plan: GuidancePlan, pipe: Pipeline) -> _Job:
    """All that can be refused before a model is loaded."""
    manifest = pipe.bundle.manifest
    prompts = chosen_prompts(plan.prompts, plan.column, plan.count, PROMPTS, plan.held_out)
    held_out = held_out_prompts(plan.held_out, plan.prompts, plan.column, plan.judged, JUDGED)
    steps = None if plan.steps is None else parse_steps(plan.steps, manifest.names("denoiser"))
    whole = Schedule(steps=steps, guidance_scale=plan.guidance_scale, guidance_interval=(0.0, 1.0))
    compiled = compile_plan(manifest, whole)
    if not all(compiled.guided):
        why = next(compiled.why(row) for row, guided in enumerate(compiled.guided) if not guided)
        got = f"guidance {compiled.guidance_scale:g} on {sum(compiled.guided)} of {compiled.table.rows} rows ({why})"
        remedy = "Give --guidance-scale above 1, or --steps on denoisers that run both branches."
        raise ArgumentError(str(plan.bundle), "no guidance to leave out", got=got, expected="all rows", remedy=remedy)
    if compiled.table.rows < 3:
        what, rows = "rows, of which some are to run one branch", compiled.table.rows
        raise ArgumentError("--steps", what, got=rows, expected="3 or more")
    arguments = {"steps": steps, "guidance_scale": plan.guidance_scale}
    scorer = None if plan.scorer is None else scorer_of(plan.scorer)
    return _Job(pipe, compiled, arguments, prompts, held_out, Loss(plan.min_psnr_db, plan.max_loss), scorer)


def _measured(plan: GuidancePlan, job: _Job, ledger: Ledger, reporter: Reporter) -> tuple[dict[str, Any], list[Curve]]:
    series = (
        Series("chosen with", job.prompts, plan.seed),
        Series("held out", job.held_out, plan.seed + len(job.prompts)),
    )
    chooser, judge = (Painter(job.pipe, one, job.arguments, ledger, job.scorer) for one in series)
    curves = []
    for index in range(len(job.prompts)):
        curves.append(chooser.curve(index))
        reporter.progress("discrepancy curves", index + 1, len(job.prompts))
    listed = _candidates(plan, job, curves)
    why_not = _unrunnable(plan, job, listed, reporter)
    tallies = {
        kind: [] if kind in why_not else _walk(kind, listed[kind], chooser, job, reporter) for kind in plan.kinds
    }
    out_of_reach = {kind: _out_of_reach(walk, chooser, job) for kind, walk in tallies.items()}
    why_not |= {kind: told for kind, told in out_of_reach.items() if told is not None}
    fronts = {kind: front_of(tallies[kind], job.loss) for kind in plan.kinds}
    built_in = [one for one in _built_in(job, curves) if tallies.get(one.kind)]
    judgements, compared = settled(judge, fronts, built_in, job.loss, job.full, reporter.progress)
    for kind, judgement in judgements.items():
        if fronts[kind] and not judgement.held:
            why_not[kind] = f"none of {len(judgement.tried)} settings that keep to the loss does on held-out prompts"
    facts = {
        **job.ground(plan),
        "steps": [list(run) for run in job.compiled.steps],
        "rows": job.compiled.table.rows,
        "guidance_scale": job.compiled.guidance_scale,
        "full_branches": job.full,
        "loss": {"min_psnr_db": job.loss.min_psnr_db, "max_lost": job.loss.max_lost},
        "kinds": {
            kind: {
                "why_not": why_not.get(kind),
                **_kind_facts(listed[kind], tallies[kind], fronts[kind], judgements[kind]),
            }
            for kind in plan.kinds
        },
        "built_in": [one.facts() for one in compared],
    }
    return facts, curves


def _walk(kind: str, candidates: Sequence[Candidate], painter: Painter, job: _Job, reporter: Reporter) -> list[Tally]:
    walks = 0

    def paint(candidate: Candidate, index: int) -> Painted:
        nonlocal walks
        walks += index == 0
        reporter.progress(f"settings of {kind}", walks, len(candidates))
        return painter.painted(candidate.name, candidate.arguments, index)

    return walked(candidates, paint, len(job.prompts), job.loss)


def _out_of_reach(walk: Sequence[Tally], painter: Painter, job: _Job) -> str | None:
    """Where no setting of a walk keeps to the loss, that none does, and what the nearest comes to."""
    if not walk or front_of(walk, job.loss):
        return None
    nearest = nearest_of(walk, lambda one, index: painter.painted(one.name, one.arguments, index), job.loss)
    lost = "" if nearest.lost is None else f" and loses {nearest.lost:.1%} of the pictures"
    told = f"the nearest, {nearest.candidate.name}, comes to {nearest.psnr_db:.1f} dB{lost}"
    return f"none of {len(walk)} settings keeps to the loss; {told}"


def _candidates(plan: GuidancePlan, job: _Job, curves: Sequence[Curve]) -> dict[str, list[Candidate]]:
    """The settings of each kind."""
    made: Mapping[str, Callable[[], list[Candidate]]] = {
        "interval": lambda: interval_candidates(job.compiled.table.steps.tolist(), plan.candidates),
        "adaptive": lambda: adaptive_candidates(curves, plan.candidates),
        "hybridiff": lambda: hybridiff_candidates(curves, plan.candidates),
    }
    return {kind: made[kind]() for kind in plan.kinds}


def _unrunnable(
    plan: GuidancePlan, job: _Job, listed: Mapping[str, Sequence[Candidate]], reporter: Reporter
) -> dict[str, str]:
    """Why the settings of a kind cannot be run here, in a sentence."""
    windows = listed.get("hybridiff")
    if windows is None:
        return {}
    refused = _require_window(plan, job, windows, reporter) if windows else "too few rows for a window"
    return {"hybridiff": f"not run: {refused}"} if refused else {}


def _require_window(plan: GuidancePlan, job: _Job, windows: Sequence[Candidate], reporter: Reporter) -> str:
    """Why no window can be run here, in a sentence; stages that are missing are built where any machine can."""
    request = {"prompt": job.prompts[0], **job.arguments, **windows[0].arguments}
    try:
        try:
            job.pipe.stream(**request)
        except EngineError:
            target = job.pipe.target
            if target.backend not in _BUILT_ANYWHERE:
                raise
            cache, denoiser = cache_folder(plan.cache), job.compiled.denoisers[0]
            building = BuildPlan(plan.bundle, (target,), cache, (denoiser,), stages=_STAGES)
            for wanted in requests_of(building, job.pipe.bundle):
                ensure_engine(wanted, cache, reporter.progress, {"tandemrt": version("tandemrt")})
            job.pipe.stream(**request)
    except TandemError as error:
        return str(error)
    return ""


def _built_in(job: _Job, curves: Sequence[Curve]) -> Iterator[Candidate]:
    """The numbers that are used where none are measured, if they can be."""
    yield adaptive_candidate(curves, AdaptiveRule())
    taus = default_taus(job.pipe.bundle.manifest.components[job.compiled.denoisers[0]].inputs)
    if taus.tau_cap + taus.k < job.compiled.table.rows:
        yield hybridiff_candidate(curves, taus)


def _kind_facts(
    listed: Sequence[Candidate], walk: Sequence[Tally], front: Sequence[Tally], judgement: Judgement
) -> dict[str, Any]:
    """What became of the settings of a kind, of which those were run that are in the walk."""
    told = [{**tally.facts(), "front": any(tally is one for one in front)} for tally in walk]
    return {
        "settings": told or [one.facts() for one in listed],
        "judged": [one.facts() for one in judgement.tried],
        "chosen": judgement.tried[-1].facts() if judgement.held else None,
    }
