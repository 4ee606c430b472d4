"""Solvers that follow dx/dσ: Euler, Euler ancestral, Heun and LMS on x = x0 + σ noise, flow Euler on rectified flow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.polynomial import Polynomial

from ..table import Float64
from .forms import Form, Row, basis, denoised_and_noise
from .sigmas import SigmaSchedule

_LMS_ORDER = 4


def euler(schedule: SigmaSchedule) -> Iterator[Row]:
    """Karras et al. 2022 (2206.00364), algorithm 1 without its second-order correction; no churn."""
    x, _, output, _ = basis(0)
    sigmas = schedule.sigmas
    for n, t in schedule.visited:
        model_input, denoised, slope = _evaluated(schedule, n, x, output)
        yield Row(t, n, model_input, (x + (sigmas[n + 1] - sigmas[n]) * slope,), denoised, (1.0, sigmas[n]))


def euler_ancestral(schedule: SigmaSchedule) -> Iterator[Row]:
    """Euler to below the next noise level, then fresh noise up to it (k-diffusion, sample_euler_ancestral, eta 1)."""
    x, _, output, z = basis(0)
    for n, t in schedule.visited:
        now, then = schedule.sigmas[n : n + 2]
        model_input, denoised, slope = _evaluated(schedule, n, x, output)
        up = np.sqrt(then**2 * (now**2 - then**2) / now**2)
        down = np.sqrt(then**2 - up**2)
        yield Row(t, n, model_input, (x + (down - now) * slope + up * z,), denoised, (1.0, now))


def heun(schedule: SigmaSchedule) -> Iterator[Row]:
    """Karras et al. 2022 (2206.00364), algorithm 1: two model calls a step but for the last; no churn.

    h1 is x with half of the first slope's step taken: what the second slope's half is added to.
    """
    x, (h1,), output, _ = basis(1)
    last = len(schedule.timesteps) - 1
    for n, t in schedule.visited:
        step = schedule.sigmas[n + 1] - schedule.sigmas[n]
        model_input, denoised, slope = _evaluated(schedule, n, x, output)
        halfway = x + step / 2 * slope
        yield Row(t, n, model_input, (x + step * slope, halfway), denoised, (1.0, schedule.sigmas[n]))
        if n < last:
            model_input, denoised, slope = _evaluated(schedule, n + 1, x, output)
            noised = (1.0, schedule.sigmas[n + 1])
            yield Row(schedule.timesteps[n + 1], n, model_input, (h1 + step / 2 * slope,), denoised, noised)


def lms(schedule: SigmaSchedule) -> Iterator[Row]:
    """Linear multistep of order 4: the integral of the polynomial through the last slopes (k-diffusion, sample_lms).

    Where the schedule begins at a later step, the first rows have that order too, as in diffusers, although the slopes
    they would need are not there (and count as 0).
    """
    x, history, output, _ = basis(_LMS_ORDER - 1)
    for n, t in schedule.visited:
        model_input, denoised, slope = _evaluated(schedule, n, x, output)
        slopes = (slope, *history)
        order = min(n + 1, _LMS_ORDER)
        weights = _lagrange_integrals(schedule.sigmas[n + 1 - order : n + 1][::-1], schedule.sigmas[n + 1])
        moved = x + sum((weight * form for weight, form in zip(weights, slopes, strict=False)), np.zeros_like(x))
        yield Row(t, n, model_input, (moved, *slopes[:-1]), denoised, (1.0, schedule.sigmas[n]))


def flow_euler(schedule: SigmaSchedule) -> Iterator[Row]:
    """Euler on dx/dσ = velocity (Esser et al. 2024, 2403.03206); stochastic_sampling draws noise at every level."""
    x, _, output, z = basis(0)
    for n, t in schedule.visited:
        now, then = schedule.sigmas[n : n + 2]
        denoised = x - now * output
        moved = x + (then - now) * output
        if schedule.config["stochastic_sampling"]:
            moved = (1 - then) * denoised + then * z
        yield Row(t, n, x, (moved,), denoised, (1 - now, now))


def _evaluated(schedule: SigmaSchedule, n: int, x: Form, output: Form) -> tuple[Form, Form, Form]:
    """The model's input at noise level n, the denoised estimate, and the slope dx/dσ, which is the predicted noise."""
    alpha, sigma = schedule.alphas[n], schedule.sigmas[n]
    model_input = alpha * x
    prediction_type = schedule.config["prediction_type"]
    return (model_input, *denoised_and_noise(prediction_type, alpha, alpha * sigma, model_input, output))


def _lagrange_integrals(points: Float64, end: float) -> list[float]:
    """∫ from points[0] to `end` of each Lagrange basis polynomial on `points`, exact but for rounding."""
    # Measured from the first point, so that neighbouring noise levels do not cancel.
    offsets = points - points[0]
    integrals = []
    for k, own in enumerate(offsets):
        others = np.delete(offsets, k)
        polynomial = Polynomial.fromroots(others) if len(others) else Polynomial([1.0])
        integrals.append(float(polynomial.integ()(end - points[0]) / np.prod(own - others)))
    return integrals
