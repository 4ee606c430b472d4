"""The arguments of `tandemrt calibrate collect`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..runtime.cli.prompts import require_text
from ..runtime.errors import ArgumentError
from .shared_arguments import (
    add_bundle,
    add_discard,
    add_held_out,
    add_pictures,
    add_place,
    add_prompts,
    add_seed,
    check_shared,
)

PROMPTS = 64
ROWS = 4
DESCRIPTION = (
    "Paint prompts with a bundle and keep what its models are given: the denoisers at time steps spread evenly, in "
    "both branches of guidance, the text encoders, and the decoders. What is kept is for the other calibrations. The "
    "same command goes on where it was interrupted."
)
EPILOG = """\
steps:
  Without --steps, or with a number, the denoisers that share the bundle's scheduler, or those that --denoiser names,
  run in turns, alone and handing over to each other in the middle, so that each is seen at every time step as often.
  With steps by denoiser, such as 10,15 or unet:10,unet_small:15, every prompt is painted so, and a denoiser is seen at
  its own steps alone.

examples:
  tandemrt calibrate collect bundle/ --prompts prompts.txt -n 64 --held-out judged.txt --out trajectories/
  tandemrt calibrate collect bundle/ --prompts captions.csv --column caption --steps 25 --out trajectories/
  tandemrt calibrate collect bundle/ --prompts prompts.txt --denoiser unet_one_step --steps 1 \\
      --guidance-scale 0 --out one-step/
"""


@dataclass(frozen=True, slots=True)
class CollectPlan:
    """What to collect; None stands for the bundle's default, of count for 64 or as many prompts as there are."""

    bundle: Path
    prompts: Path
    column: str | None
    count: int | None
    held_out: Path | None
    rows: int
    target: str
    threads: int | None
    cache: Path | None
    denoisers: tuple[str, ...]
    steps: str | None
    guidance_scale: float | None
    negative_prompt: str | None
    height: int | None
    width: int | None
    seed: int
    out: Path
    discard: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt calibrate collect`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_bundle(parser)
    what = parser.add_argument_group("what to paint, and what to keep")
    add_prompts(what, "to paint", PROMPTS)
    add_held_out(what)
    what.add_argument(
        "--rows",
        type=int,
        default=ROWS,
        metavar="N",
        help=f"how many rows of the schedule, at as many time steps, are kept of a prompt (default: {ROWS})",
    )
    _add_how(parser.add_argument_group("how to paint it"))
    where = parser.add_argument_group("where to run, where to write")
    add_place(where)
    where.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for what is kept")
    add_discard(where)


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", metavar="STEPS", help="see below (default: the bundle's number of steps)")
    group.add_argument(
        "--denoiser",
        dest="denoisers",
        action="append",
        default=[],
        metavar="NAME",
        help="a denoiser that is to run, in turns with others that are named so; see below",
    )
    add_pictures(group)
    add_seed(group)


def plan_from_arguments(namespace: argparse.Namespace) -> CollectPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    check_shared(namespace)
    if namespace.rows < 1:
        raise ArgumentError("--rows", "number of rows", got=namespace.rows, expected="1 or more")
    if namespace.negative_prompt is not None:
        require_text("--negative-prompt", namespace.negative_prompt)
    as_given = {name: getattr(namespace, name) for name in CollectPlan.__slots__ if name != "denoisers"}
    return CollectPlan(**as_given, denoisers=tuple(dict.fromkeys(namespace.denoisers)))
