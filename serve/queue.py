"""Who is painted for when: a bounded number runs, a bounded number waits, and nobody runs on for a caller who left."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from tandemrt.runtime import Output, Pipeline, Request, StepEvent, Stream
from tandemrt.runtime.stream import Stage

from .batching import Batch, in_common
from .help import Help
from .limits import HANGS_S, Limits
from .metrics import Metrics
from .problems import busy, overdue, unready
from .threads import Threads
from .work import Seen, Work

LOG = logging.getLogger("tandemrt.serve")
# How often who waits for the last calls looks whether they hang.
_LOOKS_S = 0.5


@dataclass(slots=True, eq=False)
class _Caller:
    """Whom a request is painted for. made: what it made, or why not; done where he is gone. call: once it runs."""

    work: Work
    seen: Seen | None
    common: Hashable | None
    made: asyncio.Future[Output]
    since: float
    call: _Call | None = None


class _Call:
    """A call of a pipeline for one caller, or for several at once; it ends when all of them are gone.

    gone_at: when the last of them went, of time.monotonic.
    """

    def __init__(self, callers: Sequence[_Caller]) -> None:
        self.callers = callers
        self.batch = Batch.of([caller.work for caller in callers])
        self.gone_at = math.inf
        self._stream: Stream | None = None

    @property
    def hangs(self) -> bool:
        """Whether it should have ended long ago, if it runs."""
        return time.monotonic() - self.gone_at > HANGS_S

    def look(self) -> None:
        """End it if nobody waits for what it makes."""
        if all(caller.made.done() for caller in self.callers):
            self.gone_at = min(self.gone_at, time.monotonic())
            if self._stream is not None:
                self._stream.cancel()

    def run(self, pipe: Pipeline, told: Callable[[StepEvent | Stage], object]) -> Output:
        """Walk it, on a thread of its own."""
        self._stream = stream = pipe.stream_planned(self.batch.request, self.callers[0].work.plan)
        if self.gone_at < math.inf:  # before there was a stream to cancel
            stream.cancel()
        for event in stream.with_stages():
            told(event)
        return stream.result()

    def tell(self, event: StepEvent | Stage) -> None:
        """Tell those of a row or stage who want to know."""
        for index, caller in enumerate(self.callers):
            if caller.seen is not None and not caller.made.done():
                caller.seen(event if isinstance(event, Stage) else self.batch.event(event, index))


class Queue:
    """Runs requests on a pipeline, on threads of its own; used by one event loop."""

    def __init__(self, pipe: Pipeline, limits: Limits, metrics: Metrics, cloud: Help | None = None) -> None:
        """cloud: is told of what was painted, where the pipeline has one."""
        self._pipe, self._limits, self._metrics, self._help = pipe, limits, metrics, cloud or Help()
        self._threads = Threads(limits.running)
        self._free, self._typical_s = limits.running, 1.0
        self._waiting: list[_Caller] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._running: set[_Call] = set()
        self._first: Stream | None = None
        self._unready, self._draining = "it has not painted its first picture yet", False

    @property
    def unready(self) -> str:
        """Why no request is taken; empty where one is."""
        if self._draining:
            return "it is shutting down"
        return "a call of a model does not end" if self._hanging else self._unready

    @property
    def _hanging(self) -> int:
        """How many calls hang."""
        return sum(call.hangs for call in self._running)

    async def warm_up(self, request: Request) -> None:
        """Paint a picture, and be ready; where that fails, stay unready, and log why, unless `drain` has ended it."""
        began = time.perf_counter()
        try:
            await self._threads.run(partial(self._paint_first, request))
        except Exception as error:
            if not self._draining:
                self._unready = "its first picture failed; its log says why"
                LOG.error("the first picture failed: %s", error, exc_info=error)
        else:
            self._typical_s, self._unready = time.perf_counter() - began, ""

    def _paint_first(self, request: Request) -> None:
        """Paint the first picture, on a thread of its own."""
        self._first = self._pipe.stream(**request.arguments)
        if self._draining:  # before there was a stream to cancel
            self._first.cancel()
        self._first.result()
        self._first = None

    def drain(self) -> None:
        """Take no further request, and end the first picture; requests that were taken are painted yet."""
        self._draining = True
        if (first := self._first) is not None:
            first.cancel()

    async def close(self) -> None:
        """Wait until what was taken has ended, but for calls that hang, and end the threads."""
        while len(self._calls) > self._hanging:
            await asyncio.wait(self._calls, timeout=_LOOKS_S)
        if self._calls:
            LOG.error("calls of models do not end, and are given up: %d", len(self._calls))
        self._threads.close()

    def require_room(self) -> None:
        """As `Painter.require_room`."""
        if self.unready:
            raise unready(self.unready)
        if not self._free and len(self._waiting) >= self._limits.waiting:
            calls = len(self._waiting) + self._limits.running
            raise busy(max(1, math.ceil(self._typical_s * calls / self._limits.running)))

    async def painted(self, work: Work, seconds: float, seen: Seen | None = None) -> Output:
        """As `Painter.painted`."""
        self.require_room()
        common = in_common(work) if self._limits.batch > 1 else None
        caller = _Caller(work, seen, common, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._waiting.append(caller)
        self._fill()
        try:
            return await asyncio.wait_for(caller.made, seconds)
        except (asyncio.TimeoutError, TimeoutError) as late:
            raise overdue(seconds) from late
        finally:
            caller.made.cancel()
            self._let_go(caller)

    def _let_go(self, caller: _Caller) -> None:
        if caller.call is not None:
            caller.call.look()
        elif caller in self._waiting:
            self._waiting.remove(caller)
            self._metrics.waiting.set(len(self._waiting))

    def _fill(self) -> None:
        """Have those run whose turn it is."""
        while self._free and self._waiting:
            self._free -= 1
            task = asyncio.ensure_future(self._run(self._next()))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.running.set(self._limits.running - self._free)

    def _next(self) -> list[_Caller]:
        """Who waits longest, and those who wait for what can run with it as one."""
        first = self._waiting.pop(0)
        together, pictures = [first], first.work.request.pictures
        for caller in list(self._waiting) if first.common is not None else ():
            more = pictures + caller.work.request.pictures
            if caller.common == first.common and more <= self._limits.batch:
                together.append(caller)
                self._waiting.remove(caller)
                pictures = more
        return together

    async def _run(self, callers: Sequence[_Caller]) -> None:
        began = time.perf_counter()
        for caller in callers:
            self._metrics.waited(began - caller.since)
        try:
            await self._call(callers)
        finally:
            self._free += 1
            self._fill()

    async def _call(self, callers: Sequence[_Caller]) -> None:
        """Give each what his request makes, of all run as one; where that fails, of each run by itself."""
        call, loop, began = _Call(callers), asyncio.get_running_loop(), time.perf_counter()
        self._running.add(call)
        for caller in callers:
            caller.call = call
        wanted = any(caller.seen is not None for caller in callers)

        def told(event: StepEvent | Stage) -> None:
            if wanted:
                loop.call_soon_threadsafe(call.tell, event)

        call.look()
        try:
            output = await self._threads.run(partial(call.run, self._pipe, told))
            outputs = call.batch.outputs(output)
        except Exception as error:
            await self._fail(callers, error)
            return
        finally:
            self._running.discard(call)
        self._typical_s = 0.8 * self._typical_s + 0.2 * (time.perf_counter() - began)
        self._metrics.painted(output, len(callers))
        self._help.of(output)
        for caller, own in zip(callers, outputs, strict=True):
            if not caller.made.done():
                caller.made.set_result(own)

    async def _fail(self, callers: Sequence[_Caller], error: Exception) -> None:
        left = [caller for caller in callers if not caller.made.done()]
        if len(callers) == 1:
            for caller in left:
                caller.made.set_exception(error)
            return
        for caller in left:
            if not caller.made.done():  # by now
                await self._call([caller])
