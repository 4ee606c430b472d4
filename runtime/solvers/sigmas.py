"""Noise levels for the solvers that step from σ to σ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar, cast

import numpy as np

from ..errors import PlanError
from ..schedule import (
    Float32,
    SigmaSpacing,
    sigmas_from_alphas_cumprod,
    spaced_sigmas,
    spaced_timesteps,
    timesteps_from_sigmas,
    training_alphas_cumprod,
)
from ..table import Float64
from .config import Config
from .request import Request


@dataclass(frozen=True, slots=True)
class SigmaSchedule:
    """Time steps, and the noise levels σ before and after each.

    timesteps: (N,) what the model is given. sigmas: (N+1,).
    init_noise_sigma: what standard normal noise is multiplied by to become the first x.
    begin: the first of the time steps to be visited.
    """

    config: Config
    timesteps: Float64
    sigmas: Float64
    init_noise_sigma: float
    begin: int = 0

    @property
    def visited(self) -> Iterator[tuple[int, float]]:
        """The time steps from `begin` on, each with its index."""
        return islice(enumerate(self.timesteps), self.begin, None)

    @property
    def alphas(self) -> Float64:
        """α = 1/√(1+σ²), the signal's part on the variance-preserving scale."""
        return 1 / np.sqrt(1 + self.sigmas**2)

    @property
    def lambdas(self) -> Float64:
        """λ = −ln σ, half the log signal-to-noise ratio; infinite where σ is 0."""
        return -np.log(self.sigmas)


