"""Schedules that begin at a later step against diffusers' image-to-image and inpainting, as `test_solver_oracle`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemrt.runtime.errors import PlanError
from tandemrt.runtime.solvers import begin_at_strength, compile_table
from tandemrt.runtime.table import Table

from . import diffusers_oracle as oracle
from .test_solver_oracle import (
    EULER,
    EXACT,
    FLOW,
    ONE_OF_EACH,
    SINGLE,
    TIMESTEP_ULP,
    Case,
    assert_close,
    assert_draws_agree,
    assert_same,
    varied,
)


def table_of(case: Case, count: int, begin: int) -> Table:
    return compile_table(case.class_name, case.full_config, count, timesteps=case.timesteps, eta=case.eta, begin=begin)


def compare(case: Case, count: int, begin: int, *, single: bool) -> None:
    ours = oracle.table_coefficients(table_of(case, count, begin))
    double = oracle.double_scheduler_for(case.class_name, case.full_config, count, case.timesteps)
    theirs = oracle.probe(double, begin, double=True, **case.step_arguments)
    assert_same(ours, theirs, EXACT)
    assert ours.noised is not None
    assert_close(ours.noised, theirs.noised, EXACT)
    assert_draws_agree(ours, theirs)
    scheduler = oracle.scheduler_for(case.class_name, case.full_config, count, case.timesteps)
    timesteps = oracle.visited_timesteps(scheduler, oracle.Editing(begin)).numpy()
    np.testing.assert_allclose(ours.timesteps, timesteps, rtol=0, atol=TIMESTEP_ULP)
    if single:
        theirs = oracle.probe(scheduler, begin, **case.step_arguments)
        assert_same(ours, theirs, SINGLE)
        assert_close(ours.noised, theirs.noised, SINGLE)


def begun(case: Case) -> Iterator[tuple[int, int]]:
    """Step counts, each with steps to begin at."""
    for count in sorted({min(case.counts, key=lambda count: abs(count - 5)), max(case.counts)}):
        steps = int(table_of(case, count, 0).steps[-1]) + 1
        yield from ((count, begin) for begin in sorted({steps // 5, 2 * steps // 3}))


@pytest.mark.parametrize("case", varied(), ids=str)
def test_every_key(case: Case) -> None:
    for count, begin in begun(case):
        compare(case, count, begin, single=False)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_every_step(case: Case) -> None:
    for count in (1, 2, 3, 6, 15):
        for begin in range(count):
            compare(case, count, begin, single=True)


@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpaint"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_whole_trajectories(case: Case, masked: bool) -> None:
    """A model that is not linear and mixes what is kept with what is painted."""
    count, begin, size = 12, 5, 64
    table = table_of(case, count, begin)
    random = np.random.default_rng(7)
    latent, noise, *noises = random.standard_normal((2 + table.rows, size))
    mask = np.repeat([0.0, 1.0], size // 2)
    random.shuffle(mask)
    editing = oracle.Editing(begin, latent, noise, mask if masked else None)

    def output(row: int, model_input: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.tanh(1.7 * model_input + table.timesteps[row] / 500) + 0.3 * model_input[::-1]

    def torch_output(row: int, _: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(output(row, sample.reshape(-1).numpy())).reshape(sample.shape)

    ours = oracle.run_table(table, None, lambda row, _, x: output(row, x), lambda row: noises[row], editing)
    scheduler = oracle.double_scheduler_for(case.class_name, case.full_config, count)
    torch_noises = [torch.from_numpy(drawn).reshape(1, -1, 1, 1) for drawn in noises]
    theirs = oracle.run(
        scheduler, None, torch_output, lambda row, _: torch_noises[row], editing, double=True, **case.step_arguments
    )
    assert_same(ours, theirs, 1e-9)
    if masked:
        np.testing.assert_array_equal(ours.samples[-1][mask == 0], latent[mask == 0])


DIFFUSION_PIPELINES = (
    diffusers.StableDiffusionImg2ImgPipeline,
    diffusers.StableDiffusionInpaintPipeline,
    diffusers.StableDiffusionXLImg2ImgPipeline,
    diffusers.StableDiffusionXLInpaintPipeline,
)
FLOW_PIPELINES = (diffusers.StableDiffusion3Img2ImgPipeline, diffusers.StableDiffusion3InpaintPipeline)


@pytest.mark.parametrize(
    ("pipeline", "case"),
    [
        *((DIFFUSION_PIPELINES[0], case) for case in ONE_OF_EACH if case.class_name != FLOW),
        *((pipeline, Case(EULER)) for pipeline in DIFFUSION_PIPELINES[1:]),
        *((pipeline, Case(FLOW)) for pipeline in FLOW_PIPELINES),
    ],
)
def test_a_strength_begins_where_the_pipelines_do(pipeline: Any, case: Case) -> None:
    for count in (1, 2, 4, 7, 10, 20, 29, 50):
        scheduler = oracle.scheduler_for(case.class_name, case.full_config, count)
        for strength in (0.05, 0.1, 0.29, 0.3, 0.55, 0.7, 0.75, 0.999, 1.0):
            timesteps, steps = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), count, strength, "cpu")
            if steps == 0:
                with pytest.raises(PlanError, match=f"strength: of {count} steps, none is left, got {strength}"):
                    begin_at_strength(case.class_name, count, strength)
                continue
            begin = begin_at_strength(case.class_name, count, strength)
            assert begin == count - steps
            table = table_of(case, count, begin)
            assert table.steps[-1] + 1 == steps
            np.testing.assert_allclose(table.timesteps, timesteps.numpy(), rtol=0, atol=TIMESTEP_ULP)


@given(count=st.integers(1, 200), class_name=st.sampled_from(["DDIMScheduler", FLOW]))
def test_full_strength_begins_at_the_first_step(count: int, class_name: str) -> None:
    assert begin_at_strength(class_name, count, 1.0) == 0


def test_flow_matching_rounds_the_steps_up() -> None:
    assert begin_at_strength("EulerDiscreteScheduler", 10, 0.55) == 5
    assert begin_at_strength(FLOW, 10, 0.55) == 4


def test_lcm_keeps_the_time_steps_of_the_whole_schedule() -> None:
    """Its own set_timesteps(strength=...), which only diffusers' LCM pipelines use, would space others."""
    table = compile_table("LCMScheduler", {}, 4, begin=begin_at_strength("LCMScheduler", 4, 0.5))
    assert table.timesteps.tolist() == [499, 259]
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(4, strength=0.5)
    assert scheduler.timesteps.tolist() == [499, 379, 259, 139]


