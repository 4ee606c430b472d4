"""Plans that run in two places: some steps on a server, the rest here; all of them here where that cannot help."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .cloud import RETRIES, Cloud, CloudTiming
from .errors import CloudError, RequestError
from .handover import Handover, rows_between
from .manifest import Component, Manifest
from .output import Output, Timings
from .plan import CLOUD, Plan, compile_plan
from .plan_steps import Steps
from .request import Request
from .stream import Events, Stage
from .trace import span

# What a hand-over's request tells: the rest of a request says how this side runs, or cannot be sent.
_TOLD = (
    "prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "solver",
    "solver_config", "timesteps", "eta", "guidance_interval", "num_images_per_prompt", "seed_device",
)  # fmt: skip
_TENSORS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_NOT_SENT = ("image", "mask_image", "control_image", "loras", "latents", "original_size", "target_size",
             "crops_coords_top_left", "negative_original_size", "negative_target_size",
             "negative_crops_coords_top_left")  # fmt: skip
Paint = Callable[[Request], Events]


def names_cloud(steps: Steps | None) -> bool:
    """Whether a request's steps name a denoiser of the server's."""
    return any(name.startswith(CLOUD) for name in _named(steps))


def with_cloud(manifest: Manifest, components: Mapping[str, Component]) -> Manifest:
    """A manifest in which the server's denoisers are components too, under their names with `cloud:` before them."""
    added = {f"{CLOUD}{name}": component for name, component in components.items()}
    return msgspec.structs.replace(manifest, components={**manifest.components, **added})


class There:
    """A server's denoisers beside those that are here; safe to share between threads.

    manifest: with the server's, as it said once; with those that are here in their place until it has. models: which
    model each one is to be: the one that is here under the name, else the one that it said. said: whether it has.
    """

    def __init__(self, cloud: Cloud, manifest: Manifest) -> None:
        """Ask the server; one that cannot be asked is asked again by `ask`."""
        own = {name: manifest.components[name] for name in manifest.names("denoiser")}
        self.cloud, self.manifest = cloud, with_cloud(manifest, own)
        self.models: Mapping[str, str] = {name: manifest.model_digest(name) for name in own}
        self.said, self._lock = False, threading.Lock()
        with suppress(CloudError):
            self.ask(threading.Event(), tries=1)

    def ask(self, cancelled: threading.Event, *, tries: int = 1 + RETRIES) -> None:
        """Have the server say what it serves, unless it has; CloudError where it does not."""
        with self._lock:
            if not self.said:
                described = self.cloud.described(cancelled, tries=tries)
                self.manifest = with_cloud(self.manifest, described.components)
                self.models = {**described.models, **self.models}
                self.said = True


