"""`tandemrt calibrate split`: which steps go to the large denoiser and which to the small one, found by measuring."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ..runtime import Pipeline
from ..runtime.bundle import Bundle
from ..runtime.calibrations import RowTime, SplitCalibration, SplitHeldOut, SplitPoint
from ..runtime.cli.columns import aligned
from ..runtime.cli.inspect_bundle import cost_text, split_held_out
from ..runtime.cli.pictures import check_folder
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError
from ..runtime.manifest import Manifest
from ..runtime.plan_steps import parse_steps, runs_of
from .cache_entries import entry_of, sweep_unused
from .ledger import Ledger, writing
from .prompts import chosen_prompts, held_out_prompts
from .quality import wilson_interval
from .scorers import scorer_of
from .shared_arguments import JUDGED
from .split import (
    Sweep,
    cost_intervals,
    judged,
    measure_pictures,
    measured_rows,
    own_timesteps,
    plan_costs,
    split_points,
)
from .split_arguments import PROMPTS, SplitSettings, add_arguments, plan_from_arguments
from .split_plans import (
    QUALITIES,
    best_within,
    merged,
    name_of,
    pareto_front,
    require_affordable,
    split_plans,
    unsure_plans,
)
from .split_report import PLOT, REPORT, write_report
from .stored import require_storable, store
from .strata import Runs

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "plan_lines", "run", "summary"]

LEDGER = "sweep.jsonl"
SEGMENTS = 5


def plan_facts(plan: SplitSettings) -> dict[str, Any]:
    """What `--print-plan` shows: the plans that would be measured, and with how many prompts.

    Raises:
        TandemError: as `run`, where it can be known beforehand.
    """
    sweep = _sweep(plan, Bundle.open(plan.bundle).manifest)
    return {
        "bundle": str(plan.bundle),
        "prompts": len(sweep.prompts),
        "held_out": len(sweep.held_out),
        "plans": [{"steps": each.name, "order": each.order} for each in sweep.plans],
    }


def plan_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What would be measured, for a person."""
    judged_by = f"; the one chosen is judged by {facts['held_out']} held-out prompts" if facts["held_out"] else ""
    yield f"{facts['prompts']} prompts, each with {len(facts['plans'])} plans{judged_by}"
    yield from aligned([(plan["order"], plan["steps"]) for plan in facts["plans"]], indent="  ")


