"""The hot loop on step engines: walk a plan's rows, one call each, or all of them as one where the backend can."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import step_row as names
from .backends.base import Array, Binding, Chaining, Session, Shape
from .binding import Bound
from .control import Running, Steering, steer
from .errors import PlanError
from .lora_slots import slot_inputs
from .plan import Plan, RowGuidance
from .rows import Rows
from .sampler import SampledRow, State, denoised_estimate, finite, model_input, require_finite
from .step_inputs import given_inputs, history_of, input_shapes
from .tensors import TAKEN
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

    rows: where nobody looks between them they run as one, if the backend launches many runs as one and nothing is to be
        done between them; they compute the same numbers.
    engines: by denoiser and whether both branches run, those the plan's rows want.
    steering: runs the ControlNets.
    """

    def __init__(self, rows: Rows, engines: Mapping[Key, StepEngine], steering: Steering | None = None) -> None:
        """Nothing is allocated yet.

        Raises:
            BundleError: one is no step engine.
            PlanError: the plan carries more history than an engine's state holds, or has a time step that is not among
                those built into an engine.
        """
        plan = rows.plan
        self._plan, self._engines, self._conditioning = plan, engines, rows.conditioning
        self._draw_noise, self._keep, self._steering = rows.draw_noise, rows.keep, steering
        self._lease, self._at_once = rows.ran.lease, rows.at_once and rows.keep is None and steering is None
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
        """Advance `state` in place, row by row, to before row `until` (the end by default), with all bound beforehand.

        Raises:
            ExecutionError: an engine cannot be bound or failed, or its prediction or the latent holds NaN or Inf; row
                and model are named.
        """
        end = self._plan.table.rows if until is None else until
        vectors = np.zeros((len(state.arrays) + 1, *state.latents.shape), np.float32)
        if self._at_once and end - state.row > 1:
            yield from self._run_as_one(state, end)
        for row in range(state.row, end):
            denoiser = self._engine(row, state.latents.shape).denoiser
            if self._steering is not None:
                self._steering.running(denoiser, row, guided=self._plan.guided[row])
        while state.row < end:
            row, began = state.row, time.perf_counter()
            # What overflows is raised as an error that names the row, without numpy's warning before it.
            with span("row", row), np.errstate(over="ignore", invalid="ignore"):
                model_ms = self._advance(state, vectors)
            denoised = denoised_estimate(self._plan.table, row, vectors)
            yield SampledRow(row, model_ms, _since(began), denoised, self._guidance(row))

    def _advance(self, state: State, vectors: Float32) -> float:
        """Run the state's row; returns the milliseconds its engine took, with its ControlNets."""
        row, plan, entries = state.row, self._plan, len(state.arrays)
        bound = self._engine(row, state.latents.shape)
        inputs, outputs = bound.binding.inputs, bound.binding.outputs
        inputs[names.STATE][:entries] = vectors[:-1] = state.arrays
        self._give(row, bound.history, inputs)
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

    def _run_as_one(self, state: State, end: int) -> Iterator[SampledRow]:
        """Run all rows before `end` as one; none where the backend cannot, or where what comes of it is not finite."""
        began, rows, entries = time.perf_counter(), range(state.row, end), len(state.arrays)
        bound = [self._engine(row, state.latents.shape) for row in rows]
        first, last = bound[0].binding, bound[-1].binding
        if not isinstance(first, Chaining) or len({one.history for one in bound}) > 1:
            return
        runs = [(one.binding, self._given_anew(row, one.binding)) for row, one in zip(rows, bound, strict=True)]
        carried = {names.STATE: names.NEXT_STATE}
        # A chain holds its bindings, so that what is kept under their identities is of no others.
        key = "chain", tuple((id(binding), given) for binding, given in runs)
        chain = self._lease.take(key, lambda: first.chain(runs, carried))
        first.inputs[names.STATE][:entries] = state.arrays
        for row, one, inputs in zip(rows, bound, chain.rows, strict=True):
            self._give(row, one.history, inputs)
        called = time.perf_counter()
        with span("model", f"rows {rows[0]} to {rows[-1]}"):
            chain.run()
        model_ms, arrays = _since(called) / len(rows), last.outputs[names.NEXT_STATE][:entries]
        with np.errstate(over="ignore", invalid="ignore"):
            sound = finite(arrays)
        if not sound:
            # One after another tells the row; from the same noise.
            drawn = iter([inputs[names.NOISE].copy() for inputs in chain.rows if names.NOISE in inputs])
            self._draw_noise = lambda noise: np.copyto(noise, next(drawn))
            return
        state.arrays[...], state.row = arrays, end
        total_ms = _since(began) / len(rows)
        for row in rows:
            yield SampledRow(row, model_ms, total_ms, None, self._guidance(row), len(rows))

    def _engine(self, row: int, shape: Shape) -> _BoundEngine:
        """The engine of a row, bound for latents of this shape."""
        key = self._plan.denoisers[row], self._plan.guided[row]
        return self._bound.get(key) or self._bind(key, shape)

    def _given_anew(self, row: int, binding: Binding) -> frozenset[str]:
        """The inputs of a row that differ from other rows', its state apart."""
        given = {names.MODEL_INPUT, names.UPDATE, *({"timestep", names.STEP_INDEX} & binding.inputs.keys())}
        return frozenset({*given, names.NOISE} if self._plan.table.draws_noise[row] else given)

    def _give(self, row: int, history: int, inputs: Mapping[str, Array]) -> None:
        """Write those inputs."""
        inputs[names.MODEL_INPUT][...], inputs[names.UPDATE][...] = self._coefficients[history][row]
        if "timestep" in inputs:
            inputs["timestep"].fill(self._plan.table.timesteps[row])
        if names.STEP_INDEX in inputs:
            inputs[names.STEP_INDEX].fill(self._step_indices[row])
        if self._plan.table.draws_noise[row]:
            self._draw_noise(inputs[names.NOISE])

    def _guidance(self, row: int) -> RowGuidance:
        return RowGuidance(self._plan.guided[row], "batched", self._plan.why(row))

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
            binding = self._lease.bind(session, input_shapes(name, session.inputs, given, shape, guided=guided))
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


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
