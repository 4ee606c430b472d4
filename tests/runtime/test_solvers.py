"""Solvers: what a table promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemrt.runtime.schedule import sigmas_from_alphas_cumprod, training_alphas_cumprod
from tandemrt.runtime.solvers import SOLVERS, compile_table, resolve_solver
from tandemrt.runtime.solvers.config import effective_config
from tandemrt.runtime.table import Table

from . import diffusers_oracle as oracle

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STOCHASTIC = ("ddpm", "euler_a", "dpmsolver++sde", "lcm")
DETERMINISTIC = tuple(name for name in SOLVERS if name not in STOCHASTIC)
DPM, UNIPC, EULER = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"


def compiled(name: str, steps: int, config: Mapping[str, Any] | None = None, **arguments: Any) -> Table:
    base = {"shift": 3.0} if name == "flow_euler" else STABLE_DIFFUSION
    class_name, resolved = resolve_solver(name, {**base, **(config or {})})
    return compile_table(class_name, resolved, steps, **arguments)


@given(
    name=st.sampled_from(DETERMINISTIC),
    steps=st.integers(1, 50),
    spacing=st.sampled_from(["leading", "linspace", "trailing"]),
    prediction_type=st.sampled_from(["epsilon", "v_prediction"]),
)
@settings(max_examples=60)
def test_without_eta_nothing_draws_noise(name: str, steps: int, spacing: str, prediction_type: str) -> None:
    keys = {} if name == "flow_euler" else {"timestep_spacing": spacing, "prediction_type": prediction_type}
    table = compiled(name, steps, keys)
    assert not table.draws_noise.any()
    assert table.steps[-1] + 1 == steps


@pytest.mark.parametrize("name", [*STOCHASTIC, "ddim", "tcd"])
def test_with_noise_every_step_but_the_last_draws_it(name: str) -> None:
    table = compiled(name, 6, eta=0.5 if name in ("ddim", "tcd") else 0.0)
    assert table.draws_noise[:-1].all()
    # DDPM's last time step here is 1, not 0, and diffusers adds noise of variance 1e-20 there.
    assert table.draws_noise[-1] == (name == "ddpm")
    assert np.abs(table.noise[-1]).max() <= 1e-10


@given(name=st.sampled_from(sorted(SOLVERS)), steps=st.integers(1, 12), data=st.data())
@settings(max_examples=60)
def test_the_state_is_all_a_run_needs_to_go_on(name: str, steps: int, data: st.DataObject) -> None:
    """Stopping before any row and going on from the state with a table compiled anew repeats the run to the bit."""
    begin = data.draw(st.integers(0, steps - 1))
    table, again = compiled(name, steps, begin=begin), compiled(name, steps, begin=begin)
    stop = data.draw(st.integers(0, table.rows))
    random = np.random.default_rng(steps)
    noises = random.standard_normal((table.rows, 8))
    start = np.zeros((1 + table.history, 8))
    start[0] = random.standard_normal(8) * table.init_noise_sigma

    def advanced(table: Table, state: np.ndarray, begin: int, end: int) -> np.ndarray:
        for n in range(begin, end):
            output = np.sin(3 * table.model_input[n] @ state + table.timesteps[n])
            state = table.transition[n] @ state + np.outer(table.prediction[n], output)
            state = state + np.outer(table.noise[n], noises[n])
        return state

    whole = advanced(table, start, 0, table.rows)
    handed_over = advanced(table, start, 0, stop).copy()
    assert np.array_equal(advanced(again, handed_over, stop, table.rows), whole)


ALL_TYPES = ("epsilon", "v_prediction", "sample")
LANDS_ON_X0 = [
    *(("ddim", prediction_type) for prediction_type in ALL_TYPES),
    # PNDM mixes v-predictions of different time steps, which the same x0 and noise make differ.
    ("pndm", "epsilon"),
    *(
        (name, prediction_type)
        for name in ("euler", "heun", "lms", "dpmsolver++", "unipc")
        for prediction_type in ALL_TYPES
    ),
]


@pytest.mark.parametrize(("name", "prediction_type"), LANDS_ON_X0)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_an_exact_model_leads_to_x0(name: str, prediction_type: str, steps: int) -> None:
    """A model that knows x0 sees it in every denoised estimate, and deterministic solvers arrive there."""
    config = effective_config("DDIMScheduler", {**STABLE_DIFFUSION, "clip_sample": False})
    training = sigmas_from_alphas_cumprod(training_alphas_cumprod(config))
    to_one = {"set_alpha_to_one": True} if name in ("ddim", "pndm") else {}
    table = compiled(name, steps, {**to_one, "prediction_type": prediction_type})
    sigmas = np.interp(table.timesteps, np.arange(1000), training)
    x0 = np.array([0.3, -1.2, 0.9])

    def model(row: int, _: float, model_input: np.ndarray) -> np.ndarray:
        alpha = 1 / np.hypot(1, sigmas[row])
        sigma = alpha * sigmas[row]
        noise = (model_input - alpha * x0) / sigma
        return {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[prediction_type]

    assert_leads_to(x0, table, model, 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_an_exact_velocity_leads_to_x0(steps: int) -> None:
    table = compiled("flow_euler", steps)
    x0 = np.array([0.3, -1.2, 0.9])
    # The tolerance is that of the float32 time steps the model is given.
    assert_leads_to(x0, table, lambda _, timestep, x: (x - x0) / (timestep / 1000), 1e-5)


def assert_leads_to(x0: np.ndarray, table: Table, model: Callable[..., np.ndarray], tolerance: float) -> None:
    first = np.array([1.0, -0.4, 0.2]) * table.init_noise_sigma
    result = oracle.run_table(table, first, model, lambda _: np.zeros(3))
    np.testing.assert_allclose(result.samples[-1], x0, atol=tolerance)
    assert result.denoised is not None
    np.testing.assert_allclose(result.denoised, np.broadcast_to(x0, result.denoised.shape), atol=tolerance)


@pytest.mark.parametrize(
    ("name", "config", "history"),
    [
        *((name, {}, 0) for name in ("ddim", "ddpm", "euler", "euler_a", "lcm", "tcd", "flow_euler")),
        ("heun", {}, 1),
        ("dpmsolver++", {}, 1),
        ("dpmsolver++sde", {}, 1),
        ("dpmsolver++", {"solver_order": 3}, 2),
        ("deis", {}, 1),
        ("unipc", {}, 2),
        ("unipc", {"disable_corrector": list(range(20))}, 1),
        ("lms", {}, 3),
        ("pndm", {}, 3),
    ],
)
def test_the_state_is_no_larger_than_the_solver_needs(name: str, config: dict[str, Any], history: int) -> None:
    assert compiled(name, 20, config).history == history
    assert compiled(name, 1, config).history == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ddim", [0, 1, 2]), ("pndm", [0, 0, 1, 2]), ("heun", [0, 0, 1, 1, 2]), ("unipc", [0, 1, 2])],
)
def test_rows_know_their_inference_step(name: str, expected: list[int]) -> None:
    assert compiled(name, 3).steps.tolist() == expected


def test_trailing_spacing_has_no_stray_step() -> None:
    """diffusers' `arange` makes 62 time steps of 61, the last at −1."""
    scheduler = oracle.scheduler_for("DDIMScheduler", {"timestep_spacing": "trailing"}, 61)
    assert scheduler.timesteps[-1] == -1
    table = compiled("ddim", 61, {"timestep_spacing": "trailing"})
    assert table.timesteps.tolist() == scheduler.timesteps[:-1].tolist()


def test_unipc_bh1_ends_with_the_denoised_estimate() -> None:
    """Where diffusers multiplies 0 by infinity."""
    theirs = oracle.probe(oracle.scheduler_for(UNIPC, {"solver_type": "bh1"}, 4))
    assert np.isnan(theirs.samples[-1]).any()
    ours = oracle.table_coefficients(compiled("unipc", 4, {"solver_type": "bh1"}))
    assert ours.denoised is not None
    np.testing.assert_allclose(ours.samples[-1], ours.denoised[-1], atol=1e-12)
