"""Who is painted for when: a bounded number runs, a bounded number waits, and nobody runs on for a caller who left."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from tandemrt.runtime import Output, Pipeline, Request, Stream

from .limits import Limits
from .metrics import Metrics
from .problems import busy, overdue, unready
from .work import Seen, Work


class Queue:
    """Runs requests on a pipeline, on threads of its own; used by one event loop."""

    def __init__(self, pipe: Pipeline, limits: Limits, metrics: Metrics) -> None:
        self._pipe, self._limits, self._metrics = pipe, limits, metrics
        self._slots = asyncio.Semaphore(limits.running)
        self._threads = ThreadPoolExecutor(limits.running, thread_name_prefix="tandemrt-serve")
        self._within, self._typical_s = 0, 1.0
        self._unready = "it has not painted its first picture yet"

    @property
    def unready(self) -> str:
        """Why no request is taken; empty where one is."""
        return self._unready

    async def warm_up(self, request: Request) -> None:
        """Paint a picture, and be ready."""
        began = time.perf_counter()
        stream = self._pipe.stream(**_arguments(request))
        await asyncio.get_running_loop().run_in_executor(self._threads, stream.result)
        self._typical_s, self._unready = time.perf_counter() - began, ""

    def drain(self) -> None:
        """Take no further request."""
        self._unready = "it is shutting down"

    def close(self) -> None:
        """End the threads, when what they run has ended."""
        self._threads.shutdown(cancel_futures=True)

    async def painted(self, work: Work, seconds: float, seen: Seen | None = None) -> Output:
        """As `Painter.painted`."""
        if self._unready:
            raise unready(self._unready)
        if self._within >= self._limits.running + self._limits.waiting:
            raise busy(max(1, math.ceil(self._typical_s * self._within / self._limits.running)))
        self._within += 1
        try:
            return await asyncio.wait_for(self._in_turn(work.request, seen), seconds)
        except (asyncio.TimeoutError, TimeoutError) as late:
            raise overdue(seconds) from late
        finally:
            self._within -= 1

    async def _in_turn(self, request: Request, seen: Seen | None) -> Output:
        with self._metrics.waiting.track_inprogress():
            await self._slots.acquire()
        try:
            return await self._run(request, seen)
        finally:
            self._slots.release()

    async def _run(self, request: Request, seen: Seen | None) -> Output:
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        stream = self._pipe.stream(**_arguments(request))

        def walk() -> Output:
            for event in stream:
                if seen is not None:
                    loop.call_soon_threadsafe(seen, event)
            return stream.result()

        running = loop.run_in_executor(self._threads, walk)
        try:
            output = await asyncio.shield(running)
        except asyncio.CancelledError:
            await _ended(stream, running)
            raise
        self._typical_s = 0.8 * self._typical_s + 0.2 * (time.perf_counter() - began)
        self._metrics.painted(output)
        return output


def _arguments(request: Request) -> dict[str, Any]:
    return {field.name: getattr(request, field.name) for field in fields(request)}


async def _ended(stream: Stream, running: asyncio.Future[Output]) -> None:
    """Cancel what runs on a thread, and wait until it has ended: the next one needs its thread and its memory."""
    stream.cancel()
    await asyncio.wait([running])
    running.exception()  # it is nobody's any more
