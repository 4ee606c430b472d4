"""The sweep: plans that share the steps between two denoisers, measured beside the large denoiser alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from ..engines.job import Progress
from ..runtime import Pipeline
from ..runtime.bundle import Bundle
from ..runtime.calibrations import RowTime, SplitHeldOut, SplitPoint
from ..runtime.manifest import Frozen, Manifest
from ..runtime.output import Output
from ..runtime.plan import Schedule, compile_plan
from ..runtime.targets import Target
from .grounds import ground_of
from .ledger import Ledger
from .prompts import prompts_sha256
from .quality import Pixels, latent_error, psnr_db, ssim
from .scorers import NamedScorer
from .split_plans import SplitPlan, plan_cost
from .strata import Runs

FORMAT = 3
_ROW_TIMES = "row times"
_UNGUIDED = " unguided"
_ROUNDS = 9
_ROWS = 4


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is measured: the plans, the large denoiser's own first, over prompts, of which prompt i has seed + i.

    batch: how many pictures are painted at once, which changes none of them.
    held_out: prompts that the plan that is chosen is judged by, with the seeds behind those.
    """

    large: str
    small: str
    plans: tuple[SplitPlan, ...]
    prompts: tuple[str, ...]
    seed: int
    scorer: NamedScorer | None = None
    batch: int = 4
    held_out: tuple[str, ...] = ()

    @property
    def num_inference_steps(self) -> int:
        return sum(count for _, count in self.plans[0].runs)

    @property
    def prompts_sha256(self) -> str:
        return prompts_sha256(self.prompts)

    def ground(self, bundle: Bundle, target: Target, threads: int | None) -> dict[str, Any]:
        """All that the figures rest on but plans, prompts and seeds, which stand beside each picture's figures."""
        own = {"steps": None, "num_inference_steps": self.num_inference_steps}
        return {
            "format": FORMAT,
            **ground_of(bundle, target, threads, self.scorer, **own),
            "large": self.large,
            "small": self.small,
            "num_inference_steps": self.num_inference_steps,
        }

    def key(self, plan: SplitPlan, index: int) -> str:
        """What one picture of a plan is kept by."""
        return f"{plan.name}, seed {self.seed + index}: {self.prompts[index]}"


class PictureQuality(Frozen, frozen=True, kw_only=True):
    """One picture of a plan beside the large denoiser's of the same prompt and seed."""

    latent_error: float
    psnr_db: float
    ssim: float
    right: bool | None


def row_kinds(manifest: Manifest, plan: SplitPlan) -> tuple[str, ...]:
    """Of each row of a plan what decides how long it takes: its denoiser, and whether both branches of guidance run."""
    compiled = compile_plan(manifest, Schedule(steps=plan.runs, timesteps=own_timesteps(manifest)))
    return tuple(
        name if guided else name + _UNGUIDED for name, guided in zip(compiled.denoisers, compiled.guided, strict=True)
    )


def measured_rows(pipeline: Pipeline, sweep: Sweep, kept: Ledger) -> Mapping[str, RowTime]:
    """How long a row of each kind takes for one picture, in turns; from `kept` where all were measured before."""
    manifest = pipeline.bundle.manifest
    kinds = dict.fromkeys(kind for plan in sweep.plans for kind in row_kinds(manifest, plan))
    known = msgspec.convert(kept.get(_ROW_TIMES) or {}, dict[str, RowTime])
    if kinds.keys() <= known.keys():
        return known
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
        kind: RowTime(
            median_ms=float(np.median(taken)), least_ms=min(taken), most_ms=max(taken), rounds_ms=tuple(taken)
        )
        for kind, taken in rounds.items()
    }
    kept.put(_ROW_TIMES, msgspec.to_builtins(times))
    return times


def plan_costs(manifest: Manifest, sweep: Sweep, rows: Mapping[str, RowTime]) -> list[float]:
    """What each plan costs as a share of the large denoiser alone, the first plan."""
    row_ms = {kind: time.median_ms for kind, time in rows.items()}
    kinds = [row_kinds(manifest, plan) for plan in sweep.plans]
    return [plan_cost(rows_of, kinds[0], row_ms) for rows_of in kinds]


