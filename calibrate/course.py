"""Which denoisers run which steps of every prompt, as the arguments and the bundle say."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.bundle import Bundle
from ..runtime.errors import ArgumentError
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
    sharing = tuple(name for name in every if manifest.components[name].scheduler in (None, manifest.scheduler))
    _require_turns(plan.denoisers, bundle, sharing)
    visited = plan.denoisers or sharing or every[:1]
    if prompts < len(visited):
        expected = f"{len(visited)} or more, one for each of {', '.join(visited)}"
        raise ArgumentError("-n", "number of prompts", got=prompts, expected=expected)
    timesteps = manifest.defaults.timesteps if plan.steps is None and visited[0] in sharing else None
    if plan.steps is not None:
        count = parse_steps(plan.steps, every)[0][1]
    else:
        count = manifest.defaults.num_inference_steps if timesteps is None else len(timesteps)
    return Course(tuple(turns(visited, count, at) for at in range(prompts)), timesteps, visited, len(visited))


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
