"""How many steps each denoiser runs, as callers and the command line say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from .arguments import did_you_mean, whole_number
from .errors import PlanError
from .manifest import Manifest

MAX_STEP_DIGITS = 9

Steps: TypeAlias = int | Mapping[str, int] | Sequence[tuple[str, int]]


def parse_steps(text: str, denoisers: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Read `25`, Hybrid-SD's `10,15` (the bundle's denoisers in order), or `unet:10,unet_small:15`.

    Raises:
        PlanError: not of these forms, or more numbers than denoisers.
    """
    runs: list[tuple[str, int]] = []
    for index, part in enumerate(text.split(",")):
        name, _, count = part.strip().rpartition(":")
        if not count.isascii() or not count.isdigit() or len(count) > MAX_STEP_DIGITS:
            raise PlanError(
                "steps", "not a number of steps", got=part, expected="such as 25, 10,15 or unet:10,unet_small:15"
            )
        if not name:
            if index >= len(denoisers):
                have = ", ".join(denoisers)
                raise PlanError(
                    "steps", "more numbers than denoisers", got=text, expected=f"at most one for each of {have}"
                )
            name = denoisers[index]
        runs.append((name, int(count)))
    return tuple(runs)


def runs_of(manifest: Manifest, steps: object, timesteps: Sequence[int] | None) -> tuple[tuple[str, int], ...]:
    """A bundle's denoisers with the count of steps that each runs, in order; those with no step are dropped.

    steps: as `Schedule.steps`, of whatever type. timesteps: where they are explicit.

    Raises:
        PlanError: steps of another type, that sum to 0 or to another number than there are time steps, are negative,
            or name an unknown denoiser.
    """
    denoisers = manifest.names("denoiser")
    if steps is None:
        steps = manifest.defaults.num_inference_steps if timesteps is None else len(timesteps)
    runs = []
    for name, given in _pairs(steps, denoisers[0]):
        if name not in denoisers:
            expected, remedy = f"one of {', '.join(denoisers)}", did_you_mean(name, denoisers)
            raise PlanError("steps", "unknown denoiser", got=name, expected=expected, remedy=remedy)
        count = whole_number(given)
        if count is None or count < 0:
            raise PlanError(f"steps: {name}", "number of steps", got=given, expected="a whole number, 0 or more")
        runs.append((name, count))
    total = sum(count for _, count in runs)
    if total == 0:
        raise PlanError("steps", "number of steps in all", got=0, expected="1 or more")
    if timesteps is not None and len(timesteps) != total:
        raise PlanError("timesteps", "how many there are", got=len(timesteps), expected=f"{total}, one a step")
    return tuple((name, count) for name, count in runs if count)


def _pairs(steps: object, first: str) -> tuple[tuple[str, object], ...]:
    """What `Schedule.steps` may be as pairs of a name and a count, neither of them checked further."""
    if whole_number(steps) is not None:
        return ((first, steps),)
    pairs: tuple[Any, ...]
    if isinstance(steps, Mapping):
        pairs = tuple(steps.items())
    elif isinstance(steps, Sequence) and not isinstance(steps, str | bytes):
        pairs = tuple(steps)
    else:
        pairs = (steps,)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            expected = 'a whole number, or numbers by denoiser such as {"unet": 10, "unet_small": 15}'
            raise PlanError("steps", "not usable", got=steps, expected=expected)
    return pairs
