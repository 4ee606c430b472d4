"""How a plan's rows run: on step engines where the cache has all that they want, else on the denoisers themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import msgspec

from .auto_placement import CANDIDATES, AutoPlacement
from .backends.base import Session, Shape
from .control import Control, Steering
from .errors import EngineError
from .hybridiff import Hybridiff
from .loras import Fitted
from .manifest import TensorSpec
from .models import Models
from .placement import Batched, Parallel, Placed, Sequential, Worker
from .plan import Plan
from .ran_on import Ran
from .rows import Rows
from .sampler import SampledRow, Sampler
from .stage_parts import Stages, bound_parts
from .state import State
from .step_engines import StepEngines, Wanted
from .step_inputs import given_inputs, input_shapes
from .step_sampler import Key, StepSampler
from .update_sampler import UpdateSampler
from .variant import UPDATE, Variant
from .window import Window

_ON_STEP_ENGINES = ("batched", "auto")


class Loop(Protocol):
    """Walks a plan's rows, whatever they run on; see `Sampler`."""

    def run(self, state: State, until: int | None = None) -> Iterator[SampledRow]:
        """Advance `state` in place, row by row."""


def step_variants(plan: Plan) -> dict[Key, Variant]:
    """The step engines that run a plan, without LoRAs, by denoiser and whether both branches run; none where none may.

    They have both branches of guidance in one call, and show neither.
    """
    if plan.placement not in _ON_STEP_ENGINES or plan.adaptive is not None:
        return {}
    timesteps: dict[Key, list[float]] = {}
    for key, timestep in zip(zip(plan.denoisers, plan.guided, strict=True), plan.table.timesteps.tolist(), strict=True):
        timesteps.setdefault(key, []).append(timestep)
    return {
        (name, guided): Variant(step="guided" if guided else "unguided", timesteps=tuple(dict.fromkeys(taken)))
        for (name, guided), taken in timesteps.items()
    }


def open_loop(
    rows: Rows, shape: Shape, models: Models, engines: StepEngines, auto: AutoPlacement, *, before: Callable[[], None]
) -> tuple[Loop, bool]:
    """The loop for latents of this shape with what it runs on loaded, and whether that is step engines.

    Step engines run batched, with fixed guidance; any other placement takes the denoisers themselves, `auto` where
    there are no step engines, or a second GPU could run a branch. ControlNets run beside either. Both compute the same
    numbers, on ONNX Runtime's engines the same bits.

    before: called before each model is loaded; what it raises ends the loading.

    Raises:
        ExecutionError: the models are closed, or one cannot be loaded.
        EngineError: the target runs engines alone, and one is missing; or the cache is not the user's own.
    """
    plan, conditioning = rows.plan, rows.conditioning
    if takes_none := _what_takes_no_steps(rows, shape, models):
        engines.leave(dict.fromkeys(plan.denoisers), takes_none, "step", rows.ran)
    steps = None if takes_none else engines.load(_wanted(rows, shape), before=before, ran=rows.ran)
    controls = tuple(control.component for control in rows.controls)
    if steps is None:
        return _on_denoisers(rows, shape, models, engines, auto, before), False
    sessions = _sessions(controls, rows, models, before)
    steering = Steering(rows.controls, sessions, conditioning) if rows.controls else None
    return StepSampler(rows, steps, steering), True


def _what_takes_no_steps(rows: Rows, shape: Shape, models: Models) -> str:
    """What of a request keeps it from step engines, whichever there are; empty where nothing does."""
    plan = rows.plan
    if plan.placement not in _ON_STEP_ENGINES:
        return f"placement {plan.placement}"
    if plan.adaptive is not None:
        return "adaptive guidance"
    second = plan.placement == "auto" and models.devices > 1 and any(plan.guided)
    if second and _lacking(replace(plan, placement="parallel"), rows.controls, rows.loras, shape, models) is None:
        return "placement auto on two GPUs"
    return ""


