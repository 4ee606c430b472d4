"""What the endpoints do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tandemrt.runtime import Output
from tandemrt.runtime.cloud import JSON, MESSAGE

from .answers import Idempotent, while_connected
from .events import event_stream
from .generation import Generation, asked_for, generation_of, generation_of_query
from .guard import body_of, media_type
from .limits import Limits
from .pictures import pictures_of, places, server_timing
from .problems import unusable
from .protocol import Asked, asked_of
from .served import Served
from .work import Painter, Work, work_of


@dataclass(frozen=True, slots=True)
class Service:
    """A bundle that is served, and who paints."""

    served: Served
    painter: Painter
    limits: Limits
    kept: Idempotent

    async def handoff(self, request: Request) -> Response:
        """Steps of a picture, from noise or from a state, to the state after them."""
        kind = media_type(request, (JSON, MESSAGE))
        body = await body_of(request, self.limits)

        async def made() -> Response:
            asked, work = await asyncio.to_thread(self._part, body, kind)
            output = await self._painted(request, work, self._seconds(asked.timeout))
            if output.handover is None:
                raise RuntimeError("a request with `until` made no hand-over")
            return Response(output.handover.to_bytes(asked.dtype), media_type=MESSAGE, headers=server_timing(output))

        return await self.kept.answer(request, body, made)

    async def generations(self, request: Request) -> Response:
        """Whole pictures, as OpenAI's endpoint of the same path answers them."""
        media_type(request, (JSON,))
        body = await body_of(request, self.limits)

        async def made() -> Response:
            wanted, work = await asyncio.to_thread(self._whole, partial(generation_of, body))
            output = await self._painted(request, work, self.limits.seconds)
            files = await asyncio.to_thread(pictures_of, output, wanted.output_format, work.request, self.served)
            data = [{"b64_json": one} for one in files]
            facts = {"created": int(time.time()), "data": data, "seeds": output.seeds, **places(output)}
            return JSONResponse(facts, headers=server_timing(output))

        return await self.kept.answer(request, body, made)

    async def stream(self, request: Request) -> Response:
        """A picture as server-sent events; see `events`."""
        query = dict(request.query_params)
        previews = query.pop("previews", "0")
        if not (previews.isascii() and previews.isdigit() and len(previews) <= 4):
            raise unusable(f"previews: got {previews[:20]!r}, expected a whole number, 0 or more.")
        wanted, work = await asyncio.to_thread(self._whole, partial(generation_of_query, query))
        shown = replace(work, request=replace(work.request, previews=int(previews)))
        paint = partial(self.painter.painted, shown, self.limits.seconds)
        files = partial(pictures_of, form=wanted.output_format, request=work.request, served=self.served)
        return await event_stream(request, paint, files)

    def _part(self, body: bytes, kind: str) -> tuple[Asked, Work]:
        """What a body asks for of a part of a plan; raises as `asked_of` and `work_of`."""
        asked, tensors = asked_of(body, kind)
        if asked.until is None:
            raise unusable("until: missing, expected the step to stop before.")
        return asked, work_of(asked, tensors, self.served, self.limits)

    def _whole(self, read: Callable[[], Generation]) -> tuple[Generation, Work]:
        """What is asked for of whole pictures; raises as `read`, `asked_for` and `work_of`."""
        wanted = read()
        asked = asked_for(wanted, self.served.manifest.names("denoiser"))
        return wanted, work_of(asked, {}, self.served, self.limits)

    async def _painted(self, request: Request, work: Work, seconds: float) -> Output:
        """As `Painter.painted`, until the client leaves."""
        return await while_connected(request, self.painter.painted(work, seconds))

    def _seconds(self, asked: float | None) -> float:
        """How long a request may take, in seconds."""
        if asked is None:
            return self.limits.seconds
        if not 0 < asked <= self.limits.seconds:
            raise unusable(f"timeout: got {asked:g}, expected a number above 0, up to {self.limits.seconds:g}.")
        return asked
