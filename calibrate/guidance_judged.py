"""What was chosen, judged by prompts that it was not chosen with, and timed beside full guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engines.job import Progress
from .guidance_candidates import Candidate
from .guidance_loss import Loss, Tally
from .guidance_runs import Painter


@dataclass(frozen=True, slots=True)
class Judged:
    """A setting on all held-out prompts.

    ratios: of each prompt, the time of its rows by that with full guidance in the same turn. full: how many runs of one
    branch full guidance takes.
    """

    tally: Tally
    ratios: tuple[float, ...]
    full: int

    def facts(self) -> dict[str, Any]:
        """JSON-able; saved: the share of the runs of a branch. time_ratio: the median, time_p10 and time_p90 around."""
        low, median, high = (float(value) for value in np.percentile(self.ratios, (10, 50, 90)))
        saved = 1 - self.tally.branches / self.full
        times = {"time_ratio": median, "time_p10": low, "time_p90": high}
        return {**self.tally.facts(), "full_branches": self.full, "saved": saved, **times}


def judged(painter: Painter, candidates: Sequence[Candidate], full: int, progress: Progress) -> list[Judged]:
    """Settings on all of the painter's prompts, in turns."""
    total = len(painter.series)
    ways: Mapping[str, Mapping[str, Any]] = {one.name: one.arguments for one in candidates}
    tallies, ratios = [Tally(one, total) for one in candidates], [[] for _ in candidates]  # type: ignore[var-annotated]
    for index in range(total):
        progress("held-out prompts", index, total)
        timed = painter.timed(ways, index)
        for tally, of_one in zip(tallies, ratios, strict=True):
            one = timed[tally.candidate.name]
            tally.painted.append(one.painted)
            of_one.append(one.ratio)
    progress("held-out prompts", total, total)
    return [Judged(tally, tuple(of_one), full) for tally, of_one in zip(tallies, ratios, strict=True)]


@dataclass(frozen=True, slots=True)
class Judgement:
    """tried: the settings of a kind in the order they were judged in, the last of which holds where `held`."""

    tried: tuple[Judged, ...]
    held: bool


def settled(
    painter: Painter,
    fronts: Mapping[str, Sequence[Tally]],
    beside: Sequence[Candidate],
    loss: Loss,
    full: int,
    progress: Progress,
) -> tuple[dict[str, Judgement], list[Judged]]:
    """Of each kind the cheapest setting of its front that keeps to the loss on held-out prompts too.

    Where one does not, the next one of its front is judged, in turns with those of the other kinds. beside: settings
    to be judged for comparison.
    """
    waiting = {kind: [tally.candidate for tally in front] for kind, front in fronts.items()}
    tried: dict[str, list[Judged]] = {kind: [] for kind in fronts}
    held = dict.fromkeys(fronts, False)
    compared: list[Judged] = []
    rest = list(beside)
    while rest or any(waiting.values()):
        chosen = {kind: settings.pop(0) for kind, settings in waiting.items() if settings}
        found = judged(painter, [*chosen.values(), *rest], full, progress)
        compared += found[len(chosen) :]
        rest = []
        for kind, one in zip(chosen, found, strict=False):
            tried[kind].append(one)
            held[kind] = one.tally.allowed(loss)
            if held[kind]:
                waiting[kind] = []
    return {kind: Judgement(tuple(tried[kind]), held[kind]) for kind in fronts}, compared
