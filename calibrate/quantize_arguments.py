"""The arguments of `tandemrt calibrate quantize`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..runtime.arguments import finite_number
from ..runtime.cache import require_folder
from ..runtime.errors import ArgumentError
from ..runtime.manifest import QuantizationFormat
from .int8 import Int8Settings
from .judged import Budget
from .observers import OBSERVERS
from .quality import MAX_PSNR_DB
from .quantizers import FORMATS, NEEDS_SAMPLES, TOOLS
from .ranges import LIMITS
from .shared_arguments import (
    add_bundle,
    add_discard,
    add_guidance_scale,
    add_place,
    add_prompts,
    add_scorer,
    check_shared,
)

PROMPTS, SAMPLES = 16, 64
INT8 = Int8Settings()
DESCRIPTION = (
    "Make a bundle of another one with its denoisers, decoders and text encoders in eight or four bits. Held-out "
    "prompts are painted with both, from the same noise, and what it took is in the new bundle's manifest. With a "
    "budget, the layers that hurt most stay in floating point until it holds. The same command goes on where it was "
    "interrupted. The bundle it is made of stays as it is."
)
EPILOG = """\
formats:
  int8           activations and weights, computed in eight bits; needs --trajectories of `tandemrt calibrate collect`
  fp8            both in E4M3, of denoisers alone, for TensorRT on GPUs from sm89 on; needs them too
  int8-weights   weights alone, files of a quarter of fp32's size and half of fp16's, computed as before; OpenVINO
                 needs as much memory for convolutions as before
  int4-weights   those of matrix products in four bits, of convolutions in eight

examples:
  tandemrt calibrate quantize bundle/ --out bundle-int8/ --trajectories trajectories/ --prompts held-out.txt
  tandemrt calibrate quantize bundle/ --out bundle-int8/ --trajectories trajectories/ --prompts held-out.txt \\
      --component unet --min-psnr 30
  tandemrt calibrate quantize bundle/ --out small/ --format int8-weights
