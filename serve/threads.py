"""Threads that the end of the process does not wait for: a call of a model that hangs is on one for good."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """So many threads at most, made when they are first needed; what comes while all of them work waits."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._threads: list[threading.Thread] = []
        self._works: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """What work makes, or raises, on one of the threads."""
        made: Future[T] = Future()
        self._works.put(partial(_do, work, made))
        if len(self._threads) < self._most:
            self._threads.append(threading.Thread(target=self._walk, name="tandemrt-serve", daemon=True))
            self._threads[-1].start()
        return asyncio.wrap_future(made)

    def close(self) -> None:
        """End each thread when it has done what it is at."""
        for _ in self._threads:
            self._works.put(None)

    def _walk(self) -> None:
        while (work := self._works.get()) is not None:
            work()
            del work  # and what it made, while the next is waited for


def _do(work: Callable[[], T], made: Future[T]) -> None:
    if not made.set_running_or_notify_cancel():
        return
    try:
        made.set_result(work())
    except BaseException as error:
        made.set_exception(error)
        del work, made  # which the error's traceback would keep
