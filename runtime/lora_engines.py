"""Which engines take a request's LoRAs: those with slots for them, else those that can be refitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from .backends.base import Shape
from .build_commands import SEEN, build_command
from .bundle import Bundle
from .engine_files import Engine
from .engine_search import engines_of, fitting_engines
from .engine_session import engine_target
from .errors import EngineError
from .loras import Fitted
from .targets import ENGINES_ONLY, Target
from .variant import PLAIN, Variant


class LoraEngines:
    """The engines of a bundle on a target that LoRAs can come to; loads nothing."""

    def __init__(self, bundle: Bundle, target: Target, cache: Path) -> None:
        self._bundle, self._target, self._cache = bundle, target, cache

    def chosen(self, fitted: Fitted, shape: Shape, *, steps: bool) -> Fitted:
        """The same LoRAs, with the components told whose engines are to hold them in their weights.

        Engines with slots come first: requests with different LoRAs run on them at once, and each costs nothing to
        begin. Among those that are there for the latents' size, then among all, which errors at the call are about.

        shape: the latents', (B, C, h, w). steps: whether step engines may run the rows.

        Raises:
            EngineError: a component's engines take no LoRAs, with the commands that build some.
        """
        return replace(
            fitted, in_weights=frozenset(name for name in fitted.adapters if self._refits(fitted, name, shape, steps))
        )

    def _refits(self, fitted: Fitted, name: str, shape: Shape, steps: bool) -> bool:
        slots = fitted.variant(name)
        target = engine_target(self._bundle, name, self._target)
        listed = engines_of(self._bundle, name, target, cache=self._cache)
        engines = [engine for _, engine, misfit in listed if misfit is None]

        def are(fits: Callable[[Engine, Shape], bool], variant: Variant) -> bool:
            kinds = (None, "guided", "unguided") if steps else (None,)
            wanted = [msgspec.structs.replace(variant, step=kind) for kind in kinds]
            return any(
                fits(engine, shape)
                and any(engine.ingredients.variant.serves(one) for one in wanted)
                and (variant != PLAIN or engine.ingredients.refittable)
                for engine in engines
            )

        for fits in (_holds, _any):
            for variant in (slots, PLAIN):
                if are(fits, variant):
                    return variant == PLAIN
        self._tell(name, target, slots, shape)
        return False

    def _tell(self, name: str, target: Target, slots: Variant, shape: Shape) -> None:
        """Raise that none takes LoRAs."""
        seen = {"noise": shape}  # for the command: none serves, whatever the shapes
        try:
            fitting_engines(self._bundle, name, target, seen, cache=self._cache, variant=slots)
        except EngineError as error:
            if target.backend not in ENGINES_ONLY or target.precision not in ("fp32", "fp16"):
                raise
            refit = build_command(self._bundle, name, target, PLAIN, seen, self._cache)
            remedy = f"{error.remedy.removesuffix('.')}, or `{refit} --refit` for an engine that holds one set of LoRAs"
            raise EngineError(name, error.what, remedy=f"{remedy} at a time.") from error


def _any(engine: Engine, shape: Shape) -> bool:
    return True


def _holds(engine: Engine, shape: Shape) -> bool:
    """Whether a profile of an engine takes latents of this size, in one branch or both, where it takes latents."""
    pictures, _, *sides = shape
    ranges = [one for profile in engine.ingredients.profiles for name, one in profile.items() if name in SEEN]
    return not ranges or any(
        any(one.min[0] <= rows <= one.max[0] for rows in (pictures, 2 * pictures))
        and all(low <= side <= high for low, side, high in zip(one.min[2:], sides, one.max[2:], strict=True))
        for one in ranges
    )
