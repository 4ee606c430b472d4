"""Noise schedules: the one a model was trained on, and the points of it that inference visits.

diffusers keeps `betas` and `alphas_cumprod` in float32, so those float32 values are what models were trained with:
they are reproduced here, and everything derived from them is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

Spacing = Literal["linspace", "leading", "trailing"]
SigmaSpacing = Literal["karras", "exponential", "lu"]

# What diffusers writes over alphas_cumprod[-1] where a zero terminal SNR would make sigma infinite.
_SMALLEST_ALPHA_CUMPROD = np.float32(2.0**-24)


def training_betas(config: Mapping[str, Any]) -> Float32:
    """The betas a scheduler configuration describes, (num_train_timesteps,).

    Reads trained_betas, beta_schedule, beta_start, beta_end, num_train_timesteps and rescale_betas_zero_snr.
    """
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
    else:
        start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
        betas = _BETA_SCHEDULES[config["beta_schedule"]](start, end, count)
    return _rescaled_to_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def training_alphas_cumprod(config: Mapping[str, Any], *, keep_sigma_finite: bool = False) -> Float64:
    """ᾱ_t, (num_train_timesteps,) float64 holding diffusers' float32 values.

    keep_sigma_finite: with a zero terminal SNR, put 2⁻²⁴ in place of the last value 0, as the solvers do that divide
        by it.
    """
    alphas = np.float32(1) - training_betas(config)
    # PyTorch accumulates float32 products in double, and rounds each.
    alphas_cumprod = np.cumprod(alphas.astype(np.float64)).astype(np.float32)
    if keep_sigma_finite and config.get("rescale_betas_zero_snr"):
        alphas_cumprod[-1] = _SMALLEST_ALPHA_CUMPROD
    return alphas_cumprod.astype(np.float64)


def sigmas_from_alphas_cumprod(alphas_cumprod: Float64) -> Float64:
    """σ_t = √((1 − ᾱ_t) / ᾱ_t), the noise level of the variance-exploding form (Karras et al. 2022, 2206.00364)."""
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def spaced_timesteps(
    spacing: Spacing,
    num_inference_steps: int,
    config: Mapping[str, Any],
    *,
    endpoint_left_out: bool = False,
    last_timestep: int | None = None,
) -> Float64:
    """Falling time steps, (num_inference_steps,), not rounded for `linspace` (Lin et al. 2023, 2305.08891, table 2).

    endpoint_left_out: space one point more and leave out the last, the clean end (DPM-Solver++, DEIS, UniPC).
    last_timestep: count down from here in place of num_train_timesteps (DPM-Solver++'s lambda_min_clipped); `trailing`
        may then give fewer steps.

    `trailing` differs from diffusers for a few step counts (61, 103, 121 …), where floating-point `arange` gives
    diffusers one step more than asked for, at time step −1; it is left out here.
    """
    num_train_timesteps = config["num_train_timesteps"]
    last = num_train_timesteps if last_timestep is None else last_timestep
    points = num_inference_steps + endpoint_left_out
    if spacing == "linspace":
        return np.linspace(0, last - 1, points)[::-1][:num_inference_steps]
    if spacing == "leading":
        rising = np.arange(points, dtype=np.float64) * float(last // points)
        leading: Float64 = rising[::-1][:num_inference_steps] + config["steps_offset"]
        return leading
    falling = np.arange(last, 0, -num_train_timesteps / num_inference_steps, dtype=np.float64)
    trailing: Float64 = falling[:num_inference_steps].round() - 1
    return trailing


def spaced_sigmas(spacing: SigmaSpacing, sigma_max: float, sigma_min: float, count: int) -> Float64:
    """`count` noise levels from sigma_max down to sigma_min.

    karras: evenly in σ^(1/7) (Karras et al. 2022, equation 5). exponential: evenly in log σ. lu: the same levels, kept
    apart because diffusers rounds its time steps (Lu et al. 2022, 2211.01095).
    """
    if spacing == "karras":
        ramp = np.linspace(0, 1, count)
        start, end = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
        karras: Float64 = (start + ramp * (end - start)) ** 7
        return karras
    return np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), count))


def timesteps_from_sigmas(sigmas: Float64, training_sigmas: Float64) -> Float64:
    """The fractional time steps at which the training schedule has these noise levels, by interpolating log σ."""
    # diffusers takes the training schedule's logarithm in float32. That decides whether the first time step comes out
    # as 999 or just under it, and solvers with integer time steps cut the fraction off.
    log_training = np.log(training_sigmas.astype(np.float32)).astype(np.float64)
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_training, log_sigmas, side="right") - 1, 0, len(log_training) - 2)
    below, above = log_training[low], log_training[low + 1]
    weight = np.clip((below - log_sigmas) / (below - above), 0, 1)
    timesteps: Float64 = (1 - weight) * low + weight * (low + 1)
    return timesteps


def _linear(start: float, end: float, count: int) -> Float32:
    """What torch.linspace gives in float32: from both ends to the middle, multiplied and added with one rounding."""
    first, last = np.array([start, end], np.float32).astype(np.float64)
    step = float(np.float32(last - first) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = first + step * index, last - step * (count - 1 - index)
    return np.asarray(np.where(index < count // 2, rising, falling), np.float32)


def _scaled_linear(start: float, end: float, count: int) -> Float32:
    return np.square(_linear(math.sqrt(start), math.sqrt(end), count))


def _sigmoid(start: float, end: float, count: int) -> Float32:
    logits = _linear(-6, 6, count)
    weights = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return (weights * (end - start) + start).astype(np.float32)


def _betas_for_alpha_bar(alpha_bar: Callable[[float], float]) -> Callable[[float, float, int], Float32]:
    def betas(start: float, end: float, count: int) -> Float32:
        levels = [alpha_bar(t / count) for t in range(count + 1)]
        ratios = [after / before for before, after in pairwise(levels)]
        return np.array([min(1 - ratio, 0.999) for ratio in ratios], np.float32)

    return betas


def _cosine_alpha_bar(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential_alpha_bar(t: float) -> float:
    return math.exp(-12.0 * t)


def _laplace_alpha_bar(t: float) -> float:
    offset = 0.5 - t
    snr = math.exp(-0.5 * math.copysign(1, offset) * math.log(1 - 2 * abs(offset) + 1e-6))
    return math.sqrt(snr / (1 + snr))


_BETA_SCHEDULES: Mapping[str, Callable[[float, float, int], Float32]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "sigmoid": _sigmoid,
    "squaredcos_cap_v2": _betas_for_alpha_bar(_cosine_alpha_bar),
    "exp": _betas_for_alpha_bar(_exponential_alpha_bar),
    "laplace": _betas_for_alpha_bar(_laplace_alpha_bar),
}


def _rescaled_to_zero_terminal_snr(betas: Float32) -> Float32:
    """Shift and scale √ᾱ so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1), in float32."""
    alphas_cumprod = np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)
    root = np.sqrt(alphas_cumprod)
    root = (root - root[-1]) * (root[:1] / (root[:1] - root[-1:]))
    rescaled = np.square(root)
    alphas = np.concatenate([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    rescaled_betas: Float32 = np.float32(1) - alphas
    return rescaled_betas
