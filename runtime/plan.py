"""Plans: a compiled schedule with, for every row, the denoiser that runs and whether guidance is on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .adaptive import AdaptiveRule
from .arguments import did_you_mean, finite_number, whole_number
from .errors import PlanError, RequestError
from .guidance_defaults import checked_interval, stored_interval, stored_rule, stored_taus
from .manifest import Manifest, SchedulerDefaults
from .plan_steps import Steps, runs_of
from .solvers import begin_at_strength, compile_table, resolve_solver
from .table import Table
from .tensors import GUIDANCE_EMBEDDING, spec_of
from .window import Window, require_window_rows

GUIDANCES = ("fixed", "adaptive")
# Before the name of a denoiser that runs on a server.
CLOUD = "cloud:"
PLACEMENTS = ("batched", "sequential", "parallel", "auto", "hybridiff")
_SPACING_KEYS = ("timestep_spacing", "steps_offset", "original_inference_steps")


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a caller may say about the schedule; what is None comes from the bundle.

    steps: a number (all on the bundle's first denoiser), or how many inference steps each denoiser takes, in order:
        `{"unet": 10, "unet_small": 15}`, or pairs where a denoiser comes back: `[("unet", 5), ("unet_small", 15),
        ("unet", 5)]`.
    solver: a short name such as `ddim`, `euler`, `dpmsolver++`; the bundle's own scheduler otherwise.
    solver_config: scheduler keys that override the bundle's, such as `{"use_karras_sigmas": True}`.
    timesteps: explicit time steps, where the solver takes them; their number is the number of steps. The bundle's own
        give way to steps, a solver, and a solver_config that spaces time steps.
    eta: DDIM's eta, TCD's gamma.
    guidance_scale: classifier-free guidance; at 1 or below only the conditional branch runs, as in diffusers. A
        denoiser that takes it as an embedding, as LCMs do, never runs the other branch.
    guidance_interval: the part of the steps that run, as fractions (start, end), in which both branches do.
        The bundle's own, where it has one, is of fixed guidance outside of `hybridiff` alone.
    guidance: `fixed`, as the interval says; or `adaptive`, which within it leaves the unconditional branch out of rows
        where the branches agree. guidance_config: the numbers of `AdaptiveRule` that are not to be the
        bundle's.
    placement: where both branches of guidance run: `batched`, in one call; `sequential`, in two calls, one after the
        other, which takes less memory; `parallel`, in two calls at once; `auto`, as was fastest when it was tried; or
        `hybridiff`, in parallel but for a window in which the denoiser's stages run at once, for another picture.
    placement_config: of `hybridiff`, the numbers that are to be others than the bundle's: L_slope, eps_slope, k,
        tau_cap; model_n, stride, time_shift. See `Taus` and `Pipelining`.
    strength: how much image-to-image and inpainting change the image, above 0 and up to 1. `steps` counts the whole
        schedule, as in diffusers; below 1 it begins later, so that the first denoisers run fewer steps or none.
    """

    steps: Steps | None = None
    solver: str | None = None
    solver_config: Mapping[str, Any] | None = None
    timesteps: Sequence[int] | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance: str = "fixed"
    guidance_config: Mapping[str, Any] | None = None
    placement: str = "batched"
    placement_config: Mapping[str, Any] | None = None
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class RowGuidance:
    """What became of guidance in a row.

    guided: whether both branches ran. placement: where they did, or the one that ran. why: in plain words.
    discrepancy: between the branches, see `relative_mae`; None where there was one, or a step engine kept them.
    growth: of a row with both in adaptive guidance, see `AdaptiveGuidance`.
    taus: of a row in Hybridiff's window, the rows tau1 and tau2 between which it lies.
    """

    guided: bool
    placement: str
    why: str
    discrepancy: float | None = None
    taus: tuple[int, int] | None = None
    growth: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One generation's schedule, compiled.

    denoisers, guided: for each of the table's rows, which component runs and whether both guidance branches do.
    guidance_embedded: the denoisers that are given the guidance scale instead, as an embedding.
    adaptive: the rule by which guided rows may yet run one branch, where guidance is adaptive.
    placement: where both branches run; see `Schedule`.
    window: of placement `hybridiff`.
    ran: of an output's plan, what became of guidance in every row.
    """

    table: Table
    denoisers: tuple[str, ...]
    guided: tuple[bool, ...]
    guidance_scale: float
    guidance_embedded: tuple[str, ...] = ()
    adaptive: AdaptiveRule | None = None
    placement: str = "batched"
    window: Window | None = None
    ran: tuple[RowGuidance, ...] = ()

    def having_run(self, rows: Sequence[RowGuidance]) -> Plan:
        """The plan with what became of its rows; where `auto` was asked for, `placement` is the one that ran."""
        fastest = self.placement == "auto" and bool(rows)
        return replace(self, ran=tuple(rows), placement=rows[0].placement if fastest else self.placement)

    @property
    def taus(self) -> tuple[int, int] | None:
        """Of an output's plan, the rows tau1 and tau2 between which the window lay; None where there was none."""
        return next((row.taus for row in self.ran if row.taus is not None), None)

    @property
    def one_branch(self) -> tuple[bool, ...]:
        """For each row, whether it may run without the unconditional branch."""
        return tuple(self.adaptive is not None or not both for both in self.guided)

    def calls(self, rows: Iterable[int]) -> Iterator[tuple[int, bool]]:
        """Rows with whether both branches run: each once, or in both ways where that is decided when it comes."""
        for row in rows:
            yield row, self.guided[row]
            if self.guided[row] and self.adaptive is not None:
                yield row, False

    def why(self, row: int) -> str:
        """Why a row runs both branches of guidance, or one."""
        if self.guided[row]:
            return "guided"
        if self.guidance_scale <= 1:
            return "guidance_scale is 1 or below"
        embedded = self.denoisers[row] in self.guidance_embedded
        return "guidance is embedded" if embedded else "outside guidance_interval"

    @property
    def steps(self) -> tuple[tuple[str, int], ...]:
        """Runs of inference steps on one denoiser, in order."""
        runs: list[tuple[str, int]] = []
        previous = -1
        for step, name in zip(self.table.steps.tolist(), self.denoisers, strict=True):
            if step != previous:
                again = bool(runs) and runs[-1][0] == name
                runs[-1:] = [(name, runs[-1][1] + 1)] if again else [*runs[-1:], (name, 1)]
                previous = step
        return tuple(runs)

    def part(self, first: int, last: int) -> Plan:
        """The rows from `first` to before `last` as a plan, of which the others have run, or are run, elsewhere."""
        if (first, last) == (0, self.table.rows):
            return self
        denoisers = self.denoisers[first:last]
        embedded = tuple(name for name in self.guidance_embedded if name in denoisers)
        return replace(
            self,
            table=self.table.part(first, last),
            denoisers=denoisers,
            guided=self.guided[first:last],
            guidance_embedded=embedded,
        )

    @property
    def digest(self) -> str:
        """The sha256 of all that decides what a state between its rows means; not of where and how the rows run."""
        names, embedded = [
            [name.removeprefix(CLOUD) for name in listed] for listed in (self.denoisers, self.guidance_embedded)
        ]
        facts = [self.table.recipe, names, self.guided, self.guidance_scale, embedded]
        return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()

    def __repr__(self) -> str:
        steps = ", ".join(f"{name} {count}" for name, count in self.steps)
        guided = sum(row.guided for row in self.ran) if self.ran else sum(self.guided)
        adaptive = "" if self.adaptive is None or self.ran else "at most "
        guidance = f"{self.guidance_scale:g} on {adaptive}{guided} of {self.table.rows} rows"
        if self.guidance_embedded:
            guidance += f", embedded for {', '.join(self.guidance_embedded)}"
        placement = "" if self.placement == "batched" else f", {self.placement}"
        return f"<Plan {steps}; {self.table.solver}; guidance {guidance}{placement}>"

    def facts(self) -> dict[str, Any]:
        """The plan as JSON-able facts: solver, steps, time steps, denoiser and guidance of every row; not what ran."""
        return {
            "solver": self.table.solver,
            "steps": [list(run) for run in self.steps],
            "timesteps": self.table.timesteps.tolist(),
            "denoisers": list(self.denoisers),
            "guided": list(self.guided),
            "guidance_scale": self.guidance_scale,
            "guidance_embedded": list(self.guidance_embedded),
            "adaptive": None if self.adaptive is None else asdict(self.adaptive),
            "placement": self.placement,
            "window": None if self.window is None else asdict(self.window),
        }


