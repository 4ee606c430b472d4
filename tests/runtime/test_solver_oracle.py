"""Every solver against diffusers, coefficient by coefficient, and over whole trajectories.

Two comparisons each. With diffusers as it is: its float32 arithmetic sets the tolerance. And with diffusers computing
in double precision from the same ᾱ: what is left is rounding, so a wrong formula has nowhere to hide.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tandemrt.runtime.solvers import compile_table

from . import diffusers_oracle as oracle

SHIPPED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "schedulers.json").read_text())
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
EXACT = 1e-11
# What diffusers' own float32 loses. Third-order DEIS and UniPC subtract nearly equal numbers there.
SINGLE = 1e-5
SINGLE_THIRD_ORDER = 1e-3
# The spacing of float32 numbers just under 1000, where fractional time steps end up.
TIMESTEP_ULP = 6.2e-5


@dataclass(frozen=True)
class Case:
    """A schedule to compare; `config` is added to Stable Diffusion's, for flow matching to nothing."""

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    counts: Sequence[int] = (1, 2, 3, 5, 14, 17)
    timesteps: Sequence[int] | None = None
    eta: float = 0.0

    @property
    def full_config(self) -> dict[str, Any]:
        return {**({} if self.class_name.startswith("Flow") else STABLE_DIFFUSION), **self.config}

    @property
    def step_arguments(self) -> dict[str, Any]:
        return {"eta": self.eta} if self.class_name in ("DDIMScheduler", "TCDScheduler") else {}

    def __str__(self) -> str:
        values = [
            f"{key}={value}" for key, value in self.config.items() if key not in ("clip_sample", "skip_prk_steps")
        ]
        chosen = [*values, *(["eta"] if self.eta else []), *(["timesteps"] if self.timesteps else [])]
        return "-".join([self.class_name.removesuffix("Scheduler"), *chosen])


REQUIRED: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
}
SPACED = {
    "DDIMScheduler": ("epsilon", "v_prediction", "sample"),
    "DDPMScheduler": ("epsilon", "v_prediction", "sample"),
    "PNDMScheduler": ("epsilon", "v_prediction"),
    "EulerDiscreteScheduler": ("epsilon", "v_prediction", "sample"),
    "EulerAncestralDiscreteScheduler": ("epsilon", "v_prediction"),
    "HeunDiscreteScheduler": ("epsilon", "v_prediction", "sample"),
    "LMSDiscreteScheduler": ("epsilon", "v_prediction", "sample"),
    "DPMSolverMultistepScheduler": ("epsilon", "v_prediction", "sample"),
    "DEISMultistepScheduler": ("epsilon", "v_prediction", "sample"),
    "UniPCMultistepScheduler": ("epsilon", "v_prediction", "sample"),
}
DPM, DEIS, UNIPC = "DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"
EULER, HEUN, LMS = "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
FIVE = (999, 800, 600, 300, 100)


def varied() -> Iterator[Case]:
    for class_name, prediction_types in SPACED.items():
        for spacing in ("leading", "linspace", "trailing"):
            for prediction_type in prediction_types:
                config = {"timestep_spacing": spacing, "prediction_type": prediction_type}
                yield Case(class_name, {**REQUIRED.get(class_name, {}), **config}, counts=(1, 2, 3, 7, 16))
    for class_name in (EULER, HEUN, LMS, DPM, DEIS, UNIPC):
        for respaced in ("use_karras_sigmas", "use_exponential_sigmas"):
            yield Case(class_name, {respaced: True}, counts=(1, 2, 3, 14, 25, 50))
            yield Case(class_name, {respaced: True, "timestep_spacing": "leading"})
            yield Case(class_name, {respaced: True, "sigma_min": 0.1, "sigma_max": 10.0})
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        for class_name in (*SPACED, "LCMScheduler", "TCDScheduler"):
            config = {**REQUIRED.get(class_name, {}), "beta_schedule": schedule, "num_train_timesteps": 400}
            yield Case(class_name, config, counts=(1, 4, 11))
    for class_name in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler", EULER, DPM, UNIPC):
        config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
        yield Case(class_name, {**REQUIRED.get(class_name, {}), **config})
    yield from varied_single_step()
    yield from varied_sigma_steps()
    yield from varied_multistep()


