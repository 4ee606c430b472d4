"""Paints in parts that run elsewhere: texts, each denoiser's steps and decoding, one after the other.

What travels between them is what travels between a device and its cloud: embeddings, hand-overs, latents. Each part is
a pure function of these, so one whose replica was lost is run again by another.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from tandemrt.runtime import CancelledError, Output, Request, RequestError, Timings
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.output import StepEvent
from tandemrt.runtime.plan import Plan, compile_plan
from tandemrt.runtime.request import TEXTS
from tandemrt.runtime.stream import Stage

from .limits import Limits
from .metrics import Metrics
from .problems import Problem, busy, overdue, unready
from .ray_replica import DECODER, TEXT, Encoded, LostError
from .work import Seen, Work

LOG = logging.getLogger("tandemrt.serve")
T = TypeVar("T")
# Of a request: what only the first of several parts would need, and no caller over HTTP can send.
_NOT_SENT = ("image", "mask_image", "control_image", "loras", "latents")


class Calls(Protocol):
    """How parts are asked; what is cancelled ends there too.

    seconds: how long it may take.

    Raises:
        LostError: the replica that was asked is gone.
        Problem: too many wait for it.
        TandemError: as the part itself.
    """

    async def encode(self, request: Request, seconds: float) -> Encoded:
        """See `Replica.encode`."""

    def paint(self, part: str, request: Request, seconds: float) -> AsyncIterator[StepEvent | Output]:
        """See `Replica.paint`."""


class Spread:
    """Paints with the parts that `calls` reach, a bounded number of requests at once; a `Painter` of one event loop.

    apart: the denoisers whose branches of guidance run on two replicas.
    """

    def __init__(
        self, manifest: Manifest, calls: Calls, limits: Limits, metrics: Metrics, apart: Collection[str] = ()
    ) -> None:
        self._manifest, self._calls, self._limits, self._metrics = manifest, calls, limits, metrics
        self._apart = apart
        self._slots = asyncio.Semaphore(limits.running)
        self._within, self._typical_s = 0, 1.0
        self._unready, self._drained = "it has not painted its first picture yet", False
        self._warming: asyncio.Task[Output] | None = None

    @property
    def unready(self) -> str:
        """See `Painter`."""
        return "it is shutting down" if self._drained else self._unready

    async def warm_up(self, request: Request) -> None:
        """Paint a picture, and be ready; it is tried again while parts are lacking, which come with their machines."""
        plan = compile_plan(self._manifest, request.schedule)
        while not self._drained:
            began = time.monotonic()
            self._warming = asyncio.ensure_future(self._spread(request, plan, None, began + self._limits.seconds))
            await asyncio.wait([self._warming])
            error = None if self._warming.cancelled() else self._warming.exception()
            if error is not None and not isinstance(error, Problem | CancelledError):  # which is of parts that are late
                self._unready = "its first picture failed; its log says why"
                LOG.error("the first picture failed: %s", error, exc_info=error)
                return
            if error is None and not self._warming.cancelled():
                self._typical_s, self._unready = time.monotonic() - began, ""
                return
            await asyncio.sleep(1)

    def drain(self) -> None:
        """Take no further request."""
        self._drained = True
        if self._warming is not None:
            self._warming.cancel()

    async def close(self) -> None:
        """Nothing runs here, and Ray waits for who has asked."""

    def require_room(self) -> None:
        """See `Painter`."""
        if self.unready:
            raise unready(self.unready)
        if self._within >= self._limits.running + self._limits.waiting:
            raise busy(max(1, math.ceil(self._typical_s * self._within / self._limits.running)))

    async def painted(self, work: Work, seconds: float, seen: Seen | None = None) -> Output:
        """See `Painter`."""
        self.require_room()
        self._within += 1
        ends = time.monotonic() + seconds
        try:
            return await self._apart_from_ray(self._in_turn(work, seen, ends), seconds)
        except CancelledError as late:  # by the part that ran, just before it was cancelled from here
            if time.monotonic() < ends:
                raise
            raise overdue(seconds) from late
        finally:
            self._within -= 1

    @staticmethod
    async def _apart_from_ray(work: Coroutine[Any, Any, Output], seconds: float) -> Output:
        """What work makes within so many seconds, on a task of its own: Ray cancels who asks a replica that ends."""
        painting = asyncio.ensure_future(work)
        try:
            await asyncio.wait([painting], timeout=seconds)
            if not painting.done():
                raise overdue(seconds)
            if painting.cancelled():
                raise _replica_lost("a part")
            return painting.result()
        finally:
            if not painting.done():
                painting.cancel()
                await asyncio.wait([painting])

    async def _in_turn(self, work: Work, seen: Seen | None, ends: float) -> Output:
        asked = time.monotonic()
        with self._metrics.waiting.track_inprogress():
            await self._slots.acquire()
        began = time.monotonic()
        self._metrics.waited(began - asked)
        try:
            with self._metrics.running.track_inprogress():
                output = await self._spread(work.request, work.plan, seen, ends)
        finally:
            self._slots.release()
        self._typical_s = 0.8 * self._typical_s + 0.2 * (time.monotonic() - began)
        self._metrics.painted(output, 1)
        return output

    async def _spread(self, request: Request, plan: Plan, seen: Seen | None, ends: float) -> Output:
        """What the parts make, one after the other.

        Raises:
            RequestError: the request has what cannot be sent.
            Problem: a replica was lost, and so was the next; or too many wait for one.
            TandemError: as a call of a pipeline.
        """
        for name in _NOT_SENT:
            if getattr(request, name) is not None:
                raise RequestError(name, "cannot be sent to the parts of a pipeline", remedy="Leave it out.")
        began = time.monotonic()
        if request.seed is None and request.start is None:
            request = replace(request, seed=secrets.randbits(32))
        job = _Job(self._calls, self._metrics, ends, seen)
        texts = await job.encoded(replace(request, start=None))  # whose state they do not need
        instead: dict[str, Any] = {**dict.fromkeys(TEXTS), **texts.embeds}
        request = replace(request, **instead)
        encoded, outputs, start = time.monotonic(), list[Output](), request.start
        for name, until in parts_of(plan, request):
            placement = "parallel" if name in self._apart else "batched"
            part = replace(request, start=start, until=until, placement=placement, output_type="latent")
            outputs.append(await job.painted(name, part))
            start = outputs[-1].handover
        if seen is not None:
            seen(Stage.SAMPLED)
        if request.until is None or not outputs:
            outputs.append(await job.painted(DECODER, replace(request, start=start)))
        output = _joined(outputs, plan, (encoded - began) * 1e3, (time.monotonic() - began) * 1e3)
        return replace(output, dropped_text=texts.dropped)


@dataclass(slots=True)
class _Job:
    """A generation that is under way.

    ends: when it has to, of time.monotonic. row: the last one that was told of.
    """

    calls: Calls
    metrics: Metrics
    ends: float
    seen: Seen | None
    row: int = -1

    async def encoded(self, request: Request) -> Encoded:
        """What a request's texts come to."""
        return await self._twice(TEXT, lambda: self.calls.encode(request, self._left_s()))

    async def painted(self, part: str, request: Request) -> Output:
        """What a part makes of a request; its rows are told of as they run."""

        async def made() -> Output:
            output = None
            async for one in self.calls.paint(part, request, self._left_s()):
                if isinstance(one, Output):
                    output = one
                else:
                    self._tell(one)
            if output is None:
                raise LostError(part, "a replica ended without a result")
            return output

        return await self._twice(part, made)

    async def _twice(self, part: str, ask: Callable[[], Awaitable[T]]) -> T:
        """What a part answers; it is asked again where a replica was lost, once.

        Raises:
            Problem: the second was lost too.
        """
        try:
            return await ask()
        except LostError:
            self.metrics.lost.labels(part).inc()
        try:
            return await ask()
        except LostError as lost:
            self.metrics.lost.labels(part).inc()
            raise _replica_lost(part) from lost

    def _tell(self, event: StepEvent) -> None:
        """Tell of a row, once, also where it runs again."""
        if event.row > self.row:
            self.row = event.row
            if self.seen is not None:
                self.seen(event)

    def _left_s(self) -> float:
        return max(0.0, self.ends - time.monotonic())


def parts_of(plan: Plan, request: Request) -> list[tuple[str, int]]:
    """The denoisers that run from a request's start to its end, in order, each with the step that it ends before."""
    first = 0 if request.start is None else request.start.step
    last = sum(count for _, count in plan.steps) if request.until is None else request.until
    parts, ends = [], 0
    for name, count in plan.steps:
        begins, ends = ends, ends + count
        if max(begins, first) < min(ends, last):
            parts.append((name, min(ends, last)))
    return parts


def _replica_lost(part: str) -> Problem:
    return Problem(503, "replica_lost", f"{part}: its replicas were lost. Try again.", {"Retry-After": "5"})


def _joined(outputs: list[Output], plan: Plan, text_ms: float, total_ms: float) -> Output:
    """What the parts made, as of one pipeline; text_ms, total_ms: as it took here, the way to the parts included."""
    timings = replace(Timings.together([output.timings for output in outputs]), text_ms=text_ms, total_ms=total_ms)
    return replace(outputs[-1], timings=timings, plan=plan.having_run([row.guidance for row in timings.rows]))
