"""Plans that run in two places: some steps on a server, the rest here; all that is left here where it cannot help."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import whole_number
from .bundle import Bundle
from .cloud import CloudTiming
from .conditioning import brings_text, dropped_text
from .editing import reads_mask
from .errors import CloudError, RequestError
from .handover import TEXT, Handover
from .output import Output, Timings
from .plan import CLOUD, Plan, compile_plan
from .plan_steps import Steps
from .request import EMBEDS, TEXTS, Request
from .stream import Events, Stage
from .there import There
from .tokenizer import DroppedText
from .trace import span

# What a hand-over's request tells: the rest of a request says how this side runs, or cannot be sent.
_TOLD = (
    *TEXTS, "solver", "solver_config", "timesteps", "eta", "guidance_interval", "num_images_per_prompt", "seed",
    "seed_device",
)  # fmt: skip
_NOT_SENT = ("image", "mask_image", "control_image", "loras", "latents", "original_size", "target_size",
             "crops_coords_top_left", "negative_original_size", "negative_target_size",
             "negative_crops_coords_top_left")  # fmt: skip
Paint = Callable[[Request], Events]


def names_cloud(steps: Steps | None) -> bool:
    """Whether a request's steps name a denoiser of the server's."""
    return any(name.startswith(CLOUD) for name in _named(steps))


@dataclass(slots=True)
class _Way:
    """How far a request has come.

    spent_s: for how long the server was waited for before its first part. start: where the request stands, None before
    any step. exchanges: its hand-overs. here: what its parts took that ran here and count. dropped: what was cut from
    its prompts.
    """

    spent_s: float
    dropped: tuple[DroppedText, ...]
    start: Handover | None = None
    exchanges: list[CloudTiming] = field(default_factory=list)
    here: list[Timings] = field(default_factory=list)

    @property
    def waited_s(self) -> float:
        """For how long the server was waited for."""
        return self.spent_s + sum(one.seconds for one in self.exchanges)


@dataclass(frozen=True, slots=True)
class Edge:
    """What a plan in two places is run with.

    bundle: what runs here. paint: runs the part of a request that is to run here. cancelled: what ends it.
    """

    there: There
    bundle: Bundle
    paint: Paint
    cancelled: threading.Event

    def events(self, request: Request) -> Events:
        """Check the request now; what is returned runs it, with an event for each row that runs here.

        Stage.CLOUD is told before each part that is the server's.

        Raises:
            RequestError, PlanError: an argument cannot be used, or cannot be sent.
        """
        for name in _NOT_SENT:
            if getattr(request, name) is not None:
                raise RequestError(name, "cannot be sent to the cloud", remedy="Leave it out, or run all steps here.")
        if request.start is not None or request.until is not None:
            raise RequestError("start, until", "given beside steps in the cloud", remedy="Leave them out.")
        known = self.there.manifest.names("denoiser")
        unknown = [name for name in _named(request.steps) if name not in known]
        if not self.there.said and unknown and all(name.startswith(CLOUD) for name in unknown):
            return self._asking(request)
        return self._begun(request, 0.0)

    def _begun(self, request: Request, spent_s: float) -> Events:
        """Check the request's plan now; spent_s: for how long the server was waited for."""
        manifest = self.there.manifest
        plan = compile_plan(manifest, request.schedule)
        _require_divisible(plan)
        request.latent_shape(manifest, tuple(dict.fromkeys(plan.denoisers)))
        seed = secrets.randbits(32) if request.seed is None else request.seed
        dropped = dropped_text(self.bundle, request, guided=any(plan.guided))
        return self._run(replace(request, seed=seed), plan, _Way(spent_s, dropped))

    def _asking(self, request: Request) -> Events:
        """Ask the server once more what it serves, which is not known here; all steps run here if it does not say."""
        yield Stage.CLOUD
        began = time.monotonic()
        try:
            self.there.ask(self.there.bounds(self.cancelled))
        except CloudError as error:
            if not self._able:
                raise
            fallback = self._fallback(_named(request.steps))
            alone: Any = [(fallback, *pair[1:]) for pair in _pairs(request.steps)]  # of two each, or refused
            output = yield from self.paint(replace(request, steps=alone))
            return replace(output, degraded=f"{error.reason}: {error}")
        return (yield from self._begun(request, time.monotonic() - began))

    def _run(self, request: Request, plan: Plan, way: _Way) -> Events:
        began = time.perf_counter()
        try:
            output = yield from self._in_parts(request, plan, way)
        except CloudError as error:
            if not self._able:
                raise
            way.exchanges += [] if error.timing is None else [error.timing]
            output = yield from self._finished(*self._alone(request, plan, way), way)
            output = replace(output, degraded=f"{error.reason}: {error}")
        total_ms = (time.perf_counter() - began) * 1e3
        timings = replace(output.timings, total_ms=total_ms)
        return replace(output, cloud=tuple(way.exchanges), dropped_text=way.dropped, timings=timings)

    def _in_parts(self, request: Request, plan: Plan, way: _Way) -> Events:
        """One part after the other. CloudError: the server did not help with the one that is next."""
        parts = _parts(plan)
        for there, until in parts if parts[-1][0] else parts[:-1]:
            if there:
                yield Stage.CLOUD
                self._hand_over(request, plan, until, way)
            else:
                output = yield from _rows_alone(self.paint(replace(request, start=way.start, until=until)))
                way.start = output.handover
                way.here.append(output.timings)
        return (yield from self._finished(request, plan, way))

    def _hand_over(self, request: Request, plan: Plan, until: int, way: _Way) -> None:
        """Have the server run the steps before `until`; CloudError where it did not."""
        told, tensors = self._told(request, plan, until, way.start), _tensors(request, way.start)
        with span("cloud"):
            bounds = self.there.bounds(self.cancelled, way.waited_s)
            start, timing = self.there.cloud.run(told, tensors, plan.digest, bounds)
        self._require_shape(request, plan, start, timing)
        way.exchanges.append(timing)
        way.start = start

    def _finished(self, request: Request, plan: Plan, way: _Way) -> Events:
        """The rest, which is here, and decodes."""
        output = yield from self.paint(replace(request, start=way.start))
        timings = Timings.together([*way.here, output.timings])
        return replace(output, timings=timings, plan=plan.having_run([row.guidance for row in timings.rows]))

    def _alone(self, request: Request, plan: Plan, way: _Way) -> tuple[Request, Plan]:
        """The request whose steps that are left all run here, and its plan.

        It goes on from where it stands; but begins anew where one denoiser for all steps brings a schedule of its own.
        """
        names = [name for name, count in plan.steps for _ in range(count)]
        first = 0 if way.start is None else way.start.step
        steps = [*((name, 1) for name in names[:first]), (self._fallback(names), len(names) - first)]
        alone = replace(request, steps=steps)
        compiled = compile_plan(self.there.manifest, alone.schedule)
        if way.start is None:
            return alone, compiled
        if compiled.table.recipe != plan.table.recipe:
            way.start = None
            way.here.clear()
            return self._alone(request, plan, way)
        way.start = replace(way.start, plan=compiled.digest)
        return alone, compiled

    def _require_shape(self, request: Request, plan: Plan, answered: Handover, timing: CloudTiming) -> None:
        """Raise CloudError where a state that the server answered is of pictures of another size or number."""
        shape = request.latent_shape(self.there.manifest, tuple(dict.fromkeys(plan.denoisers)))
        wanted = (1 + plan.table.history, *shape)
        if answered.state.shape != wanted:
            what = f"answered a state of shape {answered.state.shape} for one of {wanted}"
            error = CloudError(self.there.cloud.url, "malformed", what)
            error.timing = replace(timing, received_bytes=0, models={})
            raise error

    def _told(self, request: Request, plan: Plan, until: int, start: Handover | None) -> dict[str, Any]:
        """What the server is asked, in JSON's types."""
        manifest = self.there.manifest
        read = () if brings_text(request, guided=any(plan.guided)) else (TEXT,)
        facts = {
            **{name: getattr(request, name) for name in _TOLD},
            "steps": [(name.removeprefix(CLOUD), count) for name, count in plan.steps],
            "guidance_scale": plan.guidance_scale,
            "height": request.height or manifest.defaults.height,
            "width": request.width or manifest.defaults.width,
            "until": until,
            "start_step": None if start is None else start.step,
            "models": {name: self.there.models[name] for name in (*_running(plan, start, until), *read)},
        }
        return {name: _plain(value) for name, value in facts.items() if value is not None}

    @property
    def _able(self) -> list[str]:
        """The bundle's denoisers that could run the server's steps: none that inpaints, for which there is no mask."""
        own = self.bundle.manifest
        return [name for name in own.names("denoiser") if not reads_mask(own.components[name], own.latent)]

    def _fallback(self, names: Sequence[str]) -> str:
        """The denoiser that runs the steps where the server cannot: the smallest of these here, else of all that could.

        One that brings a scheduler of its own, as one-step models do, is the last to be chosen.
        """
        components = self.bundle.manifest.components
        here = [name for name in self._able if name in names]
        key = {name: (one.scheduler is not None, one.parameters) for name, one in components.items()}
        return min(here or self._able, key=key.__getitem__)