def cost_intervals(
    manifest: Manifest, sweep: Sweep, rows: Mapping[str, RowTime], costs: Sequence[float]
) -> list[tuple[float, float]]:
    """Between what the median of each plan's cost lies with 96%: the second least and most of nine rounds' costs.

    Of nine values the median of what they are drawn from lies outside these two with 2 * (1 + 9) / 2**9.
    """
    kinds = [row_kinds(manifest, plan) for plan in sweep.plans]
    rounds = [
        dict(zip(rows, taken, strict=True)) for taken in zip(*(row.rounds_ms for row in rows.values()), strict=True)
    ]
    found = []
    for rows_of, cost in zip(kinds, costs, strict=True):
        ordered = sorted(plan_cost(rows_of, kinds[0], row_ms) for row_ms in rounds)
        found.append((min(cost, ordered[1]), max(cost, ordered[-2])))
    return found


def own_timesteps(manifest: Manifest) -> tuple[int, ...] | None:
    """The time steps that the bundle's default plan runs, where it names them: see `Schedule`."""
    first = manifest.components[manifest.names("denoiser")[0]]
    return manifest.defaults.timesteps if first.scheduler is None else None


def measure_pictures(pipeline: Pipeline, sweep: Sweep, kept: Ledger, progress: Progress) -> None:
    """Paint what `kept` lacks, and keep how far each picture and latent is from the large denoiser's of its noise."""
    prompts = len(sweep.prompts)
    for first in range(0, prompts, sweep.batch):
        chosen = range(first, min(first + sweep.batch, prompts))
        missing = [plan for plan in sweep.plans if any(kept.get(sweep.key(plan, index)) is None for index in chosen)]
        if not missing:
            continue
        alone = sweep.plans[0]
        reference = _painted(pipeline, sweep, alone.runs, chosen)
        for plan in missing:
            output = reference if plan is alone else _painted(pipeline, sweep, plan.runs, chosen)
            for index, quality in zip(chosen, _compared(sweep, chosen, output, reference), strict=True):
                kept.put(sweep.key(plan, index), msgspec.to_builtins(quality))
            done = sum(kept.get(sweep.key(each, at)) is not None for each in sweep.plans for at in range(prompts))
            progress("plans x prompts", done, prompts * len(sweep.plans))


def _painted(pipeline: Pipeline, sweep: Sweep, runs: Runs, chosen: Sequence[int]) -> Output:
    return pipeline(
        [sweep.prompts[index] for index in chosen],
        steps=runs,
        timesteps=own_timesteps(pipeline.bundle.manifest),
        seed=[sweep.seed + index for index in chosen],
    )


def _compared(sweep: Sweep, chosen: Sequence[int], output: Output, reference: Output) -> list[PictureQuality]:
    pictures, references = _pixels(output), _pixels(reference)
    right: Sequence[bool | None] = [None] * len(chosen)
    if sweep.scorer is not None:
        right = sweep.scorer([sweep.prompts[index] for index in chosen], pictures)
    return [
        PictureQuality(
            latent_error=latent_error(output.latents[place], reference.latents[place]),
            psnr_db=psnr_db(pictures[place], references[place]),
            ssim=ssim(pictures[place], references[place]),
            right=right[place],
        )
        for place in range(len(chosen))
    ]


def _pixels(output: Output) -> Pixels:
    return np.stack([np.asarray(image) for image in output.images])


def split_points(sweep: Sweep, kept: Ledger, costs: Sequence[float]) -> tuple[SplitPoint, ...]:
    """What was measured of each plan, once everything is."""
    points = []
    for plan, cost in zip(sweep.plans, costs, strict=True):
        found = [kept.get(sweep.key(plan, index)) for index in range(len(sweep.prompts))]
        pictures = msgspec.convert(found, list[PictureQuality])
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


def judged(
    pipeline: Pipeline, sweep: Sweep, chosen: SplitPoint, kept: Ledger, progress: Progress
) -> SplitHeldOut | None:
    """What the plan of a point comes to on the prompts held out, beside the large denoiser alone; None without any."""
    if not sweep.held_out:
        return None
    large = sweep.plans[0]
    plans = [large, *(plan for plan in sweep.plans[1:] if plan.runs == chosen.steps)]
    seed = sweep.seed + len(sweep.prompts)
    others = replace(sweep, plans=tuple(plans), prompts=sweep.held_out, seed=seed, held_out=())
    measure_pictures(pipeline, others, kept, lambda _, done, total: progress("plans x held-out prompts", done, total))
    points = split_points(others, kept, [1.0, chosen.cost][: len(plans)])
    return SplitHeldOut(
        prompts=len(others.prompts),
        prompts_sha256=others.prompts_sha256,
        seed=seed,
        chosen=points[-1],
        large=points[0],
    )