def run(plan: SplitSettings, reporter: Reporter) -> dict[str, Any]:
    """Measure what is not measured yet, report it, and store the best plan within a budget where there is one.

    Raises:
        ArgumentError: an argument cannot be used.
        CalibrationError: no plan is within the budget, and nothing is stored; the sweep's file is damaged, or another
            process writes it.
        BundleError: the bundle cannot be used, or its manifest not be written.
        TandemError: a model failed, or the report cannot be written.
    """
    with Pipeline.open(plan.bundle, plan.target, threads=plan.threads, cache=plan.cache) as pipeline:
        sweep = _sweep(plan, pipeline.bundle.manifest)
        ground = sweep.ground(pipeline.bundle, pipeline.target, plan.threads)
        folder = plan.out or entry_of(plan.cache, "splits", ground)
        check_folder((folder / REPORT, folder / PLOT), force=True, option="--out")
        if plan.budget is not None:
            require_storable(pipeline.bundle)
        sweep_unused(plan.cache, folder)
        with Ledger(folder / LEDGER, ground, discard=plan.discard) as kept:
            measured = _measured(plan, sweep, pipeline, kept, reporter)
            result = {**_result(plan, sweep, ground, measured), "report": str(folder)}
            with writing(folder):
                write_report(folder, result)
    if measured.best is None:
        return result
    evidence, best = _evidence(plan, sweep, ground, measured), measured.best
    stored = store(pipeline.bundle, lambda manifest: _with_split(manifest, best.steps, evidence))
    return {**result, "stored": {"steps": name_of(best.steps), "digest": stored.digest}}


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured. best: the plan to store, None where no budget is given. held_out: what it was judged by."""

    rows: Mapping[str, RowTime]
    points: tuple[SplitPoint, ...]
    best: SplitPoint | None
    held_out: SplitHeldOut | None = None


def _measured(plan: SplitSettings, sweep: Sweep, pipeline: Pipeline, kept: Ledger, reporter: Reporter) -> _Measured:
    """Measure what `kept` lacks.

    Raises:
        CalibrationError: no plan is within the budget, which is known before a picture is painted.
    """
    rows = measured_rows(pipeline, sweep, kept)
    costs = plan_costs(pipeline.bundle.manifest, sweep, rows)
    if plan.budget is not None:
        require_affordable(sweep.plans, costs, plan.budget)
    measure_pictures(pipeline, sweep, kept, reporter.progress)
    intervals = cost_intervals(pipeline.bundle.manifest, sweep, rows, costs)
    points = tuple(
        msgspec.structs.replace(point, cost_interval=interval)
        for point, interval in zip(split_points(sweep, kept, costs), intervals, strict=True)
    )
    if plan.budget is None:
        return _Measured(rows, points, None)
    if unsure := unsure_plans(points, plan.budget):
        told = "; ".join(f"{name_of(point.steps)} {cost_text(msgspec.to_builtins(point))}" for point in unsure)
        reporter.warn(
            f"--budget {plan.budget:g} lies within the interval of what some plans cost, which another run may find on "
            f"its other side: {told}. Measure on a quieter machine, or give another budget."
        )
    best = best_within(points, plan.budget, QUALITIES[plan.chosen_by])
    return _Measured(rows, points, best, judged(pipeline, sweep, best, kept, reporter.progress))


def _result(plan: SplitSettings, sweep: Sweep, ground: Mapping[str, Any], measured: _Measured) -> dict[str, Any]:
    """What was measured, and on what it rests, JSON-able."""
    return {
        **ground,
        "bundle": {"path": str(plan.bundle), "files_digest": ground["bundle"]},
        "prompts": len(sweep.prompts),
        "prompts_sha256": sweep.prompts_sha256,
        "seed": sweep.seed,
        "row_times": msgspec.to_builtins(measured.rows),
        "chosen_by": plan.chosen_by,
        "budget": plan.budget,
        "points": _point_facts(plan, sweep, measured),
        "held_out": msgspec.to_builtins(measured.held_out),
    }


def _evidence(plan: SplitSettings, sweep: Sweep, ground: Mapping[str, Any], measured: _Measured) -> SplitCalibration:
    """What the manifest keeps of it."""
    facts = {
        **{name: ground[name] for name in ("large", "small", "target", "threads", "machine", "versions")},
        "files_sha256": ground["bundle"],
        "row_times": measured.rows,
        "prompts": len(sweep.prompts),
        "prompts_sha256": sweep.prompts_sha256,
        "seed": sweep.seed,
        "scorer": plan.scorer,
        "scorer_sha256": None if sweep.scorer is None else sweep.scorer.sha256,
        "budget": plan.budget,
        "chosen_by": plan.chosen_by,
        "points": measured.points,
        "held_out": measured.held_out,
    }
    return msgspec.convert(msgspec.to_builtins(facts), SplitCalibration)


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The plans in a table, and what was stored, for a person."""
    times = (
        f"{kind} {time['median_ms']:.2f} ms ({time['least_ms']:.2f} to {time['most_ms']:.2f})"
        for kind, time in result["row_times"].items()
    )
    yield f"a row of one picture on {result['target']}: {', '.join(times)}"
    scored = result["scorer"] is not None
    rows = [("plan", "cost", "latent error", "PSNR, dB", "SSIM", *(("right",) if scored else ()), "")]
    for point in sorted(result["points"], key=operator.itemgetter("cost"), reverse=True):
        figures = [
            cost_text(point),
            f"{point['latent_error']:.4f}",
            f"{point['psnr_db']:.1f}",
            f"{point['ssim']:.3f}",
        ]
        if scored:
            share = point["accuracy"]
            figures.append(f"{share['share']:.3f} ({share['low']:.2f}–{share['high']:.2f})")
        marks = [name for name, on in (("on the front", point["front"]), ("best", point["best"])) if on]
        rows.append((_told(point), *figures, ", ".join(marks)))
    yield from aligned(rows)
    yield f"front: plans that no other beats in both cost and {result['chosen_by']}; {result['prompts']} prompts"
    if result["held_out"] is not None:
        yield split_held_out(result["held_out"])
    if "stored" in result:
        stored = result["stored"]
        yield f"{result['bundle']['path']}: {stored['steps']} by default from now on, digest {stored['digest']}"
    yield f"{result['report']}: {REPORT}, {PLOT}"


