"""Scheduler configurations and short names: what they mean, what is refused, and how."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from tandemrt.runtime.errors import PlanError
from tandemrt.runtime.solvers import compile_table, resolve_solver
from tandemrt.runtime.solvers.config import KEYS, known_keys

from . import diffusers_oracle as oracle

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DPM, UNIPC, EULER = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("class_name", KEYS)
def test_the_keys_and_defaults_are_diffusers(class_name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    theirs = {name: parameter.default for name, parameter in parameters.items() if name not in ("self", "kwargs")}
    ours = {name: key.default for name, key in KEYS[class_name].items()}
    undeclared = set(ours) - set(theirs)
    assert undeclared <= {"sigma_min", "sigma_max"}
    assert {name: tuple(value) if value == [] else value for name, value in theirs.items()} == {
        name: value for name, value in ours.items() if name not in undeclared
    }


BASES = {
    "pndm": {**STABLE_DIFFUSION, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    "euler": {**STABLE_DIFFUSION, "_class_name": EULER, "timestep_spacing": "leading", "use_karras_sigmas": True},
    "unipc": {**STABLE_DIFFUSION, "_class_name": UNIPC, "solver_order": 3, "solver_type": "bh1", "predict_x0": False},
    "unnamed": {
        **STABLE_DIFFUSION,
        "variance_type": "fixed_large",
        "clip_sample": False,
        "interpolation_type": "linear",
    },
}


@pytest.mark.parametrize("live", [False, True], ids=["json", "live"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("class_name", [name for name in KEYS if name != FLOW])
def test_another_classs_configuration_is_read_as_from_config_reads_it(class_name: str, base: str, live: bool) -> None:
    config = BASES[base]
    if live:
        config = dict(getattr(diffusers, config.get("_class_name", "DDPMScheduler")).from_config(config).config)
    theirs = getattr(diffusers, class_name).from_config(config).config
    ours = known_keys(class_name, config)
    substituted = {"solver_type", "algorithm_type"}
    declared = set(inspect.signature(getattr(diffusers, class_name).__init__).parameters) & set(KEYS[class_name])
    for name in declared - substituted:
        expected = KEYS[class_name][name].default
        assert ours.get(name, expected) == (tuple(theirs[name]) if theirs[name] == [] else theirs[name]), name


def test_keys_of_every_other_scheduler_are_dropped() -> None:
    for scheduler in KarrasDiffusionSchedulers:
        parameters = inspect.signature(getattr(diffusers, scheduler.name).__init__).parameters
        foreign = dict.fromkeys(set(parameters) - {"self", "args", "kwargs"} - set(KEYS[EULER]))
        assert known_keys(EULER, foreign) == {}


@pytest.mark.parametrize(
    ("class_name", "key", "value"),
    [
        (DPM, "thresholding", True),
        (DPM, "algorithm_type", "dpmsolver"),
        (DPM, "use_flow_sigmas", True),
        (DPM, "use_beta_sigmas", True),
        (DPM, "use_dynamic_shifting", True),
        (DPM, "prediction_type", "flow_prediction"),
        (DPM, "variance_type", "learned"),
        (DPM, "solver_order", 4),
        (DPM, "solver_order", True),
        (DPM, "beta_start", float("nan")),
        (DPM, "beta_schedule", "sigmoid"),
        (DPM, "steps_offset", -1),
        (DPM, "steps_offset", 0.5),
        (DPM, "num_train_timesteps", "1000"),
        (DPM, "final_sigmas_type", None),
        ("DDIMScheduler", "clip_sample", True),
        ("DDPMScheduler", "variance_type", "learned_range"),
        ("DDPMScheduler", "trained_betas", ["a"]),
        ("PNDMScheduler", "skip_prk_steps", False),
        ("PNDMScheduler", "prediction_type", "sample"),
        ("EulerAncestralDiscreteScheduler", "prediction_type", "sample"),
        ("EulerAncestralDiscreteScheduler", "timestep_spacing", "uniform"),
        (EULER, "interpolation_type", "log_linear"),
        (EULER, "timestep_type", "continuous"),
        (EULER, "sigma_max", -1.0),
        ("HeunDiscreteScheduler", "clip_sample", True),
        ("LCMScheduler", "thresholding", True),
        ("LCMScheduler", "original_inference_steps", 0),
        ("LCMScheduler", "timestep_scaling", 1e300),
        (EULER, "_use_default_values", 5),
        (EULER, "_use_default_values", "beta_start"),
        (UNIPC, "solver_p", "DPMSolverMultistepScheduler"),
        (UNIPC, "disable_corrector", [0.5]),
        (UNIPC, "shift_terminal", 0.1),
        (FLOW, "use_dynamic_shifting", True),
        (FLOW, "invert_sigmas", True),
        (FLOW, "shift", 0),
    ],
)
def test_an_unsupported_value_is_an_error_that_names_it(class_name: str, key: str, value: object) -> None:
    config = {"clip_sample": False, "skip_prk_steps": True} | {key: value}
    with pytest.raises(PlanError) as caught:
        compile_table(class_name, config, 5)
    assert caught.value.where == f"{class_name}: {key}"
    assert f"got {value!r}" in str(caught.value)


def test_a_default_that_is_not_supported_is_an_error_that_says_so() -> None:
    with pytest.raises(PlanError, match=r"DDIMScheduler: clip_sample: unsupported value .diffusers' default"):
        compile_table("DDIMScheduler", STABLE_DIFFUSION, 5)
    assert compile_table("DDIMScheduler", {**STABLE_DIFFUSION, "clip_sample": None}, 5).rows == 5


def test_a_key_no_scheduler_knows_is_an_error() -> None:
    with pytest.raises(PlanError, match="EulerDiscreteScheduler: use_karas_sigmas: unknown scheduler key, got True"):
        compile_table(EULER, {"use_karas_sigmas": True}, 5)


def test_two_sigma_spacings_are_refused_as_in_diffusers() -> None:
    config = {"use_karras_sigmas": True, "use_exponential_sigmas": True}
    with pytest.raises(ValueError, match="Only one"):
        oracle.scheduler_for(EULER, config, 5)
    with pytest.raises(PlanError, match="use_exponential_sigmas: more than one sigma spacing"):
        compile_table(EULER, config, 5)


def test_trained_betas() -> None:
    betas = np.linspace(0.001, 0.02, 100).tolist()
    table = compile_table(EULER, {"trained_betas": betas, "num_train_timesteps": 100}, 4)
    theirs = oracle.probe(oracle.scheduler_for(EULER, {"trained_betas": betas, "num_train_timesteps": 100}, 4))
    np.testing.assert_allclose(oracle.table_coefficients(table).samples, theirs.samples, atol=1e-4)
    with pytest.raises(PlanError, match="trained_betas: how many there are, got 100, expected 50"):
        compile_table(EULER, {"trained_betas": betas, "num_train_timesteps": 50}, 4)


@pytest.mark.parametrize(
    ("class_name", "config", "steps", "timesteps"),
    [
        ("DDIMScheduler", {"clip_sample": False}, 1001, None),
        ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, 1000, None),
        ("DDPMScheduler", {"clip_sample": False}, None, [100, 200]),
        ("DDPMScheduler", {"clip_sample": False}, None, [1000, 200]),
        ("LCMScheduler", {}, 51, None),
        ("LCMScheduler", {"original_inference_steps": 2000}, 4, None),
        ("TCDScheduler", {}, 51, None),
        ("LCMScheduler", {}, None, [1000]),
        (EULER, {"use_karras_sigmas": True}, None, [999, 500]),
        (DPM, {"use_lu_lambdas": True}, None, [999, 500]),
        (DPM, {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}, 8, None),
        (DPM, {"timestep_spacing": "leading"}, 1000, None),
    ],
)
def test_what_diffusers_refuses_is_refused(
    class_name: str, config: dict[str, Any], steps: int | None, timesteps: list[int] | None
) -> None:
    with pytest.raises((ValueError, IndexError)):
        oracle.probe(oracle.scheduler_for(class_name, config, steps or 0, timesteps))
    with pytest.raises(PlanError):
        compile_table(class_name, config, steps, timesteps=timesteps)


@pytest.mark.parametrize(
    ("class_name", "config", "steps"),
    [
        (UNIPC, {"predict_x0": False}, 3),
        (UNIPC, {"lower_order_final": False}, 3),
        (UNIPC, {"lower_order_final": False, "solver_order": 3}, 5),
        ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 3),
        (FLOW, {"shift_terminal": 0.1}, 1),
    ],
)
def test_where_diffusers_computes_nan_the_row_is_named(class_name: str, config: dict[str, Any], steps: int) -> None:
    with pytest.raises(PlanError, match=rf"{class_name}: timestep .* coefficients are not finite"):
        compile_table(class_name, config, steps)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, None, "5"])
def test_unusable_step_counts(steps: Any) -> None:
    with pytest.raises(PlanError, match=r"num_inference_steps: .*got .*1\.\.1000"):
        compile_table(EULER, STABLE_DIFFUSION, steps)


@pytest.mark.parametrize("timesteps", [[999, 999], [5, -1], [999.0], [], [True]])
def test_unusable_timesteps(timesteps: Any) -> None:
    with pytest.raises(PlanError):
        compile_table("LCMScheduler", {}, None, timesteps=timesteps)


def test_explicit_timesteps_and_steps_must_agree() -> None:
    assert compile_table("LCMScheduler", {}, 1, timesteps=[800]).timesteps.tolist() == [800]
    with pytest.raises(PlanError, match="timesteps: how many there are, got 1, expected 4"):
        compile_table("LCMScheduler", {}, 4, timesteps=[800])


@pytest.mark.parametrize("class_name", [name for name in KEYS if name not in ("DDIMScheduler", "TCDScheduler")])
def test_eta_is_refused_where_it_means_nothing(class_name: str) -> None:
    with pytest.raises(PlanError, match=r"eta: .*has none, got 0.5"):
        compile_table(class_name, {"clip_sample": False, "skip_prk_steps": True}, 4, eta=0.5)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), True, "0"])
def test_unusable_eta(eta: Any) -> None:
    with pytest.raises(PlanError, match="eta: cannot be used"):
        compile_table("TCDScheduler", {}, 4, eta=eta)


def test_third_order_sde_is_refused() -> None:
    with pytest.raises(PlanError, match="solver_order: unsupported, got 3"):
        compile_table(DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, 5)


def test_an_unknown_solver_is_named_with_those_there_are() -> None:
    with pytest.raises(PlanError, match=r"got 'k_euler'.*ddim.*flow_euler"):
        resolve_solver("k_euler", {})
    with pytest.raises(PlanError, match=r"got 'KDPM2DiscreteScheduler'.*EulerDiscreteScheduler"):
        compile_table("KDPM2DiscreteScheduler", {}, 5)


def test_resolving_keeps_what_the_class_knows() -> None:
    base = {**BASES["pndm"], "timestep_spacing": "trailing"}
    class_name, config = resolve_solver("euler", base, {"use_karras_sigmas": True})
    assert class_name == EULER
    assert config == {**STABLE_DIFFUSION, "timestep_spacing": "trailing", "use_karras_sigmas": True}
    assert resolve_solver(EULER, base)[0] == EULER


def test_overrides_by_hand_must_be_known() -> None:
    with pytest.raises(PlanError, match="DDIMScheduler: use_karras_sigmas: the class has no such key, got True"):
        resolve_solver("ddim", STABLE_DIFFUSION, {"use_karras_sigmas": True})


def test_names_decide_only_what_they_say() -> None:
    base = {**STABLE_DIFFUSION, "algorithm_type": "sde-dpmsolver++", "solver_order": 1, "clip_sample": True}
    assert resolve_solver("dpmsolver++", base)[1]["algorithm_type"] == "dpmsolver++"
    assert resolve_solver("dpmsolver++", base)[1]["solver_order"] == 1
    assert resolve_solver("ddim", base)[1]["clip_sample"] is True
    assert resolve_solver("ddim", STABLE_DIFFUSION)[1]["clip_sample"] is False


def test_flow_matching_and_diffusion_do_not_mix() -> None:
    with pytest.raises(PlanError, match="solver: not for a diffusion model, got 'flow_euler'"):
        resolve_solver("flow_euler", STABLE_DIFFUSION)
    with pytest.raises(
        PlanError, match="solver: not for a flow-matching model, got 'ddim', expected one of flow_euler"
    ):
        resolve_solver("ddim", {"_class_name": FLOW})
    assert resolve_solver("flow_euler", {"_class_name": FLOW, "shift": 3.0}) == (FLOW, {"shift": 3.0})
