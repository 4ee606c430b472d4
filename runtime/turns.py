"""Whose turn it is where generations of one set of LoRAs alone run beside each other."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .refits import Loras
from .stream import Events

# A generation that nobody advances for so long, as of a stream that was put aside, lets others go before it.
PATIENCE_S = 1.0
_POLL_S = 0.05


@dataclass(eq=False, slots=True)
class _Turn:
    """A generation, and since when nobody advances it; None while somebody does."""

    loras: Loras
    idle_since: float | None = None


class Turns:
    """The generations of a pipeline that run beside each other; safe to share between threads.

    Generations of one set of LoRAs run at once; none at all is a set like others. One of another set waits until those
    before it are done, and then has engines hold its own. A generation is never waited for while it waits itself, so
    that none waits for ever: one that is put aside between two events loses its turn when another has waited for a
    while, and has it again when it goes on.
    """

    def __init__(self, hold: Callable[[Loras], None]) -> None:
        """Nobody runs yet; hold: has the engines hold other LoRAs, while nothing runs. See `Refits.hold`."""
        self._hold = hold
        self._condition = threading.Condition()  # held while engines are refitted
        self._waiting: deque[_Turn] = deque()
        self._running: list[_Turn] = []
        self._advances = 0

    def alone(self) -> int | None:
        """None while several generations are advanced; else a number that is another one once a second one was."""
        with self._condition:
            advanced = [one for one in self._running if one.idle_since is None]
            return self._advances if len(advanced) <= 1 else None

    def in_turn(self, loras: Loras, events: Events, before: Callable[[], None]) -> Events:
        """A generation whose every event is made while the engines hold its LoRAs.

        before: called again and again while it waits; what it raises ends the generation.

        Raises:
            EngineError, ExecutionError, BundleError: as of `Refits.hold`.
        """
        turn = _Turn(loras)
        try:
            while True:
                self._begin(turn, before)
                try:
                    event = next(events)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                finally:
                    turn.idle_since = time.monotonic()
                yield event
        finally:
            events.close()
            with self._condition:
                self._running = [one for one in self._running if one is not turn]
                self._condition.notify_all()

    def _begin(self, turn: _Turn, before: Callable[[], None]) -> None:
        """Wait until it is this generation's turn, and have the engines hold its LoRAs."""
        with self._condition:
            if turn in self._running:
                turn.idle_since = None
                self._advances += 1
                return
            self._waiting.append(turn)
            try:
                while not self._is_next(turn):
                    self._condition.wait(_POLL_S)
                    before()
                if not (self._running and _same(self._running, turn)):
                    self._running = []
                    self._hold(turn.loras)
                turn.idle_since = None
                self._advances += 1
                self._running = [*self._running, turn]
            finally:
                self._waiting.remove(turn)
                self._condition.notify_all()

    def _is_next(self, turn: _Turn) -> bool:
        if self._waiting[0] is not turn:
            return False
        idle_since = [one.idle_since for one in self._running]
        long_ago = time.monotonic() - PATIENCE_S
        return _same(self._running, turn) or all(since is not None and since <= long_ago for since in idle_since)


def _same(running: list[_Turn], turn: _Turn) -> bool:
    """Whether generations hold the LoRAs of another one; of none it is no matter."""
    return not running or _key(running[0].loras) == _key(turn.loras)


def _key(loras: Loras) -> dict[str, tuple[Any, ...]]:
    keys = {name: tuple(one.key for one in own if one.scale) for name, own in loras.items()}
    return {name: key for name, key in keys.items() if key}
