"""What quantization takes: pictures of held-out prompts by a candidate beside the float bundle's of the same noise."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engines.job import Progress
from ..runtime import Pipeline
from ..runtime.bundle import Bundle
from ..runtime.manifest import Loss
from .prompts import prompts_sha256
from .quality import Pixels, Scorer, psnr_db
from .ranges import silent
from .strata import Runs

NO_PROMPTS = ("",)  # what is painted where none are given: the empty one, which no file of prompts holds
_PIXELS_AT_ONCE = 1 << 17  # of the pictures that are painted together: 32 of 64x64, one of 512x512


@dataclass(frozen=True, slots=True)
class Budget:
    """What a candidate has to reach; None where nothing is asked for.

    min_psnr_db: median PSNR to the float bundle's pictures. min_accuracy: a share of the float bundle's accuracy.
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
    """How pictures are painted: prompt i has seed i. arguments: of `Request`, the same for all ways."""

    prompts: tuple[str, ...]
    target: str = "auto"
    threads: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompts_sha256(self) -> str:
        """The digest of the prompts, a line each."""
        return prompts_sha256(self.prompts)


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
        self._bundle, self._painting, self._budget = bundle, painting, budget
        self._scorer, self._progress = scorer, progress
        self._references: dict[Way, tuple[Pixels, float | None]] = {}
        self._target = ""

    def losses(self, candidate: Bundle, ways: Iterable[Way]) -> dict[Way, tuple[Loss, ...]]:
        """What a candidate takes, in each way that is named.

        Raises:
            TandemError: the target cannot run, or a model failed.
        """
        found = {}
        for way in dict.fromkeys(ways):
            if way not in self._references:
                pictures = self._painted(self._bundle, way, "the float bundle")
                self._references[way] = pictures, self._accuracy(pictures)
            found[way] = self._compared(self._painted(candidate, way, "a candidate"), way)
        return found

    def _compared(self, pictures: Pixels, way: Way) -> tuple[Loss, ...]:
        references, reference = self._references[way]
        told: dict[str, Any] = {
            "bundle": self._bundle.digest,
            "prompts": len(pictures),
            "prompts_sha256": self._painting.prompts_sha256,
            "held_out": self._painting.prompts != NO_PROMPTS,
            "painted": f"{way}, {references.shape[2]}x{references.shape[1]}, {self._target}",
        }
        pairs = zip(pictures, references, strict=True)
        distance = statistics.median(psnr_db(picture, meant) for picture, meant in pairs)
        losses = [Loss(metric="psnr_db", value=distance, at_least=self._budget.min_psnr_db, **told)]
        accuracy = self._accuracy(pictures)
        if accuracy is not None and reference is not None:
            share = self._budget.min_accuracy
            at_least = None if share is None else share * reference
            losses.append(Loss(metric="accuracy", value=accuracy, reference=reference, at_least=at_least, **told))
        return tuple(losses)

    def _accuracy(self, pictures: Pixels) -> float | None:
        if self._scorer is None:
            return None
        return float(np.mean(self._scorer(self._painting.prompts, pictures)))

    def _painted(self, bundle: Bundle, way: Way, label: str) -> Pixels:
        """The prompts' pictures, (prompts, H, W, 3) uint8."""
        painting, prompts = self._painting, self._painting.prompts
        defaults, pictures = bundle.manifest.defaults, list[Any]()
        height = painting.arguments.get("height") or defaults.height
        at_once = max(1, _PIXELS_AT_ONCE // (height * (painting.arguments.get("width") or defaults.width)))
        with Pipeline.open(bundle.path, painting.target, threads=painting.threads) as pipeline:
            self._target = str(pipeline.target)
            for start in range(0, len(prompts), at_once):
                self._progress(f"{way}: pictures of {label}", start, len(prompts))
                part = list(prompts[start : start + at_once])
                seeds = list(range(start, start + len(part)))
                output = pipeline(part, steps=way.steps, decoder=way.decoder, seed=seeds, **painting.arguments)
                pictures += [np.asarray(image) for image in output.images]
        self._progress(f"{way}: pictures of {label}", len(prompts), len(prompts))
        return np.stack(pictures)


def missed(losses: Mapping[Way, Sequence[Loss]]) -> list[Loss]:
    """Those that are not within the budget."""
    return [loss for each in losses.values() for loss in each if not loss.holds]


def ways_of(bundle: Bundle, names: Sequence[str], steps: Mapping[str, Runs]) -> dict[str, tuple[Way, ...]]:
    """How the pictures are painted that show what each component does, whatever else of `names` has changed before.

    A denoiser shows in its own steps, another decoder than the first in the first denoiser's. Text encoders and the
    first decoder show in all the ways of the denoisers that come before them in `names`, else in the first denoiser's.

    steps: by denoiser what runs to show it.
    """
    manifest, found = bundle.manifest, dict[str, tuple[Way, ...]]()
    first, decoder = manifest.names("denoiser")[0], manifest.names("vae_decoder")[0]
    so_far: list[Way] = []
    for name in names:
        role = manifest.components[name].role
        if role == "denoiser":
            ways = [Way(steps[name], decoder)]
            so_far += [way for way in ways if way not in so_far]
        elif role == "vae_decoder" and name != decoder:
            ways = [Way(steps[first], name)]
        else:
            ways = list(so_far) or [Way(steps[first], decoder)]
        found[name] = tuple(ways)
    return found
