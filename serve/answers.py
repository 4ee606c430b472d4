"""Endpoints in common: errors become answers, a caller who leaves ends his work, the same key gives the same answer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from .problems import Problem, busy, conflict, malformed, overdue, problem_of

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
Make = Callable[[float], Coroutine[Any, Any, Response]]
_KEY_CHARACTERS, _KEPT, _KEPT_S, _KEPT_BYTES = 200, 64, 600.0, 64 << 20


def answering(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors are answers."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            return problem_of(error).response()

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
        gone.cancel()
        task.cancel()
        if not task.done():
            await asyncio.wait([task])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True, slots=True)
class Key:
    """A caller's `Idempotency-Key`, and the path and the body's sha256 that came with it."""

    name: str
    made_of: tuple[str, str]


def key_of(request: Request, digest: str) -> Key | None:
    """A request's key, if it has one; Problem where that cannot be used.

    digest: the sha256 of its body.
    """
    name = request.headers.get("idempotency-key")
    if name is None:
        return None
    if not 0 < len(name) <= _KEY_CHARACTERS:
        raise malformed(f"Idempotency-Key: expected 1 to {_KEY_CHARACTERS} characters.")
    return Key(name, (request.url.path, digest))


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer that is being made, or was. made_at: when, of time.monotonic; 0 until then."""

    made_of: tuple[str, str]
    answer: asyncio.Future[Response]
    made_at: float = 0.0


class Idempotent:
    """Answers by key: the first request with a key makes it, and others wait for it, so many at most."""

    def __init__(self, waiting: int) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._free = waiting

    def __contains__(self, name: str | None) -> bool:
        """Whether an answer for a key of that name is there, or is being made."""
        return name in self._kept

    async def answer(self, key: Key, seconds: float, make: Make) -> Response:
        """The answer for a key, made once, within so many seconds.

        make: makes it, within the seconds that it is given. What fails there fails for all who wait, and is not kept:
            who asks again is to have another try. Where who makes it leaves, the first of those who wait does.

        Raises:
            Problem: the key came with another body; too many wait for answers of others; or it took too long.
        """
        ends, left = monotonic() + seconds, seconds
        self._forget_old()
        while (kept := self._kept.get(key.name)) is not None:
            if kept.made_of != key.made_of:
                raise conflict("Idempotency-Key: came with another body before. Send a key of its own.")
            await self._until_made(kept.answer, left)
            if not kept.answer.done():
                raise overdue(seconds)
            if not kept.answer.cancelled():
                return kept.answer.result()
            left = max(0.0, ends - monotonic())
        future = asyncio.get_running_loop().create_future()
        self._kept[key.name] = _Kept(key.made_of, future)
        try:
            response = await _made(make, left, seconds)
        except BaseException as error:
            del self._kept[key.name]
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # which is nobody's where nobody waits
            else:
                future.cancel()
            raise
        del self._kept[key.name]  # and put it behind those that were made before it
        self._kept[key.name] = _Kept(key.made_of, future, monotonic())
        future.set_result(response)
        self._forget_old()
        return response

    async def _until_made(self, answer: asyncio.Future[Response], seconds: float) -> None:
        """Wait for what another makes, so many seconds at most."""
        if answer.done():
            return
        if not self._free:
            raise busy(1)
        self._free -= 1
        try:
            await asyncio.wait([answer], timeout=seconds)
        finally:
            self._free += 1

    def _forget_old(self) -> None:
        oldest = monotonic() - _KEPT_S
        made = {name: kept for name, kept in self._kept.items() if kept.answer.done()}
        count, size = len(made), sum(len(kept.answer.result().body) for kept in made.values())
        for name, kept in made.items():
            if kept.made_at > oldest and count <= _KEPT and size <= _KEPT_BYTES:
                return
            count, size = count - 1, size - len(kept.answer.result().body)
            del self._kept[name]


async def _made(make: Make, left: float, seconds: float) -> Response:
    """What `make` makes within what is left of a request's seconds, of all of which it is told where that is over."""
    try:
        return await make(left)
    except Problem as problem:
        if problem.reason != "deadline" or left == seconds:
            raise
        raise overdue(seconds) from problem
