"""What the endpoints do."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tandemrt.runtime import Output
from tandemrt.runtime.cloud import JSON, MESSAGE, PROTOCOL
from tandemrt.runtime.connections import TIMEOUT_HEADER
from tandemrt.runtime.errors import RequestError

from .answers import Idempotent, Key, Make, key_of, while_connected
from .events import event_stream
from .generation import Generation, asked_for, generation_of, generation_of_query
from .guard import body_of, media_type
from .limits import BODY_S, Limits
from .pictures import dropped, pictures_of, places, server_timing
from .problems import busy, malformed, unready, unusable
from .protocol import Asked, asked_of
from .served import Served
from .work import Painter, UncompiledError, Work, work_of

T = TypeVar("T")
# So much is read, for a plan that is compiled, or packed sooner than a thread takes its turn.
_AT_ONCE_BYTES = 256 << 10


@dataclass(slots=True)
class Service:
    """A bundle that is served, and who paints.

    arriving: how many bodies are being read.
    """

    served: Served
    painter: Painter
    limits: Limits
    kept: Idempotent
    arriving: int = 0

    async def handoff(self, request: Request) -> Response:
        """Steps of a picture, from noise or from a state, to the state after them."""
        ends = _ends(request)
        kind = media_type(request, (JSON, MESSAGE))
        body = await self._body(request)

        def read(*, compiling: bool) -> tuple[Asked, Work, Key | None, str]:
            asked, tensors = asked_of(body, kind)
            if asked.until is None:
                raise unusable("until: missing, expected the step to stop before.")
            work = work_of(asked, tensors, self.served, self.limits, compiling=compiling)
            digest = hashlib.sha256(body).hexdigest()
            return asked, work, key_of(request, digest), digest

        try:
            asked, work, key, digest = await _soon(partial(read, compiling=False), len(body))
        except UncompiledError:
            asked, work, key, digest = await asyncio.to_thread(read, compiling=True)

        async def made(seconds: float) -> Response:
            output = await self.painter.painted(work, seconds)
            return await _soon(partial(_handed_over, output, asked, digest), output.latents.nbytes)

        seconds = min(self._seconds(asked.timeout), max(0.0, ends - time.monotonic()))
        return await self._answered(request, key, seconds, made)

    async def generations(self, request: Request) -> Response:
        """Whole pictures, as OpenAI's endpoint of the same path answers them."""
        media_type(request, (JSON,))
        body = await self._body(request)

        def read() -> tuple[Generation, Work, Key | None]:
            return *self._whole(partial(generation_of, body)), key_of(request, hashlib.sha256(body).hexdigest())

        wanted, work, key = await asyncio.to_thread(read)

        def answer(output: Output) -> Response:
            files = pictures_of(output, wanted.output_format, work.request, self.served)
            facts = {"created": int(time.time()), "data": [{"b64_json": one} for one in files], "seeds": output.seeds}
            return JSONResponse({**facts, **dropped(output), **places(output)}, headers=server_timing(output))

        async def made(seconds: float) -> Response:
            output = await self.painter.painted(work, seconds)
            return await asyncio.to_thread(answer, output)

        return await self._answered(request, key, self.limits.seconds, made)

    async def stream(self, request: Request) -> Response:
        """A picture as server-sent events; see `events`."""
        self.painter.require_room()
        query = dict(request.query_params)
        previews = query.pop("previews", "0")
        if not (previews.isascii() and previews.isdigit() and len(previews) <= 4):
            raise unusable(f"previews: got {previews[:20]!r}, expected a whole number, 0 or more.")
        wanted, work = await asyncio.to_thread(self._whole, partial(generation_of_query, query))
        shown = replace(work, request=replace(work.request, previews=int(previews)))
        paint = partial(self.painter.painted, shown, self.limits.seconds)
        files = partial(pictures_of, form=wanted.output_format, request=work.request, served=self.served)
        return await event_stream(request, paint, files)

    async def server(self, _: Request) -> Response:
        """The Open Inference Protocol's metadata of a server, and the name of the one model."""
        version, name = metadata.version("tandemrt"), self.served.name
        return JSONResponse({"name": "tandemrt", "version": version, "extensions": [PROTOCOL], "model": name})

    async def ready(self, _: Request) -> Response:
        """Whether a request would be taken."""
        if self.painter.unready:
            raise unready(self.painter.unready)
        return JSONResponse({"ready": True})

    async def model(self, request: Request) -> Response:
        """What is served, and the limits."""
        self.served.require(request.path_params["name"])
        bounds = {name: getattr(self.limits, name) for name in ("steps", "pictures", "pixels", "prompt_bytes")}
        return JSONResponse({**self.served.facts, "limits": bounds})

    async def model_ready(self, request: Request) -> Response:
        """As `ready`, of the one model."""
        self.served.require(request.path_params["name"])
        return await self.ready(request)

    async def _body(self, request: Request) -> bytes:
        """The body of a request that there is room for, or whose key has an answer already.

        Raises:
            Problem: there is no room, or as many bodies arrive as may run and wait; or as `body_of`.
        """
        if request.headers.get("idempotency-key") not in self.kept:
            self.painter.require_room()
        if self.arriving >= self.limits.running + self.limits.waiting:
            raise busy(1)
        self.arriving += 1
        try:
            most = self.limits.body_bytes(self.served.own)
            return await body_of(request, most, min(BODY_S, self.limits.seconds))
        finally:
            self.arriving -= 1

    def _whole(self, read: Callable[[], Generation]) -> tuple[Generation, Work]:
        """What is asked for of whole pictures; raises as `read`, `asked_for` and `work_of`."""
        wanted = read()
        asked = asked_for(wanted, self.served.manifest.names("denoiser"))
        return wanted, work_of(asked, {}, self.served, self.limits)

    async def _answered(self, request: Request, key: Key | None, seconds: float, make: Make) -> Response:
        """What `make` makes, or has made for the key, within so many seconds and until the client leaves."""
        return await while_connected(request, make(seconds) if key is None else self.kept.answer(key, seconds, make))

    def _seconds(self, asked: float | None) -> float:
        """How long a request may take, in seconds: no longer than the server lets any."""
        if asked is not None and not asked > 0:
            raise unusable(f"timeout: got {asked:g}, expected a number above 0.")
        return self.limits.seconds if asked is None else min(asked, self.limits.seconds)