def _on_denoisers(
    rows: Rows, shape: Shape, models: Models, engines: StepEngines, auto: AutoPlacement, before: Callable[[], None]
) -> Loop:
    """The loop on the denoisers themselves; guidance and the solver's update run beside them where engines do both."""
    plan, updates = rows.plan, None
    if models.observed or models.elsewhere is not None:
        why = "observe" if models.observed else "a branch elsewhere"
        engines.leave(dict.fromkeys(plan.denoisers), why, "update", rows.ran)
    else:
        updates = engines.load(_updates(rows, shape), before=before, ran=rows.ran)

    def place(placement: str, ran: Ran, *, hands: bool) -> Placed:
        placed_so = replace(rows, plan=replace(plan, placement=placement), ran=ran)
        return _placed(placed_so, shape, models, before, hands=hands)

    def tried(placement: str) -> Placed:
        return place(placement, Ran(), hands=False)

    chosen, before_it = plan.placement, models.uses()
    with ExitStack() as at_end:
        if chosen == "auto":
            try:
                chosen = _fastest(rows, shape, models, auto, tried, before)
            finally:
                of_trial = {key: use for key, use in models.uses().items() if key not in before_it}
                at_end.callback(models.release, of_trial)
        placed = place(chosen, rows.ran, hands=updates is not None)
    if updates is None:
        return Sampler(plan, placed, rows.draw_noise, keep=rows.keep)
    return UpdateSampler(rows, placed, {name: one.session for (name, _), one in updates.items()})


def _fastest(
    rows: Rows,
    shape: Shape,
    models: Models,
    auto: AutoPlacement,
    place: Callable[[str], Placed],
    before: Callable[[], None],
) -> str:
    """The placement that `auto` stands for; place, before: as of `AutoPlacement.choose`."""
    plan = rows.plan
    placed = {one: replace(plan, placement=one) for one in CANDIDATES}
    lacking = {one: _lacking(there, rows.controls, rows.loras, shape, models) for one, there in placed.items()}
    without = {one: error for one, error in lacking.items() if error is not None}
    guided = models_of(plan, rows.controls, plan.guided)
    engines_of = {name: models.engines(name, rows.loras.variant(name)) for name in guided}
    measured = auto.choose(plan, shape, engines_of, place, before, without)
    rows.ran.tried = {} if measured is None else measured.ms
    return "batched" if measured is None else measured.fastest


def _placed(rows: Rows, shape: Shape, models: Models, before: Callable[[], None], *, hands: bool) -> Placed:
    """What predicts the rows, placed as the plan says; hands: as of `Worker`."""
    plan, conditioning, controls = rows.plan, rows.conditioning, rows.controls
    every = [control.component for control in controls] + list(dict.fromkeys(plan.denoisers))
    if plan.placement in ("parallel", "hybridiff"):
        guided, apart = models_of(plan, controls, plan.guided), models.apart
        both = _sessions(guided, rows, models, before, calls=1 if apart else 2)
        placed = [both, _sessions(models_of(plan, controls, plan.one_branch), rows, models, before)]
        if apart:
            placed.append(_sessions(guided, rows, models, before, device=1))
        parallel = Parallel(*(Worker(plan, sessions, conditioning, controls, hands=hands) for sessions in placed))
        if plan.window is None:
            return parallel
        whole = _stages(rows, plan.window, both[plan.denoisers[0]].inputs, shape, models)
        stages = replace(whole, hands=hands)
        bound = bound_parts(stages, plan.window.pipelining, conditioning[stages.name], shape, before)
        return Hybridiff(plan, plan.window, parallel, bound)
    sessions = _sessions(every, rows, models, before)
    worker = Worker(plan, sessions, conditioning, controls, hands=hands)
    return Sequential(worker) if plan.placement == "sequential" else Batched(worker)


