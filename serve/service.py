"""What the endpoints do."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tandemrt.runtime import Output, Pipeline, StepEvent
from tandemrt.runtime import Request as Painting
from tandemrt.runtime.cloud import JSON, MESSAGE
from tandemrt.runtime.plan import compile_plan
from tandemrt.runtime.plan_steps import parse_steps

from .answers import Idempotent, while_connected
from .guard import body_of, media_type
from .limits import Limits
from .problems import conflict, malformed, problem_of, unknown_model, unusable
from .protocol import Asked, asked_of, request_of, require_within
from .queue import Queue

_FRESH = {"Cache-Control": "no-store"}


class Generation(msgspec.Struct, frozen=True):
    """OpenAI's body of `images/generations`, with what diffusion models take besides; other keys are passed over.

    size: `512x768` is width by height, `auto` the bundle's. steps: also `10,15` or `unet:10,unet_small:15`.
    """

    prompt: str
    model: str | None = None
    n: int = 1
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | str | dict[str, int] | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """A bundle that is served, under a name."""

    name: str
    pipe: Pipeline
    queue: Queue
    limits: Limits
    kept: Idempotent

    async def handoff(self, request: Request) -> Response:
        """Steps of a picture, from noise or from a state, to the state after them."""
        kind = media_type(request, (JSON, MESSAGE))
        body = await body_of(request, self.limits.body_bytes)

        async def made() -> Response:
            asked, tensors = asked_of(body, kind)
            if asked.until is None:
                raise unusable("until: missing, expected the step to stop before.")
            painting = await self._checked(asked, tensors)
            output = await while_connected(request, self.queue.painted(painting, self._seconds(asked.timeout)))
            if output.handover is None:
                raise RuntimeError("a request with `until` made no hand-over")
            return Response(output.handover.to_bytes(asked.dtype), media_type=MESSAGE, headers=_timings(output))

        return await self.kept.answer(request, body, made)

    async def generations(self, request: Request) -> Response:
        """Whole pictures, as OpenAI's endpoint of the same path answers them."""
        media_type(request, (JSON,))
        body = await body_of(request, self.limits.body_bytes)

        async def made() -> Response:
            try:
                wanted = msgspec.json.decode(body, type=Generation)
            except msgspec.ValidationError as error:
                raise unusable(f"request: {error}.") from error
            except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
                raise malformed(f"request: no JSON ({error}).") from error
            painting = await self._checked(self._asked_for(wanted), {})
            output = await while_connected(request, self.queue.painted(painting, self.limits.seconds))
            data = [{"b64_json": one} for one in _pictures(output, wanted.output_format)]
            facts = {"created": int(time.time()), "data": data, "seeds": output.seeds}
            return JSONResponse(facts, headers=_timings(output))

        return await self.kept.answer(request, body, made)

    async def stream(self, request: Request) -> Response:
        """A picture as server-sent events: `step` after each row, with previews; at last `picture`, or `error`."""
        query = dict(request.query_params)
        previews = query.pop("previews", "0")
        if not (previews.isascii() and previews.isdigit() and len(previews) <= 4):
            raise unusable(f"previews: got {previews[:20]!r}, expected a whole number, 0 or more.")
        try:
            wanted = msgspec.convert(query, Generation, strict=False)
        except msgspec.ValidationError as error:
            raise unusable(f"query: {error}.") from error
        painting = await self._checked(self._asked_for(wanted), {})
        events = self._events(replace(painting, previews=int(previews)), wanted.output_format)
        first = await anext(events)  # what keeps it from beginning is an answer of its own
        return StreamingResponse(_behind(first, events), media_type="text/event-stream", headers=_FRESH)

    def facts(self, name: str) -> dict[str, Any]:
        """What the bundle is, as the Open Inference Protocol tells of a model. Problem: it has another name."""
        if name != self.name:
            raise unknown_model(name, self.name)
        bundle = self.pipe.bundle
        manifest = bundle.manifest
        return {
            "name": self.name,
            "platform": self.pipe.target.told(manifest),
            "bundle": bundle.digest,
            "components": {name: msgspec.to_builtins(manifest.components[name]) for name in manifest.names("denoiser")},
            "latent": {"channels": manifest.latent.channels, "downsampling": manifest.latent.downsampling},
            "defaults": msgspec.to_builtins(manifest.defaults),
        }

    def _asked_for(self, wanted: Generation) -> Asked:
        return asked_for(wanted, self.pipe.bundle.manifest.names("denoiser"))

    async def _checked(self, asked: Asked, tensors: dict[str, Any]) -> Painting:
        """The pipeline's request, whose plan and size are within the limits.

        Raises:
            Problem: a limit is passed, or another model, bundle or plan is wanted.
            RequestError, PlanError: an argument cannot be used.
        """
        if asked.model not in (None, self.name):
            raise unknown_model(str(asked.model), self.name)
        return await asyncio.to_thread(self._within_limits, asked, tensors)

    def _within_limits(self, asked: Asked, tensors: dict[str, Any]) -> Painting:
        manifest = self.pipe.bundle.manifest
        painting = request_of(asked, tensors, self.pipe.bundle.digest, self.limits)
        plan = compile_plan(manifest, painting.schedule)
        if asked.plan not in (None, plan.digest):
            raise conflict(
                f"plan: got {str(asked.plan)[:16]!r}, expected {plan.digest[:16]!r}, which the request makes."
            )
        shape = painting.latent_shape(manifest, tuple(dict.fromkeys(plan.denoisers)))
        require_within(plan.table.rows, shape, manifest.latent.downsampling, self.limits)
        return painting

    def _seconds(self, asked: float | None) -> float:
        """How long a request may take, in seconds."""
        if asked is None:
            return self.limits.seconds
        if not 0 < asked <= self.limits.seconds:
            raise unusable(f"timeout: got {asked:g}, expected a number above 0, up to {self.limits.seconds:g}.")
        return asked

    async def _events(self, painting: Painting, form: str) -> AsyncIterator[bytes]:
        """The events of a picture. Problem, TandemError: it failed before the first row."""
        told: asyncio.Queue[StepEvent | None] = asyncio.Queue()
        task = asyncio.ensure_future(self.queue.painted(painting, self.limits.seconds, told.put_nowait))
        task.add_done_callback(lambda _: told.put_nowait(None))
        begun = False
        try:
            while (event := await told.get()) is not None:
                begun = True
                yield _event("step", _step_facts(event))
            output = task.result()
            yield _event(
                "picture", {"b64_json": _pictures(output, form), "seeds": output.seeds, **_milliseconds(output)}
            )
        except Exception as error:
            if not begun:
                raise
            yield _event("error", problem_of(error).facts)
        finally:
            task.cancel()
            await asyncio.wait([task])


