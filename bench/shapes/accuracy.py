"""How well pictures of the shapes family follow the prompts they were painted from.

Prompt i is painted from seed i, so every way to paint starts from the same noise and every run gives the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tandemrt.calibrate.quality import psnr_db, wilson_interval
from tandemrt.runtime import Pipeline
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.output import Output

from .checker import Verdict, check
from .scenes import Scene

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]

SCENES_SEED = 0
# What the family was trained to be sampled with.
GUIDANCE_SCALE = 2.0


@dataclass(frozen=True, slots=True)
class Way:
    """A way to paint: its name, which denoisers take how many steps, and what else a generation is asked for."""

    name: str
    steps: Mapping[str, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The components that take at least one step."""
        return tuple(name for name, count in self.steps.items() if count)


ONE_STEP = Way(
    "one step",
    {"unet_one_step": 1},
    {
        "solver": "ddim",
        # From t = 999 to the clean latent itself, as it was trained.
        "solver_config": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
        "guidance_scale": 0.0,
    },
)
WAYS = (
    *(Way(f"{large}/{25 - large}", {"unet": large, "unet_small": 25 - large}) for large in (25, 15, 10, 5, 0)),
    ONE_STEP,
)


@dataclass(frozen=True, slots=True)
class Share:
    """How many of `trials` succeeded."""

    successes: int
    trials: int

    def facts(self) -> dict[str, float | int | None]:
        """The share with its 95% Wilson interval; None where there was no trial."""
        low, high = wilson_interval(self.successes, self.trials) if self.trials else (None, None)
        share = self.successes / self.trials if self.trials else None
        return {"share": share, "low": low, "high": high, "successes": self.successes, "trials": self.trials}


@dataclass(frozen=True, slots=True)
class Score:
    """What the checker says about a set of pictures, one for each scene.

    all_right: of all; one_object and two_objects: all right among the scenes with so many. order_blind: background and
    items right, whatever their order. psnr_db: the median over pictures of the PSNR to the reference picture.
    """

    all_right: Share
    one_object: Share
    two_objects: Share
    order_blind: Share
    psnr_db: float | None

    def facts(self) -> dict[str, Any]:
        shares = ("all_right", "one_object", "two_objects", "order_blind")
        return {**{name: getattr(self, name).facts() for name in shares}, "psnr_db": self.psnr_db}


def score_pictures(
    pictures: Sequence[Pixels] | Pixels, scenes: Sequence[Scene], references: Sequence[Pixels] | Pixels | None = None
) -> Score:
    """Check pictures, (64, 64, 3) uint8 each, against the scenes their prompts came from.

    references: what PSNR is taken to, one for each picture; a picture equal to its reference counts as 99 dB.
    """
    verdicts = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    decibels = None
    if references is not None:
        pairs = zip(pictures, references, strict=True)
        decibels = float(np.median([psnr_db(picture, reference) for picture, reference in pairs]))
    return Score(
        all_right=_all_right(verdicts),
        one_object=_all_right(_of_size(verdicts, scenes, 1)),
        two_objects=_all_right(_of_size(verdicts, scenes, 2)),
        order_blind=Share(sum(verdict.background and verdict.items for verdict in verdicts), len(verdicts)),
        psnr_db=decibels,
    )


def generate(pipeline: Pipeline, way: Way, prompts: Sequence[str], seeds: Sequence[int]) -> Output:
    """Paint prompts with a seed each."""
    arguments = {"guidance_scale": GUIDANCE_SCALE, **way.arguments}
    return pipeline(list(prompts), steps=dict(way.steps), seed=list(seeds), **arguments)


def paint(
    pipeline: Pipeline, way: Way, prompts: Sequence[str], *, batch: int = 32, progress: Progress | None = None
) -> Pixels:
    """Paint prompt i from seed i: (len(prompts), 64, 64, 3) uint8."""
    pictures = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        output = generate(pipeline, way, part, range(start, start + len(part)))
        pictures += [np.asarray(image) for image in output.images]
        if progress is not None:
            progress(way.name, len(pictures), len(prompts))
    return np.stack(pictures)


def score_ways(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    ways: Sequence[Way] = WAYS,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> dict[str, Score]:
    """Score each way on the scenes' captions; PSNR is to the pictures of the first way.

    Scores of scenes that are not held out say nothing, so those are refused.

    Raises:
        ValueError: a scene is not of the held-out split, or there is none.
    """
    if not scenes or any(scene.split != "held_out" for scene in scenes):
        raise ValueError("scenes: expected at least one, all of the held-out split")
    prompts = [scene.caption for scene in scenes]
    scores: dict[str, Score] = {}
    reference: Pixels | None = None
    for way in ways:
        pictures = paint(pipeline, way, prompts, batch=batch, progress=progress)
        scores[way.name] = score_pictures(pictures, scenes, reference)
        reference = pictures if reference is None else reference
    return scores


def size_of(manifest: Manifest, components: Sequence[str]) -> dict[str, float | int]:
    """Parameters of some components, and the megabytes (10^6 bytes) of their files in the bundle."""
    folders = tuple(manifest.components[name].model.rpartition("/")[0] + "/" for name in components)
    size = sum(record.size for path, record in manifest.files.items() if path.startswith(folders))
    parameters = sum(manifest.components[name].parameters for name in components)
    return {"parameters": parameters, "megabytes": round(size / 1e6, 2)}


def _all_right(verdicts: Sequence[Verdict]) -> Share:
    return Share(sum(verdict.all_right for verdict in verdicts), len(verdicts))


def _of_size(verdicts: Sequence[Verdict], scenes: Sequence[Scene], items: int) -> list[Verdict]:
    return [verdict for verdict, scene in zip(verdicts, scenes, strict=True) if len(scene.items) == items]