def varied_single_step() -> Iterator[Case]:
    ddim, ddpm, lcm, tcd = "DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"
    for eta in (0.3, 1.0):
        for to_one in (True, False):
            yield Case(ddim, {"clip_sample": False, "set_alpha_to_one": to_one}, eta=eta)
        yield Case(ddim, {"clip_sample": False, "timestep_spacing": "trailing"}, eta=eta)
    for variance in ("fixed_small", "fixed_small_log", "fixed_large", None):
        yield Case(ddpm, {"clip_sample": False, "variance_type": variance, "timestep_spacing": "linspace"})
    for schedule in ("sigmoid", "laplace"):
        yield Case(ddpm, {"clip_sample": False, "beta_schedule": schedule})
    yield Case(ddpm, {"clip_sample": False}, counts=(5,), timesteps=FIVE)
    yield Case("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True})
    for class_name in (lcm, tcd):
        yield Case(
            class_name, {"original_inference_steps": 37}, counts=(1, 2, 5, 36, 37), eta=0.5 * (class_name == tcd)
        )
        for prediction_type in ("v_prediction", "sample"):
            yield Case(class_name, {"prediction_type": prediction_type}, eta=0.5 * (class_name == tcd))
    for eta in (0.1, 0.3, 0.7, 1.0):
        yield Case(tcd, eta=eta)
    yield Case(tcd, counts=(4,), timesteps=(999, 500, 3, 0), eta=0.5)
    yield Case(lcm, {"timestep_scaling": 3.0})
    yield Case(lcm, counts=(1,), timesteps=(800,))
    yield Case(lcm, counts=(3,), timesteps=(999, 10, 0))


def varied_sigma_steps() -> Iterator[Case]:
    for config in (TO_SIGMA_MIN, {**TO_SIGMA_MIN, "use_karras_sigmas": True}):
        yield Case(EULER, config)
    yield Case(HEUN, {"beta_schedule": "exp"})
    for class_name in (EULER, HEUN):
        yield Case(class_name, counts=(5,), timesteps=FIVE)
    for config in (
        {"shift": 3.0},
        {"shift": 0.5, "num_train_timesteps": 500},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "shift": 2.0},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 0.9},
        {"stochastic_sampling": True, "shift": 3.0},
    ):
        yield Case(FLOW, config)
    yield Case(FLOW, {"shift_terminal": 0.1, "shift": 3.0}, counts=(2, 3, 10))
    yield Case(FLOW, {"shift": 3.0}, counts=(3,), timesteps=(1000, 600, 300))


def varied_multistep() -> Iterator[Case]:
    v_prediction = {"prediction_type": "v_prediction"}
    for config in (
        {"solver_type": "heun"},
        {"solver_type": "bh2"},
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, **v_prediction, **TO_SIGMA_MIN, "lower_order_final": False},
        {"lower_order_final": False},
        {"lower_order_final": False, **TO_SIGMA_MIN},
        {"lower_order_final": False, **TO_SIGMA_MIN, "euler_at_final": True},
        {"use_lu_lambdas": True},
        {"use_lu_lambdas": True, **TO_SIGMA_MIN},
        {"use_karras_sigmas": True, **TO_SIGMA_MIN},
        {"variance_type": "fixed_small"},
        *({"lambda_min_clipped": -1.5, "timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")),
        SDE,
        {**SDE, "solver_order": 1},
        {**SDE, "solver_type": "heun", **v_prediction},
        {**SDE, **TO_SIGMA_MIN, "use_karras_sigmas": True},
    ):
        yield Case(DPM, config)
    yield Case(DPM, counts=(5,), timesteps=FIVE)
    for config in (
        {"solver_order": 1},
        {"solver_order": 3},
        {"lower_order_final": False},
        {"algorithm_type": "dpmsolver++"},
    ):
        yield Case(DEIS, config)
    for config in (
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "midpoint"},
        {"solver_type": "bh1", **TO_SIGMA_MIN},
        TO_SIGMA_MIN,
        {"predict_x0": False, **TO_SIGMA_MIN},
        {"predict_x0": False, **TO_SIGMA_MIN, "solver_order": 3, **v_prediction},
        {"disable_corrector": [0, 1]},
        {"disable_corrector": [2], "solver_order": 3},
        {"lower_order_final": False, **TO_SIGMA_MIN, "solver_order": 3},
        {"use_karras_sigmas": True, **TO_SIGMA_MIN},
    ):
        yield Case(UNIPC, config)


# All step counts but for the solvers that take diffusers long.
COUNTS = {class_name: range(1, 101) for class_name in SPACED} | dict.fromkeys((LMS, DEIS, UNIPC), range(1, 101, 9))
ONE_OF_EACH = [
    *(Case(class_name, REQUIRED.get(class_name, {}), COUNTS[class_name]) for class_name in SPACED),
    Case(DPM, SDE, range(1, 101)),
    Case(FLOW, {"shift": 3.0}, range(1, 101)),
    Case("LCMScheduler", counts=range(1, 51)),
    Case("TCDScheduler", counts=range(1, 51), eta=0.3),
]


def assert_close(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64] | None, tolerance: float) -> None:
    """Within `tolerance` of the row's largest coefficient."""
    if theirs is not None:
        assert ours.shape == theirs.shape
        excess = np.abs(ours - theirs) - tolerance * np.abs(theirs).max(axis=1, keepdims=True)
        assert excess.max() <= 0


def assert_same(ours: oracle.Coefficients, theirs: oracle.Coefficients, tolerance: float) -> None:
    assert_close(ours.model_inputs, theirs.model_inputs, tolerance)
    assert_close(ours.samples, theirs.samples, tolerance)
    assert ours.denoised is not None
    assert_close(ours.denoised, theirs.denoised, tolerance)
    assert ours.init_noise_sigma == pytest.approx(theirs.init_noise_sigma, rel=min(tolerance, 1e-6))


