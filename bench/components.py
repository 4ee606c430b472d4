"""A bundle's components each by itself, given what they were given in pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends.base import Array
from tandemrt.runtime.bundle import Bundle

from .contenders import Contender
from .entrants import Work
from .reports.schema import Figure
from .room import weights_of
from .rounds import Entrant, Taken
from .sections import file_mb


def save_inputs(work: Work, target: str, seeds: Sequence[int], folder: Path) -> tuple[str, ...]:
    """Paint a picture of each seed, and save of each component what it was given when it last ran in each of them.

    A component's file is `inputs_of` it: every input by its name, (seeds, *shape). Returns the components in the order
    they ran.
    """
    last: dict[str, dict[str, Array]] = {}
    kept: dict[str, list[dict[str, Array]]] = {}

    def keep(name: str, inputs: Mapping[str, Array]) -> None:
        last[name] = {key: one.copy() for key, one in inputs.items()}

    with Pipeline.open(work.bundle, target, threads=work.threads, cache=work.cache, observe=keep) as pipe:
        for seed in seeds:
            pipe(f"{work.prompt} {seed}", seed=seed, **work.arguments)
            for name, inputs in last.items():
                kept.setdefault(name, []).append(inputs)
    for name, each in kept.items():
        np.savez(inputs_of(name, folder), **{key: np.stack([one[key] for one in each]) for key in each[0]})
    return tuple(kept)


def inputs_of(name: str, folder: Path) -> Path:
    """The file of what a component was given."""
    return folder / f"{name}.npz"


def component_entrant(work: Work, bundle: Bundle, name: str, target: str, inputs: Path) -> Entrant:
    """A component by itself, in a process of its own; the inputs of a round are the seed's of the file's, in turns."""
    job = {
        "bundle": str(work.bundle),
        "component": name,
        "target": target,
        "threads": work.threads,
        "cache": str(work.cache),
        "inputs": str(inputs),
    }
    start = partial(Contender, name, sys.executable, "component.py", job)
    return Entrant(start, memory_bytes=weights_of(bundle, (name,)).held_on(target))


def file_figure(bundle: Bundle, name: str, taken: Taken) -> Figure:
    """The MB of the file that a component ran on, an engine's or the graph's; of the graph where it did not run."""
    told = taken.samples(f"{name}_mb") or (file_mb(bundle, name),)
    return Figure(unit="MB", samples=told[:1])
