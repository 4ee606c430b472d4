"""A generation that runs row by row, as its events are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from enum import Enum
from typing import TypeAlias

from .errors import ExecutionError, TandemError
from .output import Output, StepEvent


class Stage(Enum):
    """How far a generation has come, told between its events: what follows may run beside another's earlier part.

    CLOUD: a server is asked for the steps that follow, which makes no events.
    """

    CLOUD = "cloud"
    ENCODED = "encoded"
    SAMPLED = "sampled"


Events: TypeAlias = Generator["StepEvent | Stage", None, Output]


class Stream(Iterator[StepEvent]):
    """Events of a running generation, one a row; `result` gives what it made.

    One thread iterates or asks for the result; any may cancel: the loop over the events then ends with CancelledError,
    as it ends with any other error of the generation.
    """

    def __init__(self, events: Callable[[threading.Event], Events]) -> None:
        self._cancelled = threading.Event()
        self._events = events(self._cancelled)
        self._output: Output | None = None
        self._failure: TandemError | None = None

    def __next__(self) -> StepEvent:
        while isinstance(event := self._next(), Stage):
            pass
        return event

    def with_stages(self) -> Iterator[StepEvent | Stage]:
        """Iterate as over the events, with the stages among them."""
        while True:
            try:
                event = self._next()
            except StopIteration:
                return
            yield event

    def _next(self) -> StepEvent | Stage:
        try:
            return next(self._events)
        except StopIteration as end:
            self._output = self._output or end.value
            raise
        except TandemError as failure:
            self._failure = failure.again()  # apart from what ran, whose memory a next try may need
            raise

    def result(self) -> Output:
        """Run the rows that are left, if any, and return the output.

        Raises:
            CancelledError: it was cancelled, now or before.
            TandemError: it failed, now or before.
        """
        for _ in self:
            pass
        if self._failure is not None:
            raise self._failure.again()
        if self._output is None:
            raise ExecutionError("generation", "has no result: it was interrupted", remedy="Start it again.")
        return self._output

    def cancel(self) -> None:
        """Stop after the call of a model that is running, from any thread; a model that is loading is loaded first.

        Asking for the next event, or for the result, then raises CancelledError; so does a loop that is under way.
        """
        self._cancelled.set()