def _ends(request: Request) -> float:
    """When the client no longer waits, of time.monotonic, as he says where he does; Problem where it is no time.

    It is counted from here on, where the head has come: so the body's way is within it.
    """
    told = request.headers.get(TIMEOUT_HEADER, "inf")
    try:
        seconds = float(told)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise malformed(f"{TIMEOUT_HEADER}: got {told[:20]!r}, expected seconds, a number above 0.")
    return time.monotonic() + seconds


async def _soon(work: Callable[[], T], size: int) -> T:
    """What is made of so many bytes: on a thread, so that others need not wait, where it takes longer than that."""
    return work() if size <= _AT_ONCE_BYTES else await asyncio.to_thread(work)


def _handed_over(output: Output, asked: Asked, digest: str) -> Response:
    """The state after a request's steps, in the dtype that was asked for unless that cannot hold it.

    digest: the sha256 of the body, by which who asked knows that it is the answer to that.
    """
    if output.handover is None:
        raise RuntimeError("a request with `until` made no hand-over")
    handover = replace(output.handover, request=digest)
    try:
        message = handover.to_bytes(asked.dtype)
    except RequestError:
        message = handover.to_bytes("float32")
    cut = sum(one.tokens for one in output.dropped_text)
    headers = {**server_timing(output), **({"Dropped-Tokens": str(cut)} if cut else {})}
    return Response(message, media_type=MESSAGE, headers=headers)
