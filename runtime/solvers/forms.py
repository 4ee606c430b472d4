"""Linear forms: how a solver writes down a row of its table.

A form is a vector of coefficients over (x, h1 … hH, ε, z): the latent, the history, the model's output and fresh noise.
Forms add and scale like the tensors they stand for, so a solver reads like its paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..errors import PlanError
from ..table import Float64, Table

Form = Float64


class Row(NamedTuple):
    """One model call. `state` is (x, h1 … hk) afterwards; what it leaves out of the history becomes zero.

    noised: what a clean latent and standard normal noise are multiplied by to stand where x stands before the row.
    """

    timestep: float
    step: int
    model_input: Form
    state: tuple[Form, ...]
    denoised: Form
    noised: tuple[float, float]


def basis(history: int) -> tuple[Form, tuple[Form, ...], Form, Form]:
    """The forms x, (h1 … hH), ε and z, each (H+3,) float64."""
    unit = np.eye(history + 3)
    return unit[0], tuple(unit[1:-2]), unit[-2], unit[-1]


def denoised_and_noise(
    prediction_type: str, alpha: float, sigma: float, model_input: Form, output: Form
) -> tuple[Form, Form]:
    """The clean latent x̂0 and the noise that a model's output stands for.

    model_input is α x0 + σ noise with α² + σ² = 1: the variance-preserving form, whatever scale the solver keeps x in.
    prediction_type: `epsilon`, `v_prediction` (α noise − σ x0; Salimans & Ho 2022, 2202.00512) or `sample`.
    """
    if prediction_type == "epsilon":
        return (model_input - sigma * output) / alpha, output
    if prediction_type == "v_prediction":
        return alpha * model_input - sigma * output, alpha * output + sigma * model_input
    return output, (model_input - alpha * output) / sigma


def table_from_rows(solver: str, rows: Iterable[Row], init_noise_sigma: float) -> Table:
    """Collect rows into a table whose state holds no history that is never read, and whose steps rise from 0.

    Raises:
        PlanError: a coefficient is infinite or NaN; the time step is named.
    """
    rows = tuple(rows)
    width = len(rows[0].model_input)
    model_input = np.stack([row.model_input for row in rows])
    denoised = np.stack([row.denoised for row in rows])
    timesteps = np.array([row.timestep for row in rows], np.float64)
    noised = np.array([row.noised for row in rows], np.float64)
    state = np.zeros((len(rows), width - 2, width))
    for n, row in enumerate(rows):
        state[n, : len(row.state)] = row.state
    coefficients = [timesteps[:, None], model_input, denoised, noised, state.reshape(len(rows), -1)]
    finite = np.isfinite(np.concatenate(coefficients, axis=1)).all(axis=1)
    if not finite.all():
        bad = rows[int(np.argmin(finite))]
        raise PlanError(
            f"{solver}: timestep {bad.timestep:g}",
            "the solver's coefficients are not finite",
            expected="a schedule whose noise levels differ from step to step and allow this prediction type",
            remedy="Use other step counts, spacing, prediction_type or final_sigmas_type.",
        )
    kept = _slots_read(state[:, :, :-2], model_input[:, :-2], denoised[:, :-2])
    return Table(
        solver=solver,
        timesteps=timesteps,
        steps=np.array([row.step - rows[0].step for row in rows], np.int64),
        model_input=model_input[:, kept],
        transition=state[:, kept][:, :, kept],
        prediction=state[:, kept, -2],
        noise=state[:, kept, -1],
        denoised_state=denoised[:, kept],
        denoised_prediction=denoised[:, -2],
        noised=np.append(noised, [[1.0, 0.0]], axis=0),
        init_noise_sigma=float(init_noise_sigma),
    )


def _slots_read(transition: Float64, model_input: Float64, denoised: Float64) -> list[int]:
    """The places of the state that reach x, a model input or a denoised estimate."""
    into = (transition != 0).any(axis=0)
    live = (model_input != 0).any(axis=0) | (denoised != 0).any(axis=0)
    live[0] = True
    for _ in range(len(live)):
        live = live | into[live].any(axis=0)
    return [int(slot) for slot in np.flatnonzero(live)]
