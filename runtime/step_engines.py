"""The step engines that the user's cache has for a bundle on a target."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .backends import open_engine
from .backends.base import Session, Shape
from .bundle import Bundle
from .engine_files import Engine, check_engine_files
from .engine_search import Found, engines_of, fitted
from .engine_session import engine_target
from .errors import EngineError, ExecutionError
from .manifest import TensorSpec
from .step_sampler import Key, StepEngine, history_of
from .targets import Target
from .trace import span
from .variant import Variant


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a step engine must be for the rows that it is to run.

    history: how many earlier predictions the plan carries. shapes: of an engine's inputs, by what inputs it has.
    """

    variant: Variant
    history: int
    shapes: Callable[[Sequence[TensorSpec]], Mapping[str, Shape]]

    def fitted(self, folder: Path, engine: Engine) -> Found | None:
        """The engine with the profile to run it in, where it is what is wanted."""
        if not engine.ingredients.variant.serves(self.variant) or history_of(engine.inputs) < self.history:
            return None
        return fitted(folder, engine, self.shapes(engine.inputs))


class StepEngines:
    """Step engines by what a plan wants of them; safe to share between threads.

    The cache is looked through once for each denoiser, when a plan first runs it: what is built later is found by
    those who open the bundle anew. An engine is loaded once, when it is first needed.
    """

    def __init__(self, bundle: Bundle, target: Target, threads: int | None) -> None:
        self._bundle, self._target, self._threads = bundle, target, threads
        self._lock = threading.RLock()
        self._listed: dict[str, dict[Path, Engine]] = {}
        self._sessions: dict[Path, Session] = {}
        self._closed = False

    def close(self) -> None:
        """Free the engines; a second call does nothing, none can be had after it."""
        with self._lock:
            self._closed = True
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()

    def load(self, wanted: Mapping[Key, Wanted], *, before: Callable[[], None]) -> dict[Key, StepEngine] | None:
        """An engine for everything that is wanted; None, and nothing is loaded, where the cache lacks one.

        One whose files are not those that were built is passed over from then on.

        before: called before each is loaded; what it raises ends the loading.

        Raises:
            EngineError: the cache belongs to another user, or everybody may write to it.
            TargetError: the target cannot run here.
            ExecutionError: the engines are closed, or the backend refuses one.
        """
        with self._lock:
            if self._closed:
                raise ExecutionError("pipeline", "used after it was closed", remedy="Open it again.")
            while (chosen := self._chosen(wanted)) is not None:
                engines = {}
                for (name, guided), found in chosen.items():
                    before()
                    try:
                        session = self._session(name, found)
                    except EngineError:
                        del self._listed[name][found.folder]
                        break
                    engines[name, guided] = StepEngine(session, found.engine.ingredients.variant)
                else:
                    return engines
        return None

    def _chosen(self, wanted: Mapping[Key, Wanted]) -> dict[Key, Found] | None:
        chosen = {}
        for key, one in wanted.items():
            fitting = [one.fitted(folder, engine) for folder, engine in self._of(key[0]).items()]
            found = min(filter(None, fitting), key=lambda found: found.order, default=None)
            if found is None:
                return None
            chosen[key] = found
        return chosen

    def _of(self, name: str) -> dict[Path, Engine]:
        """A component's step engines that run here, by their folders."""
        if name not in self._listed:
            target = engine_target(self._bundle, name, self._target)
            self._listed[name] = {
                folder: msgspec.structs.replace(engine, layers=())  # most of a sidecar, and nothing to run it by
                for folder, engine, misfit in engines_of(self._bundle, name, target)
                if engine.ingredients.variant.step and misfit is None
            }
        return self._listed[name]

    def _session(self, name: str, found: Found) -> Session:
        if found.folder not in self._sessions:
            check_engine_files(found.folder, found.engine)
            target = engine_target(self._bundle, name, self._target)
            with span("load", f"{name} step"):
                self._sessions[found.folder] = open_engine(found, target, threads=self._threads)
        return self._sessions[found.folder]
