"""What each of a bundle's decoders makes of real pictures, after the encoder: accuracy, PSNR, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.images import pixels_from_decoded

from ..figures import spread
from .accuracy import Pixels, Progress, score_pictures, size_of
from .scenes import Scene

Float32 = npt.NDArray[np.float32]

WARM_UP = 5


def score_decoders(
    pipeline: Pipeline, scenes: Sequence[Scene], pictures: Pixels, *, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Encode real pictures once and decode them one at a time with every decoder of the bundle.

    pictures: (n, 64, 64, 3) uint8, the scenes as rendered; PSNR is to them. Times are of single pictures, in ms.
    """
    manifest = pipeline.bundle.manifest
    latents = encoded(pipeline, pictures)
    rows = []
    for name in manifest.names("vae_decoder"):
        decoded, samples_ms = _decoded(pipeline, name, latents, progress)
        score = score_pictures(decoded, scenes, pictures)
        latency = {"latency_ms": spread(samples_ms), "warm_up": WARM_UP}
        rows.append({"decoder": name, **size_of(manifest, [name]), **score.facts(), **latency})
    return rows


def encoded(pipeline: Pipeline, pictures: Pixels) -> Float32:
    """The encoder's mean for pictures (n, H, W, 3) uint8, as decoders take it: (n, C, H/8, W/8) float32."""
    channels = pipeline.bundle.manifest.latent.channels
    session = open_session(pipeline.bundle.model_path("vae_encoder"), pipeline.target)
    (given,), (made,) = session.inputs, session.outputs
    binding = session.bind({given.name: (1, 3, *pictures.shape[1:3])})
    latents = []
    for picture in pictures:
        np.subtract(picture.transpose(2, 0, 1) / np.float32(127.5), 1, out=binding.inputs[given.name][0])
        binding.run()
        latents.append(binding.outputs[made.name][0, :channels].copy())
    session.close()
    return np.stack(latents)


def _decoded(pipeline: Pipeline, name: str, latents: Float32, progress: Progress | None) -> tuple[Pixels, list[float]]:
    """Pictures (n, H, W, 3) uint8, and the milliseconds of each."""
    session = open_session(pipeline.bundle.model_path(name), pipeline.target)
    binding = session.bind({"latent_sample": (1, *latents.shape[1:])})
    for _ in range(WARM_UP):
        binding.run()
    pictures, samples_ms = [], []
    for n, latent in enumerate(latents):
        binding.inputs["latent_sample"][0] = latent
        began = time.perf_counter()
        binding.run()
        samples_ms.append((time.perf_counter() - began) * 1e3)
        pixels = pixels_from_decoded(binding.outputs["sample"])[0]
        pictures.append((pixels * np.float32(255)).round().astype(np.uint8))
        if progress is not None:
            progress(name, n + 1, len(latents))
    session.close()
    return np.stack(pictures), samples_ms