def _stages(rows: Rows, window: Window, inputs: tuple[TensorSpec, ...], shape: Shape, models: Models) -> Stages:
    """All stages of the denoiser that a window needs; inputs: of the whole."""
    (name,) = dict.fromkeys(rows.plan.denoisers)
    pipelining, sessions = window.pipelining, []
    devices = pipelining.devices(models.devices)
    for index, variant in enumerate(models.require_stages(name, devices, shape)):
        calls, workers = pipelining.calls(index), pipelining.workers
        session = models.session(name, variant, calls=calls, workers=workers, device=devices[index])
        sessions.append(rows.ran.watched(name, session))
    return Stages(name, inputs, sessions)


def require_engines(plan: Plan, controls: Sequence[Control], loras: Fitted, shape: Shape, models: Models) -> None:
    """Check that the GPUs have engines for the calls of a plan, as it is placed, by what is known before any.

    shape: the latents', (B, C, h, w).

    Raises:
        EngineError: one is missing.
    """
    every, both = [True] * len(plan.guided), (2 * shape[0], *shape[1:])
    calls: list[tuple[Sequence[bool], Shape, int]] = [(every, shape, 0)]
    if plan.placement == "batched":
        calls = [(plan.guided, both, 0), (plan.one_branch, shape, 0)]
    elif plan.placement != "sequential" and models.devices > 1:
        calls.append((plan.guided, shape, 1))
    for rows, taken, device in calls:
        for name in models_of(plan, controls, rows):
            models.require_engine(name, loras.variant(name), taken, refit=name in loras.in_weights, device=device)


def _lacking(
    plan: Plan, controls: Sequence[Control], loras: Fitted, shape: Shape, models: Models
) -> EngineError | None:
    """Why `require_engines` refuses these; None where it does not."""
    try:
        require_engines(plan, controls, loras, shape, models)
    except EngineError as error:
        return error
    return None


def models_of(plan: Plan, controls: Sequence[Control], at: Sequence[bool]) -> list[str]:
    """The ControlNets and denoisers of the rows marked."""
    marked = [row for row, used in enumerate(at) if used]
    steering = [control.component for control in controls if any(control.rows[row] for row in marked)]
    return steering + list(dict.fromkeys(plan.denoisers[row] for row in marked))


def _sessions(
    names: Iterable[str], rows: Rows, models: Models, before: Callable[[], None], *, calls: int = 1, device: int = 0
) -> dict[str, Session]:
    sessions = {}
    for name in names:
        before()
        refit = name in rows.loras.in_weights
        session = models.session(name, rows.loras.variant(name), refit=refit, calls=calls, device=device)
        sessions[name] = rows.ran.watched(name, session)
    return sessions


def _wanted(rows: Rows, shape: Shape) -> dict[Key, Wanted]:
    """What the rows want of step engines, by denoiser and whether both branches run."""
    plan, wanted = rows.plan, {}
    for (name, guided), step in step_variants(plan).items():
        variant = msgspec.structs.replace(rows.loras.variant(name), step=step.step, timesteps=step.timesteps)
        shapes, refit = _Shapes(rows, shape, name, guided), name in rows.loras.in_weights
        wanted[name, guided] = Wanted(variant, plan.table.history, shapes, refit)
    return wanted


def _updates(rows: Rows, shape: Shape) -> dict[Key, Wanted]:
    """The update engines that the rows want, as `StepEngines.load` takes it."""
    history = rows.plan.table.history
    return {
        (name, True): Wanted(UPDATE, history, partial(_update_shapes, name, shape))
        for name in dict.fromkeys(rows.plan.denoisers)
    }


def _update_shapes(name: str, shape: Shape, inputs: Sequence[TensorSpec]) -> dict[str, Shape]:
    return input_shapes(name, inputs, {}, shape, guided=False)


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The shapes of an engine's inputs in a call; see `input_shapes`."""

    rows: Rows
    shape: Shape
    name: str
    guided: bool

    def __call__(self, inputs: Sequence[TensorSpec]) -> dict[str, Shape]:
        given = given_inputs(self.name, self.rows.plan, self.rows.conditioning[self.name], guided=self.guided)
        return input_shapes(self.name, inputs, given, self.shape, guided=self.guided)
