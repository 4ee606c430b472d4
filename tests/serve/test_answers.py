"""The same key, the same answer: made once, by whoever is there to make it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from tandemrt.serve import answers
from tandemrt.serve.answers import Idempotent
from tandemrt.serve.problems import Problem, unusable

from .conftest import run_apart

Make = Callable[[], Awaitable[Response]]


def request(key: str) -> Request:
    headers = [(b"idempotency-key", key.encode()), (b"host", b"here")]
    return Request({"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers})


class Maker:
    """Makes answers when it is let, and counts them."""

    def __init__(self, size: int = 1) -> None:
        self.made, self.size = 0, size
        self.open = asyncio.Event()

    async def __call__(self) -> Response:
        await self.open.wait()
        self.made += 1
        return Response(b"x" * self.size)


async def begun(*work: Awaitable[Any]) -> list[asyncio.Future[Any]]:
    tasks = [asyncio.ensure_future(one) for one in work]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def test_those_who_come_meanwhile_wait_for_the_first() -> None:
    async def run() -> None:
        kept, make = Idempotent(), Maker()
        tasks = await begun(*(kept.answer(request("a"), b"body", make) for _ in range(3)))
        make.open.set()
        first, second, third = await asyncio.gather(*tasks)
        assert first is second is third
        assert make.made == 1
        with pytest.raises(Problem, match="came with another body"):
            await kept.answer(request("a"), b"another", make)

    run_apart(run())


def test_when_the_first_leaves_one_of_those_who_wait_makes_it() -> None:
    async def run() -> None:
        kept, make = Idempotent(), Maker()
        tasks = await begun(*(kept.answer(request("a"), b"body", make) for _ in range(4)))
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.wait(tasks[:1])
        make.open.set()
        one, other = await asyncio.gather(tasks[1], tasks[3])
        assert one is other
        assert make.made == 1

    run_apart(run())


def test_a_failure_is_not_kept() -> None:
    async def run() -> None:
        kept, make = Idempotent(), Maker()

        async def fail() -> Response:
            raise unusable("no")

        with pytest.raises(Problem, match="no"):
            await kept.answer(request("a"), b"body", fail)
        make.open.set()
        assert (await kept.answer(request("a"), b"body", make)).body == b"x"

    run_apart(run())


@pytest.mark.parametrize(("size", "left"), [(1, 64), (answers._KEPT_BYTES // 4, 4)])
def test_so_many_are_kept_and_so_many_bytes(size: int, left: int) -> None:
    async def run() -> None:
        kept, make = Idempotent(), Maker(size)
        make.open.set()
        for index in range(left + 3):
            await kept.answer(request(str(index)), b"", make)
        made = make.made
        await kept.answer(request(str(left + 2)), b"", make)
        await kept.answer(request("3"), b"", make)
        assert make.made == made
        await kept.answer(request("1"), b"", make)
        assert make.made == made + 1

    run_apart(run())
