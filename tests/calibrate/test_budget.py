"""The fewest layers that have to be kept, found by asking of few counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandemrt.calibrate.budget import fewest_kept


@given(st.integers(1, 300), st.integers(0, 400))
def test_the_fewest_are_found(layers: int, needed: int) -> None:
    asked: list[int] = []

    def holds(kept: int) -> bool:
        asked.append(kept)
        return kept >= needed

    assert fewest_kept(layers, holds) == (needed if needed < layers else None)
    assert len(asked) == len(set(asked)) <= 2 * layers.bit_length() + 2
    assert max(asked) < layers
