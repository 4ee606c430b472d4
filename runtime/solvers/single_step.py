"""Solvers that keep x on the variance-preserving scale, x = √ᾱ x0 + √(1−ᾱ) noise: DDIM, DDPM, PNDM, LCM, TCD."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from ..schedule import spaced_timesteps, training_alphas_cumprod
from ..table import Float64
from .config import Config
from .forms import Form, Row, basis, denoised_and_noise
from .request import Request

_LCM_SIGMA_DATA = 0.5


@dataclass(frozen=True, slots=True)
class AlphaSchedule:
    """Integer time steps, and ᾱ at every training step.

    timesteps: (N,) int, falling. alphas_cumprod: (num_train_timesteps,).
    final_alpha_cumprod: ᾱ before the first training step, where the last inference step may lead.
    begin: the first of the time steps to be visited.
    """

    config: Config
    eta: float
    timesteps: tuple[int, ...]
    alphas_cumprod: Float64
    final_alpha_cumprod: np.float64
    init_noise_sigma: float = 1.0
    begin: int = 0

    @property
    def stride(self) -> int:
        """Training steps per inference step, rounded down."""
        return int(self.config["num_train_timesteps"]) // len(self.timesteps)

    def visited(self, end: int) -> Iterator[tuple[int, int, int]]:
        """The time steps from `begin` on, each with its index and the time step after it; `end` after the last."""
        followed = zip(self.timesteps, (*self.timesteps[1:], end), strict=True)
        return islice(((n, t, following) for n, (t, following) in enumerate(followed)), self.begin, None)

    def alpha_cumprod(self, timestep: int) -> np.float64:
        """ᾱ at a time step, in numpy's arithmetic, where a division by zero goes on as infinity."""
        if timestep < 0:
            return self.final_alpha_cumprod
        if timestep >= len(self.alphas_cumprod):
            raise PlanError(
                "steps_offset",
                "a time step lies outside the training schedule",
                got=timestep,
                expected=f"0..{len(self.alphas_cumprod) - 1}",
                remedy="Ask for fewer steps, or use a smaller steps_offset.",
            )
        level: np.float64 = self.alphas_cumprod[timestep]
        return level

    def noised(self, timestep: int) -> tuple[float, float]:
        """What a clean latent and noise are multiplied by at a time step: √ᾱ, √(1−ᾱ)."""
        alpha_cumprod = self.alpha_cumprod(timestep)
        return np.sqrt(alpha_cumprod), np.sqrt(1 - alpha_cumprod)

    def split(self, timestep: int, model_input: Form, output: Form) -> tuple[Form, Form]:
        """The denoised estimate and the noise of a model's output at a time step."""
        alpha, sigma = self.noised(timestep)
        return denoised_and_noise(self.config["prediction_type"], alpha, sigma, model_input, output)


def spaced_schedule(request: Request) -> AlphaSchedule:
    """Time steps by timestep_spacing, or as given."""
    timesteps = request.timesteps
    if timesteps is None:
        spaced = spaced_timesteps(request.config["timestep_spacing"], request.steps, request.config)
        timesteps = _whole(np.round(spaced))
    return _schedule(request, timesteps)


