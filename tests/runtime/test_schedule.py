"""Noise schedules against diffusers and their own properties."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemrt.runtime.schedule import (
    sigmas_from_alphas_cumprod,
    spaced_sigmas,
    spaced_timesteps,
    timesteps_from_sigmas,
    training_alphas_cumprod,
    training_betas,
)


def config(**keys: Any) -> dict[str, Any]:
    defaults = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
        "steps_offset": 1,
    }
    return {**defaults, **keys}


TRAINING = sigmas_from_alphas_cumprod(training_alphas_cumprod(config()))


@pytest.mark.parametrize("count", [1000, 999, 500, 37])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace"])
def test_betas_and_alphas_cumprod_are_diffusers(schedule: str, count: int) -> None:
    keys = config(beta_schedule=schedule, num_train_timesteps=count)
    scheduler = diffusers.DDPMScheduler.from_config(keys)
    # What torch rounds twice on a processor without fused multiply-add may differ in the last bit.
    np.testing.assert_allclose(training_betas(keys), scheduler.betas.numpy(), rtol=2e-7)
    np.testing.assert_allclose(training_alphas_cumprod(keys), scheduler.alphas_cumprod.numpy(), rtol=1e-6)
    if schedule in ("squaredcos_cap_v2", "laplace"):
        assert np.array_equal(training_betas(keys), scheduler.betas.numpy())
        assert np.array_equal(training_alphas_cumprod(keys), scheduler.alphas_cumprod.numpy().astype(np.float64))


def test_other_beta_schedules() -> None:
    sigmoid = config(beta_schedule="sigmoid")
    np.testing.assert_allclose(
        training_betas(sigmoid), diffusers.DDPMScheduler.from_config(sigmoid).betas.numpy(), rtol=1e-6
    )
    exponential = config(beta_schedule="exp")
    assert np.array_equal(
        training_betas(exponential), diffusers.HeunDiscreteScheduler.from_config(exponential).betas.numpy()
    )
    trained = config(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)
    assert training_betas(trained).tolist() == np.array([0.1, 0.2, 0.3], np.float32).tolist()


def test_a_zero_terminal_snr_ends_in_noise_alone() -> None:
    keys = config(rescale_betas_zero_snr=True)
    ours = training_alphas_cumprod(keys)
    theirs = diffusers.DDIMScheduler.from_config(keys).alphas_cumprod.numpy()
    assert ours[-1] == theirs[-1] == 0
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=1e-4)
    assert ours[0] == pytest.approx(training_alphas_cumprod(config())[0], rel=1e-6)
    assert training_alphas_cumprod(keys, keep_sigma_finite=True)[-1] == 2.0**-24
    assert training_alphas_cumprod(config(), keep_sigma_finite=True)[-1] > 2.0**-24


@given(
    spacing=st.sampled_from(["linspace", "leading", "trailing"]),
    steps=st.integers(1, 1000),
    endpoint_left_out=st.booleans(),
)
@settings(max_examples=200)
def test_timesteps_fall_within_the_training_schedule(spacing: Any, steps: int, endpoint_left_out: bool) -> None:
    timesteps = spaced_timesteps(spacing, steps, config(), endpoint_left_out=endpoint_left_out)
    assert len(timesteps) == steps
    assert 0 <= timesteps[-1] <= timesteps[0] <= 1000
    # One training step cannot be left out of a thousand that are all asked for.
    if not (spacing == "leading" and endpoint_left_out and steps == 1000):
        assert (np.diff(timesteps) < 0).all()


@given(
    spacing=st.sampled_from(["karras", "exponential", "lu"]),
    steps=st.integers(2, 100),
    lowest=st.floats(0.001, 1),
    highest=st.floats(1.5, 1000),
)
def test_respaced_sigmas_fall_from_end_to_end(spacing: Any, steps: int, lowest: float, highest: float) -> None:
    sigmas = spaced_sigmas(spacing, highest, lowest, steps)
    assert len(sigmas) == steps
    assert sigmas[0] == pytest.approx(highest)
    assert sigmas[-1] == pytest.approx(lowest)
    assert (np.diff(sigmas) < 0).all()


def test_sigmas_rise_with_time_and_give_the_timestep_back() -> None:
    assert (np.diff(TRAINING) > 0).all()
    timesteps = np.array([999.0, 640.25, 17.5, 0.0])
    between = np.exp(np.interp(timesteps, np.arange(1000), np.log(TRAINING)))
    np.testing.assert_allclose(timesteps_from_sigmas(between, TRAINING), timesteps, atol=1e-3)


def test_sigmas_outside_the_training_schedule_clamp_to_its_ends() -> None:
    assert timesteps_from_sigmas(np.array([1e6, 0.0]), TRAINING).tolist() == [999.0, 0.0]


@given(sigma=st.floats(1e-3, 100))
def test_timesteps_follow_sigma(sigma: float) -> None:
    lower, higher = timesteps_from_sigmas(np.array([sigma, sigma * 1.01]), TRAINING)
    assert 0 <= lower <= higher <= 999
