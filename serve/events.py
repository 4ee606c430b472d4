"""A picture as server-sent events: `step` after each row, with previews; at last `picture`, or `error`.

Between them `stage` tells of what comes next and makes no rows: `cloud`, another server's steps, `sampled`, decoding.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tandemrt.runtime import Output, StepEvent
from tandemrt.runtime.stream import Stage

from .answers import while_connected
from .pictures import encoded, milliseconds, places
from .problems import problem_of
from .work import Seen

Paint = Callable[[Seen], Coroutine[Any, Any, Output]]
_FRESH = {"Cache-Control": "no-store"}


async def event_stream(request: Request, paint: Paint, pictures: Callable[[Output], list[str]]) -> Response:
    """The answer that tells of a picture while it is painted.

    paint: paints it, and calls what it is given with each row. pictures: an output's, as texts.

    Raises:
        Problem, TandemError: it failed before the first row, which is an answer of its own.
    """
    events = _events(paint, pictures)
    first = await while_connected(request, anext(events))
    return StreamingResponse(_behind(first, events), media_type="text/event-stream", headers=_FRESH)


async def _events(paint: Paint, pictures: Callable[[Output], list[str]]) -> AsyncGenerator[bytes, None]:
    told: asyncio.Queue[StepEvent | Stage | None] = asyncio.Queue()
    task = asyncio.ensure_future(paint(told.put_nowait))
    task.add_done_callback(lambda _: told.put_nowait(None))
    begun = False
    try:
        while (event := await told.get()) is not None:
            if event is Stage.ENCODED:
                continue  # what fails before the first row is an answer of its own
            begun = True
            if isinstance(event, Stage):
                yield _event("stage", {"stage": event.value})
            else:
                yield _event("step", await asyncio.to_thread(_step_facts, event))
        output = task.result()
        files = await asyncio.to_thread(pictures, output)
        facts = {"b64_json": files, "seeds": output.seeds, "steps": output.plan.steps}
        yield _event("picture", {**facts, **milliseconds(output), **places(output)})
    except Exception as error:
        if not begun:
            raise
        yield _event("error", problem_of(error).facts)
    finally:
        task.cancel()
        await asyncio.wait([task])


def _step_facts(event: StepEvent) -> dict[str, Any]:
    return {
        "row": event.row,
        "rows": event.rows,
        "step": event.step,
        "denoiser": event.timing.denoiser,
        "milliseconds": round(event.timing.total_ms, 3),
        "guided": event.timing.guidance.guided,
        "previews": [encoded(image, "jpeg") for image in event.preview],
    }


def _event(name: str, facts: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(facts, separators=(',', ':'))}\n\n".encode()


async def _behind(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event