def distilled_schedule(request: Request) -> AlphaSchedule:
    """Time steps out of the original_inference_steps a consistency model was distilled on, or as given.

    Raises:
        PlanError: more steps than original_inference_steps, or more of those than training steps.
    """
    original, count = request.config["original_inference_steps"], request.config["num_train_timesteps"]
    if original > count:
        where = f"{request.class_name}: original_inference_steps"
        raise PlanError(where, "more than num_train_timesteps", got=original, expected=f"1..{count}")
    if request.timesteps is not None:
        return _schedule(request, request.timesteps)
    if request.steps > original:
        expected = f"1..{original}, the original_inference_steps of the distillation"
        raise PlanError(
            "num_inference_steps", f"too many for {request.class_name}", got=request.steps, expected=expected
        )
    falling = (np.arange(original, 0, -1) * (count // original)) - 1
    chosen = np.floor(np.linspace(0, original, request.steps, endpoint=False)).astype(np.int64)
    return _schedule(request, _whole(falling[chosen]))


def _whole(timesteps: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> tuple[int, ...]:
    return tuple(int(timestep) for timestep in timesteps)


def _schedule(request: Request, timesteps: tuple[int, ...]) -> AlphaSchedule:
    alphas_cumprod = training_alphas_cumprod(request.config)
    to_one = request.config.get("set_alpha_to_one", True)
    return AlphaSchedule(
        config=request.config,
        eta=request.eta,
        timesteps=timesteps,
        alphas_cumprod=alphas_cumprod,
        final_alpha_cumprod=np.float64(1) if to_one else alphas_cumprod[0],
    )


def ddim(schedule: AlphaSchedule) -> Iterator[Row]:
    """Song et al. 2021 (2010.02502), equations 12 and 16; eta 1 has DDPM's variance."""
    x, _, output, z = basis(0)
    for n, t, _ in schedule.visited(-1):
        now, then = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t - schedule.stride)
        denoised, noise = schedule.split(t, x, output)
        deviation = schedule.eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
        direction = np.sqrt(max(1 - then - deviation**2, 0.0))
        moved = np.sqrt(then) * denoised + direction * noise + deviation * z
        yield Row(t, n, x, (moved,), denoised, schedule.noised(t))


def ddpm(schedule: AlphaSchedule) -> Iterator[Row]:
    """Ho et al. 2020 (2006.11239), equations 6 and 7; no noise at time step 0."""
    x, _, output, z = basis(0)
    for n, t, previous in schedule.visited(-1):
        now = schedule.alpha_cumprod(t)
        then = schedule.alpha_cumprod(previous) if previous >= 0 else np.float64(1)
        denoised, _ = schedule.split(t, x, output)
        beta = 1 - now / then
        posterior = max((1 - then) / (1 - now) * beta, 1e-20)
        variance = beta if schedule.config["variance_type"] == "fixed_large" else posterior
        deviation = np.sqrt(variance) if t > 0 else 0.0
        mean = np.sqrt(then) * beta / (1 - now) * denoised + np.sqrt(now / then) * (1 - then) / (1 - now) * x
        yield Row(t, n, x, (mean + deviation * z,), denoised, schedule.noised(t))


def lcm(schedule: AlphaSchedule) -> Iterator[Row]:
    """Luo et al. 2023 (2310.04378), multistep sampling of a consistency model; the skip weights as in diffusers."""
    x, _, output, z = basis(0)
    last = len(schedule.timesteps) - 1
    for n, t, following in schedule.visited(0):
        prediction, _ = schedule.split(t, x, output)
        scaled = t * schedule.config["timestep_scaling"]
        skip = _LCM_SIGMA_DATA**2 / (scaled**2 + _LCM_SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + _LCM_SIGMA_DATA**2)
        denoised = out * prediction + skip * x
        then = schedule.alpha_cumprod(following)
        renoised = np.sqrt(then) * denoised + np.sqrt(1 - then) * z
        yield Row(t, n, x, (denoised if n == last else renoised,), denoised, schedule.noised(t))


def tcd(schedule: AlphaSchedule) -> Iterator[Row]:
    """Zheng et al. 2024 (2402.19159), strategic stochastic sampling; diffusers' `eta` is the paper's γ."""
    x, _, output, z = basis(0)
    last = len(schedule.timesteps) - 1
    for n, t, following in schedule.visited(0):
        # In float32 as diffusers has it: the product may lie on either side of a whole number.
        towards = int(np.floor(np.float32(1 - schedule.eta) * np.float32(following)))
        then, between = schedule.alpha_cumprod(following), schedule.alpha_cumprod(towards)
        denoised, noise = schedule.split(t, x, output)
        solved = np.sqrt(between) * denoised + np.sqrt(1 - between) * noise
        ratio = then / between
        renoised = np.sqrt(ratio) * solved + np.sqrt(1 - ratio) * z
        moved = renoised if schedule.eta > 0 and n < last else solved
        yield Row(t, n, x, (moved,), denoised, schedule.noised(t))


# Adams–Bashforth weights on the newest prediction first (Liu et al. 2022, 2202.09778, equation 12).
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(schedule: AlphaSchedule) -> Iterator[Row]:
    """PLMS, PNDM without Runge–Kutta steps (Liu et al. 2022, 2202.09778): N+1 model calls for N steps.

    The second time step is visited twice: the first step is taken again from its beginning with the mean of both
    predictions. Its beginning is not kept but recovered from where the first attempt led.

    To begin at step b, diffusers leaves out b model calls: what is left visits t(b−1), t(b), t(b+1) … once each, or
    t1, t1, t2 … for b = 1, and takes the first step twice as ever. From the third row on, x is therefore one step
    noisier than its time step says. That is kept, for parity.
    """
    x, (h1, h2, h3), output, _ = basis(3)
    predictions = (output, h1, h2, h3)
    calls = (*schedule.timesteps[:2], *schedule.timesteps[1:])
    beginning = x
    for n, t in enumerate(calls[schedule.begin :]):
        denoised, _ = schedule.split(t, x, output)
        state: tuple[Form, ...]
        if n == 0:
            kept, moved = _pndm_transfer(schedule, t, t - schedule.stride)
            beginning = (x - moved * h1) / kept
            state = (kept * x + moved * output, output)
        elif n == 1:
            kept, moved = _pndm_transfer(schedule, t + schedule.stride, t)
            state = (kept * beginning + moved * (output + h1) / 2, h1)
        else:
            kept, moved = _pndm_transfer(schedule, t, t - schedule.stride)
            weights = _ADAMS_BASHFORTH[min(n - 1, 3)]
            mixed = sum((weight * form for weight, form in zip(weights, predictions, strict=False)), np.zeros_like(x))
            state = (kept * x + moved * mixed, *predictions[:3])
        yield Row(t, max(n - 1, 0), x, state, denoised, schedule.noised(t))


def _pndm_transfer(schedule: AlphaSchedule, t: int, previous: int) -> tuple[np.float64, np.float64]:
    """What x and the model's output are multiplied by to go from one time step to another (equation 9)."""
    now, then = schedule.alpha_cumprod(t), schedule.alpha_cumprod(previous)
    kept = np.sqrt(then / now)
    moved = -(then - now) / (now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then))
    if schedule.config["prediction_type"] == "v_prediction":
        return kept + moved * np.sqrt(1 - now), moved * np.sqrt(now)
    return kept, moved
