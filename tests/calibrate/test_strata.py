"""Which denoiser runs which step, and which rows are kept: evenly."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tandemrt.calibrate.strata import evenly, kept_rows, place, turns


def by_step(runs: tuple[tuple[str, int], ...]) -> list[str]:
    return [name for name, count in runs for _ in range(count)]


@given(denoisers=st.integers(1, 4), steps=st.integers(1, 60), group=st.integers(0, 40))
def test_of_each_step_in_a_group_every_denoiser_runs_one(denoisers: int, steps: int, group: int) -> None:
    names = [f"unet_{index}" for index in range(denoisers)]
    prompts = [by_step(turns(names, steps, group * denoisers + turn)) for turn in range(denoisers)]
    assert all(sorted(at) == names for at in zip(*prompts, strict=True))
    assert [len(prompt) for prompt in prompts] == [steps] * denoisers


def test_two_denoisers_run_alone_and_then_hand_over_both_ways() -> None:
    assert [turns(["unet", "unet_small"], 8, prompt) for prompt in range(8)] == [
        (("unet", 8),),
        (("unet_small", 8),),
        (("unet", 4), ("unet_small", 4)),
        (("unet_small", 4), ("unet", 4)),
        (("unet", 6), ("unet_small", 2)),
        (("unet_small", 6), ("unet", 2)),
        (("unet", 2), ("unet_small", 6)),
        (("unet_small", 2), ("unet", 6)),
    ]


@given(rows=st.integers(1, 80), kept=st.integers(1, 12), groups=st.integers(1, 100))
def test_every_stratum_is_kept_by_every_group_and_its_rows_equally_often(rows: int, kept: int, groups: int) -> None:
    strata = min(kept, rows)
    bounds = [rows * stratum // strata for stratum in range(strata + 1)]
    chosen = [kept_rows(rows, kept, group, groups) for group in range(groups)]
    for stratum, (begin, end) in enumerate(pairwise(bounds)):
        counts = Counter(one[stratum] for one in chosen)
        every = [counts.pop(row, 0) for row in range(begin, end)]
        assert not counts
        assert max(every) - min(every) <= 1
    assert all(len(one) == strata for one in chosen)


@given(places=st.lists(st.integers(0, 99), min_size=1, max_size=300), most=st.integers(1, 400))
def test_some_of_many_are_taken_once_each_in_order(places: list[int], most: int) -> None:
    taken = evenly(places, most)
    assert list(taken) == sorted(set(taken))
    assert len(taken) == min(len(places), most)
    assert 0 <= taken[0] <= taken[-1] < len(places)


@given(prompts=st.integers(1, 40), rows=st.integers(1, 30), most=st.integers(2, 400))
def test_some_of_many_are_even_over_rows_and_branches(prompts: int, rows: int, most: int) -> None:
    places = [place(row, branch) for _ in range(prompts) for row in range(rows) for branch in (0, 1)]
    taken = [places[index] for index in evenly(places, most)]
    branches = Counter(one % 2 for one in taken)
    assert max(branches.values()) - min(branches.values()) <= 1
    for branch in branches:
        counts = Counter(one for one in taken if one % 2 == branch)
        assert max(counts.values()) - min(counts[place(row, branch)] for row in range(rows)) <= 1
