"""The random numbers of one request, in the order diffusers draws them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .request import Request
from .rng import new_generator

Float32 = npt.NDArray[np.float32]


class Noise:
    """The standard normal noise of one request, in the order diffusers draws it; `shape` is the latents'."""

    def __init__(self, request: Request, shape: tuple[int, int, int, int]) -> None:
        seed = request.seed if request.start is None else request.start.seed
        if seed is None:
            seed = secrets.randbits(32)
        seeds = tuple(seed) if isinstance(seed, Sequence) else (seed,)
        self.seed = seeds if isinstance(seed, Sequence) else seed
        self.seeds = seeds if len(seeds) == request.pictures else seeds * request.pictures
        self.shape = shape
        self._generators = [new_generator(value, request.seed_device) for value in seeds]

    @property
    def by_picture(self) -> bool:
        """Whether each picture has a generator of its own."""
        return len(self._generators) > 1

    def draw(self, count: int | None = None) -> Float32:
        """Fresh noise of latents: (pictures, C, h, w) float32, or `count` of them where one generator serves all."""
        if not self.by_picture:
            return self._generators[0].randn((self.shape[0] if count is None else count, *self.shape[1:]))
        noise = np.empty(self.shape, np.float32)
        self.fill(noise)
        return noise

    def fill(self, out: Float32) -> None:
        """Draw fresh noise of latents into `out`, (pictures, C, h, w) float32, C-contiguous."""
        for generator, part in zip(self._generators, np.split(out, len(self._generators)), strict=True):
            generator.fill(part)