def asked_for(wanted: Generation, denoisers: Sequence[str]) -> Asked:
    """OpenAI's request in our words.

    Raises:
        Problem: its size is none.
        PlanError: its steps are none.
    """
    width = height = None
    if wanted.size != "auto":
        width, _, height = wanted.size.partition("x")
        if not all(side.isascii() and side.isdigit() and len(side) <= 5 for side in (width, height)):
            raise unusable(f"size: got {wanted.size[:40]!r}, expected such as '512x512', or 'auto'.")
    return Asked(
        prompt=wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        num_images_per_prompt=wanted.n,
        width=None if width is None else int(width),
        height=None if height is None else int(height),
        seed=wanted.seed,
        steps=list(parse_steps(wanted.steps, denoisers)) if isinstance(wanted.steps, str) else wanted.steps,
        guidance_scale=wanted.guidance_scale,
        model=wanted.model,
    )


def encoded(image: Image.Image, form: str) -> str:
    """A picture's file, `png`, `jpeg` or `webp`, in base64."""
    stream = io.BytesIO()
    image.save(stream, form)
    return base64.b64encode(stream.getvalue()).decode()


def _pictures(output: Output, form: str) -> list[str]:
    return [encoded(image, form) for image in output.images if isinstance(image, Image.Image)]


def _step_facts(event: StepEvent) -> dict[str, Any]:
    guidance = event.timing.guidance
    return {
        "row": event.row,
        "rows": event.rows,
        "step": event.step,
        "denoiser": event.timing.denoiser,
        "milliseconds": round(event.timing.total_ms, 3),
        "guided": guidance.guided,
        "previews": [encoded(image, "jpeg") for image in event.preview],
    }


def _milliseconds(output: Output) -> dict[str, float]:
    """What the stages took."""
    timings = output.timings
    stages = {"text_ms": timings.text_ms, "denoise_ms": timings.denoise_ms, "decode_ms": timings.decode_ms}
    return {name: round(value, 3) for name, value in {**stages, "total_ms": timings.total_ms}.items()}


def _timings(output: Output) -> dict[str, str]:
    """The stages' times as a header that browsers show; W3C's `Server-Timing`."""
    stages = ", ".join(f"{name.removesuffix('_ms')};dur={value}" for name, value in _milliseconds(output).items())
    return {"Server-Timing": stages}


def _event(name: str, facts: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(facts, separators=(',', ':'))}\n\n".encode()


async def _behind(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in events:
        yield event
