"""What quantization takes: pictures of held-out prompts by a candidate beside the float bundle's of the same noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engines.job import Progress
from ..runtime import Pipeline
from ..runtime.bundle import Bundle
from ..runtime.manifest import Loss
from .guidance_loss import pooled_db
from .prompts import prompts_sha256
from .quality import Float32, Pixels, Scorer, latent_error, psnr_db, ssim
from .ranges import silent
from .strata import Runs

NO_PROMPTS = ("",)  # what is painted where none are given: the empty one, which no file of prompts holds
_ALL_LOST = 1e6  # as a latent error, of latents that are no numbers
_PIXELS_AT_ONCE = 1 << 17  # of the pictures that are painted together: 32 of 64x64, one of 512x512


@dataclass(frozen=True, slots=True)
class Budget:
    """What a candidate has to reach; None where nothing is asked for.

    min_psnr_db: PSNR of the mean squared error of all pictures to the float bundle's. min_accuracy: a share of the
    float bundle's accuracy.
    """

    min_psnr_db: float | None = None
    min_accuracy: float | None = None

    @property
    def asks(self) -> bool:
        """Whether anything is asked for."""
        return self.min_psnr_db is not None or self.min_accuracy is not None


@dataclass(frozen=True, slots=True)
class Way:
    """Which denoisers run how many steps, and what decodes."""

    steps: Runs
    decoder: str

    def __str__(self) -> str:
        return f"{', '.join(f'{name} {count}' for name, count in self.steps)}, {self.decoder}"


@dataclass(frozen=True)
class Painting:
    """How pictures are painted: prompt i with seed `seed` + i. arguments: of `Request`, the same for all ways."""

    prompts: tuple[str, ...]
    seed: int = 0
    target: str = "auto"
    threads: int | None = None
    cache: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompts_sha256(self) -> str:
        """The digest of the prompts, a line each."""
        return prompts_sha256(self.prompts)


class _Painted(NamedTuple):
    """pixels: (prompts, H, W, 3). latents: (prompts, C, h, w). target: what painted."""

    pixels: Pixels
    latents: Float32
    target: str


class Judge:
    """Compares candidates with a float bundle, whose pictures are painted once for each way."""

    def __init__(
        self,
        bundle: Bundle,
        painting: Painting,
        budget: Budget,
        scorer: Scorer | None = None,
        progress: Progress = silent,
    ) -> None:
        """scorer: tells accuracy; needed where the budget has one."""
        self.painting = painting
        self._bundle, self._budget, self._scorer, self._progress = bundle, budget, scorer, progress
        self._references: dict[Way, tuple[_Painted, float | None]] = {}

    def losses(self, candidate: Bundle, ways: Iterable[Way]) -> dict[Way, Loss]:
        """What a candidate takes, in each way that is named.

        Raises:
            TandemError: the target cannot run, or a model failed.
        """
        found = {}
        for way in dict.fromkeys(ways):
            if way not in self._references:
                meant = self._painted(self._bundle, way, "the float bundle")
                self._references[way] = meant, self._accuracy(meant.pixels)
            found[way] = self._compared(self._painted(candidate, way, "a candidate"), way)
        return found

    def _compared(self, found: _Painted, way: Way) -> Loss:
        (meant, float_accuracy), budget = self._references[way], self._budget
        pairs = list(zip(found.pixels, meant.pixels, strict=True))
        distances = [psnr_db(*pair) for pair in pairs]
        error = latent_error(found.latents, meant.latents)
        _, height, width, _ = meant.pixels.shape
        return Loss(
            psnr_db=pooled_db(distances, len(distances)),
            worst_psnr_db=min(distances),
            ssim=float(np.mean([ssim(*pair) for pair in pairs])),
            latent_error=error if math.isfinite(error) else _ALL_LOST,
            accuracy=self._accuracy(found.pixels),
            float_accuracy=float_accuracy,
            min_psnr_db=budget.min_psnr_db,
            min_accuracy=budget.min_accuracy,
            bundle=self._bundle.digest,
            prompts=len(pairs),
            prompts_sha256=self.painting.prompts_sha256,
            held_out=self.painting.prompts != NO_PROMPTS,
            seed=self.painting.seed,
            painted=f"{way}, {width}x{height}, {found.target}",
        )

    def _accuracy(self, pictures: Pixels) -> float | None:
        if self._scorer is None:
            return None
        return float(np.mean(self._scorer(self.painting.prompts, pictures)))

    def _painted(self, bundle: Bundle, way: Way, label: str) -> _Painted:
        painting, prompts = self.painting, self.painting.prompts
        defaults, pictures, latents = bundle.manifest.defaults, list[Any](), list[Float32]()
        height = painting.arguments.get("height") or defaults.height
        at_once = max(1, _PIXELS_AT_ONCE // (height * (painting.arguments.get("width") or defaults.width)))
        opened = Pipeline.open(bundle.path, painting.target, threads=painting.threads, cache=painting.cache)
        with opened as pipeline:
            for start in range(0, len(prompts), at_once):
                self._progress(f"{way}: pictures of {label}", start, len(prompts))
                part = list(prompts[start : start + at_once])
                seeds = [painting.seed + start + index for index in range(len(part))]
                output = pipeline(part, steps=way.steps, decoder=way.decoder, seed=seeds, **painting.arguments)
                pictures += [np.asarray(image) for image in output.images]
                latents.append(output.latents)
            target = str(pipeline.target)
        self._progress(f"{way}: pictures of {label}", len(prompts), len(prompts))
        return _Painted(np.stack(pictures), np.concatenate(latents), target)


def ways_of(bundle: Bundle, names: Sequence[str], steps: Mapping[str, Runs]) -> dict[str, tuple[Way, ...]]:
    """How the pictures are painted that show what each component of `names` does.

    A denoiser shows in its own steps, another decoder than the first in the first denoiser's, text encoders and the
    first decoder in those of all denoisers.

    steps: what runs to show a denoiser, by those in `names`; where there are none, by one that shows the others.
    """
    components, decoder = bundle.manifest.components, bundle.manifest.names("vae_decoder")[0]
    shown = {name: Way(runs, decoder) for name, runs in steps.items()}
    every = tuple(dict.fromkeys(shown.values()))
    found: dict[str, tuple[Way, ...]] = {}
    for name in names:
        if components[name].role == "denoiser":
            found[name] = (shown[name],)
        elif components[name].role == "vae_decoder" and name != decoder:
            found[name] = (Way(every[0].steps, name),)
        else:
            found[name] = every
    return found
