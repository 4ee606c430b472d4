"""Exponential multistep solvers on x = α (x0 + σ noise): DPM-Solver++, DEIS, UniPC."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.polynomial import Polynomial

from ..errors import PlanError
from ..table import Float64
from .config import Config
from .forms import Form, Row, basis, denoised_and_noise
from .sigmas import SigmaSchedule

# diffusers lowers the order at the end only of schedules shorter than this.
_FEW_STEPS = 15


def dpmsolver_multistep(schedule: SigmaSchedule) -> Iterator[Row]:
    """DPM-Solver++ of order 1 to 3, and its SDE form of order 1 and 2 (Lu et al. 2022, 2211.01095, algorithm 2).

    History: the earlier denoised estimates.

    Raises:
        PlanError: the SDE form with order 3, for which diffusers' formula is not consistent (its D2 term keeps a
            finite weight as the step size goes to 0).
    """
    config = schedule.config
    stochastic = config["algorithm_type"] == "sde-dpmsolver++"
    if stochastic and config["solver_order"] > 2:
        expected = "1 or 2 with algorithm_type 'sde-dpmsolver++'"
        raise PlanError(
            "DPMSolverMultistepScheduler: solver_order", "unsupported", got=config["solver_order"], expected=expected
        )
    x, history, output, z = basis(2)
    alphas, lambdas = schedule.alphas, schedule.lambdas
    noises = alphas * schedule.sigmas
    for n, t in schedule.visited:
        denoised, _ = denoised_and_noise(config["prediction_type"], alphas[n], noises[n], x, output)
        estimates = (denoised, *history)
        h = lambdas[n + 1] - lambdas[n]
        # The SDE form is the ODE form with twice the step in its exponentials, more decay, and noise.
        weights = _dpmsolver_weights(config, _dpmsolver_order(schedule, n), lambdas[: n + 1], h)
        decay = noises[n + 1] / noises[n] * (np.exp(-h) if stochastic else 1.0)
        moved = decay * x + alphas[n + 1] * _mixed(weights, estimates)
        if stochastic:
            moved = moved + noises[n + 1] * np.sqrt(-np.expm1(-2 * h)) * z
        yield Row(t, n, x, (moved, *estimates[:2]), denoised, (alphas[n], noises[n]))


def _dpmsolver_order(schedule: SigmaSchedule, n: int) -> int:
    """diffusers' choice of order at step n: as far as history reaches, lower at the end of short schedules."""
    config = schedule.config
    short = _ends_lower(schedule)
    ends_first_order = config["euler_at_final"] or short or config["final_sigmas_type"] == "zero"
    return _order_at(schedule, n, short, ends_first_order)


def _ends_lower(schedule: SigmaSchedule) -> bool:
    return bool(schedule.config["lower_order_final"]) and len(schedule.timesteps) < _FEW_STEPS


def _order_at(schedule: SigmaSchedule, n: int, short: bool, ends_first_order: bool) -> int:
    order = min(int(schedule.config["solver_order"]), n - schedule.begin + 1)
    last = len(schedule.timesteps) - 1
    if n == last and ends_first_order:
        return 1
    return min(order, 2) if n == last - 1 and short else order


def _dpmsolver_weights(config: Config, order: int, lambdas: Float64, h: np.float64) -> Float64:
    """What the newest `order` denoised estimates, newest first, add to x over the step h in λ, in units of α.

    lambdas: up to the step's beginning.
    """
    width = 2 * h if config["algorithm_type"] == "sde-dpmsolver++" else h
    zeroth = -np.expm1(-width)
    if order == 1:
        return np.array([zeroth])
    first = 1 - zeroth / width
    r0 = (lambdas[-1] - lambdas[-2]) / h
    if order == 2:
        slope = (first if config["solver_type"] == "heun" else zeroth / 2) / r0
        return np.array([zeroth + slope, -slope])
    second = (zeroth - width) / width**2 + 1 / 2
    r1 = (lambdas[-2] - lambdas[-3]) / h
    # First and second derivative over λ, in units of h, by divided differences.
    newer, older = np.array([1.0, -1.0, 0.0]) / r0, np.array([0.0, 1.0, -1.0]) / r1
    curvature = (newer - older) / (r0 + r1)
    derivative: Float64 = newer + r0 * curvature
    weights: Float64 = zeroth * np.array([1.0, 0.0, 0.0]) + first * derivative + second * curvature
    return weights


def deis(schedule: SigmaSchedule) -> Iterator[Row]:
    """Zhang & Chen 2023 (2204.13902), ρAB-DEIS in log ρ, of order 1 to 3. History: the earlier noise predictions.

    ρ = σ here; each step adds ∫ noise dρ with the noise a polynomial in ln ρ through the last predictions.
    """
    config = schedule.config
    x, history, output, _ = basis(2)
    alphas, sigmas = schedule.alphas, schedule.sigmas
    noises = alphas * sigmas
    short = _ends_lower(schedule)
    for n, t in schedule.visited:
        denoised, noise = denoised_and_noise(config["prediction_type"], alphas[n], noises[n], x, output)
        predictions = (noise, *history)
        order = _order_at(schedule, n, short, short)
        weights = _log_lagrange_integrals(sigmas[n + 1 - order : n + 1][::-1], sigmas[n + 1])
        moved = alphas[n + 1] * (x / alphas[n] + _mixed(weights, predictions))
        yield Row(t, n, x, (moved, *predictions[:2]), denoised, (alphas[n], noises[n]))


