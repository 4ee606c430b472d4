"""What a generation took whose parts ran apart."""

from __future__ import annotations

import pytest

from tandemrt.runtime import Timings
from tandemrt.runtime.output import RowTiming
from tandemrt.runtime.plan import RowGuidance
from tandemrt.runtime.ran_on import GRAPH, RanOn

ENGINE = RanOn("0123456789abcdef", "plain")


def row_of(denoiser: str) -> RowTiming:
    return RowTiming(denoiser, 1.0, 1.5, RowGuidance(True, "batched", "guided"))


def test_timings_of_parts_are_those_of_one() -> None:
    large, small = row_of("unet"), row_of("unet_small")
    first = Timings(1.0, 0.5, (large, large), 0.0, 5.0, True, {"unet": (ENGINE,)}, {"batched": 3.0})
    second = Timings(0.0, 0.0, (small,), 0.0, 2.0, True, {"unet_small": (GRAPH,), "unet": (ENGINE, GRAPH)})
    last = Timings(0.0, 0.0, (), 4.0, 4.0, False, {"vae_decoder": (GRAPH,)}, {"parallel": 2.0})
    together = Timings.together([first, second, last])
    assert together == Timings(
        text_ms=1.0,
        image_ms=0.5,
        rows=(large, large, small),
        decode_ms=4.0,
        total_ms=11.0,
        step_engines=True,
        ran_on={"unet": (ENGINE, GRAPH), "unet_small": (GRAPH,), "vae_decoder": (GRAPH,)},
        tried={"batched": 3.0, "parallel": 2.0},
    )
    assert together.denoise_ms == 4.5


@pytest.mark.parametrize(("engines", "wanted"), [((True, True), True), ((True, False), False), ((), False)])
def test_all_rows_ran_on_step_engines_or_not(engines: tuple[bool, ...], wanted: bool) -> None:
    parts = [Timings(0.0, 0.0, (row_of("unet"),), 0.0, 1.0, one, {}) for one in engines]
    assert Timings.together([*parts, Timings(0.0, 0.0, (), 1.0, 1.0, False, {})]).step_engines is wanted
