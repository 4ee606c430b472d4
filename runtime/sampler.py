"""The hot loop: walk a plan's rows, one model call and one linear update each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .adaptive import AdaptiveGuidance
from .control import Running
from .discrepancy import relative_mae
from .errors import NonFiniteError
from .placement import Branches, Placed
from .plan import Plan, RowGuidance
from .state import State
from .table import Table
from .trace import record, span

Float32 = npt.NDArray[np.float32]
Terms = tuple[tuple[int, float], ...]
# Of a row that has run: how long its model took in milliseconds, and `denoised` and `guidance` of `SampledRow`.
Advanced = tuple[float, Callable[[], Float32], RowGuidance]


class Vectors(Protocol):
    """Latents by their numbers, all of one shape (B, C, h, w) float32."""

    def __getitem__(self, index: int, /) -> Float32: ...


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A finished row of the plan: which one, and how long the model (with its ControlNets) and all of it took.

    `denoised()` is the estimate of the clean latent at this row, (B, C, h, w) float32; ask before the next row runs.
    guidance: what became of it. together: how many rows ran as one, of which it is one: they share their time equally,
        and `denoised` is None where that is more than one.
    """

    row: int
    model_ms: float
    total_ms: float
    denoised: Callable[[], Float32] | None
    guidance: RowGuidance
    together: int = 1


class Sampler:
    """Carries a state through a plan; used by one thread at a time.

    placed: predicts its rows.
    draw_noise: writes fresh standard normal noise to (B, C, h, w) float32; called only for rows that need it.
    keep: called after every row with its index and the latents it left, which it may change.
    """

    def __init__(
        self,
        plan: Plan,
        placed: Placed,
        draw_noise: Callable[[Float32], object],
        *,
        keep: Callable[[int, Float32], None] | None = None,
    ) -> None:
        self._plan, self._placed = plan, placed
        self._draw_noise, self._keep = draw_noise, keep
        self._rows = _compiled_rows(plan)
        self._adaptive = None if plan.adaptive is None else AdaptiveGuidance(plan.adaptive)

    def run(self, state: State, until: int | None = None) -> Iterator[SampledRow]:
        """Advance `state` in place, row by row, to before row `until` (the end by default), with all bound beforehand.

        Raises:
            ExecutionError: a model cannot be bound or failed, or its prediction or the latent holds NaN or Inf; row and
                model are named.
        """
        end = len(self._rows) if until is None else until
        # What a row reads: x, h1 … hH, the guided prediction ε, fresh noise z. It writes into the state's arrays.
        vectors = np.zeros((state.entries + 2, *state.shape), np.float32)
        sample, scratch = np.empty((2, *state.shape), np.float32)
        self._placed.bind(self._plan.calls(range(state.row, end)), state.shape)
        try:
            yield from walked(state, end, lambda: self._advance(state, vectors, sample, scratch))
        finally:
            self._placed.rest()

    def _advance(self, state: State, vectors: Float32, sample: Float32, scratch: Float32) -> Advanced:
        """Run the state's row."""
        row = self._rows[state.row]
        prediction, noise = vectors[-2], vectors[-1]
        vectors[:-2] = state.arrays
        _combine(row.model_input, vectors, sample, scratch)
        adaptive = self._adaptive if self._plan.guided[state.row] else None
        guided = self._plan.guided[state.row] if adaptive is None else adaptive.wanted(self._plan.denoisers[state.row])
        made = self._placed.predict(state.row, sample, guided=guided)
        returned = time.perf_counter()
        guidance = self._guided(state.row, made, adaptive, prediction, scratch)
        require_finite(self._plan, state.row, "prediction", prediction, made.running)
        if row.draws_noise:
            self._draw_noise(noise)
        for target, terms in zip(state.arrays, row.update, strict=True):
            _combine(terms, vectors, target, scratch)
        require_finite(self._plan, state.row, "latent", state.latents, made.running)
        if self._keep is not None:
            self._keep(state.row, state.latents)
        record("update", state.row, returned)
        state.row += 1
        return made.model_ms, _Denoised(row.denoised, vectors, state.shape), guidance

    def _guided(
        self, row: int, made: Branches, adaptive: AdaptiveGuidance | None, prediction: Float32, scratch: Float32
    ) -> RowGuidance:
        """Write the guided prediction that a row's branches make; returns what became of guidance.

        adaptive: decides whether the row runs both branches; None where the plan does.
        """
        plan, conditional, unconditional = self._plan, made.conditional, made.unconditional
        why = made.why or (plan.why(row) if adaptive is None else adaptive.why)
        discrepancy: float | None = None
        if unconditional is None:
            prediction[...] = conditional
            if adaptive is not None:
                adaptive.guide(prediction, plan.guidance_scale, scratch)
        else:
            discrepancy = relative_mae(conditional, unconditional, scratch)
            if made.seen is not None:
                made.seen(discrepancy)
            np.subtract(conditional, unconditional, out=prediction)
            np.multiply(prediction, plan.guidance_scale, out=prediction)
            np.add(prediction, unconditional, out=prediction)
            if adaptive is not None:
                adaptive.saw(conditional, unconditional, discrepancy)
        growth = None if adaptive is None or unconditional is None else adaptive.growth
        return RowGuidance(unconditional is not None, made.placement, why, discrepancy, made.taus, growth)


