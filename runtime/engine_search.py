"""Which engine of the cache runs a component on a target, for the shapes of a call."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from .build_commands import build_command
from .bundle import Bundle
from .cache import cache_folder, engines_folder
from .engine_files import (
    RECIPES,
    REFIT,
    VERSION_COMPATIBLE,
    Engine,
    Ingredients,
    Shape,
    architecture_of,
    cached_engines,
    origin_of,
    weights_of,
)
from .errors import EngineError, UntrustedError
from .lora_slots import slot_shapes
from .targets import PORTABLE, Target, installed_version
from .variant import PLAIN, Variant

_PORTABLE_FROM_SM = 80  # TensorRT-RTX: an engine for no architecture in particular runs from Ampere on


@dataclass(frozen=True, slots=True)
class Found:
    """An engine that fits: its folder and sidecar, which of its profiles serves the call best, and how wide that is."""

    folder: Path
    engine: Engine
    profile: int
    width: int

    @property
    def order(self) -> tuple[Any, ...]:
        """What orders engines that fit alike: narrowest profile, cheapest variant, one that cannot be refitted."""
        made_of = self.engine.ingredients
        return self.width, made_of.variant.cost, REFIT in made_of.flags, self.folder.name


def fitting_engines(
    bundle: Bundle,
    component: str,
    target: Target,
    shapes: Mapping[str, Shape] | None = None,
    *,
    cache: Path | None = None,
    variant: Variant = PLAIN,
) -> list[Found]:
    """The engines in the cache that run a component on a target, by what their sidecars say, the best first.

    Their files are looked at when one is loaded; see `check_engine_files`.

    target: for TensorRT with the one architecture that is here, such as `tensorrt-rtx:sm89`.
    shapes: of the call's inputs, those of LoRA slots may be left out; None for engines of any profile. Of several that
        fit, the one whose profile is the narrowest comes first, of these the one whose variant costs least.
    cache: as in `cache_folder`. variant: what the engines must be, or more; see `Variant.serves`.

    Raises:
        EngineError: there is none, or none that fits, with the reason and the command that builds one.
        UntrustedError: one that may fit is in a folder that others could have written to, or the cache is such a one.
        TargetError: the target's backend is not installed.
    """
    misfits: list[tuple[bool, str]] = []
    fitting: list[Found] = []
    asked = target.of_component(bundle.component(component))
    for folder, engine, reason in engines_of(bundle, component, target, cache=cache):
        found = _found_or_why_not(folder, engine, reason, shapes, variant)
        if isinstance(found, Found):
            fitting.append(found)
        elif found:
            misfits.append((answers(engine.ingredients, asked), f"{folder.name[:12]} {found}"))
    if not fitting:
        # What is for another device or precision is worth a word where nothing else is there.
        unread = unreadable(cache)
        told = [why for answering, why in misfits if answering] + [error.without_remedy for error in unread]
        told = told or [why for _, why in misfits]
        wanted = f"engine for {asked}{'' if variant == PLAIN else f' ({variant})'}"
        why = f"no {wanted} fits: {'; '.join(told)}" if told else f"there is no {wanted}"
        why += f" (in {engines_folder(cache_folder(cache))})"
        if untrusted := " ".join(error.remedy for error in unread if isinstance(error, UntrustedError)):
            raise UntrustedError(component, why, remedy=untrusted)
        remedy = f"Run `{build_command(bundle, component, asked, variant, shapes, cache)}`."
        raise EngineError(component, why, remedy=remedy)
    return sorted(fitting, key=lambda found: found.order)


def _found_or_why_not(
    folder: Path, engine: Engine, reason: str | None, shapes: Mapping[str, Shape] | None, variant: Variant
) -> Found | str:
    """An engine that fits, or why it does not in words that follow its name; none of those for other variants.

    reason: why it does not run here at all.
    """
    made_as = engine.ingredients.variant
    if not made_as.serves(variant):
        one_slot = msgspec.structs.replace(variant, lora_slots=1, lora_rank=1)
        has_slots = variant.lora_slots and made_as.serves(one_slot)
        return f"has {made_as}, which are too few or too small" if has_slots else ""
    found = None if reason else fitted(folder, engine, shapes)
    return found or reason or out_of_profile(engine, shapes or {})


def engines_of(
    bundle: Bundle, component: str, target: Target, *, cache: Path | None = None
) -> Iterator[tuple[Path, Engine, str | None]]:
    """Every engine in the cache that was built from a component for a target's backend, in any variant.

    With each comes why it does not run here, in words that follow its name; None where it does. target, cache: as of
    `fitting_engines`.

    Raises:
        EngineError: as of `cached_engines`.
        TargetError: the target's backend is not installed.
    """
    target = target.of_component(bundle.component(component))
    origin, weights = origin_of(bundle, component), weights_of(bundle, component)
    for folder, engine in cached_engines(cache_folder(cache)):
        if isinstance(engine, Engine):
            made_of = engine.ingredients
            if (made_of.origin, made_of.backend) == (origin, target.backend):
                yield folder, engine, _misfit(made_of, weights, target)


def unreadable(cache: Path | None = None) -> list[EngineError]:
    """Why engines of a cache cannot be read; they may be of any component."""
    return [error for _, error in cached_engines(cache_folder(cache)) if isinstance(error, EngineError)]


def fitted(folder: Path, engine: Engine, shapes: Mapping[str, Shape] | None) -> Found | None:
    """An engine with the narrowest of its profiles that takes these shapes; None where none does.

    shapes: those of LoRA slots may be left out.
    """
    served = _serving(engine, shapes)
    return None if served is None else Found(folder, engine, served[1], served[0])


def profile_for(engine: Engine, shapes: Mapping[str, Shape]) -> int | None:
    """The narrowest profile of an engine that takes these shapes, by its place; None where none does."""
    served = _serving(engine, shapes)
    return None if served is None else served[1]


def has_engine(
    bundle: Bundle, component: str, target: Target, *, cache: Path | None = None, variant: Variant = PLAIN
) -> bool:
    """Whether anything in the cache may be an engine of a component, in this variant, that answers a target.

    That is what was built for the target's backend, device and precision, whether or not it runs here, and what
    cannot be read.

    Raises:
        EngineError: as of `cached_engines`.
    """
    target = target.of_component(bundle.component(component))
    wanted = origin_of(bundle, component), target.backend
    return any(
        isinstance(engine, EngineError)
        or ((engine.ingredients.origin, engine.ingredients.backend) == wanted
            and answers(engine.ingredients, target)
            and engine.ingredients.variant.serves(variant))
        for _, engine in cached_engines(cache_folder(cache))
    )  # fmt: skip


def answers(made_of: Ingredients, target: Target) -> bool:
    """Whether an engine of a target's backend is for its device and computes in its precision."""
    return _covers(made_of.device, target.device) and made_of.precision == target.precision