def exploding_schedule(request: Request) -> SigmaSchedule:
    """For solvers that keep x = x0 + σ noise: Euler, Euler ancestral, Heun, LMS. Time steps are float32 fractions."""
    config = request.config
    training = _training_sigmas(config)
    timesteps = _requested_timesteps(request, config["timestep_spacing"] == "linspace")
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    spacing = _sigma_spacing(config)
    if spacing is not None:
        # LMS alone reads no sigma_min and sigma_max for this spacing.
        ranged = {} if request.class_name == "LMSDiscreteScheduler" and spacing == "karras" else config
        sigmas = _respaced(spacing, sigmas, ranged, request.steps)
        timesteps = timesteps_from_sigmas(sigmas, training)
    final = training[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    sigmas = np.append(sigmas, final)
    highest = float(sigmas.max())
    in_level = config["timestep_spacing"] in ("linspace", "trailing")
    return SigmaSchedule(
        config, _rounded_to_float32(timesteps), sigmas, highest if in_level else float(np.hypot(highest, 1))
    )


def preserving_schedule(request: Request) -> SigmaSchedule:
    """For solvers that keep x = α (x0 + σ noise): DPM-Solver++, DEIS, UniPC. Time steps are whole numbers.

    Raises:
        PlanError: so many steps that the first time step comes twice.
    """
    config = request.config
    training = _training_sigmas(config)
    timesteps = np.trunc(_requested_timesteps(request, False, _last_timestep(config, training)))
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    spacing = _sigma_spacing(config)
    if spacing is not None:
        sigmas = _respaced(spacing, training[::-1], {} if spacing == "lu" else config, request.steps)
        timesteps = timesteps_from_sigmas(sigmas, training)
        if _rounds_timesteps(request, spacing):
            timesteps = np.round(timesteps)
        timesteps = np.trunc(timesteps)
    if np.count_nonzero(timesteps == timesteps[0]) > 1:
        raise PlanError(
            "num_inference_steps",
            f"{request.class_name} would visit its first time step {timesteps[0]:g} twice",
            got=request.steps,
            remedy="Ask for fewer steps, or use another sigma spacing.",
        )
    sigmas = np.append(sigmas, _final_sigma(request, spacing, sigmas, training))
    return SigmaSchedule(config, timesteps, sigmas, 1.0)


def flow_schedule(request: Request) -> SigmaSchedule:
    """For rectified flow, x = (1−σ) x0 + σ noise (Esser et al. 2024, 2403.03206); time steps are σ scaled up."""
    config = request.config
    count, shift = config["num_train_timesteps"], config["shift"]
    if request.timesteps is not None:
        sigmas = np.asarray(request.timesteps, np.float64) / count
    else:
        # As in diffusers, the shift is applied to the range's ends, in float32, and to every point again below.
        ends = _shifted(np.array([count, 1], np.float32) / np.float32(count), shift)
        sigmas = np.linspace(float(ends[0]) * count, float(ends[1]) * count, request.steps) / count
    sigmas = _shifted(sigmas, shift)
    if config["shift_terminal"]:
        sigmas = _stretched_to(sigmas, config["shift_terminal"])
    spacing = _sigma_spacing(config)
    if spacing is not None:
        sigmas = _respaced(spacing, sigmas, config, request.steps)
    timesteps = sigmas.astype(np.float32) * np.float32(count)
    if request.timesteps is not None:
        timesteps = np.asarray(request.timesteps, np.float32)
    return SigmaSchedule(config, timesteps.astype(np.float64), np.append(sigmas, 0.0), 1.0)


def _training_sigmas(config: Config) -> Float64:
    return sigmas_from_alphas_cumprod(training_alphas_cumprod(config, keep_sigma_finite=True))


def _requested_timesteps(request: Request, fractional: bool, last_timestep: int | None = None) -> Float64:
    if request.timesteps is not None:
        return np.asarray(request.timesteps, np.float64)
    spaced = spaced_timesteps(
        request.config["timestep_spacing"],
        request.steps,
        request.config,
        endpoint_left_out=last_timestep is not None,
        last_timestep=last_timestep,
    )
    return _rounded_to_float32(spaced) if fractional else np.round(spaced)


def _last_timestep(config: Config, training: Float64) -> int:
    """Where counting down begins: training steps noisier than lambda_min_clipped are left out (DPM-Solver++ only)."""
    clipped = np.count_nonzero(-np.log(training) < config.get("lambda_min_clipped", -np.inf))
    if clipped == len(training):
        raise PlanError(
            "lambda_min_clipped",
            "leaves out every training step",
            got=config["lambda_min_clipped"],
            expected=f"at most {-np.log(training[0]):.4g}, the highest of the training schedule",
        )
    return len(training) - int(clipped)


def _sigma_spacing(config: Config) -> SigmaSpacing | None:
    for spacing, key in (
        ("karras", "use_karras_sigmas"),
        ("exponential", "use_exponential_sigmas"),
        ("lu", "use_lu_lambdas"),
    ):
        if config.get(key):
            return cast("SigmaSpacing", spacing)
    return None


def _respaced(spacing: SigmaSpacing, falling: Float64, config: Config, count: int) -> Float64:
    highest, lowest = config.get("sigma_max"), config.get("sigma_min")
    return spaced_sigmas(
        spacing,
        float(falling[0]) if highest is None else float(highest),
        float(falling[-1]) if lowest is None else float(lowest),
        count,
    )


def _rounds_timesteps(request: Request, spacing: SigmaSpacing) -> bool:
    """Whether diffusers rounds the time steps of respaced noise levels before it cuts their fraction off."""
    if spacing == "exponential":
        return False
    return request.class_name != "DPMSolverMultistepScheduler" or request.config["beta_schedule"] != "squaredcos_cap_v2"


def _final_sigma(request: Request, spacing: SigmaSpacing | None, sigmas: Float64, training: Float64) -> float:
    """The noise level after the last step. Only DPM-Solver++ ends respaced levels at the training schedule's lowest."""
    if request.config.get("final_sigmas_type") == "zero":
        return 0.0
    if spacing is None or request.class_name == "DPMSolverMultistepScheduler":
        return float(training[0])
    return float(sigmas[-1])


_Sigmas = TypeVar("_Sigmas", Float32, Float64)


def _shifted(sigmas: _Sigmas, shift: float) -> _Sigmas:
    shifted: _Sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return shifted


def _stretched_to(sigmas: Float64, terminal: float) -> Float64:
    """Stretch 1 − σ so that the last σ is `terminal`."""
    kept = 1 - sigmas
    return 1 - kept * float((1 - terminal) / kept[-1])


def _rounded_to_float32(values: Float64) -> Float64:
    return values.astype(np.float32).astype(np.float64)
