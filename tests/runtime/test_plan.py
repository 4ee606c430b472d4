"""Plans: which denoiser and which guidance each row of the schedule gets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandemrt.runtime.errors import PlanError, RequestError
from tandemrt.runtime.manifest import (
    Component,
    Defaults,
    LatentSpace,
    Manifest,
    SchedulerDefaults,
    Source,
    TextConditioning,
    TextEncoding,
)
from tandemrt.runtime.plan import Schedule, compile_plan
from tandemrt.runtime.plan_steps import parse_steps
from tandemrt.runtime.solvers import begin_at_strength

BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
ONE_STEP = SchedulerDefaults(class_name="DDIMScheduler", config={**BETAS, "timestep_spacing": "trailing"})


def denoiser(scheduler: SchedulerDefaults | None = None) -> Component:
    source = Source(class_name="UNet2DConditionModel", sha256="0" * 64)
    return Component(
        role="denoiser",
        model="unet/model.onnx",
        inputs=(),
        outputs=(),
        precision="fp32",
        source=source,
        parameters=1,
        prediction_type="epsilon",
        scheduler=scheduler,
        evidence=(),
    )


MANIFEST = Manifest(
    format=1,
    producers={},
    components={"unet": denoiser(), "unet_small": denoiser(), "unet_one_step": denoiser(ONE_STEP)},
    files={},
    latent=LatentSpace(channels=4, downsampling=8, scaling_factor=1.0),
    text=TextConditioning(encoders={"text_encoder": TextEncoding(max_length=24, width=128)}, width=128),
    scheduler=SchedulerDefaults(class_name="DPMSolverMultistepScheduler", config=dict(BETAS)),
    defaults=Defaults(height=64, width=64, num_inference_steps=25, guidance_scale=2.0),
)


def plan(**arguments: Any) -> Any:
    return compile_plan(MANIFEST, Schedule(**arguments))


def test_defaults_come_from_the_bundle() -> None:
    compiled = plan()
    assert compiled.steps == (("unet", 25),)
    assert compiled.guidance_scale == 2.0
    assert all(compiled.guided)
    assert compiled.table.timesteps[0] == 999


def test_plans_can_be_compared() -> None:
    """Tables are equal where they are one: of two arrays it has no one truth whether they are."""
    one = plan()
    assert one == replace(one)
    assert one != plan()


def test_tandem_hands_over_after_the_large_models_steps() -> None:
    compiled = plan(steps={"unet": 10, "unet_small": 15})
    assert compiled.denoisers == ("unet",) * 10 + ("unet_small",) * 15
    assert compiled.steps == (("unet", 10), ("unet_small", 15))


def test_a_stored_split_runs_where_the_caller_names_no_steps() -> None:
    split = (("unet", 5), ("unet_small", 15), ("unet", 5))
    manifest = msgspec.structs.replace(MANIFEST, defaults=msgspec.structs.replace(MANIFEST.defaults, steps=split))
    assert compile_plan(manifest, Schedule()).steps == split
    assert compile_plan(manifest, Schedule(solver="ddim", guidance_scale=1.0)).steps == split
    assert compile_plan(manifest, Schedule(steps=25)).steps == (("unet", 25),)
    assert compile_plan(manifest, Schedule(steps={"unet_small": 3})).steps == (("unet_small", 3),)
    assert compile_plan(manifest, Schedule(timesteps=[999, 499])).steps == (("unet", 2),)


def test_a_stored_split_runs_the_time_steps_of_a_distilled_bundle() -> None:
    defaults = msgspec.structs.replace(
        MANIFEST.defaults, num_inference_steps=2, timesteps=(999, 499), steps=(("unet", 1), ("unet_small", 1))
    )
    manifest = msgspec.structs.replace(MANIFEST, defaults=defaults)
    compiled = compile_plan(manifest, Schedule())
    assert (compiled.steps, compiled.table.timesteps.tolist()) == (defaults.steps, [999, 499])


def test_a_denoiser_may_come_back() -> None:
    compiled = plan(steps=[("unet", 2), ("unet_small", 3), ("unet", 1)])
    assert compiled.steps == (("unet", 2), ("unet_small", 3), ("unet", 1))


def test_pndm_calls_the_first_steps_denoiser_twice() -> None:
    compiled = plan(steps={"unet": 2, "unet_small": 3}, solver="pndm")
    assert compiled.denoisers == ("unet",) * 3 + ("unet_small",) * 3
    assert compiled.table.steps.tolist() == [0, 0, 1, 2, 3, 4]
    assert compiled.steps == (("unet", 2), ("unet_small", 3))


@given(st.lists(st.tuples(st.sampled_from(["unet", "unet_small"]), st.integers(1, 4)), min_size=1, max_size=5))
def test_steps_read_back_as_given(runs: list[tuple[str, int]]) -> None:
    merged: list[tuple[str, int]] = []
    for name, count in runs:
        if merged and merged[-1][0] == name:
            merged[-1] = (name, merged[-1][1] + count)
        else:
            merged.append((name, count))
    for solver in ("euler", "heun", "pndm"):
        assert plan(steps=runs, solver=solver).steps == tuple(merged)


def test_a_denoiser_alone_brings_its_own_scheduler() -> None:
    assert plan(steps={"unet_one_step": 1}).table.solver == plan(steps=1, solver="ddim").table.solver
    assert plan(steps={"unet_one_step": 1}).table.timesteps.tolist() == [999]
    mixed = plan(steps={"unet": 1, "unet_one_step": 1})
    assert mixed.table.solver == plan(steps=2).table.solver


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_at_one_or_below_is_off_as_in_diffusers(scale: float) -> None:
    assert not any(plan(guidance_scale=scale).guided)


def test_guidance_interval_switches_guidance_by_steps() -> None:
    assert plan(steps=10, guidance_interval=(0.2, 0.7)).guided == (False,) * 2 + (True,) * 5 + (False,) * 3


def test_strength_leaves_out_the_first_steps() -> None:
    compiled = plan(steps={"unet": 10, "unet_small": 15}, strength=0.8)
    assert compiled.steps == (("unet", 5), ("unet_small", 15))
    assert compiled.table.timesteps.tolist() == plan(steps=25).table.timesteps.tolist()[5:]
    assert plan(steps={"unet": 10, "unet_small": 15}, strength=0.5).steps == (("unet_small", 12),)


@pytest.mark.parametrize("solver", ["pndm", "heun"])
def test_strength_counts_steps_where_solvers_call_twice(solver: str) -> None:
    assert plan(steps={"unet": 5, "unet_small": 5}, solver=solver, strength=0.8).steps == (
        ("unet", 3),
        ("unet_small", 5),
    )


def test_guidance_interval_is_of_the_steps_that_run() -> None:
    guided = plan(steps=10, strength=0.5, guidance_interval=(0.2, 0.7)).guided
    assert guided == (False, True, True, True, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps.*got 0"),
        ({"steps": {"unet": 0, "unet_small": 0}}, "steps.*got 0"),
        ({"steps": {"unet": -1, "unet_small": 2}}, "unet.*got -1"),
        ({"steps": {"unet": 2.5}}, "unet.*got 2.5"),
        ({"steps": {"unet_large": 2}}, "got 'unet_large', expected one of unet, unet_small, unet_one_step"),
        ({"steps": {"unet_smal": 2}}, r"got 'unet_smal', .*\. Did you mean 'unet_small'\?$"),
        ({"solver": "dpm3000"}, "dpm3000"),
        ({"solver_config": {"thresholding": True}}, "thresholding"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.0, math.nan)}, "guidance_interval"),
        ({"steps": 2, "timesteps": [999]}, "timesteps.*got 1, expected 2"),
        ({"steps": 10, "strength": 0.05}, "strength: of 10 steps, none is left, got 0.05"),
        ({"strength": 1.5}, "strength.*got 1.5"),
    ],
)
def test_unusable_schedules_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(**arguments)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, "7"])
def test_unusable_guidance_is_refused(scale: Any) -> None:
    with pytest.raises(RequestError, match="guidance_scale"):
        plan(guidance_scale=scale)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25", (("unet", 25),)),
        ("10,15", (("unet", 10), ("unet_small", 15))),
        ("0, 25", (("unet", 0), ("unet_small", 25))),
        ("unet_small:3,unet:2", (("unet_small", 3), ("unet", 2))),
    ],
)
def test_steps_are_read_from_text(text: str, expected: tuple[tuple[str, int], ...]) -> None:
    assert parse_steps(text, ("unet", "unet_small")) == expected


@pytest.mark.parametrize("text", ["", "ten", "1,2,3", "unet:", "-1", "5,", "\u0665"])
def test_text_that_is_no_steps_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="steps"):
        parse_steps(text, ("unet", "unet_small"))


@given(st.integers(1, 100_000))
def test_the_strength_that_is_advised_leaves_a_step(steps: int) -> None:
    with pytest.raises(PlanError) as caught:
        begin_at_strength("DDIMScheduler", steps, 1e-9)
    least = float(str(caught.value).split("expected ")[1].split(" or more")[0])
    assert begin_at_strength("DDIMScheduler", steps, least) == steps - 1
