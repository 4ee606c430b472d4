"""The arguments of `tandemrt calibrate guidance`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..runtime.arguments import finite_number
from ..runtime.errors import ArgumentError
from .guidance_candidates import KINDS
from .prompts import MAX_PROMPTS
from .shared_arguments import (
    add_bundle,
    add_discard,
    add_guidance_scale,
    add_held_out,
    add_judged,
    add_place,
    add_prompts,
    add_scorer,
    add_seed,
    check_number,
    check_shared,
)

PROMPTS, CANDIDATES = 64, 60
MIN_PSNR_DB, MAX_LOSS = 30.0, 0.01
MAX_CANDIDATES = 100_000
# What changes nothing until a request asks for it.
STORED = "adaptive,hybridiff"
DESCRIPTION = (
    "Find how much of guidance can be left out for a stated loss of quality: the part of the steps that need it, the "
    "thresholds of adaptive guidance, and the numbers that open and close Hybridiff's window. Settings are chosen with "
    "some prompts and judged by others, beside full guidance from the same noise. The same command goes on where it "
    "stopped."
)
EPILOG = """\
the loss that is allowed:
  --min-psnr DB      the PSNR of the mean squared error of all pictures to those with full guidance (default 30, where
                     there is no --scorer)
  --scorer M:F       a function that says of prompts and pictures whether they show these; with --max-loss X, the share
                     of pictures that do may be lower by X (default 0.01)

examples:
  tandemrt calibrate guidance bundle/ --prompts prompts.txt --held-out judged.txt --out guidance/
  tandemrt calibrate guidance bundle/ --prompts captions.csv -n 128 --held-out judged.txt --min-psnr 35 --store
  tandemrt calibrate guidance bundle/ --prompts prompts.txt --held-out judged.txt --kinds interval --store interval
"""


@dataclass(frozen=True, slots=True)
class GuidancePlan:
    """What to measure; None stands for the bundle's default, of min_psnr_db and max_loss for one that is not asked for.

    kinds, store: of `KINDS`.
    """

    bundle: Path
    prompts: Path
    column: str | None
    count: int | None
    held_out: Path
    judged: int | None
    steps: str | None
    guidance_scale: float | None
    min_psnr_db: float | None
    scorer: str | None
    max_loss: float | None
    kinds: tuple[str, ...]
    candidates: int
    target: str
    threads: int | None
    cache: Path | None
    seed: int
    out: Path
    discard: bool
    store: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt calibrate guidance`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_bundle(parser)
    _add_what(parser.add_argument_group("what to paint"))
    _add_loss(parser.add_argument_group("what to look for"))
    _add_where(parser.add_argument_group("where to run, where to write"))


def _add_where(group: argparse._ArgumentGroup) -> None:
    add_place(group, cache=False)
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where engines are, and where stages for the window are built; it has to be there",
    )
    group.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder for figures, curves and plots"
    )
    add_discard(group)
    group.add_argument(
        "--store",
        nargs="?",
        const=STORED,
        default="",
        metavar="KINDS",
        help="make what was found the bundle's: what adaptive guidance and the placement hybridiff use where they are "
        "asked for; with `interval` among KINDS, what every request has that names no interval (without KINDS: "
        f"{STORED})",
    )


def _add_what(group: argparse._ArgumentGroup) -> None:
    add_prompts(group, "to choose with", PROMPTS)
    add_held_out(group, "prompts to judge by", required=True)
    add_judged(group)
    group.add_argument(
        "--steps", "--num-inference-steps", metavar="STEPS", help="as of `generate` (default: the bundle's)"
    )
    add_guidance_scale(group)
    add_seed(group)


def _add_loss(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-psnr", dest="min_psnr_db", type=float, metavar="DB", help="see below")
    add_scorer(group)
    group.add_argument("--max-loss", type=float, metavar="X", help="see below")
    group.add_argument(
        "--kinds", default=",".join(KINDS), metavar="KINDS", help=f"of {', '.join(KINDS)} (default: all)"
    )
    group.add_argument(
        "--candidates",
        type=int,
        default=CANDIDATES,
        metavar="N",
        help=f"how many settings of each kind are tried at most (default {CANDIDATES})",
    )


def plan_from_arguments(namespace: argparse.Namespace) -> GuidancePlan:
    """The command line as a plan.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    check_shared(namespace)
    check_number("--judge", namespace.judged, MAX_PROMPTS)
    check_number("--candidates", namespace.candidates, MAX_CANDIDATES)
    given = {name: getattr(namespace, name) for name in GuidancePlan.__slots__}
    kinds = _kinds("--kinds", namespace.kinds)
    store = _kinds("--store", namespace.store) if namespace.store else ()
    measured = tuple(kind for kind in store if kind in kinds)
    if store and (not measured or (measured != store and namespace.store != STORED)):
        raise ArgumentError("--store", "not measured", got=namespace.store, expected=f"of --kinds {','.join(kinds)}")
    return GuidancePlan(**{**given, **_loss(namespace), "kinds": kinds, "store": measured})


def _loss(namespace: argparse.Namespace) -> dict[str, float | None]:
    min_psnr_db, max_loss, scorer = namespace.min_psnr_db, namespace.max_loss, namespace.scorer
    if max_loss is not None and scorer is None:
        raise ArgumentError("--max-loss", "given without a scorer", remedy="Give --scorer MODULE:FUNCTION.")
    if max_loss is not None and not 0 <= max_loss < 1:
        raise ArgumentError("--max-loss", "share of pictures", got=max_loss, expected="0 or more, below 1")
    if min_psnr_db is not None and (finite_number(min_psnr_db) or 0.0) <= 0:
        raise ArgumentError("--min-psnr", "decibels", got=min_psnr_db, expected="a number above 0")
    if scorer is None:
        return {"min_psnr_db": MIN_PSNR_DB if min_psnr_db is None else min_psnr_db, "max_loss": None}
    return {"min_psnr_db": min_psnr_db, "max_loss": MAX_LOSS if max_loss is None else max_loss}


def _kinds(option: str, text: str) -> tuple[str, ...]:
    named = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in named:
        if name not in KINDS:
            raise ArgumentError(option, "unknown kind", got=name, expected=f"of {', '.join(KINDS)}")
    return named
