"""What a generation binds is kept for the next one: buffers, execution contexts, recorded graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from .backends.base import Binding, Session, Shape
from .errors import ExecutionError

T = TypeVar("T")
Things = list[tuple[Hashable, Any]]

GENERATIONS = 8  # as many as may run at once and find all that they left
THINGS = 16  # of each: what its denoisers, ControlNets and decoders are bound to, in several sizes


class Pool:
    """What generations left, those that were used last at the end; safe to share between threads."""

    def __init__(self) -> None:
        # Garbage may be collected while it is held, and a stream in it be closed, which gives back what it has leased.
        self._lock = threading.RLock()
        self._left: list[Things] = []
        self._closed = False

    def lease(self) -> Lease:
        """What one generation takes of it."""
        return Lease(self)

    def close(self) -> None:
        """Let go of all; what is in use is not kept afterwards. A second call does nothing."""
        self._closed = True
        self.clear()

    def clear(self) -> bool:
        """Let go of all; whether there was any."""
        with self._lock:
            left, self._left = self._left, []
        return bool(left)

    def adopt(self, key: Hashable) -> Things:
        """All that one generation left, which had something of this key if any had; it is the caller's then."""
        with self._lock:
            last_used = [*reversed(self._left)]
            having = (left for left in last_used if any(one == key for one, _ in left))
            adopted = next(having, last_used[0] if last_used else None)
            self._left = [left for left in self._left if left is not adopted]
            return adopted or []

    def keep(self, things: Things) -> None:
        """Take back what a generation leaves, with the keys it was had under."""
        with self._lock:
            left = [*self._left, things[-THINGS:]] if things and not self._closed else self._left
            # Let go of when the lock is: a GPU takes its time.
            self._left, dropped = left[-GENERATIONS:], left[:-GENERATIONS]
        del dropped


class Lease:
    """What a generation has of a pool, until the `with` around it ends; it is kept unless that is by an error.

    A generation has what another one left as a whole, since graphs are recorded on bindings that lie beside them.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._had: Things = []
        self._spare: Things | None = None

    def bind(self, session: Session, shapes: Mapping[str, Shape]) -> Binding:
        """A binding of a session, its inputs all zero as in one that is new; raises as `Session.bind`."""
        key = (session, tuple(sorted((name, tuple(shape)) for name, shape in shapes.items())))
        binding: Binding = self.take(key, lambda: session.bind(shapes))
        for array in binding.inputs.values():
            array.fill(0)
        return binding

    def take(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made under this key for an earlier generation, or is made now; raises as `make`."""
        if self._spare is None:
            self._spare = self._pool.adopt(key)
        index = next((index for index, (one, _) in enumerate(self._spare) if one == key), None)
        thing: T = self._made(make) if index is None else self._spare.pop(index)[1]
        self._had.append((key, thing))
        return thing

    def give_back(self, thing: object) -> None:
        """What is not used any more, as by this generation's next picture it may be."""
        self._spare = [*(self._spare or []), *(one for one in self._had if one[1] is thing)]
        self._had = [one for one in self._had if one[1] is not thing]

    def _made(self, make: Callable[[], T]) -> T:
        try:
            return make()
        except ExecutionError:
            # It may be memory that is lacking.
            spare, self._spare = self._spare, []
            if not (self._pool.clear() or spare):
                raise
            del spare
        return make()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A run that failed, or was left alone, may have left anything behind.
        self._pool.keep([*(self._spare or []), *(self._had if kind is None else [])])
        self._had, self._spare = [], None
