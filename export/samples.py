"""Inputs such as a generation would feed: real token ids, latents of pictures at several noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..runtime.manifest import LatentSpace, SchedulerDefaults, TensorSpec
from ..runtime.schedule import training_alphas_cumprod
from ..runtime.solvers.config import effective_config
from .modules import Interface, extent

Inputs = dict[str, npt.NDArray[np.generic]]

PROMPTS = (
    "",
    "a red circle left of a blue square on a white background",
    "An oil painting of two sailing boats in a storm, at dusk; highly detailed!",
)
# Latent height and width and the text's length as shares of the model's own, and the batch: square, landscape, tall.
# PROBE is the one of them that differs most from what a graph was traced with.
PROBE = 1
_CASES = ((1.0, 1.0, 1.0, 1), (0.25, 0.5, 0.5, 2), (0.75, 0.25, 0.25, 2))
# So many multiples at least stand for a share of 1: with fewer, cases would round to one size.
_MULTIPLES = 4
# ONNX Runtime's CPU InstanceNormalization sums a map's squares in one float32 run: against PyTorch, a KL decoder of
# random weights is off by 4e-6 at 32 x 32 latents, 5e-4 at 64 x 64, 4e-3 at 96 x 96. Larger maps would measure that.
_LARGEST_OF_AUTOENCODERS = 32
# So large a latent is encoded from pictures; what is larger mirrors it.
_ENCODED = 16
# From pure noise to a nearly finished picture; 417.25 is such a step between two as Karras spacings give.
_TIMESTEPS = (999.0, 417.25, 1.0)


@dataclass(frozen=True)
class SampleText:
    """What the sample prompts become.

    token_ids: by text encoder, (len(PROMPTS), max_length) int64. embeddings: (len(PROMPTS), tokens, width) float32.
    pooled: (len(PROMPTS), pooled width) float32, of width 0 where no pooled text is used.
    """

    token_ids: Mapping[str, npt.NDArray[np.int64]]
    embeddings: npt.NDArray[np.float32]
    pooled: npt.NDArray[np.float32]


class Samples:
    """Where the inputs for comparisons come from; the same ones at every export.

    encode_picture: the checkpoint's own autoencoder. sample_size: the latent size the model was made for.
    """

    def __init__(
        self,
        text: SampleText,
        encode_picture: Callable[[Tensor], Tensor],
        latent: LatentSpace,
        scheduler: SchedulerDefaults,
        sample_size: int,
    ) -> None:
        self._text, self._latent, self._size = text, latent, sample_size
        side = min(sample_size, _ENCODED)
        pictures = torch.from_numpy(_pictures(*self._picture_size(side, side), max(batch for *_, batch in _CASES)))
        encoded = encode_picture(pictures)[:, : latent.channels].numpy()
        self._encoded = (encoded - np.float32(latent.shift_factor)) * np.float32(latent.scaling_factor)
        self._kept, self._noise = _noise_levels(scheduler)

    def cases(self, name: str, graph: Interface) -> tuple[Inputs, ...]:
        """Three shapes and two batch sizes of inputs for the graph of component `name`, on every symbolic axis."""
        if graph.role == "text_encoder":
            return tuple(_shortened(self._text.token_ids[name], text, batch) for _, _, text, batch in _CASES)
        return tuple(self._inputs(graph, *case) for case in _CASES)

    def _inputs(self, graph: Interface, height: float, width: float, text: float, batch: int) -> Inputs:
        if graph.role in ("denoiser", "controlnet"):
            length = max(1, round(self._text.embeddings.shape[1] * text))
            return self._denoiser(graph, *_sizes(height, width, self._size, graph.multiple), length, batch)
        sizes = _sizes(height, width, min(self._size, _LARGEST_OF_AUTOENCODERS), 1)
        if graph.role == "vae_encoder":
            return {"sample": _pictures(*self._picture_size(*sizes), batch)}
        scaled = self._latents(*sizes, batch) / self._latent.scaling_factor + self._latent.shift_factor
        return {"latent_sample": scaled.astype(np.float32)}

    def _denoiser(self, graph: Interface, height: int, width: int, length: int, batch: int) -> Inputs:
        clean = self._latents(height, width, batch)
        rows = np.arange(batch)
        # Where a graph takes one time step for all rows as well, the tall case has one.
        shared = height > width and any("steps" in spec.shape for spec in graph.inputs)
        timestep = np.array([_TIMESTEPS[(batch + row * (not shared)) % len(_TIMESTEPS)] for row in rows], np.float32)
        level = np.minimum(timestep.astype(int), len(self._kept) - 1)
        kept, noisy = (values[level].reshape(-1, 1, 1, 1) for values in (self._kept, self._noise))
        noise = np.random.default_rng(clean.shape[2:]).standard_normal(clean.shape)
        latent = (kept * clean + noisy * noise).astype(np.float32)
        # An inpainting UNet is also given a mask and the latent of the picture around it.
        mask = np.zeros_like(clean[:, :1])
        mask[..., : width // 2] = 1
        prompts = (rows + 1) % len(self._text.embeddings)
        pooled = self._text.pooled[prompts]
        known = {
            "timestep": timestep[:1] if shared else timestep,
            "encoder_hidden_states": self._text.embeddings[prompts, :length],
            "text_embeds": pooled,
            "pooled_projections": pooled,
            "controlnet_cond": _pictures(*self._picture_size(height, width), batch) / 2 + np.float32(0.5),
            "conditioning_scale": np.array([0.8], np.float32),
            "time_ids": np.tile(np.array([*self._picture_size(height, width), 0, 0] * 2, np.float32)[:6], (batch, 1)),
        }
        first, *others = graph.inputs
        extents = {"batch": batch, "height": height, "width": width}
        repainted = np.concatenate([latent, mask, clean * (1 - mask)], 1)
        sample = latent if first.shape[1] == clean.shape[1] else repainted
        return {
            first.name: sample,
            **{spec.name: known[spec.name] if spec.name in known else _any(spec, extents) for spec in others},
        }

    def _latents(self, height: int, width: int, batch: int) -> npt.NDArray[np.float32]:
        """Latents of pictures, scaled as denoisers see them; beyond the size that was encoded they are mirrored."""
        more = (max(0, wanted - side) for wanted, side in zip((height, width), self._encoded.shape[2:], strict=True))
        whole = np.pad(self._encoded[:batch], [(0, 0), (0, 0), *((0, size) for size in more)], "symmetric")
        return whole[..., :height, :width]

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


def _noise_levels(scheduler: SchedulerDefaults) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What a picture and noise are multiplied by at every training time step; 1 − σ and σ for rectified flow."""
    config = effective_config(scheduler.class_name, scheduler.config)
    if "beta_schedule" not in config:
        sigmas = np.linspace(0, 1, config["num_train_timesteps"])
        return 1 - sigmas, sigmas
    alphas = training_alphas_cumprod(config)
    return np.sqrt(alphas), np.sqrt(1 - alphas)


def _shortened(ids: npt.NDArray[np.int64], share: float, batch: int) -> Inputs:
    return {"input_ids": ids[np.arange(1, batch + 1) % len(ids), : max(1, round(ids.shape[1] * share))].copy()}


def _any(spec: TensorSpec, extents: Mapping[str, int]) -> npt.NDArray[np.float32]:
    """Values in -1..1, for inputs such as the guidance embedding `timestep_cond` and a ControlNet's residuals."""
    shape = [extent(size, extents) for size in spec.shape]
    return np.random.default_rng(shape).uniform(-1, 1, shape).astype(np.float32)
