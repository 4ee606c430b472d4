"""Engines that hold LoRAs in their weights: one set of LoRAs at a time in all of a pipeline's."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from .backends.base import Array, Session
from .base_weights import BaseWeights, Changes
from .bundle import Bundle
from .engine_search import Found
from .lora_slots import Adapter
from .trace import span

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


class Refits:
    """The engines of a pipeline that can be refitted, each from the base's weights; see `Turns`."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self._engines: dict[Session, _Engine] = {}
        self._bases: dict[str, BaseWeights] = {}
        self._loras: Loras = {}

    def opened(self, name: str, found: Found, session: Session) -> None:
        """An engine of component `name` was loaded, and holds the base's weights."""
        if found.engine.ingredients.refittable:
            with self._lock:
                self._engines[session] = _Engine(name, cast("Refitting", session))

    def ready(self, session: Session) -> None:
        """Have an engine, where it can be refitted, hold what all are to; it does not run yet.

        Raises:
            EngineError, ExecutionError: see `TensorRtSession.refit`.
            BundleError: the bundle's weights are not what the manifest says, or LoRAs cannot be put into them.
        """
        with self._lock:
            if session in self._engines:
                self._refit(self._engines[session])

    def hold(self, loras: Loras) -> None:
        """Have all engines hold these LoRAs, and those that are loaded later; nothing runs meanwhile.

        Raises:
            EngineError, ExecutionError, BundleError: as of `ready`; what comes next is refitted from the base again.
        """
        with self._lock:
            self._loras = loras
            for engine in self._engines.values():
                self._refit(engine)

    def close(self) -> None:
        """Forget the engines, which are others' to close."""
        with self._lock:
            self._engines.clear()
            self._bases.clear()

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
