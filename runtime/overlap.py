"""Consecutive generations whose parts overlap: the next one's text, this one's rows, the last one's pictures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeAlias, TypeVar

from .errors import ExecutionError, TandemError
from .output import Output
from .stream import Events, Stage

T = TypeVar("T")
Begin: TypeAlias = Callable[[threading.Event], Events]


class _Part:
    """A thread that does one part of every generation, in their order."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, f"tandemrt-{name}")

    def submit(self, work: Callable[[], T]) -> Future[T]:
        return self._pool.submit(copy_context().run, work)

    def drop(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait for what has begun."""
        self._pool.shutdown()


class _UnderWay:
    """The generations that are under way, each in a part of its own or before it, in their order."""

    def __init__(self) -> None:
        self._parts = _Part("text"), _Part("rows"), _Part("pictures")
        self._cancelled = threading.Event()
        self._begun: deque[Future[Events]] = deque()
        self._outputs: deque[Future[Output]] = deque()

    def __len__(self) -> int:
        return len(self._outputs)

    @property
    def full(self) -> bool:
        return len(self) >= len(self._parts)

    def begin(self, begin: Begin) -> None:
        text, rows, pictures = self._parts
        begun = text.submit(partial(begin, self._cancelled))
        encoded = text.submit(partial(_until, Stage.ENCODED, begun))
        sampled = rows.submit(partial(_until, Stage.SAMPLED, encoded))
        self._begun.append(begun)
        self._outputs.append(pictures.submit(partial(_output, sampled)))

    def fail(self, error: Exception) -> None:
        """Have an error raised after the outputs of all that has begun."""
        failed: Future[Output] = Future()
        failed.set_exception(error)
        self._outputs.append(failed)

    def output(self) -> Output:
        """The first one's output, which is under way no more; raises what it failed with."""
        output = self._outputs.popleft()
        try:
            made = output.result()
        finally:
            del output  # it holds the error, whose traceback holds this frame
        self._begun.popleft()
        return made

    def cancel(self) -> None:
        """Have all end as soon as they can."""
        for part in self._parts:
            part.drop()
        self._cancelled.set()

    def close(self) -> None:
        """Cancel all, and have each let go of what it has."""
        self.cancel()
        for part in self._parts:
            part.close()
        while self._begun:  # none is left behind here, which an error's traceback holds
            begun = self._begun.popleft()
            if not begun.cancelled() and begun.exception() is None:
                begun.result().close()


def overlapped(generations: Iterable[Begin]) -> Iterator[Output]:
    """What generations make, in their order; three at most are under way, each in another part.

    generations: each is begun by a call with an event that cancels it; the next is asked for when there is room. An
    error, also of the iterable itself, is raised in its turn, and ends the others. Closing the iterator cancels them,
    and waits for none.
    """
    under_way, failed = _UnderWay(), list[TandemError]()
    try:
        yield from _outputs(generations, under_way)
    except GeneratorExit:
        # Put aside, it may be garbage that is collected amid anything, also on a thread that what runs waits for.
        under_way.cancel()
        raise
    except TandemError as error:
        failed.append(error.again())  # apart from what ran, whose memory a next try may need
    except BaseException:
        under_way.close()
        raise
    under_way.close()
    if failed:
        raise failed.pop()  # held by no frame of its own traceback


def _outputs(generations: Iterable[Begin], under_way: _UnderWay) -> Iterator[Output]:
    taken = iter(generations)
    while True:
        try:
            begin = next(taken, None)
        except Exception as error:  # whatever it is, it is the caller's own, and comes when its turn does
            under_way.fail(error)
            break
        if begin is None:
            break
        under_way.begin(begin)
        if under_way.full:
            yield under_way.output()
    while under_way:
        yield under_way.output()


def _until(stage: Stage, earlier: Future[Events]) -> Events:
    """The generation itself, when it has come so far."""
    try:
        events = earlier.result()
    finally:
        del earlier  # it holds the error, whose traceback holds this frame
    if any(event is stage for event in events):
        return events
    raise ExecutionError("generation", f"ended before it was {stage.value}")


def _output(sampled: Future[Events]) -> Output:
    try:
        events = sampled.result()
    finally:
        del sampled  # as above
    try:
        while True:
            next(events)
    except StopIteration as end:
        made: Output = end.value
        return made
