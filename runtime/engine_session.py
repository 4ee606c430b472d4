"""A component on its compiled engines: those that fit the calls' shapes, found in the user's cache and loaded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from .backends import open_engine, open_session, target_here
from .backends.base import Binding, Session, Shape
from .backends.buffers import symbol_sizes
from .bundle import Bundle
from .engine_files import Found, find_engine, has_engine
from .errors import EngineError, ExecutionError
from .targets import ENGINES_ONLY, Target


def open_component(bundle: Bundle, name: str, target: Target, threads: int | None) -> Session:
    """A component on a target: on engines that were built for it, else on the bundle's own graph where that can run.

    Raises:
        TargetError: the target cannot run here.
        ExecutionError: the backend cannot load the graph.
        EngineError: the cache of engines is not the user's own.
    """
    asked = target.of_component(bundle.component(name))
    if target.backend in ENGINES_ONLY:
        here = target_here(asked)
        return EngineSession(bundle, name, here, lambda found: open_engine(found, here))

    def graph() -> Session:
        return open_session(bundle.model_path(name), asked, threads=threads)

    if not has_engine(bundle, name, asked):
        return graph()
    return EngineSession(bundle, name, asked, lambda found: open_engine(found, asked, threads=threads), graph)


class EngineSession:
    """Engines behind the interface of a model; see `Session`. Which engine runs is decided by the shapes bound."""

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        target: Target,
        load: Callable[[Found], Session],
        otherwise: Callable[[], Session] | None = None,
    ) -> None:
        """Nothing is loaded yet.

        target: as `find_engine` takes it.
        otherwise: loads the bundle's own graph, for shapes that no engine fits; where None they are an error.
        """
        component = bundle.component(name)
        self.inputs, self.outputs = component.inputs, component.outputs
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
            found = find_engine(self._bundle, self._name, self._target, shapes)
        except EngineError:
            if self._otherwise is None:
                raise
            return self._kept(None, self._otherwise)
        return self._kept(found.folder, lambda: self._load(found))

    def _kept(self, folder: Path | None, load: Callable[[], Session]) -> Session:
        if folder not in self._by_folder:
            self._by_folder[folder] = load()
        return self._by_folder[folder]
