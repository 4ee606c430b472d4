"""The step engines, update engines among them, that the user's cache has for a bundle on a target."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from . import step_row as names
from .backends.base import Shape
from .build_commands import exact_remedy, rebuild_command
from .bundle import Bundle
from .engine_files import Engine
from .engine_search import Found, answers, engines_of, fitted, out_of_profile
from .engine_session import Loader, engine_target
from .errors import EngineError, ExecutionError, TandemError
from .manifest import TensorSpec
from .ran_on import Ran, engine_run, with_remedies
from .refits import Refits
from .step_inputs import history_of
from .step_sampler import Key, StepEngine
from .targets import ENGINES_ONLY, Target
from .tensors import spec_of
from .variant import UPDATE, Variant


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a step engine must be for the rows that it is to run.

    history: how many earlier predictions the plan carries. shapes: of an engine's inputs, by what inputs it has.
    refit: whether LoRAs are to be in its weights.
    """

    variant: Variant
    history: int
    shapes: Callable[[Sequence[TensorSpec]], Mapping[str, Shape]]
    refit: bool = False

    def fitted(self, folder: Path, engine: Engine) -> Found | str | None:
        """The engine with the profile to run it in; why it does not do, or None where it is something else."""
        made_as = engine.ingredients.variant
        if not made_as.serves(msgspec.structs.replace(self.variant, timesteps=made_as.timesteps)):
            return None
        if not made_as.serves(self.variant):
            return "has other time steps built in"
        hands = engine.ingredients.backend in ENGINES_ONLY
        if hands and spec_of(engine.outputs, names.SUMS) is None:
            return "was composed by another version of tandemrt, in another way"
        if self.refit and not engine.ingredients.refittable:
            return "cannot be refitted, which the LoRAs need"
        if history_of(engine.inputs) < self.history:
            return f"holds {history_of(engine.inputs)} earlier predictions, and the solver carries {self.history}"
        shapes = self.shapes(engine.inputs)
        return fitted(folder, engine, shapes) or out_of_profile(engine, shapes)


@dataclass(slots=True)
class _Listed:
    """An engine of the cache, and why it is not run, in words that follow its name; None as long as it is.

    refused: the error where that came of loading it.
    """

    engine: Engine
    misfit: str | None
    refused: TandemError | None = None


