"""Calls of quantized components beside the float ones, in turns within one run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tandemrt.calibrate import call_times as module
from tandemrt.calibrate.call_times import LEAST_ROUNDS, ROUNDS, call_times
from tandemrt.calibrate.judged import Painting, Way
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.pipeline import Pipeline

LARGE, SMALL = Way((("unet", 4),), "vae_decoder"), Way((("unet_small", 1),), "vae_decoder")
WAYS = {"text_encoder": (LARGE, SMALL), "unet": (LARGE,), "unet_small": (SMALL,), "vae_decoder": (LARGE, SMALL)}
PAINTING = Painting(("red",), seed=3, target="onnxruntime:cpu", threads=1, arguments={"timesteps": (900, 600, 300, 1)})


def test_each_component_is_called_in_every_round(tiny_bundle: Path, cache: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    found = call_times(bundle, bundle, WAYS, PAINTING)
    assert list(found) == list(WAYS)
    for one in found.values():
        assert LEAST_ROUNDS <= one.rounds <= ROUNDS
        assert 0 < one.least_ratio <= one.ratio <= one.most_ratio
        assert min(one.float_ms, one.quantized_ms) > 0
        assert (one.target, one.threads) == ("onnxruntime:cpu", 1)


@pytest.mark.parametrize(("seconds", "rounds"), [(3600, ROUNDS), (-1, LEAST_ROUNDS)])
def test_medians_and_extremes_are_of_rounds_that_took_turns(
    tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int
) -> None:
    """The first one, which loads, does not count; a dear one ends with the least number of them."""
    asked: list[tuple[Pipeline, int]] = []

    def called(pipeline: Pipeline, runs: Any, painting: Painting, round_: int) -> dict[str, float]:
        asked.append((pipeline, round_))
        quantized = pipeline is not asked[0][0]
        return {"unet": 1e6 if not round_ else (30.0 if round_ == 2 else 5.0) if quantized else 10.0}

    monkeypatch.setattr(module, "_calls", called)
    monkeypatch.setattr(module, "_SECONDS", seconds)
    bundle = Bundle.open(tiny_bundle)
    one = call_times(bundle, bundle, {"unet": (LARGE,), "text_encoder": (LARGE,)}, PAINTING)
    assert list(one) == ["unet"]  # the other did not run
    assert [round_ for _, round_ in asked] == [each for round_ in range(1 + rounds) for each in (round_, round_)]
    assert all(first is not second for (first, _), (second, _) in pairwise(asked))
    facts = one["unet"]
    assert (facts.rounds, facts.float_ms, facts.quantized_ms) == (rounds, 10, 5)
    assert (facts.ratio, facts.least_ratio, facts.most_ratio) == (0.5, 0.5, 3)
