"""`tandemrt bench BUNDLE`: measures a bundle, beside its peers, and writes a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.plan import Schedule, compile_plan
from tandemrt.runtime.plan_steps import parse_steps

from .contenders import Contender
from .measured import (
    Work,
    models_section,
    otherwise,
    own_contender,
    own_name,
    parts_section,
    peer_contender,
    pictures_section,
    start_section,
    subject_of,
)
from .preset_work import preset_bundle
from .reports.caveats import caveats
from .reports.files import require_free, write_report_files
from .reports.schema import Machine, Method, Report
from .rounds import ORDER, Taken, in_rounds
from .run_arguments import RunPlan, add_arguments, plan_from_arguments
from .setting import Watch

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]


def plan_facts(plan: RunPlan) -> dict[str, Any]:
    """What would be measured, in JSON's types; no bundle is looked at."""
    return {**_request(plan), "warm_up": plan.rounds.warm_up, "rounds": plan.rounds.count, "out": str(plan.out)}


def run(plan: RunPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BundleError, ExportError: the bundle is damaged, or the preset cannot be exported.
        PlanError, RequestError: the bundle cannot do what is asked for.
        BenchmarkError: the report's folder is taken or cannot be written, or TandemRT failed on a target.
    """
    require_free(plan.out, force=plan.force)
    path, checkpoint, sources = _sources(plan, reporter)
    bundle = Bundle.open(path)
    watch = Watch()
    with TemporaryDirectory() as pictures:
        work = _work(plan, bundle, checkpoint, sources, Path(pictures))
        contenders: dict[str, Callable[[], Contender]] = {
            own_name(target): own_contender(work, target) for target in plan.targets
        }
        contenders |= {name: peer_contender(work, name) for name in plan.peers}
        taken = in_rounds(contenders, plan.rounds, reporter.progress)
    for target in plan.targets:
        if taken[own_name(target)].failed:
            raise BenchmarkError(own_name(target), taken[own_name(target)].failed)
    report = _report(plan, bundle, taken, watch)
    written = write_report_files(plan.out, report)
    return {"written": [str(one) for one in written], "caveats": list(report.caveats)}


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as lines."""
    yield from (f"know first: {caveat}" for caveat in result["caveats"])
    yield from result["written"]


def _sources(plan: RunPlan, reporter: Reporter) -> tuple[Path, Path | None, Mapping[str, Path]]:
    """The bundle, what it was made of, and further checkpoints by component."""
    if plan.preset is None:
        if plan.bundle is None:
            raise BenchmarkError("bench", "nothing to measure", remedy="Name a bundle, or a --preset.")
        return plan.bundle, plan.checkpoint, plan.sources
    folder = preset_bundle(plan.preset, plan.scale, plan.dtype, plan.cache, reporter.progress)
    checkpoint = folder / "checkpoint"
    added = {one.name: one for one in folder.iterdir() if one.is_dir() and one.name not in (plan.preset, "checkpoint")}
    return folder / plan.preset, checkpoint, added


def _work(plan: RunPlan, bundle: Bundle, checkpoint: Path | None, sources: Mapping[str, Path], pictures: Path) -> Work:
    manifest = bundle.manifest
    steps = None if plan.steps is None else parse_steps(plan.steps, manifest.names("denoiser"))
    compiled = compile_plan(
        manifest, Schedule(steps=steps, guidance_scale=plan.guidance_scale, placement=plan.placement)
    )
    width, height = plan.size or (manifest.defaults.width, manifest.defaults.height)
    arguments: dict[str, Any] = {
        "steps": compiled.steps,
        "guidance_scale": compiled.guidance_scale,
        "placement": plan.placement,
        "height": height,
        "width": width,
        "decoder": plan.decoder,
        "num_images_per_prompt": plan.num_images_per_prompt,
    }
    return Work(
        bundle=bundle.path,
        checkpoint=checkpoint,
        added=sources,
        prompt=plan.prompt,
        arguments=arguments,
        steps=compiled.steps,
        guidance_scale=compiled.guidance_scale,
        height=height,
        width=width,
        decoder=plan.decoder,
        threads=plan.threads,
        cache=plan.cache,
        pictures=pictures,
    )


def _report(plan: RunPlan, bundle: Bundle, taken: Mapping[str, Taken], watch: Watch) -> Report:
    machine: Machine = watch.machine()
    sections = (
        pictures_section(taken, plan.num_images_per_prompt),
        parts_section(taken),
        start_section(taken),
        models_section(bundle, taken),
    )
    subjects = (subject_of(bundle, random_weights=plan.preset is not None),)
    rounds = plan.rounds
    return Report(
        title=f"{subjects[0].name}: a benchmark",
        began=watch.began,
        request=_request(plan),
        machine=machine,
        method=Method(warm_up=rounds.warm_up, rounds=rounds.count, order=ORDER, seed=rounds.seed, threads=plan.threads),
        subjects=subjects,
        sections=sections,
        caveats=caveats(machine, subjects, sections, tuple(otherwise(taken))),
    )


def _request(plan: RunPlan) -> dict[str, str]:
    """What was asked for, without paths: they say nothing on another machine."""
    subject = plan.bundle.name if plan.bundle is not None else f"preset {plan.preset} {plan.scale} {plan.dtype}"
    return {
        "of": subject,
        "targets": ", ".join(plan.targets),
        "beside": ", ".join(plan.peers) or "nothing",
        "steps": plan.steps or "the bundle's",
        "guidance scale": "the bundle's" if plan.guidance_scale is None else f"{plan.guidance_scale:g}",
        "placement": plan.placement,
        "decoder": plan.decoder or "the bundle's first",
        "size": "the bundle's" if plan.size is None else f"{plan.size[0]}x{plan.size[1]}",
        "pictures a call": str(plan.num_images_per_prompt),
    }
