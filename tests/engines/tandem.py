"""A bundle with guidance placed in every way: one picture from all placements, and Hybridiff's window on stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime import Output, Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.targets import parse_target

from ..interop.picture import psnr_db

LEAST_PSNR_DB = 60.0
ROWS = 6
WINDOW: Mapping[str, Any] = {"L_slope": 2, "eps_slope": 1e-9, "k": 2, "tau_cap": 2}
# Of the rows, by stride: the window's first fills the stages, and it closes behind row 4.
PLACED = {
    1: ["parallel", "parallel", "filling", "pipelined", "pipelined", "parallel"],
    2: ["parallel", "parallel", "filling", "pipelined", "held", "parallel"],
}


def build_stages(bundle: Path, cache: Path, component: str, count: int, target: str = "onnxruntime:cpu") -> None:
    """Engines of a denoiser's stages: ONNX Runtime's for any size, OpenVINO's for two pictures of 64 px."""
    profiles = (parse_profile("64:b1"),)
    plan = BuildPlan(bundle, (parse_target(target),), cache, (component,), profiles, stages=count)
    for request in requests_of(plan, Bundle.open(bundle)):
        ensure_engine(request, cache, lambda label, done, total: None, {})


def require_tandem(bundle: Path, cache: Path, component: str, **arguments: Any) -> None:
    """Every placement paints one picture, and the window's pictures are others, of stages built into `cache`."""
    build_stages(bundle, cache, component, 2)
    given = {"seed": 7, "num_inference_steps": ROWS, "output_type": "np", **arguments}
    with Pipeline.open(bundle, cache=cache) as pipe:
        expected = pipe(**given)
        assert expected.images[0].std() > 0.01
        for placement in ("sequential", "parallel", "auto"):
            assert distance_db(pipe(**given, placement=placement), expected) >= LEAST_PSNR_DB
        made = [expected]
        for stride, time_shift in ((1, False), (2, True)):
            config = {**WINDOW, "stride": stride, "time_shift": time_shift}
            out = pipe(**given, placement="hybridiff", placement_config=config)
            require_window(out, expected, stride)
            assert distance_db(out, expected) < LEAST_PSNR_DB
            assert min(np.abs(out.latents - other.latents).max() for other in made) > 1e-3
            made.append(out)


def require_window(out: Output, whole: Output, stride: int) -> None:
    """The report of a picture through the window is that of `WINDOW`, up to which its rows are those of `whole`."""
    assert out.plan.taus == (2, 4)
    assert [row.placement for row in out.plan.ran] == PLACED[stride]
    assert [row.guidance for row in out.timings.rows] == list(out.plan.ran)
    for row in out.plan.ran:
        assert row.guided == (row.placement == "parallel")
        assert (row.discrepancy is None) != row.guided
        assert row.guided or row.why == "in the window: one prediction serves both branches"
    np.testing.assert_allclose(
        [row.discrepancy for row in out.plan.ran[:2]], [row.discrepancy for row in whole.plan.ran[:2]], rtol=1e-3
    )


def distance_db(one: Output, other: Output) -> float:
    return psnr_db(np.stack(one.images), np.stack(other.images))
