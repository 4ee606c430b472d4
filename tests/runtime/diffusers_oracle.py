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
    not tell. draws: (N,) whether a row drew noise. noised: (N+1, 2) what a clean latent and noise are multiplied by
    before each row, and after the last; None for diffusers' text-to-image.
    """

    timesteps: Float64
    model_inputs: Float64
    samples: Float64
    denoised: Float64 | None
    draws: npt.NDArray[np.bool_]
    init_noise_sigma: float
    noised: Float64 | None = None


@dataclass(frozen=True)
class Editing:
    """What image-to-image and inpainting begin with, besides the first x.

    begin: the inference step. latent, noise: (K,), the image and the noise on it. mask: (K,), 0 where inpainting keeps
    the image, 1 elsewhere; image-to-image has none.
    """

    begin: int
    latent: Float64 | None = None
    noise: Float64 | None = None
    mask: Float64 | None = None

    def start(self, noised: Float64) -> Float64:
        """The image at the noise of row 0."""
        return noised[0, 0] * self.latent + noised[0, 1] * self.noise

    def blended(self, sample: Float64, noised: Float64) -> Float64:
        """What inpainting goes on with after a row: the image at the noise of the next one where it is kept."""
        if self.mask is None:
            return sample
        return (1 - self.mask) * (noised[0] * self.latent + noised[1] * self.noise) + self.mask * sample


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


def probe(scheduler: Any, begin: int | None = None, *, double: bool = False, **step_arguments: Any) -> Coefficients:
    """The coefficients of a scheduler whose time steps are set.

    begin: the inference step to begin at as image-to-image does; None for text-to-image, which sets no begin index.
    double: compute in double precision where diffusers casts to float32 (for `double_scheduler_for`).
    step_arguments: passed on to `step`, such as eta.
    """
    editing = None if begin is None else Editing(begin)
    rows = len(visited_timesteps(scheduler, editing))
    inputs = torch.eye(1 + 2 * rows, dtype=torch.float64)

    def model(row: int, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return inputs[1 + row].reshape(sample.shape)

    def noise(row: int, shape: torch.Size) -> torch.Tensor:
        return inputs[1 + rows + row].reshape(shape)

    first = inputs[0].reshape(1, -1, 1, 1)
    return run(scheduler, first, model, noise, editing, double=double, **step_arguments)


def visited_timesteps(scheduler: Any, editing: Editing | None) -> torch.Tensor:
    """What diffusers' img2img pipelines loop over."""
    timesteps: torch.Tensor = scheduler.timesteps[(editing.begin if editing else 0) * scheduler.order :]
    return timesteps


def run(
    scheduler: Any,
    first: torch.Tensor | None,
    model: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    noise: Callable[[int, torch.Size], torch.Tensor],
    editing: Editing | None = None,
    *,
    double: bool = False,
    **step_arguments: Any,
) -> Coefficients:
    """diffusers' sampling loop with a model and a noise source of one's own; every tensor it meets, by row.

    first: None for the image of `editing` at the noise of the first row.
    model: (row, timestep, scaled sample) to output. noise: (row, shape) to noise.
    """
    row = 0
    drawn: list[int] = []
    noised: list[Float64] = []
    model_inputs: list[torch.Tensor] = []
    samples: list[torch.Tensor] = []
    denoised: list[torch.Tensor] = []

    def randn_tensor(shape: torch.Size, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        drawn.append(row)
        return noise(row, shape)

    with _replaced(_module_of(scheduler), "randn_tensor", randn_tensor), double_precision(scheduler, double):
        timesteps = visited_timesteps(scheduler, editing)
        if editing:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(editing.begin * scheduler.order)
            noised.append(_noised(scheduler, timesteps[:1]))
        sample = _tensor(editing.start(noised[0][None])) if first is None and editing else first
        assert sample is not None
        for row, timestep in enumerate(timesteps):
            # Given as a number, diffusers calculates with a whole time step in double precision.
            moment = timestep if timestep.is_floating_point() else int(timestep)
            scaled = _scaled(scheduler, sample, moment)
            model_inputs.append(scaled)
            result = scheduler.step(model(row, timestep, scaled), moment, sample, **step_arguments)
            sample = result.prev_sample
            if editing:
                following = timesteps[row + 1 : row + 2]
                noised.append(_noised(scheduler, following) if len(following) else np.array([1.0, 0.0]))
                sample = sample if editing.mask is None else _tensor(editing.blended(_array(sample), noised[-1]))
            samples.append(sample)
            estimate = getattr(result, "pred_original_sample", getattr(result, "denoised", None))
            denoised += [] if estimate is None else [estimate]
    rows = len(samples)
    return Coefficients(
        timesteps=timesteps.double().numpy(),
        model_inputs=_flat(model_inputs),
        samples=_flat(samples),
        denoised=_flat(denoised) if denoised else None,
        draws=np.isin(np.arange(rows), drawn),
        init_noise_sigma=float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0,
        noised=np.stack(noised) if noised else None,
    )


def table_coefficients(table: Table) -> Coefficients:
    """The same coefficients, as a compiled table has them."""
    rows = table.rows
    inputs = np.eye(1 + 2 * rows)
    return run_table(table, inputs[0], lambda row, _, __: inputs[1 + row], lambda row: inputs[1 + rows + row])


def run_table(
    table: Table,
    first: Float64 | None,
    model: Callable[[int, float, Float64], Float64],
    noise: Callable[[int], Float64],
    editing: Editing | None = None,
) -> Coefficients:
    """The sampling loop on a table, as `run` is on a scheduler: (K,) vectors in place of tensors."""
    started = editing.start(table.noised) if first is None and editing else first
    assert started is not None
    state = np.zeros((1 + table.history, len(started)))
    state[0] = started
    model_inputs, samples, denoised = [], [], []
    for n in range(table.rows):
        model_inputs.append(table.model_input[n] @ state)
        output = model(n, float(table.timesteps[n]), model_inputs[-1])
        denoised.append(table.denoised_state[n] @ state + table.denoised_prediction[n] * output)
        state = table.transition[n] @ state + np.outer(table.prediction[n], output)
        if table.draws_noise[n]:
            state = state + np.outer(table.noise[n], noise(n))
        if editing:
            state[0] = editing.blended(state[0], table.noised[n + 1])
        samples.append(state[0])
    return Coefficients(
        timesteps=table.timesteps,
        model_inputs=np.stack(model_inputs),
        samples=np.stack(samples),
        denoised=np.stack(denoised),
        draws=table.draws_noise,
        init_noise_sigma=table.init_noise_sigma,
        noised=table.noised,
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


def _noised(scheduler: Any, timestep: torch.Tensor) -> Float64:
    """What `add_noise` or `scale_noise` multiplies latent and noise by, (2,); timestep: (1,)."""
    latent, noise = torch.eye(2, dtype=torch.float64).reshape(2, 1, 2, 1, 1)
    if hasattr(scheduler, "scale_noise"):
        return _array(scheduler.scale_noise(latent, timestep, noise))
    return _array(scheduler.add_noise(latent, noise, timestep))


def _tensor(values: Float64) -> torch.Tensor:
    return torch.from_numpy(values).reshape(1, -1, 1, 1)


def _array(tensor: torch.Tensor) -> Float64:
    return tensor.double().reshape(-1).numpy()


def _scaled(scheduler: Any, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample


def _flat(tensors: Sequence[torch.Tensor]) -> Float64:
    return np.stack([_array(tensor) for tensor in tensors])
