"""A component on its compiled engines: those that fit the calls' shapes, found in the user's cache and loaded once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from .backends import open_engine, open_session, target_here
from .backends.base import Binding, Overlapping, Session, Shape
from .backends.buffers import symbol_sizes
from .build_commands import build_command, exact_remedy, rebuild_command
from .bundle import Bundle
from .cache import cache_folder
from .engine_files import Engine, check_engine_files
from .engine_search import Found, fitting_engines, has_engine
from .errors import EngineError, ExecutionError, UntrustedError
from .lora_slots import slot_shapes
from .manifest import Component
from .ran_on import RanOn, engine_run, with_remedies
from .refits import Refits
from .targets import ENGINES_ONLY, Target
from .trace import span
from .variant import PLAIN, Variant

_Key = tuple[tuple[str, Shape], ...]
_Refused = tuple[tuple[str, str], ...]  # why engines cannot be run, each with its remedy


def engine_target(bundle: Bundle, name: str, target: Target) -> Target:
    """A component's target as engines are looked up for it here.

    Raises:
        TargetError: the target runs engines alone, and cannot here.
    """
    asked = target.of_component(bundle.component(name))
    return target_here(asked) if target.backend in ENGINES_ONLY else asked


class Loader:
    """The models of one component on a target, each loaded once for all sessions of it; safe to share."""

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        target: Target,
        threads: int | None = None,
        streams: int = 1,
        cache: Path | None = None,
    ) -> None:
        """Nothing is loaded yet.

        threads, streams: as of `open_session`. cache: as of `cache_folder`.

        Raises:
            TargetError: the target runs engines alone, and cannot here.
        """
        self.bundle, self.name, self.target = bundle, name, engine_target(bundle, name, target)
        self.cache, self.lock = cache_folder(cache), threading.RLock()
        self.closed = False
        self.refits = Refits(bundle)  # a pipeline has one for all its loaders
        self._threads, self._streams, self._runs = threads, streams, 1
        self._loaded: dict[Path | None, Session] = {}
        self._granted: dict[tuple[Variant, _Refused], EngineSession] = {}

    def session(self, variant: Variant = PLAIN, *, refit: bool = False) -> Session:
        """The component on engines that were built for it, else on the bundle's own graph where that can run.

        variant: what engines must be, or more; of anything but `PLAIN` there are engines alone.
        refit: whether they must be such as can be refitted, of which there are engines alone too.

        Raises:
            TargetError: the target cannot run here.
            ExecutionError: the backend cannot load the graph.
            EngineError: the cache of engines is not the user's own, or there is no engine of the variant.
        """
        choosing = (
            self.engines_only
            or variant != PLAIN
            or refit
            or has_engine(self.bundle, self.name, self.target, cache=self.cache)
        )
        return EngineSession(self, variant, refit=refit) if choosing else self.graph()

    def granted(self, variant: Variant, refused: _Refused) -> EngineSession:
        """The session on engines of just this variant, the same one for all that are served by them.

        refused: as of `EngineSession`.
        """
        with self.lock:
            if (variant, refused) not in self._granted:
                self._granted[variant, refused] = EngineSession(self, variant, refused)
            return self._granted[variant, refused]

    def overlap(self, runs: int) -> None:
        """Let so many runs overlap; see `Overlapping`. What is told when it is opened stays as it is."""
        with self.lock:
            self._runs = max(runs, self._runs)
            for session in self._loaded.values():
                if isinstance(session, Overlapping):
                    session.overlap(self._runs)

    @property
    def engines_only(self) -> bool:
        """Whether the target runs no graphs."""
        return self.target.backend in ENGINES_ONLY

    def engine(self, found: Found) -> Session:
        """An engine, its files proved to be those that were built; before it runs, see `Refits.ready`.

        Raises:
            EngineError: they are not, or the backend refuses the engine.
            ExecutionError: the backend refuses the engine.
            TargetError: the target is not installed or was not granted.
        """
        with self.lock:
            if found.folder not in self._loaded:
                variant = found.engine.ingredients.variant
                step = f" {variant.step_kind}" if variant.step else ""
                with span("load", f"{self.name}{step}"):
                    check_engine_files(found.folder, found.engine)
                    opened = open_engine(found, self.target, threads=self._threads, streams=self._streams)
                self.refits.opened(self.name, found, opened)
                self._loaded[found.folder] = opened
                self.overlap(self._runs)
            return self._loaded[found.folder]

    def graph(self) -> Session:
        """The bundle's own graph; raises as `open_session`."""
        with self.lock:
            if None not in self._loaded:
                model = self.bundle.model_path(self.name)
                with span("load", self.name):
                    unchanged = partial(self.bundle.check_component, self.name)
                    threads, streams = self._threads, self._streams
                    opened = open_session(model, self.target, threads=threads, streams=streams, unchanged=unchanged)
                self._loaded[None] = opened
            return self._loaded[None]

    def close(self) -> None:
        """Free them; a second call does nothing."""
        with self.lock:
            self.closed = True
            for session in self._loaded.values():
                session.close()
            self._loaded.clear()


