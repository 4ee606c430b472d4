"""Which engines take a request's LoRAs: those with slots for them, else those that can be refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from .backends.base import Shape
from .build_commands import SEEN, build_command
from .bundle import Bundle
from .engine_files import Engine
from .engine_search import engines_of, fitting_engines
from .engine_session import engine_target
from .errors import EngineError, UntrustedError
from .loras import Fitted
from .step_sampler import Key
from .targets import ENGINES_ONLY, Target
from .variant import PLAIN, Variant


class LoraEngines:
    """The engines of a bundle on a target that LoRAs can come to; loads nothing."""

    def __init__(self, bundle: Bundle, target: Target, cache: Path) -> None:
        self._bundle, self._target, self._cache = bundle, target, cache

    def chosen(self, fitted: Fitted, shape: Shape, steps: Mapping[Key, Variant]) -> Fitted:
        """The same LoRAs, with the components told whose engines are to hold them in their weights.

        Engines with slots come first: requests with different LoRAs run on them at once, and each costs nothing to
        begin. Among those that are there for the latents' size, then among all, which errors at the call are about.

        shape: the latents', (B, C, h, w). steps: the step engines that may run the rows, as of `step_variants`; they
            run all of them, or none.

        Raises:
            EngineError: a component's engines take no LoRAs, with the commands that build some.
        """
        with_steps = {name for name, _ in steps if self._has_steps(fitted, name, shape, _of(name, steps))}
        in_weights = set()
        for name in fitted.adapters:
            others = {other for other, _ in steps if other != name}
            if self._refits(fitted, name, shape, _of(name, steps) if others <= with_steps else []):
                in_weights.add(name)
        return replace(fitted, in_weights=frozenset(in_weights))

    def _has_steps(self, fitted: Fitted, name: str, shape: Shape, steps: list[Variant]) -> bool:
        """Whether a denoiser has all these step engines, which take its LoRAs where it has some."""
        there = [engine for engine in self._engines(name) if _holds(engine, shape)]
        slots, changed = fitted.variant(name), name in fitted.adapters
        return _serve(there, slots, steps, refit=False) or (changed and _serve(there, PLAIN, steps, refit=True))

    def _refits(self, fitted: Fitted, name: str, shape: Shape, steps: list[Variant]) -> bool:
        """Whether engines that can be refitted are to hold a component's LoRAs, for want of some with slots.

        steps: the step engines that may run its rows.
        """
        engines, slots = self._engines(name), fitted.variant(name)
        for there in ([engine for engine in engines if _holds(engine, shape)], engines):
            for variant, refit in ((slots, False), (PLAIN, True)):
                if _serve(there, variant, [PLAIN], refit=refit) or (
                    steps and _serve(there, variant, steps, refit=refit)
                ):
                    return refit
        self._tell(name, slots, shape)
        return False

    def _engines(self, name: str) -> list[Engine]:
        target = engine_target(self._bundle, name, self._target)
        listed = engines_of(self._bundle, name, target, cache=self._cache)
        return [engine for _, engine, misfit in listed if misfit is None]

    def _tell(self, name: str, slots: Variant, shape: Shape) -> None:
        """Raise that none takes LoRAs."""
        target = engine_target(self._bundle, name, self._target)
        seen = {"noise": shape}  # for the command: none serves, whatever the shapes
        try:
            fitting_engines(self._bundle, name, target, seen, cache=self._cache, variant=slots)
        except EngineError as error:
            cannot_refit = target.backend not in ENGINES_ONLY or target.precision not in ("fp32", "fp16")
            if cannot_refit or isinstance(error, UntrustedError):
                raise
            refit = build_command(self._bundle, name, target, PLAIN, seen, self._cache)
            remedy = f"{error.remedy.removesuffix('.')}, or `{refit} --refit` for an engine that holds one set of LoRAs"
            raise EngineError(name, error.what, remedy=f"{remedy} at a time.") from error


def _of(name: str, steps: Mapping[Key, Variant]) -> list[Variant]:
    return [step for (denoiser, _), step in steps.items() if denoiser == name]


def _serve(engines: Sequence[Engine], variant: Variant, wanted: Sequence[Variant], *, refit: bool) -> bool:
    """Whether engines have all that is wanted, a whole model or the kinds of a step engine, with a variant's slots.

    refit: whether they must be such as can be refitted.
    """
    made_as = [one.ingredients.variant for one in engines if one.ingredients.refittable or not refit]
    every = [msgspec.structs.replace(variant, step=one.step, timesteps=one.timesteps) for one in wanted]
    return all(any(made.serves(one) for made in made_as) for one in every)


def _holds(engine: Engine, shape: Shape) -> bool:
    """Whether a profile of an engine takes latents of this size, in one branch or both, where it takes latents."""
    pictures, _, *sides = shape
    ranges = [one for profile in engine.ingredients.profiles for name, one in profile.items() if name in SEEN]
    return not ranges or any(
        any(one.min[0] <= rows <= one.max[0] for rows in (pictures, 2 * pictures))
        and all(low <= side <= high for low, side, high in zip(one.min[2:], sides, one.max[2:], strict=True))
        for one in ranges
    )
