"""The hot loop: splitting, history, guidance, noise and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.errors import ExecutionError
from tandemrt.runtime.manifest import TensorSpec
from tandemrt.runtime.placement import Batched, Worker
from tandemrt.runtime.plan import Plan, Schedule, compile_plan
from tandemrt.runtime.rng import new_generator
from tandemrt.runtime.sampler import Sampler
from tandemrt.runtime.state import State

from .test_plan import MANIFEST

SHAPE = (2, 4, 8, 8)
SOLVERS = (
    "ddim", "ddpm", "euler", "euler_a", "heun", "dpmsolver++", "dpmsolver++sde",
    "pndm", "lms", "unipc", "deis", "lcm", "tcd",
)  # fmt: skip


class Denoiser:
    """A session whose prediction is a smooth function of everything it is given."""

    outputs = (TensorSpec(name="out_sample", dtype="float32", shape=("batch", 4, "height", "width")),)
    inputs = (
        TensorSpec(name="sample", dtype="float32", shape=("batch", 4, "height", "width")),
        TensorSpec(name="timestep", dtype="float32", shape=(1,)),
        TensorSpec(name="encoder_hidden_states", dtype="float32", shape=("batch", "sequence", 3)),
    )

    def __init__(self, poison_at: int | None = None) -> None:
        self._poison_at, self.calls, self.bound = poison_at, count(), 0

    def bind(self, input_shapes: Mapping[str, tuple[int, ...]]) -> Any:
        self.bound += 1
        return _Binding(self, input_shapes)

    def close(self) -> None: ...


class _Binding:
    def __init__(self, denoiser: Denoiser, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._denoiser = denoiser
        self.inputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self.outputs = {"out_sample": np.zeros(shapes["sample"], np.float32)}

    def run(self) -> None:
        sample, text = self.inputs["sample"], self.inputs["encoder_hidden_states"]
        mean = text.mean(axis=(1, 2))[:, None, None, None]
        np.tanh(sample * 0.7 + mean + self.inputs["timestep"] / 1000, out=self.outputs["out_sample"])
        if next(self._denoiser.calls) == self._denoiser._poison_at:
            self.outputs["out_sample"][0, 0, 0, 0] = np.nan


def plan(steps: Any, solver: str = "ddim", **arguments: Any) -> Plan:
    return compile_plan(MANIFEST, Schedule(steps=steps, solver=solver, **arguments))


def conditioning(compiled: Plan) -> dict[str, Conditioning]:
    branches = ({"encoder_hidden_states": text(1)}, {"encoder_hidden_states": text(2)})
    return dict.fromkeys(compiled.denoisers, Conditioning(*branches))


def text(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(SHAPE[0], 5, 3)).astype(np.float32)


def sampler(compiled: Plan, generator: Any, denoiser: Denoiser | None = None) -> Sampler:
    sessions = dict.fromkeys(compiled.denoisers, denoiser or Denoiser())
    return Sampler(compiled, Batched(Worker(compiled, sessions, conditioning(compiled))), generator.fill)


def latents(compiled: Plan, split: int | None = None) -> np.ndarray:
    """Sample to the end; with `split`, stop there and go on from a copy of the state in a new sampler."""
    generator = new_generator(3)
    first = sampler(compiled, generator)
    state = State.begin(compiled.table, generator.randn(SHAPE) * np.float32(compiled.table.init_noise_sigma))
    if split is not None:
        list(first.run(state, until=split))
        first = sampler(compiled, generator)
        state = State(np.frombuffer(state.arrays.tobytes(), np.float32).reshape(state.arrays.shape).copy(), state.row)
    list(first.run(state))
    assert state.row == compiled.table.rows
    return state.latents


@settings(max_examples=60)
@given(st.sampled_from(SOLVERS), st.integers(1, 9), st.data())
def test_splitting_anywhere_changes_no_bit(solver: str, steps: int, data: st.DataObject) -> None:
    compiled = plan(steps, solver, eta=0.3 if solver in ("ddim", "tcd") else 0.0)
    split = data.draw(st.integers(0, compiled.table.rows))
    np.testing.assert_array_equal(latents(compiled, split), latents(compiled))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_computes_what_the_table_says(solver: str) -> None:
    compiled = plan(6, solver)
    table, generator = compiled.table, new_generator(3)
    state = np.zeros((1 + table.history, *SHAPE))
    state[0] = generator.randn(SHAPE).astype(np.float64) * table.init_noise_sigma
    for n in range(table.rows):
        sample = np.tensordot(table.model_input[n], state, 1)
        branch = [
            np.tanh(sample * 0.7 + t.mean((1, 2))[:, None, None, None] + table.timesteps[n] / 1000)
            for t in (text(2), text(1))
        ]
        guided = branch[0] + compiled.guidance_scale * (branch[1] - branch[0])
        fresh = generator.randn(SHAPE) if table.draws_noise[n] else np.zeros(SHAPE)
        state = (
            np.tensordot(table.transition[n], state, 1)
            + np.multiply.outer(table.prediction[n], guided)
            + np.multiply.outer(table.noise[n], fresh)
        )
    np.testing.assert_allclose(latents(compiled), state[0], rtol=2e-4, atol=2e-4)


def test_guidance_one_equals_the_conditional_branch() -> None:
    unguided = plan(5)
    conditional = replace(unguided, guided=(False,) * 5)
    guided_at_one = replace(unguided, guided=(True,) * 5, guidance_scale=1.0)
    np.testing.assert_allclose(latents(guided_at_one), latents(conditional), atol=1e-5)
    assert np.abs(latents(unguided) - latents(conditional)).max() > 1e-2


def test_noise_is_drawn_only_where_the_row_needs_it() -> None:
    def refuse(_: np.ndarray) -> None:
        raise AssertionError("noise was drawn")

    for solver in ("ddim", "euler", "dpmsolver++", "pndm"):
        compiled = plan(4, solver)
        runner = Sampler(compiled, Batched(Worker(compiled, {"unet": Denoiser()}, conditioning(compiled))), refuse)
        list(runner.run(State.begin(compiled.table, new_generator(0).randn(SHAPE))))


def test_denoised_is_the_last_rows_result_for_ddim() -> None:
    compiled = plan(4, solver_config={"set_alpha_to_one": True})
    generator = new_generator(3)
    runner = sampler(compiled, generator)
    state = State.begin(compiled.table, generator.randn(SHAPE))
    estimates = [done.denoised() for done in runner.run(state)]
    np.testing.assert_allclose(estimates[-1], state.latents, rtol=1e-4, atol=1e-4)
    assert np.abs(estimates[0] - state.latents).max() > 1e-2


def test_each_branch_is_bound_once() -> None:
    denoiser = Denoiser()
    compiled = plan(10, guidance_interval=(0.2, 0.6))
    runner = sampler(compiled, new_generator(0), denoiser)
    list(runner.run(State.begin(compiled.table, new_generator(1).randn(SHAPE))))
    assert denoiser.bound == 2


def test_nan_is_caught_at_its_step_and_names_the_model() -> None:
    compiled = plan({"unet": 2, "unet_small": 3})
    runner = sampler(compiled, new_generator(0), Denoiser(poison_at=3))
    state = State.begin(compiled.table, new_generator(1).randn(SHAPE))
    with pytest.raises(ExecutionError, match=r"step 3 \(timestep \d+, unet_small\): NaN or Inf in the prediction"):
        list(runner.run(state))
    assert state.row == 3


def test_guidance_that_overflows_is_an_error_and_no_warning() -> None:
    compiled = plan(2, guidance_scale=1e300)
    runner = sampler(compiled, new_generator(0))
    with pytest.raises(ExecutionError, match="NaN or Inf in the prediction"):
        list(runner.run(State.begin(compiled.table, new_generator(1).randn(SHAPE))))


def test_large_finite_values_are_no_alarm() -> None:
    compiled = plan(2, guidance_scale=1.0)
    runner = sampler(compiled, new_generator(0))
    state = State.begin(compiled.table, np.full(SHAPE, 3e36, np.float32))
    list(runner.run(state))
    assert np.isfinite(state.latents).all()