class EngineSession:
    """Engines behind the interface of a model; see `Session`. Which engine runs is decided by the shapes bound.

    An engine that is damaged, or that the backend refuses, is passed over for the next one that fits, or for the graph,
    and `ran_on` tells.

    variant: what the engines are that its inputs are of: the cheapest of those asked for. See `serving`.
    """

    def __init__(
        self, loader: Loader, variant: Variant = PLAIN, refused: _Refused = (), *, refit: bool = False
    ) -> None:
        """Nothing is loaded yet.

        variant, refit: as of `Loader.session`. The graph serves `PLAIN` alone, and no target of engines alone.
        refused: why engines of other variants that come before cannot be run, and what helps.

        Raises:
            EngineError: there is no engine of a variant other than `PLAIN`.
        """
        bundle, name, target = loader.bundle, loader.name, loader.target
        described: Component | Engine = bundle.component(name)
        self._loader, self._bundle, self._name, self._target = loader, bundle, name, target
        self._cache, self._refused = loader.cache, refused
        self._wanted, self._refit = variant, refit
        self._has_graph = variant == PLAIN and not loader.engines_only and not refit
        if variant != PLAIN:
            described = fitting_engines(bundle, name, target, cache=loader.cache, variant=variant)[0].engine
            variant = described.ingredients.variant
        self.inputs, self.outputs, self.variant = described.inputs, described.outputs, variant
        self._by_shapes: dict[_Key, tuple[Session, RanOn]] = {}
        self._serving: dict[_Key, EngineSession] = {}

    def bind(self, input_shapes: Mapping[str, Shape]) -> Binding:
        """Allocate buffers for these input shapes; see `Session.bind`.

        Raises:
            EngineError: no engine fits them, or it is damaged.
        """
        return self._chosen(input_shapes)[0].bind(input_shapes)

    def ran_on(self, shapes: Mapping[str, Shape]) -> RanOn:
        """What a binding of these shapes runs on; raises as `bind`."""
        return self._chosen(shapes)[1]

    def serving(self, shapes: Mapping[str, Shape]) -> Session:
        """The session for a call of these shapes, those of LoRA slots left out.

        Where the cheapest variant has no engine for them that can be run, and another has one, that is a session of
        the other's inputs.

        Raises:
            EngineError: there is no engine for them that can be run, with the command that builds one.
            ExecutionError: the model is closed.
        """
        if self._wanted == PLAIN:
            return self
        key = _key(shapes)
        with self._loader.lock:
            self._require_open()
            if key not in self._serving:
                refused: dict[str, str] = {}
                found, _ = self._loaded(self._fitting(shapes, self._wanted), shapes, self._wanted, refused)
                self._serving[key] = self._loader.granted(found.engine.ingredients.variant, tuple(refused.items()))
            return self._serving[key]

    def close(self) -> None:
        """Free the engines, also of other sessions that share them; a second call does nothing."""
        self._loader.close()
        self._by_shapes.clear()

    def _chosen(self, shapes: Mapping[str, Shape]) -> tuple[Session, RanOn]:
        symbol_sizes(self._name, self.inputs, shapes)
        key = _key(shapes)
        with self._loader.lock:
            self._require_open()
            if key not in self._by_shapes:
                self._by_shapes[key] = self._opened(shapes)
            return self._by_shapes[key]

    def _opened(self, shapes: Mapping[str, Shape]) -> tuple[Session, RanOn]:
        refused = dict(self._refused)
        try:
            fitting = self._fitting(shapes, self.variant)
        except EngineError as error:
            if not self._has_graph:
                raise
            return self._loader.graph(), RanOn(refused=with_remedies({error.what: error.remedy}))
        slots = slot_shapes(self.inputs)
        alike = (found for found in fitting if slot_shapes(found.engine.inputs) == slots)
        try:
            found, session = self._loaded(alike, shapes, self.variant, refused)
        except EngineError:
            if not self._has_graph:
                raise
            return self._loader.graph(), RanOn(refused=with_remedies(refused))
        self._loader.refits.ready(session)
        return session, engine_run(found, self._target, with_remedies(refused), refitted=self._refit)

    def _fitting(self, shapes: Mapping[str, Shape], variant: Variant) -> list[Found]:
        """The engines that fit, the best first; raises EngineError where there is none."""
        try:
            found = fitting_engines(self._bundle, self._name, self._target, shapes, cache=self._cache, variant=variant)
        except EngineError as error:
            if not self._refit or isinstance(error, UntrustedError):
                raise
            raise EngineError(self._name, error.what, remedy=self._remedy(shapes, variant)) from error
        if self._refit and not (found := [one for one in found if one.engine.ingredients.refittable]):
            what = "no engine that fits this call can be refitted, which its LoRAs need"
            raise EngineError(self._name, what, remedy=self._remedy(shapes, variant))
        return found

    def _loaded(
        self, fitting: Iterable[Found], shapes: Mapping[str, Shape], variant: Variant, refused: dict[str, str]
    ) -> tuple[Found, Session]:
        """The first engine that can be run; why those before it cannot is added to what was refused, with what helps.

        Raises:
            EngineError: none can; its cause is why the last one cannot.
        """
        last: EngineError | ExecutionError | None = None
        for found in fitting:
            try:
                session = self._loader.engine(found)
            except (EngineError, ExecutionError) as error:
                last = error
                again = rebuild_command(self._bundle, self._name, self._target, found.engine, shapes, self._cache)
                refused.setdefault(error.without_remedy, exact_remedy(error, again))
                continue
            return found, session
        what = f"no engine can be run: {'; '.join(refused)}"
        raise EngineError(self._name, what, remedy=self._remedy(shapes, variant)) from last

    def _remedy(self, shapes: Mapping[str, Shape], variant: Variant) -> str:
        command = build_command(self._bundle, self._name, self._target, variant, shapes, self._cache)
        return f"Run `{command}{' --refit' if self._refit else ''}`."

    def _require_open(self) -> None:
        if self._loader.closed:
            raise ExecutionError(self._name, "the model is closed", remedy="Open it again.")


def _key(shapes: Mapping[str, Shape]) -> _Key:
    return tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