def compile_plan(manifest: Manifest, schedule: Schedule) -> Plan:
    """Compile `schedule` for a bundle.

    Where all steps go to one denoiser that brings its own scheduler (a one-step model), that scheduler is the default.

    Raises:
        PlanError: an argument is of another type than `Schedule` says; steps that sum to 0, are negative or name an
            unknown denoiser; an unknown solver or a scheduler key it does not support; a guidance interval outside
            0..1; a strength that is not in 0..1 or leaves no step; a window's number out of range, or a window that
            could close behind the last row.
        RequestError: guidance that is negative, NaN or infinite; an unknown placement, or one that cannot run such
            rows; unknown numbers of adaptive guidance or of a placement, or of another type, and those of adaptive
            guidance out of range.
    """
    _require_solver(schedule)
    timesteps = _timesteps(manifest, schedule)
    stored = manifest.defaults.steps if schedule.steps is None and schedule.timesteps is None else None
    runs = runs_of(manifest, stored or schedule.steps, timesteps)
    guidance_scale = _guidance_scale(manifest, schedule)
    start, end = _guidance_interval(manifest, schedule)
    total = sum(count for _, count in runs)
    default = _default_scheduler(manifest, {name for name, _ in runs})
    solver = default.class_name if schedule.solver is None else schedule.solver
    class_name, config = resolve_solver(solver, default.config, schedule.solver_config)
    eta = schedule.eta
    if eta is None:
        eta = manifest.defaults.eta if schedule.solver is None and default is manifest.scheduler else 0.0
    begin = begin_at_strength(class_name, total, schedule.strength)
    table = compile_table(class_name, config, total, timesteps=timesteps, eta=eta, begin=begin)
    by_step = [name for name, count in runs for _ in range(count)][begin:]
    left = len(by_step)
    on = [guidance_scale > 1 and start <= step / left < end for step in range(left)]
    used = dict.fromkeys(by_step)
    embedded = tuple(name for name in used if spec_of(manifest.components[name].inputs, GUIDANCE_EMBEDDING))
    plan = Plan(
        table=table,
        denoisers=tuple(by_step[step] for step in table.steps),
        guided=tuple(on[step] and by_step[step] not in embedded for step in table.steps),
        guidance_scale=guidance_scale,
        guidance_embedded=embedded,
        adaptive=_adaptive(manifest, schedule),
        placement=_one_of("placement", schedule.placement, PLACEMENTS),
    )
    return replace(plan, window=_window(manifest, schedule, plan))