def _told(point: Mapping[str, Any]) -> str:
    """A plan's runs, or where these are many how its steps are shared."""
    if len(point["steps"]) <= 4:
        return str(point["plan"])
    names = dict.fromkeys(name for name, _ in point["steps"])
    shares = (f"{name} {sum(count for each, count in point['steps'] if each == name)}" for name in names)
    return f"{point['order']}: {', '.join(shares)}"


def _sweep(plan: SplitSettings, manifest: Manifest) -> Sweep:
    """What is to be measured of a bundle."""
    large, small = _denoisers(plan, manifest)
    prompts = chosen_prompts(plan.prompts, plan.column, plan.count, PROMPTS, plan.held_out)
    held_out: tuple[str, ...] = ()
    if plan.held_out is not None and plan.budget is not None:
        held_out = held_out_prompts(plan.held_out, plan.prompts, plan.column, plan.judged, JUDGED)
    total = plan.num_inference_steps or manifest.defaults.num_inference_steps
    distilled = own_timesteps(manifest)
    if distilled is not None and total != len(distilled):
        expected = f"{len(distilled)}, as the time steps that the bundle was distilled for"
        raise ArgumentError("--num-inference-steps", "of this bundle", got=total, expected=expected)
    points = plan.points
    if points is None:
        points = tuple(round(total * segment / SEGMENTS) for segment in range(SEGMENTS + 1))
    given = [_given(text, manifest, total) for text in plan.plans]
    return Sweep(
        large=large,
        small=small,
        plans=split_plans(large, small, total, points, given),
        prompts=prompts,
        seed=plan.seed,
        scorer=None if plan.scorer is None else scorer_of(plan.scorer),
        batch=plan.batch,
        held_out=held_out,
    )


def _denoisers(plan: SplitSettings, manifest: Manifest) -> tuple[str, str]:
    """The large and the small denoiser, those of the bundle in its order where they are not named."""
    known = manifest.names("denoiser")
    if len(known) < 2:
        remedy = "Export it again with --small DIR."
        raise ArgumentError(str(plan.bundle), "denoisers", got=", ".join(known), expected="two or more", remedy=remedy)
    for option, name in (("--large", plan.large), ("--small", plan.small)):
        if name is not None and name not in known:
            raise ArgumentError(option, "unknown denoiser", got=name, expected=f"one of {', '.join(known)}")
    large = plan.large or next(name for name in known if name != plan.small)
    small = plan.small or next(name for name in known if name != large)
    if large == small:
        raise ArgumentError("--small", "the large denoiser itself", got=small, expected="another of the bundle's")
    return large, small


def _given(text: str, manifest: Manifest, total: int) -> Runs:
    runs = merged(runs_of(manifest, parse_steps(text, manifest.names("denoiser")), None))
    count = sum(steps for _, steps in runs)
    if count != total:
        raise ArgumentError("--plan", f"number of steps in {text}", got=count, expected=f"{total}, as the others have")
    return runs


def _point_facts(plan: SplitSettings, sweep: Sweep, measured: _Measured) -> list[dict[str, Any]]:
    """The points with what follows from them."""
    quality = QUALITIES[plan.chosen_by]
    front = pareto_front([(point.cost, quality(point)[0]) for point in measured.points])
    facts = []
    for each, point, on_front in zip(sweep.plans, measured.points, front, strict=True):
        accuracy = None
        if point.right is not None:
            low, high = wilson_interval(point.right, len(sweep.prompts))
            accuracy = {"share": point.right / len(sweep.prompts), "low": low, "high": high}
        stated = {"plan": each.name, "order": each.order, **msgspec.to_builtins(point), "accuracy": accuracy}
        facts.append({**stated, "front": on_front, "best": point is measured.best})
    return facts


def _with_split(manifest: Manifest, steps: Runs, evidence: SplitCalibration) -> Manifest:
    total = sum(count for _, count in steps)
    defaults = msgspec.structs.replace(manifest.defaults, steps=steps, num_inference_steps=total)
    calibrations = msgspec.structs.replace(manifest.calibrations, split=evidence)
    return msgspec.structs.replace(manifest, defaults=defaults, calibrations=calibrations)
