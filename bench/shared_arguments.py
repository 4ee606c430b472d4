"""Arguments that several benchmarks have: what is measured, where, how often, where the report goes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemrt.runtime.arguments import did_you_mean, thread_count
from tandemrt.runtime.cache import cache_folder
from tandemrt.runtime.cli.values import parse_size
from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.targets import parse_target

from .command import COMMANDS
from .rounds import Rounds

# What is told of what was not asked for.
BUNDLES = "the bundle's"
PROMPT = "a red circle left of a blue square"
# Of a benchmark that paints nothing, which declares no arguments of pictures.
UNPAINTED: Mapping[str, Any] = {"size": None, "guidance_scale": None, "prompt": PROMPT, "seed": 0}


@dataclass(frozen=True, slots=True)
class Shared:
    """What every benchmark of a bundle is told; None stands for the bundle's default.

    preset: exported with random weights instead of a bundle. size: (width, height) in pixels.
    """

    bundle: Path | None
    preset: str | None
    scale: str
    dtype: str
    targets: tuple[str, ...]
    size: tuple[int, int] | None
    guidance_scale: float | None
    prompt: str
    threads: int | None
    rounds: Rounds
    cache: Path
    out: Path
    force: bool

    @property
    def subject(self) -> str:
        """What is measured, without its path: that says nothing on another machine."""
        return f"preset {self.preset} {self.scale} {self.dtype}" if self.bundle is None else self.bundle.name

    @property
    def whereabouts(self) -> Mapping[str, str]:
        """What is measured and where, for the report."""
        return {"of": self.subject, "targets": ", ".join(self.targets)}

    @property
    def facts(self) -> Mapping[str, str]:
        """What was asked for of a benchmark that paints, for the report."""
        return {
            **self.whereabouts,
            "size": BUNDLES if self.size is None else f"{self.size[0]}x{self.size[1]}",
            "guidance scale": BUNDLES if self.guidance_scale is None else f"{self.guidance_scale:g}",
            "prompt": f"{self.prompt!r} and the seed",
        }


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Declare BUNDLE or --preset, what of a picture all benchmarks are told, where, how often."""
    add_subject(parser)
    picture = parser.add_argument_group("what is painted")
    picture.add_argument("--size", metavar="PIXELS", help="512, or 768x512; default: the bundle's")
    picture.add_argument("--guidance-scale", type=float, metavar="X", help="default: the bundle's")
    picture.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"default: {PROMPT!r}")
    where = add_runs(parser)
    where.add_argument("--seed", type=int, default=0, metavar="N", help="of the first round; each next has the next")


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Declare BUNDLE or --preset."""
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="a folder that `tandemrt export` made")
    preset = parser.add_argument_group("instead of a bundle")
    preset.add_argument(
        "--preset", metavar="NAME", help="export a published architecture with random weights, and measure that"
    )
    preset.add_argument("--scale", choices=("full", "tiny"), help="of the preset (default: full)")
    preset.add_argument("--dtype", choices=("fp32", "fp16"), help="of its weights (default: fp32)")


def add_runs(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare what `add_where` does, for models that run here: with how many threads, after how many rounds."""
    where = add_where(parser, rounds=7)
    where.add_argument("--threads", type=int, metavar="N", help="how many CPU threads a model may use, of all")
    where.add_argument("--warm-up", type=int, default=2, metavar="N", help="rounds before the first that counts (2)")
    return where


def add_where(parser: argparse.ArgumentParser, rounds: int) -> argparse._ArgumentGroup:
    """Declare targets, how many rounds count, and the folders. rounds: their number by default."""
    where = parser.add_argument_group("where, how often")
    where.add_argument(
        "--target",
        action="append",
        dest="targets",
        default=[],
        metavar="TARGET",
        help="backend:device[:precision]; several are measured in the same rounds (default: auto)",
    )
    where.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"rounds that count ({rounds})")
    where.add_argument("--cache", type=Path, metavar="DIR", help="where engines, presets and peers are kept")
    where.add_argument("--out", type=Path, metavar="DIR", help="the folder for the report, which has to be given")
    where.add_argument("--force", action="store_true", help="replace a report that is there")
    return where


def shared_from(namespace: argparse.Namespace, least_warm_up: int = 1) -> Shared:
    """These arguments.

    Raises:
        ArgumentError: one cannot be used.
    """
    if (namespace.bundle is None) == (namespace.preset is None):
        raise ArgumentError("BUNDLE, --preset", "what to measure", expected="one of the two")
    for option in ("scale", "dtype"):
        if namespace.preset is None and getattr(namespace, option) is not None:
            raise ArgumentError(
                f"--{option}", "is of a --preset", remedy="Leave it out: a bundle is as it was exported."
            )
    if namespace.out is None:
        _require_known(namespace.bundle)
        raise ArgumentError("--out", "not given", expected="the folder for the report")
    thread_count("--threads", namespace.threads)
    require_least("--warm-up", namespace.warm_up, least_warm_up)
    require_least("--rounds", namespace.rounds, 1)
    parsed = {
        "bundle": None if namespace.bundle is None else namespace.bundle.resolve(),
        "scale": namespace.scale or "full",
        "dtype": namespace.dtype or "fp32",
        "targets": different("--target", [str(parse_target(target)) for target in namespace.targets or ("auto",)]),
        "size": None if namespace.size is None else parse_size(namespace.size),
        "rounds": Rounds(namespace.warm_up, namespace.rounds, namespace.seed),
        "cache": cache_folder(namespace.cache).resolve(),
    }
    as_given = {name: getattr(namespace, name) for name in Shared.__slots__ if name not in parsed}
    return Shared(**as_given, **parsed)


def _require_known(bundle: Path | None) -> None:
    """Raise ArgumentError for a word that is neither a folder nor, as it reached a benchmark, a command."""
    if bundle is not None and not bundle.is_dir():
        expected = f"a folder that `tandemrt export` made, or one of {', '.join(COMMANDS)}"
        remedy = did_you_mean(str(bundle), COMMANDS)
        raise ArgumentError("BUNDLE", "no such folder or command", got=str(bundle), expected=expected, remedy=remedy)


def different(option: str, given: Sequence[str]) -> tuple[str, ...]:
    """What an option was given, several times. ArgumentError: the same twice."""
    twice = next((one for one in given if given.count(one) > 1), None)
    if twice is not None:
        raise ArgumentError(option, "given twice", got=twice, remedy="Name it once; --rounds says how often it runs.")
    return tuple(given)


def require_least(option: str, number: int, least: int) -> None:
    """Raise ArgumentError for a number below the least that can be used."""
    if number < least:
        raise ArgumentError(option, "not usable", got=number, expected=f"{least} or more")
