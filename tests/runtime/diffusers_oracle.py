"""The oracle: diffusers' schedulers, probed with basis vectors for the coefficients of everything they compute.

A scheduler is linear in the latent, the model's outputs and the noise. Its whole run is done once on a tensor with one
channel for each of these, the n-th input being the n-th unit vector; what comes out are the coefficients themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch

from tandemrt.runtime.schedule import training_alphas_cumprod
from tandemrt.runtime.table import Table

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Coefficients:
    """What a schedule computes, over K = 1 + 2N inputs: the first x, the N model outputs, the N noises.

    timesteps: (N,). model_inputs, samples (after each row), denoised: (N, K). denoised is None where a scheduler does
    not tell. draws: (N,) whether a row drew noise.
    """

    timesteps: Float64
    model_inputs: Float64
    samples: Float64
    denoised: Float64 | None
    draws: npt.NDArray[np.bool_]
    init_noise_sigma: float


def scheduler_for(
    class_name: str,
    config: Mapping[str, Any],
    num_inference_steps: int,
    timesteps: Sequence[int] | None = None,
) -> Any:
    """A diffusers scheduler made by `from_config`, its time steps set."""
    scheduler = getattr(diffusers, class_name).from_config(dict(config))
    _set_timesteps(scheduler, num_inference_steps, timesteps)
    return scheduler


def double_scheduler_for(
    class_name: str, config: Mapping[str, Any], num_inference_steps: int, timesteps: Sequence[int] | None = None
) -> Any:
    """The same in double precision from the float32 ᾱ on, which is taken from `training_alphas_cumprod`."""
    scheduler = getattr(diffusers, class_name).from_config(dict(config))
    if hasattr(scheduler, "alphas_cumprod"):
        kept_finite = bool(scheduler.alphas_cumprod[-1] == 2.0**-24)
        alphas_cumprod = torch.from_numpy(training_alphas_cumprod(scheduler.config, keep_sigma_finite=kept_finite))
        scheduler.alphas_cumprod = alphas_cumprod
        if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.set_alpha_to_one:
            scheduler.final_alpha_cumprod = alphas_cumprod[0]
    with double_precision(scheduler):
        _set_timesteps(scheduler, num_inference_steps, timesteps)
    return scheduler


def probe(scheduler: Any, *, double: bool = False, **step_arguments: Any) -> Coefficients:
    """The coefficients of a scheduler whose time steps are set.

    double: compute in double precision where diffusers casts to float32 (for `double_scheduler_for`).
    step_arguments: passed on to `step`, such as eta.
    """
    rows = len(scheduler.timesteps)
    inputs = torch.eye(1 + 2 * rows, dtype=torch.float64)

    def model(row: int, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return inputs[1 + row].reshape(sample.shape)

    def noise(row: int, shape: torch.Size) -> torch.Tensor:
        return inputs[1 + rows + row].reshape(shape)

    first = inputs[0].reshape(1, -1, 1, 1)
    return run(scheduler, first, model, noise, double=double, **step_arguments)


def run(
    scheduler: Any,
    first: torch.Tensor,
    model: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    noise: Callable[[int, torch.Size], torch.Tensor],
    *,
    double: bool = False,
    **step_arguments: Any,
) -> Coefficients:
    """diffusers' sampling loop with a model and a noise source of one's own; every tensor it meets, by row.

    model: (row, timestep, scaled sample) to output. noise: (row, shape) to noise.
    """
    sample, row = first, 0
    drawn: list[int] = []
    model_inputs: list[torch.Tensor] = []
    samples: list[torch.Tensor] = []
    denoised: list[torch.Tensor] = []

    def randn_tensor(shape: torch.Size, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        drawn.append(row)
        return noise(row, shape)

    with _replaced(_module_of(scheduler), "randn_tensor", randn_tensor), double_precision(scheduler, double):
        for row, timestep in enumerate(scheduler.timesteps):
            # Given as a number, diffusers calculates with a whole time step in double precision.
            moment = timestep if timestep.is_floating_point() else int(timestep)
            scaled = _scaled(scheduler, sample, moment)
            model_inputs.append(scaled)
            result = scheduler.step(model(row, timestep, scaled), moment, sample, **step_arguments)
            sample = result.prev_sample
            samples.append(sample)
            estimate = getattr(result, "pred_original_sample", getattr(result, "denoised", None))
            denoised += [] if estimate is None else [estimate]
    rows = len(samples)
    return Coefficients(
        timesteps=scheduler.timesteps.double().numpy(),
        model_inputs=_flat(model_inputs),
        samples=_flat(samples),
        denoised=_flat(denoised) if denoised else None,
        draws=np.isin(np.arange(rows), drawn),
        init_noise_sigma=float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0,
    )


def table_coefficients(table: Table) -> Coefficients:
    """The same coefficients, as a compiled table has them."""
    rows = table.rows
    inputs = np.eye(1 + 2 * rows)
    return run_table(table, inputs[0], lambda row, _, __: inputs[1 + row], lambda row: inputs[1 + rows + row])


def run_table(
    table: Table,
    first: Float64,
    model: Callable[[int, float, Float64], Float64],
    noise: Callable[[int], Float64],
) -> Coefficients:
    """The sampling loop on a table, as `run` is on a scheduler: (K,) vectors in place of tensors."""
    state = np.zeros((1 + table.history, len(first)))
    state[0] = first
    model_inputs, samples, denoised = [], [], []
    for n in range(table.rows):
        model_inputs.append(table.model_input[n] @ state)
        output = model(n, float(table.timesteps[n]), model_inputs[-1])
        denoised.append(table.denoised_state[n] @ state + table.denoised_prediction[n] * output)
        state = table.transition[n] @ state + np.outer(table.prediction[n], output)
        if table.draws_noise[n]:
            state = state + np.outer(table.noise[n], noise(n))
        samples.append(state[0])
    return Coefficients(
        timesteps=table.timesteps,
        model_inputs=np.stack(model_inputs),
        samples=np.stack(samples),
        denoised=np.stack(denoised),
        draws=table.draws_noise,
        init_noise_sigma=table.init_noise_sigma,
    )


@contextmanager
def double_precision(scheduler: Any, double: bool = True) -> Iterator[None]:
    """Within, float32 means float64 in the scheduler's module; float32 time steps keep their rounding."""
    if not double:
        yield
        return
    module = _module_of(scheduler)
    with _replaced(module, "torch", _DoubleTorch(torch)), _replaced(module, "np", _DoubleNumpy(np)):
        yield


class _DoubleTorch:
    float32 = torch.float64

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _DoubleNumpy(_DoubleTorch):
    float32 = np.float64

    def linspace(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dtype") is self.float32:
            return np.linspace(*args, **{**kwargs, "dtype": np.float32}).astype(np.float64)
        return np.linspace(*args, **kwargs)


def _module_of(scheduler: Any) -> ModuleType:
    return importlib.import_module(type(scheduler).__module__)


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    if not hasattr(module, name):
        yield
        return
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _set_timesteps(scheduler: Any, num_inference_steps: int, timesteps: Sequence[int] | None) -> None:
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps)
    else:
        scheduler.set_timesteps(timesteps=list(timesteps))


def _scaled(scheduler: Any, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample


def _flat(tensors: Sequence[torch.Tensor]) -> Float64:
    return np.stack([tensor.double().reshape(-1).numpy() for tensor in tensors])
