"""Arguments that several of the programs run by `python -m tandemrt.bench…` have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_report(parser: argparse.ArgumentParser) -> None:
    """Declare --json, as `write_report` takes it."""
    parser.add_argument(
        "--json",
        type=Path,
        required=True,
        metavar="FILE",
        help="where the figures go; a .md of the tables beside it",
    )


def add_rounds(parser: argparse.ArgumentParser, warm_up: int, repeats: int, rounds: str = "rounds") -> None:
    """Declare --warm-up and --repeats with their defaults; rounds: what is counted."""
    before, counted = f"{rounds} before the first that counts", f"{rounds} that count"
    parser.add_argument("--warm-up", type=int, default=warm_up, metavar="N", help=f"{before} (default {warm_up})")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"{counted} (default {repeats})")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Declare --threads."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a model; the backend's choice by default")
