"""The sweep: plans that share the steps between two denoisers, measured beside the large denoiser alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import msgspec
import numpy as np

from ..runtime import Pipeline
from ..runtime.architecture import cpu_architecture, usable_cpus
from ..runtime.backends import gpu_names
from ..runtime.bundle import Bundle
from ..runtime.calibrations import Calibrations, RowTime, SplitPoint
from ..runtime.manifest import Manifest
from ..runtime.output import Output
from ..runtime.plan import Schedule, compile_plan
from ..runtime.targets import Target, installed_version
from .quality import Pixels, Scorer, latent_error, psnr_db, ssim
from .split_plans import Runs, SplitPlan, plan_cost
from .sweep_file import FORMAT, Ground, PictureQuality, RowTimes, SweepFile

Progress = Callable[[str, int, int], None]

_UNGUIDED = " unguided"
_ROUNDS = 9
_ROWS = 4


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is measured: the plans, the large denoiser's own first, over prompts, of which prompt i has seed + i.

    batch: how many pictures are painted at once, which changes none of them.
    """

    large: str
    small: str
    plans: tuple[SplitPlan, ...]
    prompts: tuple[str, ...]
    seed: int
    scorer_name: str | None = None
    scorer: Scorer | None = None
    batch: int = 4

    @property
    def num_inference_steps(self) -> int:
        return sum(count for _, count in self.plans[0].runs)

    @property
    def prompts_sha256(self) -> str:
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()

    def ground(self, bundle: Bundle, target: Target, threads: int | None) -> Ground:
        """All that the figures rest on."""
        manifest = bundle.manifest
        defaults = msgspec.structs.replace(manifest.defaults, steps=None, num_inference_steps=self.num_inference_steps)
        facts = msgspec.structs.replace(manifest, defaults=defaults, calibrations=Calibrations())
        return Ground(
            format=FORMAT,
            bundle=manifest.files_digest,
            facts=hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest(),
            target=str(target),
            threads=threads,
            machine=(cpu_architecture(), f"{usable_cpus()} CPUs", *gpu_names(target)),
            versions={"tandemrt": version("tandemrt"), target.backend: installed_version(target.backend)},
            large=self.large,
            small=self.small,
            num_inference_steps=self.num_inference_steps,
            scorer=self.scorer_name,
        )

    def key(self, plan: SplitPlan, index: int) -> tuple[str, str, int]:
        """What one picture of a plan is kept by."""
        return plan.name, self.prompts[index], self.seed + index


def row_kinds(manifest: Manifest, plan: SplitPlan) -> tuple[str, ...]:
    """Of each row of a plan what decides how long it takes: its denoiser, and whether both branches of guidance run."""
    compiled = compile_plan(manifest, Schedule(steps=plan.runs, timesteps=own_timesteps(manifest)))
    return tuple(
        name if guided else name + _UNGUIDED for name, guided in zip(compiled.denoisers, compiled.guided, strict=True)
    )


def measured_rows(pipeline: Pipeline, sweep: Sweep, kept: SweepFile) -> Mapping[str, RowTime]:
    """How long a row of each kind takes for one picture, in turns; from `kept` where all were measured before."""
    manifest = pipeline.bundle.manifest
    kinds = dict.fromkeys(kind for plan in sweep.plans for kind in row_kinds(manifest, plan))
    if kept.row_times is not None and kinds.keys() <= kept.row_times.keys():
        return kept.row_times
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_ in range(1 + _ROUNDS):
        for kind, taken in rounds.items():
            output = pipeline(
                sweep.prompts[0],
                steps={kind.removesuffix(_UNGUIDED): min(_ROWS, sweep.num_inference_steps)},
                guidance_interval=(0.0, 0.0 if kind.endswith(_UNGUIDED) else 1.0),
                seed=sweep.seed,
                output_type="latent",
            )
            if round_:  # the first one loads and warms up
                taken.append(float(np.median([row.model_ms for row in output.timings.rows])))
    times = {
        kind: RowTime(median_ms=float(np.median(taken)), least_ms=min(taken), most_ms=max(taken))
        for kind, taken in rounds.items()
    }
    kept.keep([RowTimes(by_kind=times)])
    return times