@dataclass(frozen=True, slots=True)
class Edge:
    """What a plan in two places is run with.

    paint: runs the part of a request that is to run here. cancelled: what ends it.
    """

    there: There
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
        unknown = [name for name in _named(request.steps) if name not in self.there.manifest.components]
        if self.there.said or not unknown:
            return self._begun(request, 0.0)
        return self._asking(request)

    def _begun(self, request: Request, spent: float) -> Events:
        """Check the request's plan now; spent: how many of the cloud's seconds are over."""
        manifest = self.there.manifest
        plan = compile_plan(manifest, request.schedule)
        rows_between(plan, None, 1)
        request.latent_shape(manifest, tuple(dict.fromkeys(plan.denoisers)))
        seed = secrets.randbits(32) if request.seed is None else request.seed
        return self._run(replace(request, seed=seed), plan, spent)

    def _asking(self, request: Request) -> Events:
        """Ask the server once more what it serves, which is not known here; all steps run here if it does not say."""
        began = time.monotonic()
        yield Stage.CLOUD
        try:
            self.there.ask(self.cancelled)
        except CloudError as error:
            fallback = self._fallback(_named(request.steps))
            alone: Any = [(fallback, *pair[1:]) for pair in _pairs(request.steps)]  # of two each, or refused
            output = yield from self.paint(replace(request, steps=alone))
            return replace(output, degraded=f"{error.reason}: {error}")
        return (yield from self._begun(request, time.monotonic() - began))

    def _run(self, request: Request, plan: Plan, spent: float) -> Events:
        began = time.perf_counter()
        exchanges: list[CloudTiming] = []
        try:
            output = yield from self._in_parts(request, plan, exchanges, spent)
        except CloudError as error:
            exchanges += [] if error.timing is None else [error.timing]
            alone = {self._fallback([name for name, _ in plan.steps]): sum(count for _, count in plan.steps)}
            output = yield from self.paint(replace(request, steps=alone))
            output = replace(output, degraded=f"{error.reason}: {error}")
        total_ms = (time.perf_counter() - began) * 1e3
        return replace(output, cloud=tuple(exchanges), timings=replace(output.timings, total_ms=total_ms))

    def _in_parts(self, request: Request, plan: Plan, exchanges: list[CloudTiming], spent: float) -> Events:
        """One part after the other; the rest is here, and decodes. CloudError: the server did not help."""
        start: Handover | None = None
        before: list[Timings] = []
        parts = _parts(plan)
        for there, until in parts if parts[-1][0] else parts[:-1]:
            if there:
                told, tensors = self._told(request, plan, until, start), _tensors(request, start)
                yield Stage.CLOUD
                with span("cloud"):
                    start, timing = self.there.cloud.run(told, tensors, plan.digest, self.cancelled, spent)
                exchanges.append(timing)
                self._require_shape(request, plan, start)
            else:
                output = yield from _rows_alone(self.paint(replace(request, start=start, until=until)))
                start = output.handover
                before.append(output.timings)
        output = yield from self.paint(replace(request, start=start))
        timings = _together([*before, output.timings])
        return replace(output, timings=timings, plan=plan.having_run([row.guidance for row in timings.rows]))

    def _require_shape(self, request: Request, plan: Plan, answered: Handover) -> None:
        """Raise CloudError where a state that the server answered is of pictures of another size or number."""
        shape = request.latent_shape(self.there.manifest, tuple(dict.fromkeys(plan.denoisers)))
        wanted = (1 + plan.table.history, *shape)
        if answered.state.shape != wanted:
            what = f"answered a state of shape {answered.state.shape} for one of {wanted}"
            raise CloudError(self.there.cloud.url, "malformed", what)

    def _told(self, request: Request, plan: Plan, until: int, start: Handover | None) -> dict[str, Any]:
        """What the server is asked."""
        defaults = self.there.manifest.defaults
        told = {name: getattr(request, name) for name in _TOLD}
        seed = request.seed
        facts = {
            **told,
            "steps": [[name.removeprefix(CLOUD), count] for name, count in plan.steps],
            "guidance_scale": plan.guidance_scale,
            "height": request.height or defaults.height,
            "width": request.width or defaults.width,
            "seed": seed if isinstance(seed, int) or seed is None else list(seed),
            "until": until,
            "start_step": None if start is None else start.step,
            "models": {name: self.there.models[name] for name in _running(plan, start, until)},
        }
        return {name: value for name, value in facts.items() if value is not None}

    def _fallback(self, names: Sequence[str]) -> str:
        """The denoiser that runs all steps where the server cannot: the first of these here, else the bundle's last."""
        here = [name for name in names if not name.startswith(CLOUD)]
        own = [name for name in self.there.manifest.names("denoiser") if not name.startswith(CLOUD)]
        return here[0] if here else own[-1]


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
    given = {name: getattr(request, name) for name in _TENSORS}
    state = {} if start is None else {"state": start.state}
    return {**state, **{name: array for name, array in given.items() if array is not None}}


def _together(parts: Sequence[Timings]) -> Timings:
    """What the parts that ran here took, as one."""
    ran_on = {name: tuple(dict.fromkeys(one for part in parts for one in part.ran_on.get(name, ())))
              for name in dict.fromkeys(name for part in parts for name in part.ran_on)}  # fmt: skip
    return Timings(
        text_ms=sum(part.text_ms for part in parts),
        image_ms=sum(part.image_ms for part in parts),
        rows=tuple(row for part in parts for row in part.rows),
        decode_ms=parts[-1].decode_ms,
        total_ms=sum(part.total_ms for part in parts),
        step_engines=any(part.rows for part in parts) and all(part.step_engines for part in parts if part.rows),
        ran_on=ran_on,
        tried={name: ms for part in parts for name, ms in part.tried.items()},
    )


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
