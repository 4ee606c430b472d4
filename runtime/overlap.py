"""Consecutive generations whose parts overlap: the next one's text, this one's rows, the last one's pictures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from .errors import ExecutionError
from .output import Output
from .stream import Events, Stage

T = TypeVar("T")


class _Part:
    """A thread that does one part of every generation, in their order."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, f"tandemrt-{name}")

    def submit(self, work: Callable[[], T]) -> Future[T]:
        return self._pool.submit(copy_context().run, work)

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""
        self._pool.shutdown(cancel_futures=True)


def overlapped(generations: Iterable[Callable[[threading.Event], Events]]) -> Iterator[Output]:
    """What generations make, in their order; three at most are under way, each in another part.

    generations: each is begun by a call with an event that cancels it; the next is asked for when there is room. An
    error is raised in its turn, and ends the others; so does closing the iterator.
    """
    text, rows, pictures = parts = _Part("text"), _Part("rows"), _Part("pictures")
    cancelled, under_way = threading.Event(), deque[Future[Output]]()
    try:
        for begin in generations:
            encoded = text.submit(lambda begin=begin: _until(Stage.ENCODED, begin(cancelled)))  # type: ignore[misc]
            sampled = rows.submit(lambda encoded=encoded: _until(Stage.SAMPLED, encoded.result()))  # type: ignore[misc]
            under_way.append(pictures.submit(lambda sampled=sampled: _output(sampled.result())))  # type: ignore[misc]
            if len(under_way) == len(parts):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        cancelled.set()
        for part in parts:
            part.close()


def _until(stage: Stage, events: Events) -> Events:
    """The generation itself, when it has come so far."""
    if any(event is stage for event in events):
        return events
    raise ExecutionError("generation", f"ended before it was {stage.value}")


def _output(events: Events) -> Output:
    try:
        while True:
            next(events)
    except StopIteration as end:
        made: Output = end.value
        return made
