"""The hot loop on denoisers that leave their predictions where they run: an update engine makes each row of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from . import step_row as names
from .adaptive import AdaptiveGuidance
from .backends.base import Handed, Handing, Lying, Session, Shape
from .discrepancy import relative_mean
from .errors import ExecutionError
from .placement import Branches, Placed
from .plan import RowGuidance
from .rows import Rows
from .sampler import Advanced, SampledRow, denoised_estimate, require_finite, walked
from .state import State
from .step_inputs import history_of, input_shapes
from .step_sampler import StepVectors, sound
from .tensors import latent_names
from .trace import record, span
from .transfers import place, read

Float32 = npt.NDArray[np.float32]
# As `step_row.BRANCHES`: of rows with both branches, of rows with the conditional one, of no prediction.
_BOTH = np.array([[1, -1, 0], [0, 1, 0]], np.float32)
_ONE = np.array([[0, 0, 1], [1, 0, 0]], np.float32)
_NONE = np.array([[0, 0, 1], [0, 0, 0]], np.float32)


class UpdateSampler:
    """Carries a state through a plan as `Sampler` does, to the same numbers but for rounding; used by one thread.

    placed: predicts the rows for samples that lie where the denoisers run. engines: each denoiser's update engine.
    """

    def __init__(self, rows: Rows, placed: Placed, engines: Mapping[str, Session]) -> None:
        """No buffers are allocated yet.

        Raises:
            BundleError: one is no update engine.
            PlanError: the plan carries more history than an engine's state holds.
        """
        self._rows, self._plan, self._placed, self._engines = rows, rows.plan, placed, engines
        self._adaptive = None if rows.plan.adaptive is None else AdaptiveGuidance(rows.plan.adaptive)
        self._bound: dict[str, _Update] = {}
        self._carried: State | None = None
        self._coefficients = {
            name: names.coefficients(rows.plan.table, history_of(session.inputs)) for name, session in engines.items()
        }

    def run(self, state: State, until: int | None = None) -> Iterator[SampledRow]:
        """Advance `state` in place, row by row, to before row `until` (the end by default), with all bound beforehand.

        Raises:
            ExecutionError: a model cannot be bound or failed, or its prediction or the latent holds NaN or Inf; row and
                model are named.
        """
        plan, end = self._plan, self._plan.table.rows if until is None else until
        self._placed.bind(plan.calls(range(state.row, end)), state.shape)
        for name in dict.fromkeys(plan.denoisers[state.row : end]):
            self._bound[name] = self._bound.get(name) or self._bind(name, state.shape)
        try:
            yield from walked(state, end, lambda: self._advance(state))
        finally:
            self._placed.rest()

    def _advance(self, state: State) -> Advanced:
        """Run the state's row."""
        plan, row = self._plan, state.row
        name, update = plan.denoisers[row], self._bound[plan.denoisers[row]]
        binding = update.binding
        self._enter(state, update)
        adaptive = self._adaptive if plan.guided[row] else None
        guided = plan.guided[row] if adaptive is None else adaptive.wanted(name)
        made = self._placed.predict(row, Lying(binding, update.latent, state.shape), guided=guided)
        returned = time.perf_counter()
        self._take(state, binding, made.lying)
        self._give(row, made, adaptive, update)
        binding.run()
        if not sound(binding):
            state.stay(binding)
            require_finite(plan, row, "prediction", read(binding, names.PREDICTION), made.running)
            require_finite(plan, row, "latent", read(binding, names.NEXT_STATE, 0), made.running)
        guidance = self._guidance(row, made, adaptive, binding)
        state.become(binding)
        if self._rows.keep is not None:
            state.change(partial(self._rows.keep, row))
        record("update", row, returned)
        state.row += 1
        denoised = denoised_estimate(plan.table, row, StepVectors(binding, state.entries), state.shape)
        return made.model_ms, denoised, guidance

    def _enter(self, state: State, update: _Update) -> None:
        """Have the engine make the denoiser's input of a state that it did not make itself, or that changed since."""
        if self._carried is not state and self._carried is not None:
            self._carried.settle()
        self._carried = state
        if state.held is update.binding and state.scaled:
            return
        self._take(state, update.binding, ())
        inputs = update.binding.inputs
        inputs[names.MODEL_INPUT][...] = update.model_input[state.row]
        inputs[names.UPDATE].fill(0)
        np.fill_diagonal(inputs[names.UPDATE], 1)
        inputs[names.BRANCHES][...], inputs[names.GUIDANCE_SCALE][...] = _NONE, 0
        update.binding.run()
        state.become(update.binding)

    def _take(self, state: State, binding: Handing, predictions: Sequence[Lying]) -> None:
        """Have the engine's next run begin with the state, these predictions and, where it counts, the difference."""
        state.give(binding)
        places = zip((names.CONDITIONAL, names.UNCONDITIONAL), predictions, strict=False)
        handed = [one.handed(place) for place, one in places]
        if self._adaptive is not None:
            handed.append(Handed(names.DIFFERENCE, binding, names.NEXT_DIFFERENCE))
        binding.take(handed)

    def _give(self, row: int, made: Branches, adaptive: AdaptiveGuidance | None, update: _Update) -> None:
        """Write what is the row's own."""
        plan, table, inputs = self._plan, self._plan.table, update.binding.inputs
        inputs[names.UPDATE][...] = update.update[row]
        if row + 1 < table.rows:
            inputs[names.MODEL_INPUT][...] = update.model_input[row + 1]
        scale = plan.guidance_scale
        if made.unconditional is None:
            scale = 0.0 if adaptive is None else adaptive.weight(plan.guidance_scale)
        inputs[names.BRANCHES][...] = _ONE if made.unconditional is None else _BOTH
        inputs[names.GUIDANCE_SCALE][...] = scale
        if table.draws_noise[row]:
            self._rows.draw_noise(inputs[names.NOISE])
            update.binding.write(names.NOISE)

    def _guidance(self, row: int, made: Branches, adaptive: AdaptiveGuidance | None, binding: Handing) -> RowGuidance:
        """What became of guidance, told to those who go by it."""
        both = made.unconditional is not None
        why = made.why or (self._plan.why(row) if adaptive is None else adaptive.why)
        discrepancy: float | None = None
        if both:
            apart, size, former, along = map(float, binding.outputs[names.APART])
            discrepancy = relative_mean(apart, size)
            if made.seen is not None:
                made.seen(discrepancy)
            if adaptive is not None:
                adaptive.measured(discrepancy, former, along)
        growth = None if adaptive is None or not both else adaptive.growth
        return RowGuidance(both, made.placement, why, discrepancy, made.taus, growth)

    def _bind(self, name: str, shape: Shape) -> _Update:
        """An engine's buffers, with everything in place that no row changes."""
        session = self._engines[name]
        with span("bind", f"{name} update"):
            binding = self._rows.ran.lease.bind(session, input_shapes(name, session.inputs, {}, shape, guided=False))
        if not isinstance(binding, Handing):
            raise ExecutionError(name, "an update engine of a backend that hands nothing on")
        latent = next(one.name for one in session.outputs if one.name == latent_names([one]).sample)
        # Zeros, since memory may hold what is not finite.
        zeros = (names.STATE, names.NOISE, names.CONDITIONAL, names.UNCONDITIONAL, names.DIFFERENCE)
        given: dict[str, npt.ArrayLike] = {names.LATENT_SPACE: self._rows.latent_space, **dict.fromkeys(zeros, 0.0)}
        channels = self._rows.conditioning[name].channels
        if channels is not None:
            given[names.CHANNELS] = channels
        made = [names.NEXT_STATE, names.PREDICTION, names.LATENT_SAMPLE, names.NEXT_DIFFERENCE, latent]
        place(binding, given, made)
        binding.write(names.NEXT_DIFFERENCE)
        return _Update(binding, latent, *self._coefficients[name])


@dataclass(frozen=True, slots=True)
class _Update:
    """An update engine's buffers, and what it calls its denoiser's input.

    model_input, update: of all rows; see `coefficients`.
    """

    binding: Handing
    latent: str
    model_input: Float32
    update: Float32