@pytest.mark.parametrize("strength", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), "0.5", None, True])
def test_unusable_strengths_are_refused(strength: Any) -> None:
    with pytest.raises(PlanError, match="strength: cannot be used"):
        begin_at_strength("DDIMScheduler", 10, strength)


@pytest.mark.parametrize("count", [0, -1, 2.5, 10**400])
def test_strengths_of_unusable_step_counts_are_refused(count: Any) -> None:
    with pytest.raises(PlanError, match="num_inference_steps: cannot be used"):
        begin_at_strength("DDIMScheduler", count, 0.5)


@pytest.mark.parametrize("begin", [-1, 5, 1.0, True, None])
def test_unusable_beginnings_are_refused(begin: Any) -> None:
    with pytest.raises(PlanError, match=r"begin: cannot be used.*0\.\.4"):
        compile_table("EulerDiscreteScheduler", {}, 5, begin=begin)


def test_steps_that_the_schedule_leaves_out_cannot_be_begun_at() -> None:
    """With lambda_min_clipped, `trailing` spacing has fewer steps than asked for."""
    config = {"lambda_min_clipped": -1.5, "timestep_spacing": "trailing"}
    table = compile_table("DPMSolverMultistepScheduler", config, 10)
    assert table.rows < 10
    assert compile_table("DPMSolverMultistepScheduler", config, 10, begin=table.rows - 1).rows == 1
    with pytest.raises(PlanError, match="begin"):
        compile_table("DPMSolverMultistepScheduler", config, 10, begin=table.rows)


WITHOUT_MEMORY = [case for case in ONE_OF_EACH if table_of(case, 10, 0).history == 0 or "Heun" in case.class_name]


@given(case=st.sampled_from(WITHOUT_MEMORY), count=st.integers(1, 30), data=st.data())
@settings(max_examples=60)
def test_without_memory_a_later_beginning_is_the_rest_of_the_table(case: Case, count: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, count - 1))
    whole, later = table_of(case, count, 0), table_of(case, count, begin)
    left_out = whole.rows - later.rows
    assert left_out == begin * (2 if "Heun" in case.class_name else 1)
    assert later.init_noise_sigma == whole.init_noise_sigma
    np.testing.assert_array_equal(later.steps, whole.steps[left_out:] - begin)
    # The last step of Heun reads no history, so a table of it alone has none.
    kept = slice(1 + later.history)
    np.testing.assert_array_equal(later.transition, whole.transition[left_out:, kept, kept])
    for name in ("model_input", "prediction", "noise", "denoised_state"):
        np.testing.assert_array_equal(getattr(later, name), getattr(whole, name)[left_out:, kept])
    for name in ("timesteps", "denoised_prediction", "noised"):
        np.testing.assert_array_equal(getattr(later, name), getattr(whole, name)[left_out:])


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_noising_fades_to_the_clean_latent(case: Case) -> None:
    table = table_of(case, 10, 0)
    signal_to_noise = table.noised[:-1, 0] / table.noised[:-1, 1]
    assert (np.diff(signal_to_noise) >= 0).all()
    assert table.noised[-1].tolist() == [1.0, 0.0]
