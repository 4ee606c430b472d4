"""A picture as server-sent events: `step` after each row, with previews; at last `picture`, or `error`.

Between them `stage` tells of what comes next and makes no rows: `cloud`, another server's steps, `sampled`, decoding.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Scope

from tandemrt.runtime import Output, StepEvent
from tandemrt.runtime.stream import Stage

from .answers import while_connected
from .pictures import dropped, encoded, milliseconds, places
from .problems import OUTCOME, problem_of
from .work import Seen

Paint = Callable[[Seen], Coroutine[Any, Any, Output]]
_FRESH = {"Cache-Control": "no-store"}


async def event_stream(request: Request, paint: Paint, pictures: Callable[[Output], list[str]]) -> Response:
    """The answer that tells of a picture while it is painted.

    paint: paints it, and calls what it is given with each row. pictures: an output's, as texts.

    Raises:
        Problem, TandemError: it failed before the first row, which is an answer of its own.
    """
    events = _events(request.scope, paint, pictures)
    first = await while_connected(request, anext(events))
    return StreamingResponse(_behind(first, events), media_type="text/event-stream", headers=_FRESH)


class _Told:
    """What is to be told yet. Where the reader is behind, the newest previews are kept and no older ones."""

    def __init__(self) -> None:
        self._events: deque[StepEvent | Stage | None] = deque()
        self._some = asyncio.Event()

    def put(self, event: StepEvent | Stage | None) -> None:
        if isinstance(event, StepEvent) and event.preview:
            self._events = deque(
                replace(one, preview=()) if isinstance(one, StepEvent) else one for one in self._events
            )
        self._events.append(event)
        self._some.set()

    async def get(self) -> StepEvent | Stage | None:
        while not self._events:
            self._some.clear()
            await self._some.wait()
        return self._events.popleft()


async def _events(scope: Scope, paint: Paint, pictures: Callable[[Output], list[str]]) -> AsyncGenerator[bytes, None]:
    """What is told of a picture, and becomes of it: in the end that is the outcome of the request of this scope."""
    told = _Told()
    task = asyncio.ensure_future(paint(told.put))
    task.add_done_callback(lambda _: told.put(None))
    begun = False
    scope[OUTCOME] = "client_left"  # unless it goes on to the end
    try:
        while (event := await told.get()) is not None:
            if event is Stage.ENCODED:
                continue  # what fails before the first row is an answer of its own
            begun = True
            if isinstance(event, Stage):
                yield _event("stage", {"stage": event.value})
            else:
                yield await asyncio.to_thread(_step, event)
        yield await asyncio.to_thread(_picture, task.result(), pictures)
        scope[OUTCOME] = "ok"
    except Exception as error:
        if not begun:
            raise
        problem = problem_of(error)
        yield _event("error", problem.facts)
        scope[OUTCOME] = problem.reason
    finally:
        task.cancel()
        await asyncio.wait([task])


def _step(event: StepEvent) -> bytes:
    facts = {
        "row": event.row,
        "rows": event.rows,
        "step": event.step,
        "denoiser": event.timing.denoiser,
        "milliseconds": round(event.timing.total_ms, 3),
        "guided": event.timing.guidance.guided,
        "previews": [encoded(image, "jpeg") for image in event.preview],
    }
    return _event("step", facts)


def _picture(output: Output, pictures: Callable[[Output], list[str]]) -> bytes:
    facts = {"b64_json": pictures(output), "seeds": output.seeds, "steps": output.plan.steps}
    return _event("picture", {**facts, **dropped(output), **milliseconds(output), **places(output)})


def _event(name: str, facts: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(facts, separators=(',', ':'))}\n\n".encode()


async def _behind(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event
