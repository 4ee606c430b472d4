"""The walk from the cheapest setting on: what is painted in full, what is given up, and what is the front."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandemrt.calibrate.guidance_candidates import Candidate
from tandemrt.calibrate.guidance_loss import Loss, Painted, Tally, front_of, nearest_of, pooled_db, walked

TOTAL = 4
NEAR = Loss(30.0, None)


def candidates(count: int) -> list[Candidate]:
    return [Candidate("interval", {"start": 0.0, "end": float(number)}, 10.0 + number) for number in range(count)]


def walk_of(qualities: list[list[float]], loss: Loss = NEAR) -> list[Tally]:
    """A walk over settings whose pictures have these PSNRs, the cheapest first."""

    def paint(candidate: Candidate, index: int) -> Painted:
        return Painted(qualities[int(candidate.numbers["end"])][index], int(candidate.branches))

    return walked(candidates(len(qualities)), paint, TOTAL, loss)


def test_errors_are_averaged_and_not_decibels() -> None:
    assert pooled_db([20.0, 20.0], 2) == pytest.approx(20.0)
    assert pooled_db([10.0, 99.0], 2) == pytest.approx(13.01, abs=0.01)
    assert pooled_db([20.0], 2) == pytest.approx(23.01, abs=0.01)
    assert pooled_db([], 2) == math.inf


def test_the_front_is_what_costs_more_and_is_better() -> None:
    tallies = walk_of([[20.0] * 4, [31.0] * 4, [31.9] * 4, [35.0] * 4, [31.0] * 4, [40.0] * 4])
    assert [round(tally.psnr_db) for tally in front_of(tallies, NEAR)] == [31, 35, 40]
    assert [len(tally.painted) for tally in tallies] == [1, 4, 4, 4, 2, 4]


def test_the_nearest_to_the_loss_is_measured() -> None:
    """Its first picture promises more of the second setting than it comes to."""
    qualities, painted = [[13.0] * 4, [21.0, 5.0, 5.0, 5.0], [20.0] * 4, [12.0] * 4], list[int]()

    def paint(candidate: Candidate, index: int) -> Painted:
        setting = int(candidate.numbers["end"])
        painted.append(setting)
        return Painted(qualities[setting][index], 10)

    tallies = walked(candidates(4), paint, TOTAL, NEAR)
    assert [len(tally.painted) for tally in tallies] == [1] * 4
    nearest = nearest_of(tallies, paint, NEAR)
    assert (nearest, nearest.psnr_db) == (tallies[2], pytest.approx(20.0))
    # No more is painted than it takes to know: the last one's bound was lower from the start.
    assert painted == [0, 1, 2, 3, 1, *[2] * 3]


def test_the_nearest_to_a_scorer_s_loss_loses_the_fewest_pictures() -> None:
    right = [[False, False, False], [True, False, True], [False, True, False]]

    def paint(candidate: Candidate, index: int) -> Painted:
        setting = int(candidate.numbers["end"])
        return Painted(40.0 - setting, 10, right[setting][index], True)

    loss = Loss(None, 0.1)
    nearest = nearest_of(walked(candidates(3), paint, 3, loss), paint, loss)
    assert (nearest.candidate.numbers["end"], nearest.lost) == (1.0, pytest.approx(1 / 3))


def test_the_front_goes_by_what_was_paid() -> None:
    cheap, dear = Candidate("adaptive", {"probe": 2}, 10.0), Candidate("adaptive", {"probe": 3}, 11.0)
    paid = {10.0: (14, 31.0), 11.0: (12, 40.0)}
    tallies = walked(
        [cheap, dear], lambda one, index: Painted(paid[one.branches][1], paid[one.branches][0]), TOTAL, NEAR
    )
    assert [tally.candidate for tally in front_of(tallies, NEAR)] == [dear]


def test_what_cannot_be_good_enough_any_more_is_given_up() -> None:
    # One picture of 20 dB is 26 dB of four, whatever the others are.
    (tally,) = walk_of([[20.0, 60.0, 60.0, 60.0]])
    assert len(tally.painted) == 1
    (tally,) = walk_of([[60.0, 60.0, 60.0, 22.0]])
    assert len(tally.painted) == TOTAL
    assert front_of([tally], NEAR) == []


def test_the_walk_ends_where_nobody_sees_a_difference() -> None:
    assert len(walk_of([[31.0] * 4, [49.5] * 4, [60.0] * 4])) == 2


@given(st.lists(st.lists(st.floats(10, 99), min_size=TOTAL, max_size=TOTAL), min_size=1, max_size=8))
def test_the_front_is_what_painting_all_would_find(qualities: list[list[float]]) -> None:
    front = front_of(walk_of(qualities), NEAR)
    expected: list[float] = []
    for each in qualities:
        worth, pooled = expected[-1] + 1 if expected else 30.0, pooled_db(each, TOTAL)
        if worth <= pooled and worth < 50.0:
            expected.append(pooled)
    assert [tally.psnr_db for tally in front] == expected


def scored(rights: list[bool], loss: Loss) -> Tally:
    (tally,) = walked(
        candidates(1), lambda candidate, index: Painted(40.0, 10, rights[index], right_in_full=True), TOTAL, loss
    )
    return tally


def test_a_scorer_counts_what_is_lost() -> None:
    allowed = scored([True, True, False, True], Loss(None, 0.25))
    assert allowed.lost == 0.25
    assert front_of([allowed], Loss(None, 0.25)) == [allowed]
    refused = scored([True, True, False, True], Loss(None, 0.2))
    assert refused.whole
    assert front_of([refused], Loss(None, 0.2)) == []
    # Three lost of four cannot be made up for by the last.
    assert len(scored([False, False, False, True], Loss(None, 0.25)).painted) == 3
    facts = refused.facts()
    assert (facts["right"], facts["right_in_full"], facts["lost"]) == (3, 4, 0.25)


def test_without_a_scorer_nothing_is_said_of_rights() -> None:
    facts = walk_of([[40.0] * 4])[0].facts()
    assert (facts["right"], facts["right_in_full"], facts["lost"]) == (None, None, None)
