"""The arguments of `tandemrt calibrate quality`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import ArgumentError
from .shared_arguments import add_scorer

DESCRIPTION = (
    "Measure the pictures of a folder: beside those of another, of the same names (psnr, ssim, lpips) or as a whole "
    "(fid), and by their prompts (clip, and a scorer of your own). What needs networks whose weights are not here is "
    "told, and the rest is measured."
)
EPILOG = """\
measures:
  psnr   in dB, at most 99, which equal pictures have; higher is closer
  ssim   structural similarity, 1 for equal pictures
  lpips  distance by AlexNet's features, 0 for equal pictures
  fid    Frechet distance of Inception's features over both folders; lower is closer, thousands of pictures are needed
  clip   CLIP score, 100 times the cosine of prompt and picture by CLIP ViT-L/14; higher is better

examples:
  tandemrt calibrate quality int8/ --against fp32/
  tandemrt calibrate quality split/ --against coco/ --measure fid clip --prompts captions.csv
  tandemrt calibrate quality split/ --scorer my_scores:shows
"""
PAIRED, AGAINST, PROMPTED = ("psnr", "ssim", "lpips"), ("psnr", "ssim", "lpips", "fid"), ("clip",)
MEASURES = (*AGAINST, *PROMPTED)


@dataclass(frozen=True, slots=True)
class QualityPlan:
    """What to measure of which pictures. `asked`: whether the measures were named, and so have to be had."""

    pictures: Path
    against: Path | None
    prompts: Path | None
    column: str | None
    measures: tuple[str, ...]
    asked: bool
    scorer: str | None
    inception: Path | None
    clip: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt calibrate quality`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="the folder of what is measured")
    parser.add_argument("--against", type=Path, metavar="REFERENCES", help="the folder they are compared with")
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=MEASURES,
        metavar="NAME",
        help=f"{', '.join(MEASURES)} (default: all there can be)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="the pictures' prompts in the order of their names, one a line or a CSV file; pictures that TandemRT "
        "painted of prompts in it keep their own (default: those that TandemRT wrote into the pictures)",
    )
    parser.add_argument(
        "--column", metavar="NAME", help="the column (default: the first there is of caption, prompt and text)"
    )
    add_scorer(parser)
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="the network of fid: weights as torch-fidelity has them (.pth), "
        "a TorchScript module (.pt) or an ONNX graph",
    )
    parser.add_argument("--clip", type=Path, metavar="DIR", help="the model of clip, as transformers saves one")


def plan_from_arguments(namespace: argparse.Namespace) -> QualityPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: a measure was asked for that needs --against.
    """
    asked = tuple(dict.fromkeys(namespace.measure or ()))
    if namespace.against is None and set(asked) & set(AGAINST):
        needy = [name for name in asked if name in AGAINST]
        raise ArgumentError("--measure", f"{', '.join(needy)} without --against", remedy="Give --against FOLDER.")
    there_can_be = PROMPTED if namespace.against is None else MEASURES
    return QualityPlan(
        pictures=namespace.pictures,
        against=namespace.against,
        prompts=namespace.prompts,
        column=namespace.column,
        measures=asked or there_can_be,
        asked=bool(asked),
        scorer=namespace.scorer,
        inception=namespace.inception,
        clip=namespace.clip,
    )
