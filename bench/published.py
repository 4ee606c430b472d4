"""What a benchmark begins and ends with: the bundle it measures, and the report of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.plan import Plan, Schedule, compile_plan
from tandemrt.runtime.plan_steps import Steps, parse_steps
from tandemrt.runtime.request import Request
from tandemrt.runtime.targets import check_installed, check_runnable, parse_target

from .entrants import Work, peer_device
from .left_nodes import left_told
from .places import places_of, without_places
from .preset_work import preset_bundle
from .random_weights import has_random_weights
from .reports.caveats import caveats
from .reports.files import require_free, write_report_files
from .reports.schema import Method, Report, Section
from .room import weights_of
from .rounds import ORDER
from .sections import subject_of
from .setting import Watch, load_average
from .shared_arguments import Shared


@dataclass(frozen=True, slots=True)
class Measured:
    """A bundle that is measured.

    checkpoint: what it was made of, where that is known; sources: that of further components. left: what of it does not
    run on the device that was asked for, a sentence each.
    """

    bundle: Bundle
    checkpoint: Path | None
    sources: Mapping[str, Path]
    watch: Watch
    left: tuple[str, ...] = ()

    def plan(self, shared: Shared, steps: Steps | str | None, placement: str = "batched") -> Plan:
        """The plan of a request. steps: as `--steps` says them, too. PlanError, RequestError: it cannot be done."""
        if isinstance(steps, str):
            steps = parse_steps(steps, self.bundle.manifest.names("denoiser"))
        schedule = Schedule(steps=steps, guidance_scale=shared.guidance_scale, placement=placement)
        return compile_plan(self.bundle.manifest, schedule)

    def models(self, denoisers: Iterable[str], decoder: str | None = None) -> tuple[str, ...]:
        """What pictures of these denoisers take; None is the bundle's first decoder."""
        names = self.bundle.manifest.names
        return (*names("text_encoder"), *dict.fromkeys(denoisers), decoder or names("vae_decoder")[0])

    def work(self, shared: Shared, plan: Plan, decoder: str | None = None, pictures: int = 1) -> Work:
        """What every contender paints.

        Raises:
            RequestError: the bundle paints no pictures of this size.
            TargetError: the first target asks for another precision than the bundle has.
        """
        manifest, first = self.bundle.manifest, parse_target(shared.targets[0])
        width, height = shared.size or (manifest.defaults.width, manifest.defaults.height)
        asked = Request(prompt=shared.prompt, height=height, width=width, num_images_per_prompt=pictures)
        asked.latent_shape(manifest, tuple(dict(plan.steps)))
        first.check_quantized(self.bundle.path.name, manifest)
        for name, component in manifest.components.items():
            first.check_precision(name, component.precision)
        arguments: dict[str, Any] = {
            "steps": plan.steps,
            "guidance_scale": plan.guidance_scale,
            "placement": plan.placement,
            "height": height,
            "width": width,
            "decoder": decoder,
            "num_images_per_prompt": pictures,
        }
        return Work(
            bundle=self.bundle.path,
            checkpoint=self.checkpoint,
            added=self.sources,
            prompt=shared.prompt,
            arguments=arguments,
            steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            height=height,
            width=width,
            decoder=decoder,
            threads=shared.threads,
            device=peer_device(first),
            cache=shared.cache,
            weights=weights_of(self.bundle, self.models(dict(plan.steps), decoder)),
        )


def opened(
    shared: Shared,
    reporter: Reporter,
    checkpoint: Path | None = None,
    sources: Mapping[str, Path] | None = None,
    *,
    runs: bool = True,
) -> Measured:
    """Check that the report can be written, then open the bundle, or the preset's, which is exported if need be.

    runs: whether anything is to run on the targets here, besides being built for them.

    Raises:
        BenchmarkError: the report's folder is taken or cannot be written, or a checkpoint is no folder.
        TargetError: a target is not available here.
        BundleError, ExportError: the bundle is damaged, or the preset cannot be exported.
    """
    load = load_average()
    for target in map(parse_target, shared.targets):
        check_installed(target)
        if runs:
            check_runnable(target)
    for name, path in {"the bundle": checkpoint, **(sources or {})}.items():
        if path is not None and not path.is_dir():
            remedy = "Name one on this machine: none is downloaded."
            raise BenchmarkError(f"the checkpoint of {name}", "is no folder", got=str(path), remedy=remedy)
    require_free(shared.out, force=shared.force)
    shared.cache.mkdir(parents=True, exist_ok=True)
    if shared.bundle is not None:
        bundle, added = Bundle.open(shared.bundle), {name: path.resolve() for name, path in (sources or {}).items()}
        checkpoint = None if checkpoint is None else checkpoint.resolve()
    elif shared.preset is not None:
        folder = preset_bundle(shared.preset, shared.scale, shared.dtype, shared.cache, reporter.progress)
        bundle, checkpoint = Bundle.open(folder / shared.preset), folder / "checkpoint"
        own = (shared.preset, "checkpoint")
        added = {one.name: one for one in folder.iterdir() if one.is_dir() and one.name not in own}
    else:
        raise BenchmarkError("bench", "nothing to measure", remedy="Name a bundle, or a --preset.")
    left = tuple(told for target in shared.targets for told in left_told(bundle, target)) if runs else ()
    return Measured(bundle, checkpoint, added, Watch(load), left)


def publish(
    title: str,
    shared: Shared,
    measured: Measured,
    request: Mapping[str, str],
    sections: Sequence[Section],
    otherwise: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the report and return what the command tells of it. otherwise: as `asked` of `caveats`.

    Raises:
        BenchmarkError: the folder cannot be written or is full.
    """
    machine, rounds = measured.watch.machine(), shared.rounds
    subjects = (
        subject_of(measured.bundle, random_weights=shared.preset is not None or has_random_weights(measured.bundle)),
    )
    report = Report(
        title=f"{subjects[0].name}: {title}",
        began=measured.watch.began,
        request=request,
        machine=machine,
        method=Method(
            warm_up=rounds.warm_up, rounds=rounds.count, order=ORDER, seed=rounds.seed, threads=shared.threads
        ),
        subjects=subjects,
        sections=tuple(sections),
        caveats=caveats(machine, subjects, sections, (*otherwise, *measured.left), rounds.count),
    )
    named = {"BUNDLE": measured.bundle.path, "CHECKPOINT": measured.checkpoint, "CACHE": shared.cache}
    report = without_places(report, places_of({**named, **measured.sources}))
    written = write_report_files(shared.out, report)
    return {"written": [str(one) for one in written], "caveats": list(report.caveats)}


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """What a command tells of its report, as lines."""
    yield from (f"know first: {caveat}" for caveat in result["caveats"])
    yield from result["written"]


class Planned(Protocol):
    """A benchmark's arguments."""

    @property
    def shared(self) -> Shared: ...

    @property
    def facts(self) -> Mapping[str, str]: ...


def plan_facts(plan: Planned) -> dict[str, Any]:
    """What would be measured, in JSON's types; no bundle is looked at."""
    rounds = plan.shared.rounds
    return {**plan.facts, "warm_up": rounds.warm_up, "rounds": rounds.count, "out": str(plan.shared.out)}
