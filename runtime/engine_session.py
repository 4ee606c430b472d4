"""A component on its compiled engines: those that fit the calls' shapes, found in the user's cache and loaded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from .backends import open_engine, open_session, target_here
from .backends.base import Binding, Session, Shape
from .backends.buffers import symbol_sizes
from .bundle import Bundle
from .engine_files import Engine
from .engine_search import Found, find_engine, fitting_engine, has_engine
from .errors import EngineError, ExecutionError
from .manifest import Component
from .targets import ENGINES_ONLY, Target
from .variant import PLAIN, Variant


def open_component(
    bundle: Bundle, name: str, target: Target, threads: int | None, variant: Variant = PLAIN, *, streams: int = 1
) -> Session:
    """A component on a target: on engines that were built for it, else on the bundle's own graph where that can run.

    variant: what engines must be, or more; of anything but `PLAIN` there are engines alone. The first that fits says
        which variant all of the session's engines are.
    streams: as of `open_session`.

    Raises:
        TargetError: the target cannot run here.
        ExecutionError: the backend cannot load the graph.
        EngineError: the cache of engines is not the user's own, or there is no engine of the variant.
    """
    asked = engine_target(bundle, name, target)
    only_engines = target.backend in ENGINES_ONLY or variant != PLAIN

    def load(found: Found) -> Session:
        return open_engine(found, asked, threads=threads, streams=streams)

    def graph() -> Session:
        return open_session(bundle.model_path(name), asked, threads=threads, streams=streams)

    if only_engines:
        return EngineSession(bundle, name, asked, load, variant=variant)
    return EngineSession(bundle, name, asked, load, graph) if has_engine(bundle, name, asked) else graph()


def engine_target(bundle: Bundle, name: str, target: Target) -> Target:
    """A component's target as engines are looked up for it here.

    Raises:
        TargetError: the target runs engines alone, and cannot here.
    """
    asked = target.of_component(bundle.component(name))
    return target_here(asked) if target.backend in ENGINES_ONLY else asked


class EngineSession:
    """Engines behind the interface of a model; see `Session`. Which engine runs is decided by the shapes bound.

    variant: what all of the engines are.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        target: Target,
        load: Callable[[Found], Session],
        otherwise: Callable[[], Session] | None = None,
        *,
        variant: Variant = PLAIN,
    ) -> None:
        """Nothing is loaded yet.

        target: as `find_engine` takes it.
        otherwise: loads the bundle's own graph, for shapes that no engine fits; where None they are an error.
        variant: as of `open_component`.

        Raises:
            EngineError: there is no engine of a variant other than `PLAIN`.
        """
        described: Component | Engine = bundle.component(name)
        if variant != PLAIN:
            described = fitting_engine(bundle, name, target, variant=variant).engine
            variant = described.ingredients.variant
        self.inputs, self.outputs, self.variant = described.inputs, described.outputs, variant
        self._bundle, self._name, self._target = bundle, name, target
        self._load, self._otherwise = load, otherwise
        self._lock = threading.Lock()
        self._by_shapes: dict[tuple[tuple[str, Shape], ...], Session] = {}
        self._by_folder: dict[Path | None, Session] = {}
        self._closed = False

    def bind(self, input_shapes: Mapping[str, Shape]) -> Binding:
        """Allocate buffers for these input shapes; see `Session.bind`.

        Raises:
            EngineError: no engine fits them, or it is damaged.
        """
        symbol_sizes(self._name, self.inputs, input_shapes)
        key = tuple(sorted((name, tuple(shape)) for name, shape in input_shapes.items()))
        with self._lock:
            if self._closed:
                raise ExecutionError(self._name, "the model is closed", remedy="Open it again.")
            if key not in self._by_shapes:
                self._by_shapes[key] = self._session(dict(key))
            session = self._by_shapes[key]
        return session.bind(input_shapes)

    def close(self) -> None:
        """Free the engines; a second call does nothing."""
        with self._lock:
            self._closed = True
            for session in self._by_folder.values():
                session.close()
            self._by_folder.clear()
            self._by_shapes.clear()

    def _session(self, shapes: Mapping[str, Shape]) -> Session:
        try:
            found = find_engine(self._bundle, self._name, self._target, shapes, variant=self.variant)
        except EngineError:
            if self._otherwise is None:
                raise
            return self._kept(None, self._otherwise)
        return self._kept(found.folder, lambda: self._load(found))

    def _kept(self, folder: Path | None, load: Callable[[], Session]) -> Session:
        if folder not in self._by_folder:
            self._by_folder[folder] = load()
        return self._by_folder[folder]
