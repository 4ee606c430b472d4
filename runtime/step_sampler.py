"""The hot loop on step engines: walk a plan's rows, one call each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from . import step_row as names
from .backends.base import Array, Binding, Session, Shape
from .binding import Conditioning
from .errors import BundleError, ExecutionError, PlanError
from .plan import Plan
from .sampler import SampledRow, State, denoised_estimate, require_finite
from .shapes import evaluated
from .tensors import spec_of

Float32 = npt.NDArray[np.float32]


class StepSampler:
    """Carries a state through a plan on step engines, as `Sampler` does on denoisers; used by one thread at a time.

    engines: by denoiser and whether both branches run, those the plan's rows want. ControlNets are not run: an
        engine's residual inputs hold zeros, which change nothing.
    conditioning, draw_noise, keep: as of `Sampler`.
    timesteps: for the denoisers whose engines have a schedule's time steps built in, what these are.
    """

    def __init__(
        self,
        plan: Plan,
        engines: Mapping[tuple[str, bool], Session],
        conditioning: Mapping[str, Conditioning],
        draw_noise: Callable[[], Float32],
        *,
        keep: Callable[[int, Float32], None] | None = None,
        timesteps: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self._plan, self._engines, self._conditioning = plan, engines, conditioning
        self._draw_noise, self._keep = draw_noise, keep
        self._step_indices = _step_indices(plan, timesteps or {})
        self._bound: dict[tuple[str, bool], Binding] = {}
        self._coefficients = {
            history: [
                (names.model_input_row(plan.table, row, history), names.update_row(plan.table, row, history))
                for row in range(plan.table.rows)
            ]
            for history in {_history(engine) for engine in engines.values()}
        }

    def begin(self, latents: Float32) -> State:
        """The state before the first row, from the latents x there, (B, C, h, w) float32."""
        arrays = np.zeros((1 + self._plan.table.history, *latents.shape), np.float32)
        arrays[0] = latents
        return State(arrays)

    def run(self, state: State, until: int | None = None) -> Iterator[SampledRow]:
        """Advance `state` in place, row by row, to before row `until` (the end by default).

        Raises:
            ExecutionError: an engine failed, or its prediction or the latent holds NaN or Inf; row and model are named.
        """
        end = self._plan.table.rows if until is None else until
        vectors = np.zeros((len(state.arrays) + 1, *state.latents.shape), np.float32)
        while state.row < end:
            row, began = state.row, time.perf_counter()
            model_ms = self._advance(state, vectors)
            total_ms = (time.perf_counter() - began) * 1e3
            yield SampledRow(row, model_ms, total_ms, denoised_estimate(self._plan.table, row, vectors))

    def _advance(self, state: State, vectors: Float32) -> float:
        """Run the state's row; returns the milliseconds its engine took."""
        row, plan, entries = state.row, self._plan, len(state.arrays)
        key = plan.denoisers[row], plan.guided[row]
        binding = self._bound.get(key) or self._bind(key, state.latents.shape)
        inputs, outputs = binding.inputs, binding.outputs
        history = len(inputs[names.STATE]) - 1
        inputs[names.STATE][:entries] = vectors[:-1] = state.arrays
        inputs[names.MODEL_INPUT][...], inputs[names.UPDATE][...] = self._coefficients[history][row]
        if "timestep" in inputs:
            inputs["timestep"].fill(plan.table.timesteps[row])
        if names.STEP_INDEX in inputs:
            inputs[names.STEP_INDEX].fill(self._step_indices[row])
        if plan.table.draws_noise[row]:
            inputs[names.NOISE][...] = self._draw_noise()
        called = time.perf_counter()
        binding.run()
        returned = time.perf_counter()
        vectors[-1] = outputs[names.PREDICTION]
        require_finite(plan, row, "prediction", vectors[-1])
        state.arrays[...] = outputs[names.NEXT_STATE][:entries]
        require_finite(plan, row, "latent", state.latents)
        if self._keep is not None:
            self._keep(row, state.latents)
        state.row += 1
        return (returned - called) * 1e3

    def _bind(self, key: tuple[str, bool], shape: tuple[int, ...]) -> Binding:
        """An engine's buffers, with everything in place that no row changes."""
        (name, guided), session = key, self._engines[key]
        conditioning = self._conditioning[name]
        given: dict[str, Array] = dict(conditioning.conditional)
        if guided:
            if conditioning.unconditional is None:
                raise ExecutionError(name, "a guided row without an unconditional branch")
            given = {one: np.concatenate([conditioning.unconditional[one], values]) for one, values in given.items()}
            given[names.GUIDANCE_SCALE] = np.array([self._plan.guidance_scale], np.float32)
        given.update(conditioning.whole)
        if conditioning.channels is not None:
            given[names.CHANNELS] = conditioning.channels
        binding = session.bind(_shapes(name, session, given, shape, guided=guided))
        for one, values in given.items():
            binding.inputs[one][...] = values
        self._bound[key] = binding
        return binding


def _history(engine: Session) -> int:
    state = spec_of(engine.inputs, names.STATE)
    if state is None or not isinstance(state.shape[0], int):
        listed = ", ".join(spec.name for spec in engine.inputs)
        raise BundleError(
            "step engine", "inputs", got=listed, expected=f"{names.STATE} of a fixed first size among them"
        )
    return state.shape[0] - 1


def _shapes(name: str, session: Session, given: Mapping[str, Array], shape: Shape, *, guided: bool) -> dict[str, Shape]:
    """The shape of every input for latents of this shape."""
    noise = spec_of(session.inputs, names.NOISE)
    sizes = {} if noise is None else {str(stated): size for stated, size in zip(noise.shape, shape, strict=True)}
    shapes: dict[str, Shape] = {}
    for spec in session.inputs:
        stated = evaluated(spec.shape, sizes)
        if spec.name in given:
            stated = given[spec.name].shape
        elif spec.name == "timestep" and stated is None:
            stated = (shape[0] * (1 + guided),)
        if stated is None:
            raise BundleError(name, f"shape of {spec.name}", got=spec.shape, expected=f"formulas of {', '.join(sizes)}")
        shapes[spec.name] = stated
    return shapes


def _step_indices(plan: Plan, timesteps: Mapping[str, Sequence[float]]) -> dict[int, int]:
    """For each row of a denoiser whose time steps are built in, which of them it is."""
    indices = {}
    for row, name in enumerate(plan.denoisers):
        if name in timesteps:
            timestep, built_in = float(plan.table.timesteps[row]), [float(one) for one in timesteps[name]]
            if timestep not in built_in:
                raise PlanError(
                    f"{name}: row {row}",
                    "a time step that the engine was not built for",
                    got=timestep,
                    expected=f"one of {', '.join(f'{one:g}' for one in built_in)}",
                    remedy="Build the engine for this schedule, or without folded time steps.",
                )
            indices[row] = built_in.index(timestep)
    return indices
