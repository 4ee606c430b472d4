"""Which denoisers run which steps of every prompt, as the arguments and the bundle say."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.bundle import Bundle
from ..runtime.errors import ArgumentError
from ..runtime.manifest import Manifest
from ..runtime.plan_steps import parse_steps
from .collect_arguments import CollectPlan
from .strata import Runs, turns


@dataclass(frozen=True, slots=True)
class Course:
    """What denoises. steps: of every prompt. timesteps: where the bundle names them. visited: the denoisers.

    turns: after how many prompts each of them has run every step once more.
    """

    steps: tuple[Runs, ...]
    timesteps: tuple[int, ...] | None
    visited: tuple[str, ...]
    turns: int


def course_of(plan: CollectPlan, bundle: Bundle, prompts: int) -> Course:
    """What denoises so many prompts.

    Raises:
        ArgumentError: steps or denoisers that cannot be, or fewer prompts than denoisers.
    """
    manifest = bundle.manifest
    every = manifest.names("denoiser")
    if plan.steps is not None and not plan.steps.isdecimal():
        if plan.denoisers:
            raise ArgumentError("--denoiser", "given beside --steps by denoiser", remedy="Give one of them.")
        runs = tuple(run for run in parse_steps(plan.steps, every) if run[1])
        return Course((runs,) * prompts, None, tuple(dict.fromkeys(name for name, _ in runs)), 1)
    sharing = sharing_denoisers(manifest)
    _require_turns(plan.denoisers, bundle, sharing)
    visited = plan.denoisers or sharing
    if prompts < len(visited):
        expected = f"{len(visited)} or more, one for each of {', '.join(visited)}"
        raise ArgumentError("-n", "number of prompts", got=prompts, expected=expected)
    timesteps = manifest.defaults.timesteps if plan.steps is None else None
    count = default_count(manifest, visited[0]) if plan.steps is None else parse_steps(plan.steps, every)[0][1]
    return Course(tuple(turns(visited, count, at) for at in range(prompts)), timesteps, visited, len(visited))


def sharing_denoisers(manifest: Manifest) -> tuple[str, ...]:
    """The denoisers that share the bundle's scheduler; where none does, the first one."""
    every = manifest.names("denoiser")
    shares = {name: manifest.components[name].scheduler in (None, manifest.scheduler) for name in every}
    return tuple(name for name in every if shares[name]) or every[:1]


def default_count(manifest: Manifest, name: str) -> int:
    """How many steps a denoiser takes where nothing else is said: the bundle's, which are for its own scheduler.

    Raises:
        ArgumentError: it has a scheduler of its own, of which the bundle does not say how many steps it takes.
    """
    if name not in sharing_denoisers(manifest):
        what = f"not given, and {name} has a scheduler of its own"
        remedy = "Say how many it was made for, such as --steps 1, and --guidance-scale 0 where it takes no guidance."
        raise ArgumentError("--steps", what, remedy=remedy)
    timesteps = manifest.defaults.timesteps
    return manifest.defaults.num_inference_steps if timesteps is None else len(timesteps)


def _require_turns(named: tuple[str, ...], bundle: Bundle, sharing: tuple[str, ...]) -> None:
    """Raise ArgumentError unless the denoisers named share the bundle's scheduler, or there is one alone."""
    bundle.require_components("--denoiser", named)
    every = bundle.manifest.names("denoiser")
    for name in named:
        if name not in every:
            raise ArgumentError("--denoiser", "no denoiser", got=name, expected=f"one of {', '.join(every)}")
        if name not in sharing and len(named) > 1:
            what = f"{name} has a scheduler of its own, and takes no turns with others"
            raise ArgumentError(
                "--denoiser", what, remedy=f"Collect for it alone, in another folder: --denoiser {name}."
            )
