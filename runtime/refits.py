"""Engines that hold LoRAs in their weights: one set of LoRAs at a time in all of a pipeline's, and whose turn it is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from .backends.base import Array, Session
from .base_weights import BaseWeights, Changes
from .bundle import Bundle
from .engine_search import Found
from .lora_slots import Adapter
from .stream import Events
from .trace import span

# A generation that nobody advances for so long, as of a stream that was put aside, lets others go before it.
PATIENCE_S = 1.0
_POLL_S = 0.05

Loras = Mapping[str, tuple[Adapter, ...]]
"""LoRAs by the component whose weights are to hold them; those that are not listed hold none."""


class Refitting(Protocol):
    """A session whose engine takes other weights; see `TensorRtSession.refit`."""

    def refit(self, base: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
        """Compute with the base's weights and, added to those that `changes` names, what it says."""


@dataclass(eq=False, slots=True)
class _Engine:
    """An engine that can be refitted; `holds` tells its LoRAs, None where its weights may be anything."""

    name: str
    session: Refitting
    holds: tuple[Any, ...] | None = ()


@dataclass(eq=False, slots=True)
class _Turn:
    """A generation, and since when nobody advances it; None while somebody does."""

    loras: Loras
    idle_since: float | None = None


class Refits:
    """The engines of a pipeline that can be refitted, and the generations that run beside each other on them.

    Generations of one set of LoRAs, or of none, run at once. One of another set waits until those before it are done,
    and then has all engines refitted, each from the base's weights. A generation is never waited for while it waits
    itself, so that none waits for ever: one that is put aside between two events loses its turn when another has waited
    for a while, and has it again when it goes on.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._condition = threading.Condition()  # held while engines are refitted
        self._engines: dict[Session, _Engine] = {}
        self._bases: dict[str, BaseWeights] = {}
        self._waiting: deque[_Turn] = deque()
        self._running: list[_Turn] = []
        self._loras: Loras = {}

    def opened(self, name: str, found: Found, session: Session) -> None:
        """An engine of component `name` was loaded, and holds the base's weights."""
        if found.engine.ingredients.refittable:
            with self._condition:
                self._engines[session] = _Engine(name, cast("Refitting", session))

    def ready(self, session: Session) -> None:
        """Have an engine, where it can be refitted, hold the LoRAs of the generation that has its turn and asks.

        Raises:
            EngineError, ExecutionError: see `TensorRtSession.refit`.
            BundleError: the bundle's weights are not what the manifest says, or LoRAs cannot be put into them.
        """
        with self._condition:
            if session in self._engines:
                self._refit(self._engines[session])

    def in_turn(self, loras: Loras, events: Events, before: Callable[[], None]) -> Events:
        """A generation whose every event is made while the engines hold its LoRAs.

        before: called again and again while it waits; what it raises ends the generation.

        Raises:
            EngineError, ExecutionError, BundleError: as of `ready`; what comes next is refitted from the base again.
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

    def close(self) -> None:
        """Forget the engines, which are others' to close."""
        with self._condition:
            self._engines.clear()
            self._bases.clear()

    def _begin(self, turn: _Turn, before: Callable[[], None]) -> None:
        """Wait until it is this generation's turn, and have the engines hold its LoRAs."""
        with self._condition:
            if turn in self._running:
                turn.idle_since = None
                return
            self._waiting.append(turn)
            try:
                while not self._is_next(turn):
                    self._condition.wait(_POLL_S)
                    before()
                if not (self._running and _same(self._running, turn)):
                    self._running, self._loras = [], turn.loras
                    for engine in self._engines.values():
                        self._refit(engine)
                turn.idle_since = None
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

    def _refit(self, engine: _Engine) -> None:
        # At scale 0 the base's own weights.
        own = [one for one in self._loras.get(engine.name, ()) if one.scale]
        wanted = tuple(one.key for one in own)
        if engine.holds == wanted:
            return
        engine.holds = None
        if engine.name not in self._bases:
            # Proved by their paths once they are open: what came in the place of a file since the bundle was opened is
            # found, unless it went again in between. Who writes into a file afterwards changes what is read.
            base = BaseWeights(self._bundle.model_path(engine.name))
            self._bundle.check_component(engine.name)
            self._bases[engine.name] = base
        base = self._bases[engine.name]
        with span("refit", engine.name):
            engine.session.refit(base, Changes(base, own))
        engine.holds = wanted


def _same(running: list[_Turn], turn: _Turn) -> bool:
    """Whether generations hold the LoRAs of another one; of none it is no matter."""
    return not running or _key(running[0].loras) == _key(turn.loras)


def _key(loras: Loras) -> dict[str, tuple[Any, ...]]:
    keys = {name: tuple(one.key for one in own if one.scale) for name, own in loras.items()}
    return {name: key for name, key in keys.items() if key}
