"""Arguments that several calibrations have: the bundle, prompts, a scorer, and where to run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runtime.arguments import thread_count
from ..runtime.errors import ArgumentError
from .prompts import MAX_PROMPTS

JUDGED = 100


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Declare BUNDLE."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `tandemrt export` made")


def add_prompts(group: argparse._ArgumentGroup, use: str, default: int | None, *, required: bool = True) -> None:
    """Declare --prompts, --column and -n, as `chosen_prompts` takes them. use: what the prompts are for."""
    group.add_argument(
        "--prompts",
        type=Path,
        required=required,
        metavar="FILE",
        help=f"prompts {use}, one a line, or a .csv or .tsv with a column of them",
    )
    group.add_argument(
        "--column",
        metavar="NAME",
        help="the column of a table (default: the first there is of caption, prompt and text)",
    )
    told = "all" if default is None else f"{default}, or as many as there are"
    group.add_argument(
        "-n", dest="count", type=int, metavar="N", help=f"how many of the prompts, the first ones (default: {told})"
    )


def add_held_out(
    group: argparse._ArgumentGroup, use: str = "prompts to judge by later", *, required: bool = False
) -> None:
    """Declare --held-out. use: what the prompts are for."""
    group.add_argument(
        "--held-out",
        type=Path,
        required=required,
        metavar="FILE",
        help=f"{use}, in the same column where it is a table of the same kind; it is an error if one is taken here",
    )


def add_judged(group: argparse._ArgumentGroup) -> None:
    """Declare --judge."""
    group.add_argument(
        "--judge",
        dest="judged",
        type=int,
        metavar="N",
        help=f"how many of these, the first ones (default: {JUDGED}, or as many as there are)",
    )


def add_guidance_scale(group: argparse._ArgumentGroup, default: str = "the bundle's") -> None:
    """Declare --guidance-scale. default: whose it is otherwise."""
    group.add_argument("--guidance-scale", type=float, metavar="X", help=f"default: {default}")


def add_pictures(group: argparse._ArgumentGroup) -> None:
    """Declare --guidance-scale, --negative-prompt, --height and --width."""
    add_guidance_scale(group)
    group.add_argument("--negative-prompt", metavar="TEXT", help="for every prompt (default: none)")
    group.add_argument("--height", type=int, metavar="PIXELS", help="default: the bundle's")
    group.add_argument("--width", type=int, metavar="PIXELS", help="default: the bundle's")


def add_seed(group: argparse._ArgumentGroup) -> None:
    """Declare --seed."""
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first prompt; each next one has the next (default: 0)"
    )


def add_scorer(group: argparse._ActionsContainer) -> None:
    """Declare --scorer."""
    group.add_argument(
        "--scorer",
        metavar="MODULE:FUNCTION",
        help="a Python function that is given prompts and their pictures, (B, H, W, 3) uint8, and says of each whether "
        "it is right",
    )


def add_place(group: argparse._ArgumentGroup, *, cache: bool = True) -> None:
    """Declare --target, --threads and --cache."""
    group.add_argument(
        "--target", default="auto", metavar="TARGET", help="backend:device[:precision], or auto (default)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="how many CPU threads a model may use")
    if cache:
        group.add_argument("--cache", type=Path, metavar="DIR", help="where engines are looked for; see build-engine")


def add_discard(group: argparse._ArgumentGroup) -> None:
    """Declare --discard."""
    group.add_argument(
        "--discard",
        action="store_true",
        help="start over where there is a run already, of whatever settings",
    )


def check_shared(namespace: argparse.Namespace) -> None:
    """Raise ArgumentError for a -n or --threads that cannot be used."""
    thread_count("--threads", namespace.threads)
    check_number("-n", namespace.count, MAX_PROMPTS)


def check_number(option: str, number: int | None, most: int) -> None:
    """Raise ArgumentError unless a number that was given is 1 to `most`."""
    if number is not None and not 1 <= number <= most:
        raise ArgumentError(option, "not usable", got=number, expected=f"1 to {most}")
