"""Which denoiser runs which step of a prompt's generation, and which of many are taken: all evenly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Runs = tuple[tuple[str, int], ...]


def turns(denoisers: Sequence[str], steps: int, prompt: int) -> Runs:
    """The steps of the prompt of this index, as runs on the denoisers in order.

    As many prompts in a row as there are denoisers are a group: they cut the steps at the same places and give the
    pieces to the denoisers in turns, so that of each step in a group every denoiser runs one. The first group runs each
    denoiser alone; the next ones hand over in the middle, at a quarter, at three quarters and so on, from every
    denoiser to the one after it, so that each is given latents of its own and of the others.
    """
    if len(denoisers) == 1:
        return ((denoisers[0], steps),)
    group, turn = divmod(prompt, len(denoisers))
    first = steps - int(steps * _spread(group))
    others = [(steps - first) * part // (len(denoisers) - 1) for part in range(len(denoisers))]
    pieces = [first, *(end - begin for begin, end in itertools.pairwise(others))]
    ordered = [*denoisers[turn:], *denoisers[:turn]]
    return tuple((name, count) for name, count in zip(ordered, pieces, strict=True) if count)


def kept_rows(rows: int, kept: int, group: int, groups: int) -> tuple[int, ...]:
    """The rows that a prompt of this group keeps: one in each of `kept` strata of even size, the same for its group.

    Within a stratum the groups go from its first row to its last, so that over all of them the rows of one stratum are
    kept equally often, give or take one.
    """
    bounds = [rows * stratum // min(kept, rows) for stratum in range(min(kept, rows) + 1)]
    return tuple(begin + (end - begin) * group // groups for begin, end in itertools.pairwise(bounds))


def place(row: int, branch: int) -> int:
    """Where in a generation a run is: the row of the schedule, and 1 for the unconditional branch of guidance."""
    return 2 * row + branch


def evenly(places: Sequence[int], most: int) -> tuple[int, ...]:
    """The indices of so many runs at most, in order: even over the rows of either branch, and then over the runs."""
    if most >= len(places):
        return tuple(range(len(places)))
    ordered = sorted(range(len(places)), key=lambda run: (places[run] % 2, places[run], run))
    return tuple(sorted(ordered[(2 * at + 1) * len(places) // (2 * most)] for at in range(most)))


def _spread(index: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8 …: van der Corput's sequence, which is spread evenly wherever it is cut off."""
    value, share = 0.0, 0.5
    while index:
        value, share, index = value + share * (index & 1), share / 2, index >> 1
    return value
