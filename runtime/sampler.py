"""The hot loop: walk a plan's rows, one model call and one linear update each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .backends.base import Array, Session
from .binding import Bound, Conditioning, bind
from .control import Running, Steering, steer
from .errors import ExecutionError
from .plan import Plan
from .table import Table
from .tensors import latent_names
from .trace import record, span

Float32 = npt.NDArray[np.float32]
Terms = tuple[tuple[int, float], ...]


@dataclass(slots=True)
class State:
    """Where a generation stands: before row `row`, with `arrays` (1+H, B, C, h, w) float32 holding (x, h1 … hH).

    Holding the history, a state can be carried on by another model, or elsewhere, to the same numbers.
    """

    arrays: Float32
    row: int = 0

    @property
    def latents(self) -> Float32:
        """The latent x: (B, C, h, w) float32."""
        latents: Float32 = self.arrays[0]
        return latents


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A finished row of the plan: which one, and how long the model (with its ControlNets) and all of it took.

    `denoised()` is the estimate of the clean latent at this row, (B, C, h, w) float32; ask before the next row runs.
    """

    row: int
    model_ms: float
    total_ms: float
    denoised: Callable[[], Float32]


class Sampler:
    """Carries a state through a plan; used by one thread at a time.

    sessions, conditioning: those of the denoisers the plan names.
    draw_noise: returns fresh standard normal noise (B, C, h, w) float32; called only for rows that need it.
    keep: called after every row with its index and the latents it left, which it may change.
    steering: the ControlNets.
    """

    def __init__(
        self,
        plan: Plan,
        sessions: Mapping[str, Session],
        conditioning: Mapping[str, Conditioning],
        draw_noise: Callable[[], Float32],
        *,
        keep: Callable[[int, Float32], None] | None = None,
        steering: Steering | None = None,
    ) -> None:
        self._plan, self._sessions, self._conditioning = plan, sessions, conditioning
        self._draw_noise, self._keep, self._steering = draw_noise, keep, steering
        self._rows = _compiled_rows(plan)
        self._bound: dict[tuple[str, bool], tuple[Bound, Array]] = {}

    def begin(self, latents: Float32) -> State:
        """The state before the first row, from the latents x there, (B, C, h, w) float32."""
        arrays = np.zeros((1 + self._plan.table.history, *latents.shape), np.float32)
        arrays[0] = latents
        return State(arrays)

    def run(self, state: State, until: int | None = None) -> Iterator[SampledRow]:
        """Advance `state` in place, row by row, to before row `until` (the end by default).

        Raises:
            ExecutionError: a model failed, or its prediction or the latent holds NaN or Inf; row and model are named.
        """
        end = len(self._rows) if until is None else until
        # What a row reads: x, h1 … hH, the guided prediction ε, fresh noise z. It writes into the state's arrays.
        vectors = np.zeros((len(state.arrays) + 2, *state.latents.shape), np.float32)
        scratch = np.empty(state.latents.shape, np.float32)
        while state.row < end:
            began = time.perf_counter()
            # What overflows is raised as an error that names the row, without numpy's warning before it.
            with span("row", state.row), np.errstate(over="ignore", invalid="ignore"):
                model_ms = self._advance(state, vectors, scratch)
            total_ms = (time.perf_counter() - began) * 1e3
            yield SampledRow(state.row - 1, model_ms, total_ms, _Denoised(self._rows[state.row - 1].denoised, vectors))

    def _advance(self, state: State, vectors: Float32, scratch: Float32) -> float:
        """Run the state's row; returns the milliseconds its model took."""
        row, batch = self._rows[state.row], len(scratch)
        prediction, noise = vectors[-2], vectors[-1]
        vectors[:-2] = state.arrays
        bound, output = self._bound.get((row.denoiser, row.guided)) or self._bind(row, scratch.shape)
        sample = bound.sample
        _combine(row.model_input, vectors, sample[:batch], scratch)
        if row.guided:
            sample[batch:] = sample[:batch]
        bound.timestep.fill(row.timestep)
        running = self._running(bound, state.row)
        called = time.perf_counter()
        steer(running, bound, row.timestep)
        with span("model", row.denoiser):
            bound.binding.run()
        returned = time.perf_counter()
        if row.guided:
            np.subtract(output[batch:], output[:batch], out=prediction)
            np.multiply(prediction, self._plan.guidance_scale, out=prediction)
            np.add(prediction, output[:batch], out=prediction)
        else:
            prediction[...] = output
        require_finite(self._plan, state.row, "prediction", prediction, running)
        if row.draws_noise:
            noise[...] = self._draw_noise()
        for target, terms in zip(state.arrays, row.update, strict=True):
            _combine(terms, vectors, target, scratch)
        require_finite(self._plan, state.row, "latent", state.latents, running)
        if self._keep is not None:
            self._keep(state.row, state.latents)
        record("update", state.row, returned)
        state.row += 1
        return (returned - called) * 1e3

    def _bind(self, row: _Row, shape: tuple[int, ...]) -> tuple[Bound, Array]:
        """The denoiser's buffers for one or both guidance branches, and its prediction."""
        session = self._sessions[row.denoiser]
        bound = bind(row.denoiser, session, self._conditioning[row.denoiser], shape, guided=row.guided)
        prediction = bound.binding.outputs[latent_names(session.inputs).prediction]
        self._bound[row.denoiser, row.guided] = bound, prediction
        return bound, prediction

    def _running(self, bound: Bound, row: int) -> Sequence[Running]:
        return () if self._steering is None else self._steering.running(bound, row, guided=self._rows[row].guided)