def _log_lagrange_integrals(points: Float64, end: float) -> list[float]:
    """∫ dρ from points[0] to `end` of each Lagrange basis polynomial in ln ρ on `points`.

    With ρ = points[0] e^w this is points[0] ∫ P(w) e^w dw, and P − P′ + P″ … times e^w is its antiderivative.
    """
    logs = np.log(points / points[0])
    reach = float(np.log(end / points[0]))
    integrals = []
    for k, own in enumerate(logs):
        others = np.delete(logs, k)
        term = Polynomial.fromroots(others) if len(others) else Polynomial([1.0])
        antiderivative, sign = Polynomial([0.0]), 1
        for _ in range(len(points)):
            antiderivative, sign, term = antiderivative + sign * term, -sign, term.deriv()
        value = antiderivative(reach) * math.exp(reach) - antiderivative(0.0)
        integrals.append(float(points[0] * value / np.prod(own - others)))
    return integrals


def unipc(schedule: SigmaSchedule) -> Iterator[Row]:
    """Zhao et al. 2023 (2302.04867), UniPC with B1(h) = h or B2(h) = e^h − 1, on denoised or noise predictions.

    History: the earlier predictions. The corrector replaces the last step's result by one that knows the newest
    prediction. Both start from the same x, so correcting is adding to the predicted x the difference of their
    increments, and the x before the step need not be kept.
    """
    config = schedule.config
    order, steps = config["solver_order"], len(schedule.timesteps)
    x, history, output, _ = basis(order)
    alphas = schedule.alphas
    noises = alphas * schedule.sigmas
    used = 0
    for n, t in schedule.visited:
        denoised, noise = denoised_and_noise(config["prediction_type"], alphas[n], noises[n], x, output)
        prediction = denoised if config["predict_x0"] else noise
        predictions = (prediction, *history)
        corrected = x
        if n > schedule.begin and n - 1 not in config["disable_corrector"]:
            last = _UniPCStep(schedule, n - 1, used)
            corrected = x + _mixed(last.corrector(), predictions) - _mixed(last.predictor(), history)
        reached = min(order, n - schedule.begin + 1)
        used = min(reached, steps - n) if config["lower_order_final"] else reached
        step = _UniPCStep(schedule, n, used)
        ratio = (noises if config["predict_x0"] else alphas)[n + 1] / (noises if config["predict_x0"] else alphas)[n]
        moved = ratio * corrected - step.scale * np.expm1(step.h) * prediction + _mixed(step.predictor(), predictions)
        yield Row(t, n, x, (moved, *predictions[:order]), denoised, (alphas[n], noises[n]))


class _UniPCStep:
    """The increments of UniPC of one order from noise level n to n+1, beyond those of order 1.

    h: the step in λ, negative on denoised predictions. scale: what the increments are multiplied by.
    """

    def __init__(self, schedule: SigmaSchedule, n: int, order: int) -> None:
        lambdas, alpha = schedule.lambdas, schedule.alphas[n + 1]
        step = lambdas[n + 1] - lambdas[n]
        on_denoised = schedule.config["predict_x0"]
        self.h: np.float64 = -step if on_denoised else step
        self.scale: np.float64 = alpha if on_denoised else alpha * schedule.sigmas[n + 1]
        self._order = order
        self._width = self.h if schedule.config["solver_type"] == "bh1" else np.expm1(self.h)
        # Where the predictions lie: the earlier ones, newest first, then the one at the step's end.
        self._places = np.append((lambdas[n - order + 1 : n][::-1] - lambdas[n]) / step, 1.0)

    def predictor(self) -> Float64:
        """Weights of the predictions up to the step's beginning, newest first."""
        if self._order == 1:
            return np.zeros(1)
        # At order 2 diffusers takes 1/2 for the solution, which is that to the order needed.
        rhos = np.array([0.5]) if self._order == 2 else self._solution(self._order - 1)
        return self._weights(rhos, self._places[:-1])

    def corrector(self) -> Float64:
        """Weights of the prediction at the step's end, then those of the predictor."""
        rhos = np.array([0.5]) if self._order == 1 else self._solution(self._order)
        weights = self._weights(rhos, self._places)
        return np.array([weights[-1], *weights[:-1]])

    def _weights(self, rhos: Float64, places: Float64) -> Float64:
        differences = -self.scale * self._width * rhos / places
        return np.append(-differences.sum(), differences)

    def _solution(self, size: int) -> Float64:
        """The paper's ρ, from R ρ = b: one row for each power of the places."""
        powers = np.vander(self._places[:size], size, increasing=True).T
        targets, phi = [], np.expm1(self.h) / self.h - 1
        for k in range(1, size + 1):
            targets.append(phi * math.factorial(k) / self._width)
            phi = phi / self.h - 1 / math.factorial(k + 1)
        try:
            return np.asarray(np.linalg.solve(powers, np.array(targets)), np.float64)
        except np.linalg.LinAlgError:
            return np.full(size, np.nan)


def _mixed(weights: Sequence[float] | Float64, forms: Sequence[Form]) -> Form:
    mixed = np.zeros_like(forms[0])
    for weight, form in zip(weights, forms, strict=False):
        mixed = mixed + weight * form
    return mixed
