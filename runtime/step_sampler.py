"""The hot loop on step engines: walk a plan's rows, one call each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import step_row as names
from .backends.base import Array, Binding, Session, Shape
from .binding import Bound, Conditioning
from .control import Running, Steering, steer
from .errors import BundleError, ExecutionError, PlanError
from .lora_slots import slot_inputs
from .manifest import TensorSpec
from .plan import Plan, RowGuidance
from .sampler import SampledRow, State, denoised_estimate, model_input, require_finite
from .shapes import evaluated
from .tensors import TAKEN, spec_of
from .trace import record, span
from .variant import Variant

Float32 = npt.NDArray[np.float32]
Key = tuple[str, bool]


@dataclass(frozen=True, slots=True)
class StepEngine:
    """A step engine, and what was made of the denoiser's graph: LoRA slots, time steps built in."""

    session: Session
    variant: Variant


class StepSampler:
    """Carries a state through a plan on step engines, as `Sampler` does on denoisers; used by one thread at a time.

    engines: by denoiser and whether both branches run, those the plan's rows want.
    conditioning, draw_noise, keep, steering: as of `Sampler`.
    """

    def __init__(
        self,
        plan: Plan,
        engines: Mapping[Key, StepEngine],
        conditioning: Mapping[str, Conditioning],
        draw_noise: Callable[[], Float32],
        *,
        keep: Callable[[int, Float32], None] | None = None,
        steering: Steering | None = None,
    ) -> None:
        """Nothing is allocated yet.

        Raises:
            BundleError: one is no step engine.
            PlanError: the plan carries more history than an engine's state holds, or has a time step that is not among
                those built into an engine.
        """
        self._plan, self._engines, self._conditioning = plan, engines, conditioning
        self._draw_noise, self._keep, self._steering = draw_noise, keep, steering
        self._step_indices = _step_indices(plan, engines)
        self._bound: dict[Key, _BoundEngine] = {}
        self._coefficients = {
            history: [
                (names.model_input_row(plan.table, row, history), names.update_row(plan.table, row, history))
                for row in range(plan.table.rows)
            ]
            for history in {history_of(engine.session.inputs) for engine in engines.values()}
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
            # What overflows is raised as an error that names the row, without numpy's warning before it.
            with span("row", row), np.errstate(over="ignore", invalid="ignore"):
                model_ms = self._advance(state, vectors)
            total_ms = (time.perf_counter() - began) * 1e3
            guidance = RowGuidance(self._plan.guided[row], "batched", self._plan.why(row))
            yield SampledRow(row, model_ms, total_ms, denoised_estimate(self._plan.table, row, vectors), guidance)

    def _advance(self, state: State, vectors: Float32) -> float:
        """Run the state's row; returns the milliseconds its engine took, with its ControlNets."""
        row, plan, entries = state.row, self._plan, len(state.arrays)
        key = plan.denoisers[row], plan.guided[row]
        bound = self._bound.get(key) or self._bind(key, state.latents.shape)
        inputs, outputs = bound.binding.inputs, bound.binding.outputs
        inputs[names.STATE][:entries] = vectors[:-1] = state.arrays
        inputs[names.MODEL_INPUT][...], inputs[names.UPDATE][...] = self._coefficients[bound.history][row]
        if "timestep" in inputs:
            inputs["timestep"].fill(plan.table.timesteps[row])
        if names.STEP_INDEX in inputs:
            inputs[names.STEP_INDEX].fill(self._step_indices[row])
        if plan.table.draws_noise[row]:
            inputs[names.NOISE][...] = self._draw_noise()
        called = time.perf_counter()
        running = self._steer(bound, row, vectors)
        with span("model", bound.denoiser.label):
            bound.binding.run()
        returned = time.perf_counter()
        vectors[-1] = outputs[names.PREDICTION]
        require_finite(plan, row, "prediction", vectors[-1], running)
        state.arrays[...] = outputs[names.NEXT_STATE][:entries]
        require_finite(plan, row, "latent", state.latents, running)
        if self._keep is not None:
            self._keep(row, state.latents)
        record("update", row, returned)
        state.row += 1
        return (returned - called) * 1e3

    def _steer(self, bound: _BoundEngine, row: int, vectors: Float32) -> Sequence[Running]:
        """Run the row's ControlNets on what the engine makes within itself: m · S, for one or both branches."""
        denoiser = bound.denoiser
        if self._steering is None:
            return ()
        guided = self._plan.guided[row]
        running = self._steering.running(denoiser, row, guided=guided)
        if running:
            batch = vectors.shape[1]
            model_input(self._plan.table, row, vectors, denoiser.sample[:batch])
            if guided:
                denoiser.sample[batch:] = denoiser.sample[:batch]
        steer(running, denoiser, float(self._plan.table.timesteps[row]))
        return running

    def _bind(self, key: Key, shape: Shape) -> _BoundEngine:
        """An engine's buffers, with everything in place that no row changes."""
        (name, guided), session = key, self._engines[key].session
        conditioning = self._conditioning[name]
        given = given_inputs(name, self._plan, conditioning, guided=guided)
        given.update(slot_inputs(session.inputs, conditioning.adapters))
        with span("bind", name):
            binding = session.bind(input_shapes(name, session.inputs, given, shape, guided=guided))
        for one, values in given.items():
            binding.inputs[one][...] = values
        residuals = TAKEN.names(binding.inputs) if TAKEN.mid in binding.inputs else ()
        denoiser = Bound(
            conditioning.label(name, guided=guided),
            binding,
            np.zeros((shape[0] * (1 + guided), *shape[1:]), np.float32),
            binding.inputs.get("timestep", np.zeros(0, np.float32)),
            tuple(binding.inputs[residual] for residual in residuals),
        )
        self._bound[key] = _BoundEngine(binding, history_of(session.inputs), denoiser)
        return self._bound[key]


@dataclass(frozen=True, slots=True)
class _BoundEngine:
    """An engine's buffers; `denoiser` are those within it that ControlNets know, its sample apart from the engine."""

    binding: Binding
    history: int
    denoiser: Bound


def history_of(inputs: Sequence[TensorSpec]) -> int:
    """How many earlier predictions the state of a step engine with these inputs holds.

    Raises:
        BundleError: they are no step engine's.
    """
    state = spec_of(inputs, names.STATE)
    if state is None or not isinstance(state.shape[0], int):
        listed = ", ".join(spec.name for spec in inputs)
        expected = f"{names.STATE} of a fixed first size among them"
        raise BundleError("step engine", "inputs", got=listed, expected=expected)
    return state.shape[0] - 1


def given_inputs(name: str, plan: Plan, conditioning: Conditioning, *, guided: bool) -> dict[str, Array]:
    """What no row of a plan changes among a step engine's inputs.

    Raises:
        ExecutionError: a guided row without an unconditional branch.
    """
    given: dict[str, Array] = dict(conditioning.conditional)
    if guided:
        other = conditioning.unconditional
        if other is None:
            raise ExecutionError(name, "a guided row without an unconditional branch")
        given = {one: np.concatenate([other[one], values]) for one, values in given.items()}
        given[names.GUIDANCE_SCALE] = np.array([plan.guidance_scale], np.float32)
    given.update(conditioning.whole)
    if conditioning.channels is not None:
        given[names.CHANNELS] = conditioning.channels
    return given


def input_shapes(
    name: str, inputs: Sequence[TensorSpec], given: Mapping[str, Array], shape: Shape, *, guided: bool
) -> dict[str, Shape]:
    """The shape of each of a step engine's inputs, for what it is given and latents of this shape.

    Raises:
        BundleError: one does not follow from the latent's.
    """
    noise = spec_of(inputs, names.NOISE)
    sizes = {} if noise is None else {str(stated): size for stated, size in zip(noise.shape, shape, strict=True)}
    shapes: dict[str, Shape] = {}
    for spec in inputs:
        stated = evaluated(spec.shape, sizes)
        if spec.name in given:
            stated = given[spec.name].shape
        elif spec.name == "timestep" and stated is None:
            stated = (shape[0] * (1 + guided),)
        if stated is None:
            raise BundleError(name, f"shape of {spec.name}", got=spec.shape, expected=f"formulas of {', '.join(sizes)}")
        shapes[spec.name] = stated
    return shapes


def _step_indices(plan: Plan, engines: Mapping[Key, StepEngine]) -> dict[int, int]:
    """For each row whose engine has time steps built in, which of them it is."""
    indices = {}
    for row, key in enumerate(zip(plan.denoisers, plan.guided, strict=True)):
        built_in = [float(one) for one in engines[key].variant.timesteps]
        timestep = float(plan.table.timesteps[row])
        if built_in and timestep not in built_in:
            raise PlanError(
                f"{key[0]}: row {row}",
                "a time step that the engine was not built for",
                got=timestep,
                expected=f"one of {', '.join(f'{one:g}' for one in built_in)}",
                remedy="Build the engine for this schedule, or without folded time steps.",
            )
        if built_in:
            indices[row] = built_in.index(timestep)
    return indices