def require_finite(plan: Plan, row: int, what: str, values: Float32, running: Sequence[Running]) -> None:
    """Raise ExecutionError, which names the row and its denoiser or ControlNet, when `values` hold NaN or Inf.

    running: the row's ControlNets.
    """
    if _finite(values):
        return
    for one in running:
        if not one.finite:
            name = one.control.component
            remedy = f"Lower its controlnet_conditioning_scale; if '{name}' is fp16, export it as fp32."
            what = f"NaN or Inf in what the ControlNet makes, scaled by {one.control.scale:g}"
            raise ExecutionError(_where(plan, row, name), what, remedy=remedy)
    name = plan.denoisers[row]
    raise ExecutionError(
        _where(plan, row, name),
        f"NaN or Inf in the {what}",
        got=f"{int(np.count_nonzero(~np.isfinite(values)))} of {values.size} values",
        expected="finite values",
        remedy=f"Try another solver or guidance scale; if '{name}' is fp16, export it as fp32.",
    )


def model_input(table: Table, row: int, vectors: Float32, out: Float32) -> None:
    """Write what a row's denoiser is given, m · S, to `out`, from (x, h1 … hH) and whatever follows them."""
    _combine(_terms(table.model_input[row].tolist()), vectors, out, np.empty(vectors.shape[1:], np.float32))


def denoised_estimate(table: Table, row: int, vectors: Float32) -> Callable[[], Float32]:
    """The clean latent a row implies, computed when asked, from (x, h1 … hH, ε) before its update."""
    return _Denoised(_denoised_terms(table, row), vectors)


def _finite(values: Float32) -> bool:
    # A finite sum proves all values finite at a fraction of the cost of looking at each.
    return math.isfinite(float(values.sum())) or bool(np.isfinite(values).all())


def _where(plan: Plan, row: int, name: str) -> str:
    return f"step {plan.table.steps[row]} (timestep {plan.table.timesteps[row]:g}, {name})"


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the plan with its zero coefficients dropped; indices point into (x, h1 … hH, ε, z)."""

    denoiser: str
    guided: bool
    timestep: float
    draws_noise: bool
    model_input: Terms
    update: tuple[Terms, ...]
    denoised: Terms


@dataclass(frozen=True, slots=True)
class _Denoised:
    """The clean latent a row implies, computed when asked."""

    terms: Terms
    vectors: Float32

    def __call__(self) -> Float32:
        result: Float32 = np.empty_like(self.vectors[0])
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
                denoiser=plan.denoisers[n],
                guided=plan.guided[n],
                timestep=float(table.timesteps[n]),
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


def _combine(terms: Terms, vectors: Float32, out: Float32, scratch: Float32) -> None:
    """out = Σ coefficient · vectors[index], without allocating; `out` is none of the vectors."""
    if not terms:
        out.fill(0)
        return
    index, coefficient = terms[0]
    np.multiply(vectors[index], coefficient, out=out)
    for index, coefficient in terms[1:]:
        np.multiply(vectors[index], coefficient, out=scratch)
        np.add(out, scratch, out=out)