class StepEngines:
    """Step engines by what a plan wants of them; safe to share between threads.

    The cache is looked through once for each denoiser, when a plan first runs it: what is built later is found by
    those who open the bundle anew. An engine is loaded once, when it is first needed.
    """

    def __init__(self, bundle: Bundle, target: Target, threads: int | None, cache: Path, refits: Refits) -> None:
        self._refits = refits
        self._bundle, self._target, self._threads, self._cache = bundle, target, threads, cache
        self._lock = threading.RLock()
        self._listed: dict[str, dict[Path, _Listed]] = {}
        self._loaders: dict[str, Loader] = {}
        self._closed = False

    def close(self) -> None:
        """Free the engines; a second call does nothing, none can be had after it."""
        with self._lock:
            self._closed = True
            for loader in self._loaders.values():
                loader.close()
            self._loaders.clear()

    def load(
        self, wanted: Mapping[Key, Wanted], *, before: Callable[[], None], ran: Ran
    ) -> dict[Key, StepEngine] | None:
        """An engine for everything that is wanted; None, and nothing is loaded, where the cache lacks one.

        One whose files are not those that were built, or that the backend refuses, is passed over from then on.

        before: called before each is loaded; what it raises ends the loading. ran: told what runs, or why not.

        Raises:
            EngineError: the cache belongs to another user, or others may write to it.
            TargetError: the target cannot run here.
            ExecutionError: the engines are closed.
            EngineError, ExecutionError, BundleError: as of `Refits.ready`.
        """
        with self._lock:
            if self._closed:
                raise ExecutionError("pipeline", "used after it was closed", remedy="Open it again.")
            while (chosen := self._chosen(wanted, ran)) is not None:
                engines = {}
                for (name, guided), found in chosen.items():
                    before()
                    try:
                        session = self._loader(name).engine(found)
                    except (EngineError, ExecutionError) as error:
                        listed = self._listed[name][found.folder]
                        listed.misfit, listed.refused = f"cannot be run: {error.without_remedy}", error.again()
                        break
                    engines[name, guided] = StepEngine(session, found.engine.ingredients.variant)
                else:
                    for (name, guided), found in chosen.items():
                        self._refits.ready(engines[name, guided].session)
                        before_it = self._refused_before(name, wanted[name, guided], found)
                        refitted = wanted[name, guided].refit
                        ran.add(name, engine_run(found, self._target, before_it, refitted=refitted))
                    return engines
        return None

    def leave(self, names: Iterable[str], why: str, kind: str, ran: Ran) -> None:
        """Tell `ran` of the denoisers that have engines of a kind here, and why the request is for none.

        why: in words before `takes no step engines`. kind: `step` or `update`.

        Raises:
            EngineError, TargetError: as of `load`.
        """
        with self._lock:
            for name in names:
                listed = self._of(name).values()
                if any(one.misfit is None and one.engine.ingredients.variant.step_kind == kind for one in listed):
                    ran.leave(name, f"{why} takes no {kind} engines")

    def _chosen(self, wanted: Mapping[Key, Wanted], ran: Ran) -> dict[Key, Found] | None:
        """The best engine for each; None where one is missing, and `ran` is told why the others do not do."""
        chosen, lacking = dict[Key, Found](), list[str]()
        refused: dict[str, dict[str, str]] = {name: {} for name, _ in wanted}
        for (name, guided), one in wanted.items():
            fitting = []
            for folder, listed in self._of(name).items():
                found = one.fitted(folder, listed.engine)
                if isinstance(found, Found) and listed.misfit is None:
                    fitting.append(found)
                elif isinstance(found, str):
                    refused[name][f"{one.variant.step_kind} engine {folder.name[:12]} {found}"] = ""
                elif found is not None:
                    refused[name].update([self._misfit(name, folder, one)])
            best = min(fitting, key=lambda found: found.order, default=None)
            if best is None:
                made_as = "" if one.variant == UPDATE else f" {'with' if guided else 'without'} guidance"
                lacking.append(f"{name}{made_as}")
            else:
                chosen[name, guided] = best
        for name, reasons in refused.items() if lacking else ():
            own = [found for (other, _), found in chosen.items() if other == name]
            if own and not reasons:
                kind, key = own[0].engine.ingredients.variant.step_kind, own[0].folder.name[:12]
                reasons[f"{kind} engine {key} is not run, since none does for {' and '.join(lacking)}"] = ""
            ran.refuse(name, with_remedies(reasons))
        return None if lacking else chosen

    def _refused_before(self, name: str, wanted: Wanted, chosen: Found) -> tuple[str, ...]:
        """Why engines that come before the chosen one do not run: those whose loading failed."""
        listed = [(folder, one) for folder, one in self._of(name).items() if one.refused]
        fitting = [wanted.fitted(folder, one.engine) for folder, one in listed]
        before = (found for found in fitting if isinstance(found, Found) and found.order < chosen.order)
        return with_remedies(dict(self._misfit(name, found.folder, wanted) for found in before))

    def _misfit(self, name: str, folder: Path, wanted: Wanted) -> tuple[str, str]:
        """Why a listed engine does not run here, and what helps."""
        listed, target = self._of(name)[folder], engine_target(self._bundle, name, self._target)
        shapes = wanted.shapes(listed.engine.inputs)
        command = rebuild_command(self._bundle, name, target, listed.engine, shapes, self._cache)
        remedy = exact_remedy(listed.refused, command) if listed.refused else f"Run `{command}`."
        kind = listed.engine.ingredients.variant.step_kind
        return f"{kind} engine {folder.name[:12]} {listed.misfit}", remedy

    def _of(self, name: str) -> dict[Path, _Listed]:
        """A component's step engines for the target's device and precision, by their folders."""
        if name not in self._listed:
            target = engine_target(self._bundle, name, self._target)
            self._listed[name] = {
                folder: _Listed(engine, misfit)
                for folder, engine, misfit in engines_of(self._bundle, name, target, cache=self._cache)
                if engine.ingredients.variant.step and answers(engine.ingredients, target)
            }
        return self._listed[name]

    def _loader(self, name: str) -> Loader:
        if name not in self._loaders:
            self._loaders[name] = Loader(self._bundle, name, self._target, self._threads, cache=self._cache)
            self._loaders[name].refits = self._refits
        return self._loaders[name]