def _timesteps(manifest: Manifest, schedule: Schedule) -> tuple[int, ...] | None:
    given: object = schedule.timesteps
    if given is None:
        default = _default_scheduler(manifest, {manifest.names("denoiser")[0]})
        own = schedule.steps is None and schedule.solver is None and default is manifest.scheduler
        own = own and not any(map(_spaces_timesteps, (schedule.solver_config or {}).items()))
        return manifest.defaults.timesteps if own else None
    listed = given.ndim > 0 if isinstance(given, np.ndarray) else isinstance(given, Sequence)
    listed = listed and not isinstance(given, str | bytes)
    numbers = [whole_number(timestep) for timestep in given] if listed else [None]  # type: ignore[attr-defined]
    whole = tuple(number for number in numbers if number is not None)
    if len(whole) != len(numbers):
        raise PlanError("timesteps", "not usable", got=given, expected="a sequence of whole numbers")
    return whole


def _spaces_timesteps(setting: tuple[str, object]) -> bool:
    """Whether a scheduler's key and value ask for time steps other than those a bundle names."""
    key, value = setting
    return key in _SPACING_KEYS or (key.startswith("use_") and bool(value))


def _require_solver(schedule: Schedule) -> None:
    solver: object = schedule.solver
    config: object = schedule.solver_config
    if solver is not None and not isinstance(solver, str):
        raise PlanError("solver", "type", got=solver, expected="a name such as 'ddim'")
    if config is not None and not (isinstance(config, Mapping) and all(isinstance(key, str) for key in config)):
        expected = 'keys and values such as {"use_karras_sigmas": True}'
        raise PlanError("solver_config", "type", got=config, expected=expected)


def _guidance_interval(manifest: Manifest, schedule: Schedule) -> tuple[float, float]:
    given = schedule.guidance_interval
    if given is None:
        return stored_interval(manifest, schedule.guidance, schedule.placement)
    return checked_interval(given)


def _default_scheduler(manifest: Manifest, used: Collection[str]) -> SchedulerDefaults:
    own = [manifest.components[name].scheduler for name in used]
    return (own[0] if len(own) == 1 else None) or manifest.scheduler


def _guidance_scale(manifest: Manifest, schedule: Schedule) -> float:
    given = manifest.defaults.guidance_scale if schedule.guidance_scale is None else schedule.guidance_scale
    scale = finite_number(given)
    if scale is None or scale < 0:
        raise RequestError("guidance_scale", "not usable", got=given, expected="a finite number, 0 or more")
    return scale


def _adaptive(manifest: Manifest, schedule: Schedule) -> AdaptiveRule | None:
    if _one_of("guidance", schedule.guidance, GUIDANCES) == "adaptive":
        return AdaptiveRule.of(schedule.guidance_config, stored_rule(manifest))
    if schedule.guidance_config is not None:
        raise RequestError("guidance_config", "given without adaptive guidance", remedy="Ask for guidance='adaptive'.")
    return None


def _window(manifest: Manifest, schedule: Schedule, plan: Plan) -> Window | None:
    if plan.placement != "hybridiff":
        if schedule.placement_config is not None:
            remedy = "Ask for placement='hybridiff'."
            raise RequestError("placement_config", "given without a placement that has any", remedy=remedy)
        return None
    require_window_rows(plan.denoisers, plan.guided, schedule.guidance)
    return Window.of(schedule.placement_config, stored_taus(manifest, plan.denoisers[0]), plan.table.rows)


def _one_of(where: str, given: object, known: Sequence[str]) -> str:
    if not isinstance(given, str) or given not in known:
        expected, remedy = f"one of {', '.join(known)}", did_you_mean(str(given)[:80], known)
        raise RequestError(where, "unknown", got=given, expected=expected, remedy=remedy)
    return given
