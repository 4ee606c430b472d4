"""The same key, the same answer: made once, by whoever is there to make it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from tandemrt.serve import answers
from tandemrt.serve.answers import Idempotent, Key, key_of
from tandemrt.serve.problems import Problem, overdue, unusable

from .conftest import run_apart

WAITING = 5


class Maker:
    """Makes answers when it is let, and counts them; or fails. given_s: the seconds that each try had."""

    def __init__(self, size: int = 1, failure: Exception | None = None) -> None:
        self.made, self.size, self.failure = 0, size, failure
        self.given_s: list[float] = []
        self.open = asyncio.Event()

    async def __call__(self, seconds: float) -> Response:
        self.given_s.append(seconds)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.made += 1
        return Response(b"x" * self.size)


async def begun(*work: Awaitable[Any]) -> list[asyncio.Future[Any]]:
    tasks = [asyncio.ensure_future(one) for one in work]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def asked(kept: Idempotent, make: Maker, name: str = "a", made_of: str = "body", seconds: float = 10) -> Any:
    return kept.answer(Key(name, ("/", made_of)), seconds, make)


def test_a_key_is_of_what_came_with_it() -> None:
    def key(name: str | None, path: str, digest: str) -> Key | None:
        headers = [(b"host", b"here")] + ([] if name is None else [(b"idempotency-key", name.encode())])
        return key_of(Request({"type": "http", "path": path, "query_string": b"", "headers": headers}), digest)

    assert key(None, "/", "") is None
    assert key("a", "/", "digest") == key("a", "/", "digest")
    assert len({key("a", "/", "digest"), key("b", "/", "digest"), key("a", "/x", "digest"), key("a", "/", "")}) == 4
    for name in ("", "x" * 201):
        with pytest.raises(Problem, match="expected 1 to 200 characters"):
            key(name, "/", "")


def test_those_who_come_meanwhile_wait_for_the_first() -> None:
    async def run() -> None:
        kept, make = Idempotent(WAITING), Maker()
        tasks = await begun(*(asked(kept, make) for _ in range(3)))
        assert "a" in kept and "b" not in kept
        make.open.set()
        first, second, third = await asyncio.gather(*tasks)
        assert first is second is third
        assert make.made == 1
        with pytest.raises(Problem, match="came with another body"):
            await asked(kept, make, made_of="another")

    run_apart(run())


def test_when_the_first_leaves_one_of_those_who_wait_makes_it_in_what_is_left_of_his_time() -> None:
    async def run() -> None:
        kept, make = Idempotent(WAITING), Maker()
        tasks = await begun(*(asked(kept, make) for _ in range(4)))
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.wait(tasks[:1])
        make.open.set()
        one, other = await asyncio.gather(tasks[1], tasks[3])
        assert one is other
        assert make.made == 1
        first, second = make.given_s
        assert (first, 9 < second <= 9.96) == (10, True)

    run_apart(run())


@pytest.mark.parametrize("failure", [unusable("no"), overdue(10), RuntimeError("broken")])
def test_a_failure_is_that_of_all_who_wait_and_is_not_kept(failure: Exception) -> None:
    async def run() -> None:
        kept, make = Idempotent(WAITING), Maker(failure=failure)
        tasks = await begun(*(asked(kept, make) for _ in range(3)))
        make.open.set()
        await asyncio.wait(tasks)
        assert [one.exception() for one in tasks] == [failure] * 3
        assert len(make.given_s) == 1
        make.failure = None
        assert (await asked(kept, make)).body == b"x"

    run_apart(run())


def test_who_waits_has_a_deadline_of_his_own_and_so_many_may() -> None:
    async def run() -> None:
        kept, make = Idempotent(2), Maker()
        tasks = await begun(asked(kept, make), asked(kept, make, seconds=0.1), asked(kept, make))
        with pytest.raises(Problem, match="As many requests wait as may") as full:
            await asked(kept, make)
        assert full.value.status == 429
        with pytest.raises(Problem, match=r"longer than 0\.1 s") as late:
            await tasks[1]
        assert late.value.status == 504
        again = await begun(asked(kept, make))  # in the place that is free
        make.open.set()
        first, *others = await asyncio.gather(tasks[0], tasks[2], *again)
        assert all(one is first for one in others)
        assert make.made == 1
        assert await asked(kept, make) is first

    run_apart(run())


@pytest.mark.parametrize(("size", "left"), [(1, 64), (answers._KEPT_BYTES // 4, 4)])
def test_so_many_are_kept_and_so_many_bytes(size: int, left: int) -> None:
    async def run() -> None:
        kept, make = Idempotent(WAITING), Maker(size)
        make.open.set()
        for index in range(left + 3):
            await asked(kept, make, str(index))
        made = make.made
        await asked(kept, make, str(left + 2))
        await asked(kept, make, "3")
        assert make.made == made
        await asked(kept, make, "1")
        assert make.made == made + 1

    run_apart(run())


def test_those_that_are_being_made_do_not_drive_out_those_that_are() -> None:
    async def run() -> None:
        kept, make, making = Idempotent(WAITING), Maker(), Maker()
        make.open.set()
        first = await asked(kept, make)
        tasks = await begun(*(asked(kept, making, str(index)) for index in range(answers._KEPT + 1)))
        assert await asked(kept, make) is first
        making.open.set()
        await asyncio.gather(*tasks)
        assert "a" not in kept and "0" not in kept and "1" in kept

    run_apart(run())


def test_who_makes_it_in_second_place_is_told_of_all_of_his_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(seconds: float) -> Response:
        raise overdue(seconds)

    async def run() -> None:
        kept, now = Idempotent(WAITING), [1000.0]
        monkeypatch.setattr(answers, "monotonic", lambda: now[0])
        first, second = await begun(asked(kept, Maker()), kept.answer(Key("a", ("/", "body")), 10, late))
        now[0] += 4
        first.cancel()
        with pytest.raises(Problem, match=r"longer than 10 s"):
            await second

    run_apart(run())


def test_they_are_kept_for_ten_minutes_from_when_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        kept, make, now = Idempotent(WAITING), Maker(), [1000.0]
        monkeypatch.setattr(answers, "monotonic", lambda: now[0])
        (making,) = await begun(asked(kept, make))
        now[0] += 600
        make.open.set()
        first = await making
        now[0] += 599
        assert await asked(kept, make) is first
        now[0] += 2
        assert await asked(kept, make) is not first

    run_apart(run())
