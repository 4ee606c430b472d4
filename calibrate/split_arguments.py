"""The arguments of `tandemrt calibrate split`."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..runtime.calibrations import QualityMeasure
from ..runtime.errors import ArgumentError
from .prompts import MAX_PROMPTS
from .shared_arguments import (
    add_bundle,
    add_discard,
    add_held_out,
    add_judged,
    add_place,
    add_prompts,
    add_scorer,
    add_seed,
    check_number,
    check_shared,
)

PROMPTS = 64
MAX_STEPS, MAX_BATCH = 1000, 1024
DESCRIPTION = (
    "Measure which steps are best given to the large denoiser and which to the small one: the large one first, as in "
    "Hybrid-SD, the small one first, or both in turns. What a plan costs is told as a share of the large denoiser "
    "alone, and its quality by how far its pictures are from those of the large denoiser, painted from the same noise. "
    "The same command goes on where it was interrupted."
)
EPILOG = """\
examples:
  tandemrt calibrate split bundle/ --prompts prompts.txt -n 32
  tandemrt calibrate split bundle/ --prompts prompts.txt --held-out judged.txt --budget 0.6
  tandemrt calibrate split bundle/ --prompts prompts.txt --points 5,10 --plan unet:5,unet_small:15,unet:5
  tandemrt calibrate split shapes/ --prompts captions.txt --scorer tandemrt.bench.shapes.checker:shows --budget 0.6
"""


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """What to measure; None stands for what the bundle says, of out for a folder in the user's cache."""

    bundle: Path
    prompts: Path
    column: str | None
    count: int | None
    held_out: Path | None
    judged: int | None
    large: str | None
    small: str | None
    num_inference_steps: int | None
    points: tuple[int, ...] | None
    plans: tuple[str, ...]
    scorer: str | None
    by: QualityMeasure | None
    budget: float | None
    target: str
    threads: int | None
    cache: Path | None
    seed: int
    batch: int
    out: Path | None
    discard: bool

    @property
    def chosen_by(self) -> QualityMeasure:
        """The quality that tells which plan is best."""
        return self.by or ("latent_error" if self.scorer is None else "accuracy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt calibrate split`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_bundle(parser)
    _add_what(parser.add_argument_group("what to measure"))
    _add_choice(parser.add_argument_group("what to store"))
    where = parser.add_argument_group("where to run, where to write")
    add_place(where)
    where.add_argument("--batch", type=int, default=4, metavar="N", help="pictures painted at once (default: 4)")
    where.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the folder for what is measured, the figures and the plot (default: one in the cache)",
    )
    add_discard(where)


def _add_what(group: argparse._ArgumentGroup) -> None:
    add_prompts(group, "to paint", PROMPTS)
    add_held_out(group, "prompts to judge the plan by that --budget chooses")
    add_judged(group)
    group.add_argument("--large", metavar="NAME", help="the large denoiser (default: the bundle's first)")
    group.add_argument("--small", metavar="NAME", help="the small one (default: the bundle's second)")
    group.add_argument("--num-inference-steps", type=int, metavar="N", help="of every plan (default: the bundle's)")
    group.add_argument(
        "--points",
        metavar="N,N…",
        help="how many of the steps the large denoiser takes (default: none, all, and 4 between)",
    )
    group.add_argument(
        "--plan",
        dest="plans",
        action="append",
        default=[],
        metavar="STEPS",
        help="another plan, such as unet:5,unet_small:20; may be given several times",
    )
    add_scorer(group)
    add_seed(group)


def _add_choice(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="make the best plan that costs so much of the large denoiser alone, or less, the bundle's default",
    )
    group.add_argument(
        "--by",
        choices=get_args(QualityMeasure),
        help="the quality that tells which is best (default: accuracy with a scorer, latent_error without)",
    )


def plan_from_arguments(namespace: argparse.Namespace) -> SplitSettings:
    """The command line as a plan.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    check_shared(namespace)
    check_number("--batch", namespace.batch, MAX_BATCH)
    check_number("--num-inference-steps", namespace.num_inference_steps, MAX_STEPS)
    check_number("--judge", namespace.judged, MAX_PROMPTS)
    if namespace.judged is not None and (namespace.held_out is None or namespace.budget is None):
        remedy = "Give --held-out FILE and --budget SHARE: the plan that is chosen is judged."
        raise ArgumentError("--judge", "nothing to judge", got=namespace.judged, remedy=remedy)
    if namespace.budget is not None and not 0 < namespace.budget < math.inf:
        raise ArgumentError("--budget", "not usable", got=namespace.budget, expected="a share such as 0.6")
    if namespace.by == "accuracy" and namespace.scorer is None:
        raise ArgumentError("--by", "accuracy is a scorer's", remedy="Give --scorer MODULE:FUNCTION.")
    values = {name: getattr(namespace, name) for name in SplitSettings.__slots__}
    values |= {"points": _numbers(namespace.points), "plans": tuple(namespace.plans)}
    return SplitSettings(**values)


def _numbers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        expected = "numbers of steps such as 0,10,25"
        raise ArgumentError("--points", "not numbers", got=text, expected=expected) from None