def assert_draws_agree(ours: oracle.Coefficients, theirs: oracle.Coefficients) -> None:
    """The same noise reaches the same rows: what diffusers alone draws, to multiply by 0, comes after all of ours."""
    ends = int(np.flatnonzero(ours.draws)[-1]) + 1 if ours.draws.any() else 0
    assert (ours.draws[:ends] == theirs.draws[:ends]).all()


def compare(case: Case, count: int, *, single: bool = True) -> None:
    config = case.full_config
    table = compile_table(case.class_name, config, count, timesteps=case.timesteps, eta=case.eta)
    ours = oracle.table_coefficients(table)
    double = oracle.double_scheduler_for(case.class_name, config, count, case.timesteps)
    assert_same(ours, oracle.probe(double, double=True, **case.step_arguments), EXACT)
    scheduler = oracle.scheduler_for(case.class_name, config, count, case.timesteps)
    timesteps = scheduler.timesteps.double().numpy()
    whole = (timesteps == timesteps.round()).all()
    np.testing.assert_allclose(ours.timesteps, timesteps, rtol=0, atol=0 if whole else TIMESTEP_ULP)
    if single:
        theirs = oracle.probe(scheduler, **case.step_arguments)
        assert_draws_agree(ours, theirs)
        assert_same(ours, theirs, SINGLE_THIRD_ORDER if config.get("solver_order") == 3 else SINGLE)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations(name: str) -> None:
    class_name, config = SHIPPED[name]["class_name"], SHIPPED[name]["config"]
    for count in (1, 2, 3, 4, 5, 8, 10, 25, 50, 100):
        if count <= config.get("original_inference_steps", 100):
            compare(Case(class_name, config), count)


@pytest.mark.parametrize("case", varied(), ids=str)
def test_every_key(case: Case) -> None:
    for count in case.counts:
        compare(case, count)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_every_step_count(case: Case) -> None:
    # For 61 steps diffusers' trailing spacing has a stray one; no case here uses that spacing.
    for count in case.counts:
        compare(case, count, single=False)


@pytest.mark.parametrize("name", SHIPPED)
def test_published_timesteps(name: str) -> None:
    shipped = SHIPPED[name]
    for count, expected in shipped["timesteps"].items():
        explicit = expected if "lcm800" in name else None
        table = compile_table(shipped["class_name"], shipped["config"], int(count), timesteps=explicit)
        np.testing.assert_allclose(table.timesteps, expected, rtol=0, atol=5e-5 if "flow" in name else 0)


@pytest.mark.parametrize("name", [name for name in SHIPPED if "one_step" in SHIPPED[name]])
def test_published_one_step_coefficients(name: str) -> None:
    shipped, expected = SHIPPED[name], SHIPPED[name]["one_step"]
    explicit = [800] if "lcm800" in name else None
    table = compile_table(shipped["class_name"], shipped["config"], 1, timesteps=explicit)
    assert table.history == 0
    assert table.timesteps.tolist() == [expected["unet_timestep"]]
    assert table.init_noise_sigma == pytest.approx(expected["init_noise_sigma"], rel=1e-6)
    assert table.model_input[0, 0] == pytest.approx(expected["model_input_scale"], rel=1e-6)
    assert table.transition[0, 0, 0] == pytest.approx(expected["x0_from_latent"], rel=1e-6)
    assert table.prediction[0, 0] == pytest.approx(expected["x0_from_eps"], rel=1e-6)


@pytest.mark.parametrize("name", ["hyper_tcd_sd15", "hyper_tcd_sdxl"])
def test_hyper_sd_unified_lora(name: str) -> None:
    """Published for 1 to 8 steps of TCD with eta 1: every step but the last takes fresh noise."""
    for count in range(1, 9):
        compare(Case(SHIPPED[name]["class_name"], SHIPPED[name]["config"], eta=1.0), count)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_whole_trajectories(case: Case) -> None:
    """A model that is not linear, on random latents and noise."""
    count, size = 12, 64
    table = compile_table(case.class_name, case.full_config, count, eta=case.eta)
    random = np.random.default_rng(5)
    first, noises = random.standard_normal(size), random.standard_normal((table.rows, size))
    first = first * table.init_noise_sigma

    def output(timestep: float, model_input: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.tanh(1.7 * model_input + timestep / 500) + 0.3 * model_input[::-1]

    def torch_output(row: int, _: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        # Time steps are compared elsewhere; here both get the same, for the oracle's lack their rounding to float32.
        return torch.from_numpy(output(table.timesteps[row], sample.reshape(-1).numpy())).reshape(sample.shape)

    def torch_noise(row: int, shape: torch.Size) -> torch.Tensor:
        return torch.from_numpy(noises[row]).reshape(shape)

    ours = oracle.run_table(table, first, lambda _, timestep, sample: output(timestep, sample), lambda row: noises[row])
    scheduler = oracle.double_scheduler_for(case.class_name, case.full_config, count)
    started = torch.from_numpy(first).reshape(1, -1, 1, 1)
    theirs = oracle.run(scheduler, started, torch_output, torch_noise, double=True, **case.step_arguments)
    assert_same(ours, theirs, 1e-9)