def _require_divisible(plan: Plan) -> None:
    """Raise RequestError where rows go by what was seen in the rows before, which a state does not hold."""
    for name, value, told in (("guidance", "adaptive", plan.adaptive), ("placement", plan.placement, plan.window)):
        if told is not None:
            what = f"{value} goes by what it saw in the rows before, and cannot be given beside steps in the cloud"
            raise RequestError(name, what, remedy=f"Ask for another {name}, or run all steps here.")


def _parts(plan: Plan) -> list[tuple[bool, int]]:
    """Runs of steps in one place: whether that is the server, and the step that they end before."""
    parts: list[tuple[bool, int]] = []
    ends = 0
    for name, count in plan.steps:
        there, ends = name.startswith(CLOUD), ends + count
        parts[-1:] = [(there, ends)] if parts and parts[-1][0] == there else [*parts[-1:], (there, ends)]
    return parts


def _running(plan: Plan, start: Handover | None, until: int) -> tuple[str, ...]:
    """The server's denoisers, under its own names, that run the steps from a hand-over to before `until`."""
    names = [name.removeprefix(CLOUD) for name, count in plan.steps for _ in range(count)]
    return tuple(dict.fromkeys(names[0 if start is None else start.step : until]))


def _tensors(request: Request, start: Handover | None) -> dict[str, npt.NDArray[np.float32]]:
    """What is sent besides text: the state, and texts that were encoded here."""
    given = {name: getattr(request, name) for name in EMBEDS}
    state = {} if start is None else {"state": start.state}
    return {**state, **{name: array for name, array in given.items() if array is not None}}


def _plain(value: Any) -> Any:
    """An argument in JSON's types, of numpy's numbers and arrays too."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    number = None if isinstance(value, str | float) else whole_number(value)
    return value if number is None else number


def _rows_alone(events: Events) -> Events:
    """The events of rows, without stages: those are told of the last part, which has them all."""
    try:
        while True:
            event = next(events)
            if not isinstance(event, Stage):
                yield event
    except StopIteration as end:
        output: Output = end.value
        return output


def _named(steps: Steps | None) -> list[str]:
    return [str(pair[0]) for pair in _pairs(steps)]


def _pairs(steps: Steps | None) -> Iterator[tuple[Any, ...]]:
    """A request's steps as pairs, where they are; what else is in them is refused where the plan is compiled."""
    if isinstance(steps, Mapping):
        yield from steps.items()
        return
    for pair in steps if isinstance(steps, (list, tuple)) else ():
        if isinstance(pair, (list, tuple)) and pair:
            yield tuple(pair)
