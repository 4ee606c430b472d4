"""How a plan's rows run: on step engines where the cache has all that they want, else on the denoisers themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from .auto_placement import AutoPlacement
from .backends.base import Session, Shape
from .control import Steering
from .hybridiff import Hybridiff
from .manifest import TensorSpec
from .models import Models
from .placement import Batched, Parallel, Placed, Sequential, Worker
from .ran_on import Ran
from .rows import Rows
from .sampler import SampledRow, Sampler, State
from .stage_parts import Parts, Stages, bound_parts
from .step_engines import StepEngines, Wanted
from .step_inputs import given_inputs, input_shapes
from .step_sampler import Key, StepSampler
from .window import Window

Float32 = npt.NDArray[np.float32]


class Loop(Protocol):
    """Walks a plan's rows, whatever they run on; see `Sampler`."""

    def begin(self, latents: Float32) -> State:
        """The state before the first row."""

    def run(self, state: State, until: int | None = None) -> Iterator[SampledRow]:
        """Advance `state` in place, row by row."""


def open_loop(
    rows: Rows, shape: Shape, models: Models, engines: StepEngines, auto: AutoPlacement, *, before: Callable[[], None]
) -> tuple[Loop, bool]:
    """The loop for latents of this shape with what it runs on loaded, and whether that is step engines.

    Step engines run batched, with fixed guidance; any other placement takes the denoisers themselves, `auto` where
    there are no step engines. ControlNets run beside either. Both compute the same numbers, on ONNX
    Runtime's engines the same bits.

    before: called before each model is loaded; what it raises ends the loading.

    Raises:
        ExecutionError: the models are closed, or one cannot be loaded.
        EngineError: the target runs engines alone, and one is missing; or the cache is not the user's own.
    """
    plan, conditioning = rows.plan, rows.conditioning
    # A step engine has both branches of guidance in one call, and shows neither.
    fused = plan.placement in ("batched", "auto") and plan.adaptive is None
    steps = engines.load(_wanted(rows, shape), before=before, ran=rows.ran) if fused else None
    controls = tuple(control.component for control in rows.controls)
    if steps is None:

        def place(placement: str, ran: Ran) -> Placed:
            return _placed(replace(rows, plan=replace(plan, placement=placement), ran=ran), shape, models, before)

        def tried(placement: str) -> Placed:
            return place(placement, Ran())

        chosen = auto.choose(plan, shape, controls, tried, before) if plan.placement == "auto" else plan.placement
        return Sampler(plan, place(chosen, rows.ran), rows.draw_noise, keep=rows.keep), False
    sessions = _sessions(controls, rows, models, before)
    steering = Steering(rows.controls, sessions, conditioning) if rows.controls else None
    return StepSampler(rows, steps, steering), True


def _placed(rows: Rows, shape: Shape, models: Models, before: Callable[[], None]) -> Placed:
    """What predicts the rows, placed as the plan says."""
    plan, conditioning, controls = rows.plan, rows.conditioning, rows.controls
    every = [control.component for control in controls] + list(dict.fromkeys(plan.denoisers))
    if plan.placement in ("parallel", "hybridiff"):
        both = _sessions(_used(rows, plan.guided), rows, models, before, calls=2)
        alone = _sessions(_used(rows, plan.one_branch), rows, models, before)
        parallel = Parallel(Worker(plan, both, conditioning, controls), Worker(plan, alone, conditioning, controls))
        if plan.window is None:
            return parallel
        return Hybridiff(plan, plan.window, parallel, _parts(rows, plan.window, shape, models, before))
    sessions = _sessions(every, rows, models, before)
    worker = Worker(plan, sessions, conditioning, controls)
    return Sequential(worker) if plan.placement == "sequential" else Batched(worker)


def _parts(rows: Rows, window: Window, shape: Shape, models: Models, before: Callable[[], None]) -> Parts:
    """All stages of the denoiser that a window needs, loaded and bound."""
    (name,) = dict.fromkeys(rows.plan.denoisers)
    pipelining, sessions = window.pipelining, []
    for index, variant in enumerate(models.require_stages(name, pipelining.stages, shape)):
        session = models.session(name, variant, calls=pipelining.calls(index), workers=pipelining.workers)
        sessions.append(rows.ran.watched(name, session))
    stages = Stages(name, models.session(name, calls=2).inputs, sessions)
    return bound_parts(stages, pipelining, rows.conditioning[name], shape, before)


def _used(rows: Rows, at: Sequence[bool]) -> list[str]:
    """The ControlNets and denoisers of the rows marked."""
    marked = [row for row, used in enumerate(at) if used]
    controls = [control.component for control in rows.controls if any(control.rows[row] for row in marked)]
    return controls + list(dict.fromkeys(rows.plan.denoisers[row] for row in marked))


def _sessions(
    names: Iterable[str], rows: Rows, models: Models, before: Callable[[], None], *, calls: int = 1
) -> dict[str, Session]:
    sessions = {}
    for name in names:
        before()
        sessions[name] = rows.ran.watched(name, models.session(name, rows.loras.variant(name), calls=calls))
    return sessions


def _wanted(rows: Rows, shape: Shape) -> dict[Key, Wanted]:
    """What the rows want of step engines, by denoiser and whether both branches run."""
    plan = rows.plan
    timesteps: dict[Key, list[float]] = {}
    for key, timestep in zip(zip(plan.denoisers, plan.guided, strict=True), plan.table.timesteps.tolist(), strict=True):
        timesteps.setdefault(key, []).append(timestep)
    wanted = {}
    for (name, guided), taken in timesteps.items():
        variant = msgspec.structs.replace(
            rows.loras.variant(name), step="guided" if guided else "unguided", timesteps=tuple(dict.fromkeys(taken))
        )
        wanted[name, guided] = Wanted(variant, plan.table.history, _Shapes(rows, shape, name, guided))
    return wanted


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
