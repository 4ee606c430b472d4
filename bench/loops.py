"""Host time per denoising step: this runtime's loop and diffusers', both around a model that answers at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tandemrt.runtime.backends.base import Array
from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.manifest import TensorSpec
from tandemrt.runtime.placement import Batched, Worker
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.sampler import Sampler
from tandemrt.runtime.solvers import compile_table
from tandemrt.runtime.state import State

from .figures import spread

STEPS = 25
GUIDANCE_SCALE = 7.5
LATENT_SHAPE = (1, 4, 64, 64)
TEXT_SHAPE = (1, 77, 768)
# Stable Diffusion 1.5's schedule; the solvers' own settings are diffusers' defaults.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
SOLVERS = {"DPM-Solver++ 2M": "DPMSolverMultistepScheduler", "Euler": "EulerDiscreteScheduler"}

Float32 = npt.NDArray[np.float32]


class StubBinding:
    """Buffers of a model that does nothing; its output always holds `prediction`."""

    def __init__(self, input_shapes: Mapping[str, tuple[int, ...]], prediction: Float32) -> None:
        self.inputs: Mapping[str, Array] = {name: np.zeros(shape, np.float32) for name, shape in input_shapes.items()}
        self.outputs: Mapping[str, Array] = {"out_sample": prediction}

    def run(self) -> None:
        """Answer at once."""


class StubSession:
    """A denoiser that answers at once, behind the interface of every backend."""

    inputs: tuple[TensorSpec, ...] = (
        TensorSpec(name="sample", dtype="float32", shape=("batch", 4, "height", "width")),
        TensorSpec(name="timestep", dtype="float32", shape=("batch",)),
        TensorSpec(name="encoder_hidden_states", dtype="float32", shape=("batch", 77, 768)),
    )
    outputs: tuple[TensorSpec, ...] = (
        TensorSpec(name="out_sample", dtype="float32", shape=("batch", 4, "height", "width")),
    )

    def __init__(self) -> None:
        self._prediction = normal((2, *LATENT_SHAPE[1:]))

    def bind(self, input_shapes: Mapping[str, tuple[int, ...]]) -> StubBinding:
        return StubBinding(input_shapes, self._prediction)

    def close(self) -> None:
        """Nothing to free."""


def normal(shape: tuple[int, ...]) -> Float32:
    """The same standard normal noise every time, as float32."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def runtime_loop(scheduler_class: str) -> Callable[[], Float32]:
    """One generation by this runtime, its schedule compiled anew; returns the latents, (1, 4, 64, 64) float32."""
    text = {"encoder_hidden_states": normal(TEXT_SHAPE)}
    conditioning = {"unet": Conditioning(text, text)}
    noise, sessions = normal(LATENT_SHAPE), {"unet": StubSession()}

    def generate() -> Float32:
        table = compile_table(scheduler_class, SCHEDULE, STEPS)
        plan = Plan(table, ("unet",) * table.rows, (True,) * table.rows, GUIDANCE_SCALE)
        sampler = Sampler(plan, Batched(Worker(plan, sessions, conditioning)), lambda out: np.copyto(out, noise))
        state = State.begin(table, noise * np.float32(table.init_noise_sigma))
        for _ in sampler.run(state):
            pass
        return state.latents

    return generate


def diffusers_loop(scheduler_class: str) -> Callable[[], Float32]:
    """One generation by the operations of diffusers' `StableDiffusionPipeline.__call__` between and around the models.

    Left out, in its favour: progress bar, callbacks, and everything before and after the loop.
    """
    import diffusers  # noqa: PLC0415 — so that this runtime's loop can be measured without torch
    import torch  # noqa: PLC0415

    class StubUNet(torch.nn.Module):
        """Answers at once, as a module is called."""

        def __init__(self) -> None:
            super().__init__()
            self.prediction = torch.from_numpy(normal((2, *LATENT_SHAPE[1:])))

        def forward(self, sample: Any, timestep: Any, **_: Any) -> tuple[Any]:
            return (self.prediction,)

    scheduler = getattr(diffusers, scheduler_class).from_config(SCHEDULE)
    unet = StubUNet().eval()
    text = torch.from_numpy(normal((2, *TEXT_SHAPE[1:])))
    noise = torch.from_numpy(normal(LATENT_SHAPE))

    @torch.no_grad()
    def generate() -> Float32:
        scheduler.set_timesteps(STEPS)
        latents = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            unconditional, conditional = unet(both, timestep, encoder_hidden_states=text, return_dict=False)[0].chunk(2)
            guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        made: Float32 = latents.numpy()
        return made

    return generate


def step_overheads(warm_up: int, repeats: int) -> list[dict[str, Any]]:
    """Microseconds per step of both loops, taken in turns, for each solver."""
    rows = []
    for name, scheduler_class in SOLVERS.items():
        ours, theirs = runtime_loop(scheduler_class), diffusers_loop(scheduler_class)
        samples: dict[str, list[float]] = {"tandemrt": [], "diffusers": []}
        for repeat in range(warm_up + repeats):
            for label, generate in (("tandemrt", ours), ("diffusers", theirs)):
                began = time.perf_counter()
                generate()
                if repeat >= warm_up:
                    samples[label].append((time.perf_counter() - began) / STEPS * 1e6)
        figures = {label: spread(values) for label, values in samples.items()}
        rows.append({"solver": name, "unit": "microseconds per step", **figures})
    return rows
