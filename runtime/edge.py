"""Plans that run in two places: some steps on a server, the rest here; all of them here where that cannot help."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .cloud import Cloud, CloudTiming
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
    cancelled: what ends it.
    """

    cloud: Cloud
    manifest: Manifest
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
        plan = compile_plan(self.manifest, request.schedule)
        rows_between(plan, request.start, 1)
        request.latent_shape(self.manifest, tuple(dict.fromkeys(plan.denoisers)))
        if request.start is not None or request.until is not None:
            raise RequestError("start, until", "given beside steps in the cloud", remedy="Leave them out.")
        seed = secrets.randbits(32) if request.seed is None else request.seed
        return self._run(replace(request, seed=seed), plan)

    def _run(self, request: Request, plan: Plan) -> Events:
        began = time.perf_counter()
        exchanges: list[CloudTiming] = []
        try:
            output = yield from self._in_parts(request, plan, exchanges)
        except CloudError as error:
            exchanges += [] if error.timing is None else [error.timing]
            alone = {self._fallback(plan): sum(count for _, count in plan.steps)}
            output = yield from self.paint(replace(request, steps=alone))
            output = replace(output, degraded=f"{error.reason}: {error}")
        total_ms = (time.perf_counter() - began) * 1e3
        return replace(output, cloud=tuple(exchanges), timings=replace(output.timings, total_ms=total_ms))

    def _in_parts(self, request: Request, plan: Plan, exchanges: list[CloudTiming]) -> Events:
        """One part after the other; the rest is here, and decodes. CloudError: the server did not help."""
        start: Handover | None = None
        before: list[Timings] = []
        parts = _parts(plan)
        for there, until in parts if parts[-1][0] else parts[:-1]:
            if there:
                told, tensors = self._told(request, plan, until, start), _tensors(request, start)
                yield Stage.CLOUD
                with span("cloud"):
                    start, timing = self.cloud.run(told, tensors, plan.digest, self.cancelled)
                exchanges.append(timing)
            else:
                output = yield from _rows_alone(self.paint(replace(request, start=start, until=until)))
                start = output.handover
                before.append(output.timings)
        output = yield from self.paint(replace(request, start=start))
        timings = _together([*before, output.timings])
        return replace(output, timings=timings, plan=plan.having_run([row.guidance for row in timings.rows]))

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


def _pairs(steps: Steps | None) -> Iterator[tuple[Any, ...]]:
    """Those of a sequence that are pairs; what else is in it is refused where the plan is compiled."""
    for pair in steps if isinstance(steps, (list, tuple)) else ():
        if isinstance(pair, (list, tuple)) and pair:
            yield tuple(pair)
