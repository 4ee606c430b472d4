"""The hot loop on step engines: walk a plan's rows, one call each, or all of them as one where the backend can."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
from .sampler import Advanced, SampledRow, denoised_estimate, finite, model_input, require_finite, walked
from .state import State
from .step_inputs import given_inputs, history_of, input_shapes
from .tensors import TAKEN
from .trace import record, span
from .transfers import place, read, write
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
        self._latent_space = rows.latent_space
        self._carried: State | None = None
        self._bound: dict[Key, _BoundEngine] = {}
        self._coefficients = {
            key: names.coefficients(plan.table, history_of(engine.session.inputs)) for key, engine in engines.items()
        }

    def run(self, state: State, until: int | None = None) -> Iterator[SampledRow]:
        """Advance `state` in place, row by row, to before row `until` (the end by default), with all bound beforehand.

        Raises:
            ExecutionError: an engine cannot be bound or failed, or its prediction or the latent holds NaN or Inf; row
                and model are named.
        """
        end = self._plan.table.rows if until is None else until
        if self._at_once and end - state.row > 1:
            yield from self._run_as_one(state, end)
        for row in range(state.row, end):
            denoiser = self._engine(row, state.shape).denoiser
            if self._steering is not None:
                self._steering.running(denoiser, row, guided=self._plan.guided[row])
        yield from walked(state, end, lambda: self._advance(state))

    def _advance(self, state: State) -> Advanced:
        """Run the state's row; the ControlNets are counted with its model."""
        row, bound = state.row, self._engine(state.row, state.shape)
        self._enter(state).give(bound.binding)
        self._give(row, bound.binding.inputs)
        if self._plan.table.draws_noise[row]:
            write(bound.binding, names.NOISE)
        called = time.perf_counter()
        running = self._steer(bound, row, state.entries)
        with span("model", bound.denoiser.label):
            bound.binding.run()
        returned = time.perf_counter()
        if not sound(bound.binding):
            state.stay(bound.binding)
            require_finite(self._plan, row, "prediction", read(bound.binding, names.PREDICTION), running)
            require_finite(self._plan, row, "latent", read(bound.binding, names.NEXT_STATE, 0), running)
        state.become(bound.binding)
        if self._keep is not None:
            state.change(partial(self._keep, row))
        record("update", row, returned)
        state.row += 1
        denoised = denoised_estimate(self._plan.table, row, StepVectors(bound.binding, state.entries), state.shape)
        return (returned - called) * 1e3, denoised, self._guidance(row)

    def _enter(self, state: State) -> State:
        """The state, when another that lies in the bindings is taken out of them."""
        if self._carried is not state:
            if self._carried is not None:
                self._carried.settle()
            self._carried = state
        return state

    def _run_as_one(self, state: State, end: int) -> Iterator[SampledRow]:
        """Run all rows before `end` as one; none where the backend cannot, or where what comes of it is not finite."""
        began, rows = time.perf_counter(), range(state.row, end)
        bound = [self._engine(row, state.shape) for row in rows]
        first, last = bound[0].binding, bound[-1].binding
        if not isinstance(first, Chaining) or len({one.history for one in bound}) > 1:
            return
        runs = [(one.binding, self._given_anew(row, one.binding)) for row, one in zip(rows, bound, strict=True)]
        carried = {names.STATE: names.NEXT_STATE}
        # A chain holds its bindings, so that what is kept under their identities is of no others.
        key = "chain", tuple((id(binding), given) for binding, given in runs)
        chain = self._lease.take(key, lambda: first.chain(runs, carried))
        if any(state.held is one.binding for one in bound):
            state.settle()  # which the chain writes over, and one after another begins from
        self._enter(state).give(first)
        for row, inputs in zip(rows, chain.rows, strict=True):
            self._give(row, inputs)
        called = time.perf_counter()
        with span("model", f"rows {rows[0]} to {rows[-1]}"):
            chain.run()
        model_ms = _since(called) / len(rows)
        if not sound(last):
            # One after another tells the row; from the same noise.
            drawn = iter([inputs[names.NOISE].copy() for inputs in chain.rows if names.NOISE in inputs])
            self._draw_noise = lambda noise: np.copyto(noise, next(drawn))
            return
        state.become(last)
        state.row = end
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

    def _give(self, row: int, inputs: Mapping[str, Array]) -> None:
        """Write those inputs."""
        model_input, update = self._coefficients[self._plan.denoisers[row], self._plan.guided[row]]
        inputs[names.MODEL_INPUT][...], inputs[names.UPDATE][...] = model_input[row], update[row]
        if "timestep" in inputs:
            inputs["timestep"].fill(self._plan.table.timesteps[row])
        if names.STEP_INDEX in inputs:
            inputs[names.STEP_INDEX].fill(self._step_indices[row])
        if self._plan.table.draws_noise[row]:
            self._draw_noise(inputs[names.NOISE])

    def _guidance(self, row: int) -> RowGuidance:
        return RowGuidance(self._plan.guided[row], "batched", self._plan.why(row))

    def _steer(self, bound: _BoundEngine, row: int, entries: int) -> Sequence[Running]:
        """Run the row's ControlNets on what the engine makes within itself: m · S, for one or both branches."""
        denoiser = bound.denoiser
        if self._steering is None:
            return ()
        guided = self._plan.guided[row]
        running = self._steering.running(denoiser, row, guided=guided)
        if running:
            sample, *again = np.split(denoiser.sample, 1 + guided)
            vectors = StepVectors(bound.binding, entries)
            model_input(self._plan.table, row, vectors, sample, bound.scratch)
            for one in again:
                one[...] = sample
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
        residuals = TAKEN.names(binding.inputs) if TAKEN.mid in binding.inputs else ()
        # Where the plan has less history than the engine, or draws no noise, the zeros stay.
        zeros = dict.fromkeys((names.STATE, names.NOISE, *residuals), 0.0)
        space = {names.LATENT_SPACE: self._latent_space} if names.LATENT_SPACE in binding.inputs else {}
        place(binding, {**given, **zeros, **space}, [names.NEXT_STATE, names.PREDICTION, names.LATENT_SAMPLE])
        denoiser = Bound(
            conditioning.label(name, guided=guided),
            binding,
            np.zeros((shape[0] * (1 + guided), *shape[1:]), np.float32),
            binding.inputs.get("timestep", np.zeros(0, np.float32)),
            {residual: binding.inputs[residual] for residual in residuals},
        )
        self._bound[key] = _BoundEngine(binding, history_of(session.inputs), denoiser, np.empty(shape, np.float32))
        return self._bound[key]


@dataclass(frozen=True, slots=True)
class _BoundEngine:
    """An engine's buffers; `denoiser` are those within it that ControlNets know, its sample apart from the engine.

    scratch: room for a latent, (B, C, h, w) float32.
    """

    binding: Binding
    history: int
    denoiser: Bound
    scratch: Float32


@dataclass(frozen=True, slots=True)
class StepVectors:
    """What a row of an engine reads by its number, (x, h1 … hH, ε), until the next row runs."""

    binding: Binding
    entries: int

    def __getitem__(self, index: int, /) -> Float32:
        return read(self.binding, names.STATE, index) if index < self.entries else read(self.binding, names.PREDICTION)


def sound(binding: Binding) -> bool:
    """Whether a prediction and the next latent are finite; their sums tell where the engine makes them and they are."""
    if names.SUMS in binding.outputs and np.isfinite(binding.outputs[names.SUMS]).all():
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return finite(read(binding, names.PREDICTION)) and finite(read(binding, names.NEXT_STATE, 0))


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
