"""One process a target, that paints the same seeds in several ways, of all targets in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .entrants import Work, own_entrant
from .probes import Probes
from .rounds import Entrant, Progress, Taken, in_rounds
from .shared_arguments import Shared


def in_ways(
    work: Work, shared: Shared, ways: Mapping[str, Mapping[str, Any]], progress: Progress, probes: Probes
) -> dict[str, dict[str, Taken]]:
    """What each way took, by target and way; pictures are compared with the first way's on the same target.

    ways: what differs from the work's arguments. probes: as of `in_rounds`.

    Raises:
        BenchmarkError: the first way failed on the first target.
    """
    first, entrants = next(iter(ways)), dict[str, Entrant]()
    for target in shared.targets:
        own, reference = own_entrant(work, target), _named(first, target)
        entrants |= {
            _named(way, target): replace(own, arguments=arguments, reference=reference)
            for way, arguments in ways.items()
        }
    with TemporaryDirectory() as pictures:
        taken = in_rounds(entrants, shared.rounds, Path(pictures), progress, probes)
    return {target: {way: taken[_named(way, target)] for way in ways} for target in shared.targets}


def flattened(by_target: Mapping[str, Mapping[str, Taken]]) -> dict[str, Taken]:
    """What `in_ways` took, by way and target in one name."""
    return {_named(way, target): one for target, taken in by_target.items() for way, one in taken.items()}


def _named(way: str, target: str) -> str:
    return f"{way} on {target}"