"""
_ACCURACY = re.compile(r"(\d*\.?\d+)x")


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What to quantize, and how candidates are judged.

    components: all that can be where none is named. samples: how many calibrate at most. count: how many prompts
    judge. steps: for a denoiser's pictures, as `collect` takes them. discard: whether to measure anew in any case.
    """

    bundle: Path
    out: Path
    force: bool
    format: QuantizationFormat
    tool: str | None
    trajectories: Path | None
    components: tuple[str, ...]
    keep: tuple[str, ...]
    int8: Int8Settings
    samples: int
    budget: Budget
    prompts: Path | None
    column: str | None
    count: int | None
    scorer: str | None
    steps: str | None
    guidance_scale: float | None
    target: str
    threads: int | None
    cache: Path | None
    discard: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt calibrate quantize`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_bundle(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="NEW", help="the new bundle's folder")
    parser.add_argument("--force", action="store_true", help="replace a bundle at NEW")
    _add_how(parser.add_argument_group("what to quantize, and how"))
    _add_judging(parser.add_argument_group("how it is judged"))


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--format", choices=tuple(FORMATS), default="int8", help="see below (default: int8)")
    group.add_argument(
        "--tool",
        choices=tuple(TOOLS),
        metavar="NAME",
        help="have this package make the graphs: nncf, Intel's, makes int8 (default: TandemRT itself)",
    )
    group.add_argument(
        "--trajectories", type=Path, metavar="DIR", help="what the models are given, from `tandemrt calibrate collect`"
    )
    group.add_argument(
        "--component",
        action="append",
        default=[],
        metavar="NAME",
        help="a denoiser, and but for fp8 a decoder or text encoder; may be given several times (default: all that the "
        "trajectories are of, without these all but denoisers with a scheduler of their own)",
    )
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="LAYER",
        help="a layer to leave in floating point, by its node's name or a pattern such as 'up_blocks.*'; may be given "
        "several times",
    )
    group.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help=f"how many runs of a model calibrate at most, evenly of those kept (default: {SAMPLES})",
    )
    group.add_argument(
        "--observer", choices=tuple(OBSERVERS), help=f"where int8 clips activations (default: {INT8.observer})"
    )
    group.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help=f"of the magnitudes, for --observer percentile (default: {INT8.percentile})",
    )
    group.add_argument(
        "--smoothing",
        metavar="ALPHA",
        help=f"how much of an outlier channel int8 moves into weights, 0 to 1, or off (default: {INT8.smoothing})",
    )


def _add_judging(group: argparse._ArgumentGroup) -> None:
    use = "to judge by, held out: none that was calibrated with; with a budget as many behind them are searched with"
    add_prompts(group, use, PROMPTS, required=False)
    group.add_argument(
        "--min-psnr",
        type=float,
        metavar="DB",
        help="what the PSNR of the mean squared error to the float bundle's pictures has to be",
    )
    group.add_argument(
        "--min-accuracy",
        metavar="SHAREx",
        help="what the share of right pictures has to be of the float bundle's, such as 0.97x; needs --scorer",
    )
    add_scorer(group)
    group.add_argument(
        "--steps",
        metavar="STEPS",
        help="what is run for these pictures, as in `generate` (default: as in the trajectories)",
    )
    add_guidance_scale(group, "the trajectories', else the bundle's")
    add_place(group)
    add_discard(group)


def plan_from_arguments(namespace: argparse.Namespace) -> QuantizePlan:
    """The command line as a plan.

    Raises:
        ArgumentError: an option's value cannot be used, or options do not go together.
    """
    check_shared(namespace)
    require_folder(namespace.cache)
    if namespace.format in NEEDS_SAMPLES and namespace.trajectories is None:
        remedy = "Make them with `tandemrt calibrate collect`, or ask for int8-weights, which needs none."
        raise ArgumentError("--trajectories", f"not given, and {namespace.format} needs them", remedy=remedy)
    if namespace.tool is not None and TOOLS[namespace.tool][0] != namespace.format:
        remedy = f"It makes {TOOLS[namespace.tool][0]}."
        raise ArgumentError("--tool", f"{namespace.tool} does not make {namespace.format}", remedy=remedy)
    budget = _budget(namespace)
    _require_of_use(namespace)
    _require_numbers(namespace)
    if namespace.discard and not budget.asks and (namespace.format not in NEEDS_SAMPLES or namespace.tool is not None):
        remedy = "Give --min-psnr or --min-accuracy, or leave it out: nothing else is kept."
        raise ArgumentError("--discard", "given without a budget", remedy=remedy)
    return QuantizePlan(
        bundle=namespace.bundle,
        out=namespace.out,
        force=namespace.force,
        format=namespace.format,
        tool=namespace.tool,
        trajectories=namespace.trajectories,
        components=tuple(dict.fromkeys(namespace.component)),
        keep=tuple(namespace.keep),
        int8=_int8(namespace),
        samples=SAMPLES if namespace.samples is None else namespace.samples,
        budget=budget,
        prompts=namespace.prompts,
        column=namespace.column,
        count=namespace.count,
        scorer=namespace.scorer,
        steps=namespace.steps,
        guidance_scale=namespace.guidance_scale,
        target=namespace.target,
        threads=namespace.threads,
        cache=namespace.cache,
        discard=namespace.discard,
    )


def _require_of_use(namespace: argparse.Namespace) -> None:
    """Raise ArgumentError where an option is given that what is asked for would not use."""
    form, own = namespace.format, namespace.tool is None
    what = form if own else f"{form} by {namespace.tool}"
    used = {
        "--samples": form in NEEDS_SAMPLES,
        "--observer": form == "int8" and own,
        "--percentile": form == "int8" and own,
        "--smoothing": form == "int8",
    }
    for option, of_use in used.items():
        if getattr(namespace, option.removeprefix("--")) is not None and not of_use:
            raise ArgumentError(option, f"of no use for {what}", remedy="Leave it out.")
    if namespace.percentile is not None and namespace.observer != "percentile":
        raise ArgumentError("--percentile", "given without --observer percentile", remedy="Give both, or none.")
    if namespace.min_accuracy is not None and namespace.scorer is None:
        raise ArgumentError("--min-accuracy", "given without --scorer", remedy="Give what tells right pictures.")
    judging = {
        "-n": namespace.count,
        "--column": namespace.column,
        "--scorer": namespace.scorer,
        "--min-psnr": namespace.min_psnr,
    }
    for option, value in judging.items():
        if value is not None and namespace.prompts is None:
            raise ArgumentError(option, "given without --prompts", remedy="Give held-out prompts to judge by.")


def _require_numbers(namespace: argparse.Namespace) -> None:
    """Raise ArgumentError where a number is out of range, or is none."""
    least = LIMITS.least_samples
    if namespace.samples is not None and namespace.samples < least:
        raise ArgumentError("--samples", "how many", got=namespace.samples, expected=f"{least} or more")
    psnr = namespace.min_psnr
    if psnr is not None and not 0 < psnr <= MAX_PSNR_DB:
        expected = f"decibels above 0, up to {MAX_PSNR_DB:g}, which equal pictures have"
        raise ArgumentError("--min-psnr", "out of range", got=psnr, expected=expected)
    scale = namespace.guidance_scale
    if scale is not None and finite_number(scale) is None:
        raise ArgumentError("--guidance-scale", "out of range", got=scale, expected="a finite number")


def _budget(namespace: argparse.Namespace) -> Budget:
    text = namespace.min_accuracy
    if text is None:
        return Budget(namespace.min_psnr)
    found = _ACCURACY.fullmatch(text)
    if found is None or not 0 < float(found[1]) <= 1:
        expected = "a share of the float bundle's accuracy, such as 0.97x"
        raise ArgumentError("--min-accuracy", "not a share", got=text, expected=expected)
    return Budget(namespace.min_psnr, float(found[1]))


def _int8(namespace: argparse.Namespace) -> Int8Settings:
    return Int8Settings(
        observer=INT8.observer if namespace.observer is None else namespace.observer,
        percentile=INT8.percentile if namespace.percentile is None else namespace.percentile,
        smoothing=INT8.smoothing if namespace.smoothing is None else _smoothing(namespace.smoothing),
        limits=replace(LIMITS, threads=namespace.threads),
    )


def _smoothing(text: str) -> float | None:
    if text == "off":
        return None
    try:
        return float(text)
    except ValueError:
        raise ArgumentError("--smoothing", "not a number", got=text, expected="0 to 1, or off") from None
