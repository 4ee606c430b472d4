"""The queue's end: a first picture is given up, and so is a call of a model that does not end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tandemrt.runtime import Pipeline, Request
from tandemrt.serve import queue
from tandemrt.serve.limits import Limits
from tandemrt.serve.metrics import Metrics
from tandemrt.serve.problems import Problem
from tandemrt.serve.protocol import Asked
from tandemrt.serve.queue import Queue
from tandemrt.serve.served import Served
from tandemrt.serve.threads import Threads
from tandemrt.serve.work import Work, work_of

from .asking import Pace
from .conftest import run_apart

JOB: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_free": 3}, "seed": 7, "until": 1}


async def soon(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not true():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


def work(pipe: Pipeline) -> Work:
    return work_of(Asked(**JOB), {}, Served.of(pipe), Limits())


def test_the_first_picture_is_not_waited_for(slow: Pipeline, pace: Pace, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        own, before = Queue(slow, Limits(), Metrics()), pace.runs
        pace.seconds = 0.05
        warming = asyncio.ensure_future(own.warm_up(Request(prompt="", seed=0, steps=100)))
        await soon(lambda: pace.runs > before + 2)
        own.drain()
        await asyncio.wait_for(warming, 20)
        await own.close()
        assert pace.runs < before + 60
        assert own.unready == "it is shutting down"

    run_apart(run())
    assert caplog.text == ""


def test_a_call_that_does_not_end(
    slow: Pipeline, pace: Pace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(queue, "HANGS_S", 0.05)

    async def left(own: Queue) -> None:
        """Ask for what does not end, and leave."""
        before = pace.runs
        asking = asyncio.ensure_future(own.painted(work(slow), 30))
        await soon(lambda: pace.runs > before)
        asking.cancel()
        await soon(lambda: own.unready == "a call of a model does not end")

    async def run() -> None:
        own = Queue(slow, Limits(), Metrics())
        await own.warm_up(Request(prompt="", seed=0))
        with pace.held():
            await left(own)
            with pytest.raises(Problem, match="does not end") as refused:
                await own.painted(work(slow), 30)
            assert refused.value.status == 503
        await soon(lambda: own.unready == "")
        assert (await own.painted(work(slow), 30)).handover is not None
        with pace.held():
            await left(own)
            await asyncio.wait_for(own.close(), 20)
        # Nor does the end of the process wait for it.
        assert all(one.daemon for one in threading.enumerate() if one.name.startswith("tandemrt-serve"))

    run_apart(run())
    assert "calls of models do not end, and are given up: 1" in caplog.text


def test_threads_do_one_thing_each() -> None:
    async def run() -> None:
        threads, going, names = Threads(2), threading.Event(), []

        def work(number: int) -> int:
            names.append(threading.current_thread().ident)
            going.wait(20)
            if number == 3:
                raise ValueError(number)
            return number

        doing = [threads.run(lambda number=number: work(number)) for number in range(5)]  # type: ignore[misc]
        await soon(lambda: len(names) == 2)
        doing[4].cancel()
        await asyncio.sleep(0)  # until it is told
        going.set()
        assert await asyncio.gather(*doing[:3]) == [0, 1, 2]
        with pytest.raises(ValueError, match="3"):
            await doing[3]
        assert await threads.run(lambda: len(names)) == 4
        assert len(set(names)) == 2
        threads.close()

    run_apart(run())
