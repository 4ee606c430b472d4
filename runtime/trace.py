"""The timeline of a run, in Chrome's Trace Event Format: chrome://tracing and ui.perfetto.dev show it.

What is worth a bar says so with `span`. Spans of a thread lie within one another; work that a thread is given by
another is recorded where it runs in that one's context, `contextvars.copy_context().run`.

Source: "Trace Event Format", complete events (`ph` X), times in microseconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import write_whole

_OFF: AbstractContextManager[None] = nullcontext()


@dataclass(slots=True)
class Trace:
    """What ran when, of all threads that record into it; safe to share between them."""

    events: list[dict[str, Any]] = field(default_factory=list)
    _threads: dict[int, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the calling thread does meanwhile, in place of any other trace."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def add(self, category: str, about: str | int, began: float) -> None:
        """Record what the calling thread has done since a reading of `time.perf_counter`."""
        ended = time.perf_counter()
        thread = threading.get_native_id()
        event = {
            "name": f"{category} {about}".rstrip(),
            "cat": category,
            "ph": "X",
            "ts": began * 1e6,
            "dur": (ended - began) * 1e6,
            "pid": os.getpid(),
            "tid": thread,
            "args": {} if about == "" else {"about": about},
        }
        with self._lock:
            self._threads.setdefault(thread, threading.current_thread().name)
            self.events.append(event)

    def facts(self) -> dict[str, Any]:
        """The trace as JSON-able facts: its events by their beginnings, and the threads' names."""
        with self._lock:  # others may begin to record meanwhile
            threads, events = dict(self._threads), list(self.events)
        names = [
            {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": thread, "args": {"name": name}}
            for thread, name in threads.items()
        ]
        events.sort(key=lambda event: (event["ts"], -event["dur"]))
        return {"displayTimeUnit": "ms", "traceEvents": [*names, *events]}

    def write(self, path: str | Path) -> None:
        """Write the file, which appears whole or not at all.

        Raises:
            OSError: its folder cannot be written, or is full.
        """
        text = json.dumps(self.facts(), indent=None, separators=(",", ":"))
        write_whole(Path(path), lambda stream: stream.write(text.encode("utf-8")))


_CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)


class _Span:
    """A span under way."""

    __slots__ = ("_about", "_began", "_category", "_trace")

    def __init__(self, trace: Trace, category: str, about: str | int) -> None:
        self._trace, self._category, self._about = trace, category, about

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._trace.add(self._category, self._about, self._began)


def span(category: str, about: str | int = "") -> AbstractContextManager[None]:
    """Records what runs within, where the calling thread records at all; otherwise the same object for everyone.

    category: what is done, such as `model`. about: to what, such as the model's name or a row's number.
    """
    trace = _CURRENT.get()
    return _OFF if trace is None else _Span(trace, category, about)


def record(category: str, about: str | int, began: float) -> None:
    """Record as a span what the calling thread has done since `began`, a reading of `time.perf_counter`."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.add(category, about, began)


@contextmanager
def traced(path: str | Path) -> Iterator[Trace]:
    """Record what the calling thread does within, and write the timeline at the end, however that comes.

    Raises:
        OSError: the file cannot be written. Where something failed within, that is raised in its place.
    """
    trace = Trace()
    try:
        with trace.recording():
            yield trace
    except BaseException:
        with suppress(OSError):  # what failed goes before the file
            trace.write(path)
        raise
    trace.write(path)
