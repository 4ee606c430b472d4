"""Plans that run in two places: some steps on a server, the rest here; all of them here where that cannot help."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .cloud import Cloud, CloudTiming
from .errors import CloudError, RequestError
from .handover import Handover, rows_between
from .manifest import Component, Manifest
from .output import Output
from .plan import CLOUD, Plan, compile_plan
from .plan_steps import Steps
from .request import Request
from .stream import Events, Stage

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
    names = steps if isinstance(steps, Mapping) else [pair[0] for pair in _pairs(steps)]
    return any(isinstance(name, str) and name.startswith(CLOUD) for name in names)


def with_cloud(manifest: Manifest, components: Mapping[str, Component]) -> Manifest:
    """A manifest in which the server's denoisers are components too, under their names with `cloud:` before them."""
    added = {f"{CLOUD}{name}": component for name, component in components.items()}
    return msgspec.structs.replace(manifest, components={**manifest.components, **added})


@dataclass(frozen=True, slots=True)
class Edge:
    """What a plan in two places is run with.

    manifest: with the server's denoisers. paint: runs the part of a request that is to run here.
    """

    cloud: Cloud
    manifest: Manifest
    paint: Paint

    def events(self, request: Request) -> Events:
        """Check the request now; what is returned runs it, with an event for each row that runs here.

        Raises:
            RequestError, PlanError: an argument cannot be used, or cannot be sent.
        """
        for name in _NOT_SENT:
            if getattr(request, name) is not None:
                raise RequestError(name, "cannot be sent to the cloud", remedy="Leave it out, or run all steps here.")
        plan = compile_plan(self.manifest, request.schedule)
        rows_between(plan, request.start, 1)
        if request.start is not None or request.until is not None:
            raise RequestError("start, until", "given beside steps in the cloud", remedy="Leave them out.")
        seed = secrets.randbits(32) if request.seed is None else request.seed
        return self._run(replace(request, seed=seed), plan)

    def _run(self, request: Request, plan: Plan) -> Events:
        timings: list[CloudTiming] = []
        try:
            output = yield from self._in_parts(request, plan, timings)
        except CloudError as error:
            alone = replace(request, steps={self._fallback(plan): sum(count for _, count in plan.steps)})
            output = yield from self.paint(alone)
            return replace(output, degraded=f"{error.reason}: {error}", cloud=tuple(timings))
        return replace(output, cloud=tuple(timings))

    def _in_parts(self, request: Request, plan: Plan, timings: list[CloudTiming]) -> Events:
        """One part after the other; the rest is here, and decodes. CloudError: the server did not help."""
        start: Handover | None = None
        parts = _parts(plan)
        for there, until in parts if parts[-1][0] else parts[:-1]:
            if there:
                told, tensors = self._told(request, plan, until, start), _tensors(request, start)
                start, timing = self.cloud.run(told, tensors, plan.digest)
                timings.append(timing)
            else:
                output = yield from _rows_alone(self.paint(replace(request, start=start, until=until)))
                start = output.handover
        return (yield from self.paint(replace(request, start=start)))

    def _told(self, request: Request, plan: Plan, until: int, start: Handover | None) -> dict[str, Any]:
        """What the server is asked."""
        defaults = self.manifest.defaults
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
        }
        return {name: value for name, value in facts.items() if value is not None}

    def _fallback(self, plan: Plan) -> str:
        """The denoiser that runs all steps where the server cannot: the plan's first here, else the bundle's last."""
        here = [name for name, _ in plan.steps if not name.startswith(CLOUD)]
        own = [name for name in self.manifest.names("denoiser") if not name.startswith(CLOUD)]
        return here[0] if here else own[-1]


def _parts(plan: Plan) -> list[tuple[bool, int]]:
    """Runs of steps in one place: whether that is the server, and the step that they end before."""
    parts: list[tuple[bool, int]] = []
    ends = 0
    for name, count in plan.steps:
        there, ends = name.startswith(CLOUD), ends + count
        parts[-1:] = [(there, ends)] if parts and parts[-1][0] == there else [*parts[-1:], (there, ends)]
    return parts


def _tensors(request: Request, start: Handover | None) -> dict[str, npt.NDArray[np.float32]]:
    """What is sent besides text: the state, and texts that were encoded here."""
    given = {name: getattr(request, name) for name in _TENSORS}
    state = {} if start is None else {"state": start.state}
    return {**state, **{name: array for name, array in given.items() if array is not None}}


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


def _pairs(steps: Steps | None) -> Iterator[tuple[Any, ...]]:
    """Those of a sequence that are pairs; what else is in it is refused where the plan is compiled."""
    for pair in steps if isinstance(steps, (list, tuple)) else ():
        if isinstance(pair, (list, tuple)) and pair:
            yield tuple(pair)