def _misfit(made_of: Ingredients, weights: Mapping[str, str], target: Target) -> str | None:
    """Why an engine does not run here, in words that follow its name; None where it does."""
    version = installed_version(target.backend)
    differing: tuple[tuple[bool, str], ...] = (
        (made_of.weights != weights, "was built from other weights"),
        (not _covers(made_of.device, target.device), f"is for {made_of.device}, not {target.device}"),
        (made_of.precision != target.precision, f"computes in {made_of.precision}, not {target.precision}"),
        (
            not _runs_on_version(made_of, version),
            f"is of {made_of.backend} {made_of.backend_version}, here is {version}",
        ),
        (made_of.architecture != architecture_of(target), f"is for {made_of.architecture}"),
        (made_of.recipe != RECIPES[made_of.backend], "was built by another version of tandemrt, in another way"),
    )
    return next((reason for differs, reason in differing if differs), None)


def _runs_on_version(made_of: Ingredients, version: str) -> bool:
    """Whether an engine runs on a backend's version: its own, or a newer one of the same major if it was built so."""
    if made_of.backend_version == version or VERSION_COMPATIBLE not in made_of.flags:
        return made_of.backend_version == version
    own, here = ([int(part) for part in re.findall(r"\d+", text)] for text in (made_of.backend_version, version))
    return own[:1] == here[:1] and own <= here


def _covers(built_for: str, device: str) -> bool:
    if built_for == PORTABLE and device.startswith("sm"):
        return all(int(sm[2:]) >= _PORTABLE_FROM_SM for sm in device.split("+"))
    return set(device.split("+")) <= set(built_for.split("+"))


def _serving(engine: Engine, shapes: Mapping[str, Shape] | None) -> tuple[int, int] | None:
    """How wide the narrowest profile is that takes these shapes, and which it is; None where none does."""
    profiles = engine.ingredients.profiles
    if not profiles or shapes is None:
        return 0, 0
    shapes = {**slot_shapes(engine.inputs), **shapes}
    fitting = [
        (sum(prod(one.max) - prod(one.min) for one in ranges.values()), index)
        for index, ranges in enumerate(profiles)
        if ranges.keys() == shapes.keys() and all(ranges[name].holds(shape) for name, shape in shapes.items())
    ]
    return min(fitting, default=None)


def out_of_profile(engine: Engine, shapes: Mapping[str, Shape]) -> str:
    """Why no profile of an engine takes these shapes, in words that follow its name."""
    shapes = {**slot_shapes(engine.inputs), **shapes}
    misfits = (
        f"{name} {shape} is outside {ranges[name]}" if name in ranges else f"{name} is not among its inputs"
        for ranges in engine.ingredients.profiles
        for name, shape in shapes.items()
        if name not in ranges or not ranges[name].holds(shape)
    )
    return f"has no profile for this call: {next(misfits, 'it lacks inputs')}"
