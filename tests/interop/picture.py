"""A picture on disk with the request it answers, and how close another program comes to it under the same request."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
LEAST_PSNR_DB = 45.0


@dataclass(frozen=True)
class Picture:
    """`pixels` (H, W, 3) float32 in 0..1, and what was asked for in diffusers' words; the seed is for torch's CPU."""

    pixels: Float32
    prompt: str
    negative_prompt: str | None
    num_inference_steps: int
    guidance_scale: float
    seed: int

    def save(self, path: Path) -> None:
        """Write an `.npz` file."""
        request = {name: value for name, value in asdict(self).items() if name != "pixels"}
        np.savez(path, pixels=self.pixels, request=json.dumps(request))

    @classmethod
    def load(cls, path: Path) -> Picture:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            return cls(pixels=stored["pixels"], **json.loads(str(stored["request"])))

    def painted_by(self, pipeline: Any) -> Float32:
        """The picture that a pipeline of diffusers or optimum paints under the same request, (H, W, 3) float32."""
        import torch  # noqa: PLC0415 (who only paints with the runtime has none)

        height, width = self.pixels.shape[:2]
        painted = pipeline(
            self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(self.seed),
            height=height,
            width=width,
            output_type="np",
        )
        pixels: Float32 = painted.images[0]
        return pixels


def report(name: str, picture: Picture, theirs: Float32) -> int:
    """Print the PSNR of two pictures and return the exit status: 0 where it is high enough."""
    found_db = psnr_db(picture.pixels, theirs)
    # A picture of random weights may be flat or clipped, and then be easy to agree on.
    inside = float(np.mean((theirs > 0) & (theirs < 1)))
    print(
        f"{name}: PSNR {found_db:.1f} dB (at least {LEAST_PSNR_DB:g}); "
        f"standard deviation {theirs.std():.2f}, {inside:.0%} of the values unclipped"
    )
    return 0 if found_db >= LEAST_PSNR_DB else 1


def psnr_db(one: Float32, other: Float32) -> float:
    """The peak signal-to-noise ratio of pictures in 0..1; infinite for equal ones."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))