def plan_costs(manifest: Manifest, sweep: Sweep, rows: Mapping[str, RowTime]) -> list[float]:
    """What each plan costs as a share of the large denoiser alone, the first plan."""
    row_ms = {kind: time.median_ms for kind, time in rows.items()}
    kinds = [row_kinds(manifest, plan) for plan in sweep.plans]
    return [plan_cost(rows_of, kinds[0], row_ms) for rows_of in kinds]


def own_timesteps(manifest: Manifest) -> tuple[int, ...] | None:
    """The time steps that the bundle's default plan runs, where it names them: see `Schedule`."""
    first = manifest.components[manifest.names("denoiser")[0]]
    return manifest.defaults.timesteps if first.scheduler is None else None


def measure_pictures(pipeline: Pipeline, sweep: Sweep, kept: SweepFile, progress: Progress) -> None:
    """Paint what `kept` lacks, and keep how far each picture and latent is from the large denoiser's of its noise."""
    prompts = len(sweep.prompts)
    for first in range(0, prompts, sweep.batch):
        chosen = range(first, min(first + sweep.batch, prompts))
        missing = [plan for plan in sweep.plans if any(sweep.key(plan, index) not in kept.pictures for index in chosen)]
        if not missing:
            continue
        alone = sweep.plans[0]
        reference = _painted(pipeline, sweep, alone.runs, chosen)
        for plan in missing:
            output = reference if plan is alone else _painted(pipeline, sweep, plan.runs, chosen)
            kept.keep(_compared(sweep, plan, chosen, output, reference))
            done = sum(sweep.key(each, index) in kept.pictures for each in sweep.plans for index in range(prompts))
            progress("plans x prompts", done, prompts * len(sweep.plans))


def _painted(pipeline: Pipeline, sweep: Sweep, runs: Runs, chosen: Sequence[int]) -> Output:
    return pipeline(
        [sweep.prompts[index] for index in chosen],
        steps=runs,
        timesteps=own_timesteps(pipeline.bundle.manifest),
        seed=[sweep.seed + index for index in chosen],
    )


def _compared(
    sweep: Sweep, plan: SplitPlan, chosen: Sequence[int], output: Output, reference: Output
) -> list[PictureQuality]:
    pictures, references = _pixels(output), _pixels(reference)
    right: Sequence[bool | None] = [None] * len(chosen)
    if sweep.scorer is not None:
        right = sweep.scorer([sweep.prompts[index] for index in chosen], pictures)
    return [
        PictureQuality(
            plan=plan.name,
            prompt=sweep.prompts[index],
            seed=sweep.seed + index,
            latent_error=latent_error(output.latents[place], reference.latents[place]),
            psnr_db=psnr_db(pictures[place], references[place]),
            ssim=ssim(pictures[place], references[place]),
            right=right[place],
        )
        for place, index in enumerate(chosen)
    ]


def _pixels(output: Output) -> Pixels:
    return np.stack([np.asarray(image) for image in output.images])


def split_points(sweep: Sweep, kept: SweepFile, costs: Sequence[float]) -> tuple[SplitPoint, ...]:
    """What was measured of each plan, once everything is."""
    points = []
    for plan, cost in zip(sweep.plans, costs, strict=True):
        pictures = [kept.pictures[sweep.key(plan, index)] for index in range(len(sweep.prompts))]
        points.append(
            SplitPoint(
                steps=plan.runs,
                cost=cost,
                latent_error=float(np.median([picture.latent_error for picture in pictures])),
                psnr_db=float(np.median([picture.psnr_db for picture in pictures])),
                ssim=float(np.median([picture.ssim for picture in pictures])),
                right=None if sweep.scorer is None else sum(bool(picture.right) for picture in pictures),
            )
        )
    return tuple(points)
