"""The fewest layers that have to be kept, found by asking of few counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandemrt.calibrate.budget import fewest_kept


@given(st.integers(0, 300), st.integers(0, 400))
def test_the_fewest_are_found(most: int, needed: int) -> None:
    asked: list[int] = []

    def holds(kept: int) -> bool:
        asked.append(kept)
        return kept >= needed

    assert fewest_kept(most, holds) == (needed if needed <= most else None)
    assert len(asked) == len(set(asked)) <= 2 * most.bit_length() + 3
    assert max(asked) <= most
