"""What a step engine takes and makes: the tensors of one call, and a plan's row as it is given one.

A step engine is a denoiser's graph with batch duplication, guidance and the linear update of `Table` around it; one
call is one row. Its tensors, all float32, beside the denoiser's own other than the latent:

state: (1+H, B, C, h, w), (x, h1 … hH); `next_state` is what the row makes of it.
model_input: (1+H,), the coefficients of what the denoiser is given.
update: (1+H, 3+H), the coefficients of (x, h1 … hH, ε, z) in each entry of the next state.
noise: (B, C, h, w), z; any finite values where the row draws none.
guidance_scale: (1,), of an engine that runs both branches. The denoiser's own inputs then have 2B rows, those of the
    unconditional branch first.
channels: (B, …, h, w), what follows the latent in a denoiser that reads more channels than it predicts.
prediction: (B, C, h, w), ε, the guided model output.

On a backend that leaves the state where it runs, also:

latent_space: (2,), the scaling factor and the shift of what a decoder is given.
latent_sample: (B, C, h, w), that of the next x: x / scaling factor + shift.
sums: (2,), of all of ε and of the next x, which are finite where these are, unless the values are that large.

An update engine is all of that without the denoiser, for one that runs by itself and leaves its predictions there. It
takes and makes the above but the conditioning, `model_input` being the next row's, and

conditional, unconditional: (B, C, h, w), what the denoiser predicted in the branches.
difference: (B, C, h, w), of the branches of an earlier row; `next_difference` is this one's, or the same again.
branches: (2, 3), the coefficients of (conditional, unconditional, difference) in the next difference d and in what it
    is added to: ε = d · guidance_scale + that.
sample or hidden_states: (B, …, h, w), made: what the denoiser is given in the next row, its further channels among it.
apart: (4,), made: mean|d|, mean|unconditional|, Σ difference², Σ difference · d.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .errors import PlanError
from .table import Table

STATE = "state"
NEXT_STATE = "next_state"
MODEL_INPUT = "model_input"
UPDATE = "update"
NOISE = "noise"
GUIDANCE_SCALE = "guidance_scale"
CHANNELS = "channels"
PREDICTION = "prediction"
LATENT_SPACE = "latent_space"
LATENT_SAMPLE = "latent_sample"
SUMS = "sums"
CONDITIONAL = "conditional"
UNCONDITIONAL = "unconditional"
DIFFERENCE = "difference"
NEXT_DIFFERENCE = "next_difference"
BRANCHES = "branches"
APART = "apart"
# In place of the time step, where an engine has the time steps of its schedule built in: () int64, its place in them.
STEP_INDEX = "step_index"

Float32 = npt.NDArray[np.float32]


def coefficients(table: Table, history: int) -> tuple[Float32, Float32]:
    """`model_input` and `update` of all N rows of a table, (N, 1+history) and (N, 1+history, 3+history) float32.

    Entries that the schedule lacks are zero.

    Raises:
        PlanError: the schedule carries more history than the engine's state holds.
    """
    if table.history > history:
        raise PlanError(
            "solver",
            f"history that {table.solver} carries",
            got=table.history,
            expected=f"at most {history}, which the engine was composed for",
            remedy="Compose the step engine with more history, or use another solver.",
        )
    entries = 1 + table.history
    model_input = np.zeros((table.rows, 1 + history), np.float32)
    model_input[:, :entries] = table.model_input
    update = np.zeros((table.rows, 1 + history, 3 + history), np.float32)
    update[:, :entries, :entries] = table.transition
    update[:, :entries, -2] = table.prediction
    update[:, :entries, -1] = table.noise
    return model_input, update
