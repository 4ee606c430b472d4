"""Compiled schedules: the linear table every solver becomes, and the one step that applies a row of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)  # of arrays, which have no one truth
class Table:
    """A schedule of N model calls on a state S = (x, h1 … hH), everything in float64.

    Row n:  model input  model_input[n] · S
            S ← transition[n] S + prediction[n] ε + noise[n] z
            denoised estimate  denoised_state[n] · S + denoised_prediction[n] ε   (with S before the update)

    ε is the (guided) model output, z standard normal noise, drawn for row n only where `draws_noise[n]`.

    timesteps: (N,) what the denoiser is given.
    steps: (N,) int, the inference step each row belongs to, rising from 0; solvers that call the model more than once
        a step (PNDM, Heun) have rows that share one.
    model_input: (N, 1+H). transition: (N, 1+H, 1+H). prediction, noise: (N, 1+H).
    denoised_state: (N, 1+H). denoised_prediction: (N,).
    noised: (N+1, 2), how a clean latent is brought to where x stands: before row n, kept · latent + added · z with
        (kept, added) = noised[n]; after the last row it stays clean, (1, 0). Image-to-image starts at noised[0], and
        inpainting keeps the known region at noised[n+1] after row n. The region's mask must be of 0s and 1s, as
        diffusers makes it: where it is not, PNDM's second row and UniPC's corrector, which go on from x as they find
        it, differ from diffusers.
    init_noise_sigma: what standard normal noise is multiplied by to become the first x; the h start at zero.
        Of the whole schedule, also where the table begins at a later step.
    recipe: what it was compiled from, as JSON: the same wherever the same is asked for, to the last bit of no number.
    """

    solver: str
    timesteps: Float64
    steps: npt.NDArray[np.int64]
    model_input: Float64
    transition: Float64
    prediction: Float64
    noise: Float64
    denoised_state: Float64
    denoised_prediction: Float64
    noised: Float64
    init_noise_sigma: float
    recipe: str = ""

    @property
    def rows(self) -> int:
        """N, the number of model calls."""
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """H, how many earlier predictions the state carries."""
        return int(self.model_input.shape[1]) - 1

    @property
    def draws_noise(self) -> npt.NDArray[np.bool_]:
        """(N,) whether a row needs fresh noise."""
        return np.asarray(self.noise.any(axis=1))

    def part(self, first: int, last: int) -> Table:
        """The rows from `first` to before `last`, which keep their steps."""
        rows = slice(first, last)
        return replace(
            self,
            timesteps=self.timesteps[rows],
            steps=self.steps[rows],
            model_input=self.model_input[rows],
            transition=self.transition[rows],
            prediction=self.prediction[rows],
            noise=self.noise[rows],
            denoised_state=self.denoised_state[rows],
            denoised_prediction=self.denoised_prediction[rows],
            noised=self.noised[first : last + 1],
        )
