"""Endpoints in common: errors become answers, a caller who leaves ends his work, the same key gives the same answer."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from .metrics import Metrics
from .problems import Problem, conflict, malformed, problem_of

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
_KEY_CHARACTERS, _KEPT, _KEPT_S, _KEPT_BYTES = 200, 64, 600.0, 64 << 20


def answering(name: str, metrics: Metrics, endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors are answers, and which is counted by its outcome."""

    async def answered(request: Request) -> Response:
        outcome = "ok"
        try:
            return await endpoint(request)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception as error:
            problem = problem_of(error)
            outcome = problem.reason
            return problem.response()
        finally:
            metrics.requests.labels(name, outcome).inc()

    return answered


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What the work gives; it is cancelled when the client leaves before.

    The body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(499, "client_left", "The client left.")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait([task, gone])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Idempotent:
    """Answers by the caller's `Idempotency-Key`: the first request with a key makes it, the others wait for it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[str, float, asyncio.Future[Response]]] = OrderedDict()

    async def answer(self, request: Request, body: bytes, make: Callable[[], Awaitable[Response]]) -> Response:
        """The answer to a body, made once for each key.

        A failure is not kept: who asks again is to have another try.

        Raises:
            Problem: the key cannot be used, or came with another body.
        """
        key = request.headers.get("idempotency-key")
        if key is None:
            return await make()
        if not 0 < len(key) <= _KEY_CHARACTERS:
            raise malformed(f"Idempotency-Key: expected 1 to {_KEY_CHARACTERS} characters.")
        self._forget_old()
        digest = hashlib.sha256(request.url.path.encode() + b"\0" + body).hexdigest()
        while key in self._kept:
            made_of, _, future = self._kept[key]
            if made_of != digest:
                raise conflict("Idempotency-Key: came with another body before. Send a key of its own.")
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                if not future.cancelled():
                    raise
                # Who made it left: the first of those who waited makes it.
        future = asyncio.get_running_loop().create_future()
        self._kept[key] = digest, time.monotonic(), future
        try:
            response = await make()
        except BaseException as error:
            self._kept.pop(key, None)
            if isinstance(error, Exception) and not isinstance(error, Problem):
                future.set_exception(error)
                future.exception()
            else:
                future.cancel()
            raise
        future.set_result(response)
        self._forget_old()
        return response

    def _forget_old(self) -> None:
        oldest = time.monotonic() - _KEPT_S
        made = {key: one for key, one in self._kept.items() if one[2].done()}
        size = sum(len(future.result().body) for _, _, future in made.values())
        for key, (_, since, future) in made.items():
            if since > oldest and len(self._kept) <= _KEPT and size <= _KEPT_BYTES:
                return
            size -= len(future.result().body)
            del self._kept[key]
