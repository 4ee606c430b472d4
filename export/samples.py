"""Inputs such as a generation would feed: real token ids, latents of pictures at several noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..runtime.manifest import LatentSpace, SchedulerDefaults
from ..runtime.schedule import training_alphas_cumprod
from ..runtime.solvers.config import effective_config
from .modules import Graph

Inputs = dict[str, npt.NDArray[np.generic]]

PROMPTS = (
    "",
    "a red circle left of a blue square on a white background",
    "An oil painting of two sailing boats in a storm, at dusk; highly detailed!",
)
# Latent height and width and the text's length as shares of the model's own, and the batch: square, landscape, tall.
_CASES = ((1.0, 1.0, 1.0, 1), (0.5, 0.75, 0.5, 2), (1.25, 0.5, 0.25, 1), (1.0, 1.0, 1.0, 2))
# So many multiples at least stand for a share of 1: with fewer, cases would round to one size.
_MULTIPLES = 4
# ONNX Runtime's CPU InstanceNormalization sums a map's squares in one float32 run: against PyTorch, a KL decoder of
# random weights is off by 4e-6 at 32 x 32 latents, 5e-4 at 64 x 64, 4e-3 at 96 x 96. Larger maps would measure that.
_LARGEST_OF_AUTOENCODERS = 32
# From pure noise to a nearly finished picture; 417.25 is such a step between two as Karras spacings give.
_TIMESTEPS = (999.0, 417.25, 1.0)


class Samples:
    """Where the inputs for comparisons come from; the same ones at every export.

    token_ids: (len(PROMPTS), max_length) int64. encode_text, encode_picture: the checkpoint's own models.
    sample_size: the latent size the model was made for.
    """

    def __init__(
        self,
        token_ids: npt.NDArray[np.int64],
        encode_text: Callable[[Tensor], Sequence[Tensor]],
        encode_picture: Callable[[Tensor], Tensor],
        latent: LatentSpace,
        scheduler: SchedulerDefaults,
        sample_size: int,
    ) -> None:
        self._ids, self._latent, self._size = token_ids, latent, sample_size
        self._encode_picture = encode_picture
        self._alphas = _alphas_cumprod(scheduler)
        with torch.inference_mode():
            self._embeddings = encode_text(torch.from_numpy(token_ids))[0].numpy()

    def cases(self, graph: Graph) -> tuple[Inputs, ...]:
        """Three shapes and two batch sizes of inputs for a graph, on every symbolic axis."""
        return tuple(self._inputs(graph, *case) for case in _CASES)

    def _inputs(self, graph: Graph, height: float, width: float, text: float, batch: int) -> Inputs:
        length = max(1, round(self._ids.shape[1] * text))
        if graph.role == "text_encoder":
            return {"input_ids": self._ids[np.arange(1, batch + 1) % len(self._ids), :length].copy()}
        if graph.role == "denoiser":
            return self._denoiser(*_sizes(height, width, self._size, graph.multiple), length, batch)
        sizes = _sizes(height, width, min(self._size, _LARGEST_OF_AUTOENCODERS), 1)
        if graph.role == "vae_encoder":
            return {"sample": _pictures(*self._picture_size(*sizes), batch)}
        scaled = self._latents(*sizes, batch) / self._latent.scaling_factor + self._latent.shift_factor
        return {"latent_sample": scaled.astype(np.float32)}

    def _denoiser(self, height: int, width: int, length: int, batch: int) -> Inputs:
        clean = self._latents(height, width, batch)
        rows = np.arange(batch)
        timestep = np.array([_TIMESTEPS[(row + batch) % len(_TIMESTEPS)] for row in rows], np.float32)
        alpha = self._alphas[np.minimum(timestep.astype(int), len(self._alphas) - 1)].reshape(-1, 1, 1, 1)
        noise = np.random.default_rng(clean.shape[2:]).standard_normal(clean.shape)
        return {
            "sample": (np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise).astype(np.float32),
            "timestep": timestep,
            "encoder_hidden_states": self._embeddings[(rows + 1) % len(self._embeddings), :length],
        }

    def _latents(self, height: int, width: int, batch: int) -> npt.NDArray[np.float32]:
        """Latents of pictures, scaled as denoisers see them."""
        with torch.inference_mode():
            pictures = torch.from_numpy(_pictures(*self._picture_size(height, width), batch))
            latents: npt.NDArray[np.float32] = self._encode_picture(pictures)[:, : self._latent.channels].numpy()
        return (latents - np.float32(self._latent.shift_factor)) * np.float32(self._latent.scaling_factor)

    def _picture_size(self, height: int, width: int) -> tuple[int, int]:
        return height * self._latent.downsampling, width * self._latent.downsampling


def _sizes(height: float, width: float, size: int, multiple: int) -> tuple[int, int]:
    """Shares of `size` as multiples of `multiple`."""
    whole = max(size / multiple, _MULTIPLES)
    return round(whole * height) * multiple, round(whole * width) * multiple


def _pictures(height: int, width: int, batch: int) -> npt.NDArray[np.float32]:
    """Smooth backgrounds with a disc and some grain, (batch, 3, height, width) in -1..1."""
    rng = np.random.default_rng((height, width, batch))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope = rng.uniform(-0.5, 0.5, (batch, 3, 2, 1, 1))
    picture = slope[:, :, 0] * x + slope[:, :, 1] * y
    disc = (x - rng.uniform(-0.3, 0.3)) ** 2 + (y - rng.uniform(-0.3, 0.3)) ** 2 < 0.3
    picture = np.where(disc, rng.uniform(-0.9, 0.9, (batch, 3, 1, 1)), picture)
    grainy = picture + rng.normal(0, 0.02, picture.shape)
    return np.clip(grainy, -1, 1).astype(np.float32)


def _alphas_cumprod(scheduler: SchedulerDefaults) -> npt.NDArray[np.float64]:
    """How much of a picture's variance is left at every training time step; (1 − σ)² for rectified flow."""
    config = effective_config(scheduler.class_name, scheduler.config)
    if "beta_schedule" not in config:
        return np.linspace(1, 0, config["num_train_timesteps"]) ** 2
    return training_alphas_cumprod(config)
