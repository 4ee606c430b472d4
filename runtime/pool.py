"""What a generation binds is kept for the next one: buffers, execution contexts, recorded graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from .backends.base import Binding, Session, Shape

T = TypeVar("T")

KEPT = 16  # what eight requests at once of a hybrid plan bind for their rows, by an engine each


class Pool:
    """Bindings, and what is made of them, that no generation uses at the moment; safe to share between threads.

    `KEPT` are kept at most; those that were used last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[Hashable, Any]] = []
        self._closed = False

    def lease(self) -> Lease:
        """What one generation takes of it."""
        return Lease(self)

    def close(self) -> None:
        """Let go of all; what is in use is not kept afterwards. A second call does nothing."""
        with self._lock:
            self._closed = True
            self._free.clear()

    def taken(self, key: Hashable) -> Any | None:
        """Something kept under `key`, which is then the caller's alone; None where there is nothing."""
        with self._lock:
            for index in reversed(range(len(self._free))):
                if self._free[index][0] == key:
                    return self._free.pop(index)[1]
        return None

    def keep(self, things: list[tuple[Hashable, Any]]) -> None:
        """Take things back, with the keys they were had under; the pool holds the keys too."""
        with self._lock:
            if not self._closed:
                self._free = [*self._free, *things][-KEPT:]


class Lease:
    """What a generation has of a pool, until the `with` around it ends; it is kept unless that is by an error."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._had: list[tuple[Hashable, Any]] = []

    def bind(self, session: Session, shapes: Mapping[str, Shape]) -> Binding:
        """A binding of a session, its inputs all zero as in one that is new; raises as `Session.bind`."""
        key = (session, tuple(sorted((name, tuple(shape)) for name, shape in shapes.items())))
        binding: Binding | None = self._pool.taken(key)
        if binding is None:
            binding = session.bind(shapes)
        else:
            for array in binding.inputs.values():
                array.fill(0)
        self._had.append((key, binding))
        return binding

    def take(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made under this key for an earlier generation, or is made now."""
        kept: T | None = self._pool.taken(key)
        thing = make() if kept is None else kept
        self._had.append((key, thing))
        return thing

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        had, self._had = self._had, []
        # A run that failed, or was left alone, may have left anything behind.
        if kind is None:
            self._pool.keep(had)