def walked(state: State, end: int, advance: Callable[[], Advanced]) -> Iterator[SampledRow]:
    """The rows of a state to before row `end`, each run and timed when it is asked for; `advance` runs the state's."""
    while state.row < end:
        row, began = state.row, time.perf_counter()
        # What overflows is raised as an error that names the row, without numpy's warning before it.
        with span("row", row), np.errstate(over="ignore", invalid="ignore"):
            model_ms, denoised, guidance = advance()
        yield SampledRow(row, model_ms, (time.perf_counter() - began) * 1e3, denoised, guidance)


def require_finite(plan: Plan, row: int, what: str, values: Float32, running: Sequence[Running]) -> None:
    """Raise NonFiniteError, which names the row and its denoiser or ControlNet, when `values` hold NaN or Inf.

    running: the row's ControlNets.
    """
    if finite(values):
        return
    for one in running:
        if not one.finite:
            name = one.control.component
            remedy = f"Lower its controlnet_conditioning_scale; if '{name}' is fp16, export it as fp32."
            what = f"NaN or Inf in what the ControlNet makes, scaled by {one.control.scale:g}"
            raise NonFiniteError(_where(plan, row, name), what, remedy=remedy)
    name = plan.denoisers[row]
    raise NonFiniteError(
        _where(plan, row, name),
        f"NaN or Inf in the {what}",
        got=f"{int(np.count_nonzero(~np.isfinite(values)))} of {values.size} values",
        expected="finite values",
        remedy=f"Try another solver or guidance scale; if '{name}' is fp16, export it as fp32.",
    )


def model_input(table: Table, row: int, vectors: Vectors, out: Float32, scratch: Float32) -> None:
    """Write what a row's denoiser is given, m · S, to `out`, from (x, h1 … hH)."""
    _combine(_terms(table.model_input[row].tolist()), vectors, out, scratch)


def denoised_estimate(table: Table, row: int, vectors: Vectors, shape: tuple[int, ...]) -> Callable[[], Float32]:
    """The clean latent a row implies, of this shape, computed when asked, from (x, h1 … hH, ε) before its update."""
    return _Denoised(_denoised_terms(table, row), vectors, shape)


def finite(values: Float32) -> bool:
    """Whether all values are."""
    # A finite sum proves all values finite at a fraction of the cost of looking at each.
    return math.isfinite(float(values.sum())) or bool(np.isfinite(values).all())


def _where(plan: Plan, row: int, name: str) -> str:
    return f"step {plan.table.steps[row]} (timestep {plan.table.timesteps[row]:g}, {name})"


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the plan with its zero coefficients dropped; indices point into (x, h1 … hH, ε, z)."""

    draws_noise: bool
    model_input: Terms
    update: tuple[Terms, ...]
    denoised: Terms


@dataclass(frozen=True, slots=True)
class _Denoised:
    """The clean latent a row implies, computed when asked."""

    terms: Terms
    vectors: Vectors
    shape: tuple[int, ...]

    def __call__(self) -> Float32:
        result: Float32 = np.empty(self.shape, np.float32)
        _combine(self.terms, self.vectors, result, np.empty_like(result))
        return result


def _compiled_rows(plan: Plan) -> tuple[_Row, ...]:
    table = plan.table
    draws_noise = table.draws_noise
    rows = []
    for n in range(table.rows):
        update = (
            [*transition, prediction, noise]
            for transition, prediction, noise in zip(
                table.transition[n].tolist(), table.prediction[n].tolist(), table.noise[n].tolist(), strict=True
            )
        )
        rows.append(
            _Row(
                draws_noise=bool(draws_noise[n]),
                model_input=_terms(table.model_input[n].tolist()),
                update=tuple(_terms(coefficients) for coefficients in update),
                denoised=_denoised_terms(table, n),
            )
        )
    return tuple(rows)


def _denoised_terms(table: Table, row: int) -> Terms:
    return _terms([*table.denoised_state[row].tolist(), float(table.denoised_prediction[row])])


def _terms(coefficients: list[float]) -> Terms:
    return tuple((index, value) for index, value in enumerate(coefficients) if value != 0.0)


def _combine(terms: Terms, vectors: Vectors, out: Float32, scratch: Float32) -> None:
    """out = Σ coefficient · vectors[index], without allocating; `out` is none of the vectors."""
    if not terms:
        out.fill(0)
        return
    index, coefficient = terms[0]
    np.multiply(vectors[index], coefficient, out=out)
    for index, coefficient in terms[1:]:
        np.multiply(vectors[index], coefficient, out=scratch)
        np.add(out, scratch, out=out)
