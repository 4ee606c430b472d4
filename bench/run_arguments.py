"""The arguments of `tandemrt bench BUNDLE`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandemrt.runtime.arguments import thread_count
from tandemrt.runtime.cache import cache_folder
from tandemrt.runtime.cli.values import parse_size, parse_sources
from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.plan import PLACEMENTS
from tandemrt.runtime.targets import parse_target

from .peer_table import PEERS, named_peer
from .rounds import Rounds

DESCRIPTION = (
    "Measure a bundle end to end and part by part, beside what would run the same model otherwise, in the same rounds, "
    "and write a report: report.json, report.md and report.html."
)
EPILOG = """\
examples:
  tandemrt bench bundle/ --target openvino:cpu --out report/
  tandemrt bench bundle/ --steps 10,15 --checkpoint sd15/ --small small-unet/ --peer diffusers --out report/
  tandemrt bench --preset sdxs-512-0.9 --peer diffusers --peer diffusers-compile --out report/
"""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What to measure and beside what; None stands for the bundle's default. sources: checkpoints by component."""

    bundle: Path | None
    preset: str | None
    scale: str
    dtype: str
    checkpoint: Path | None
    sources: Mapping[str, Path]
    targets: tuple[str, ...]
    peers: tuple[str, ...]
    steps: str | None
    guidance_scale: float | None
    placement: str
    decoder: str | None
    size: tuple[int, int] | None
    num_images_per_prompt: int
    prompt: str
    threads: int | None
    rounds: Rounds
    cache: Path
    out: Path
    force: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench run`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="a folder that `tandemrt export` made")
    _add_what(parser.add_argument_group("instead of a bundle"))
    _add_how(parser.add_argument_group("what is painted"))
    _add_beside(parser.add_argument_group("beside what"))
    where = parser.add_argument_group("where, how often")
    where.add_argument(
        "--target",
        action="append",
        dest="targets",
        default=[],
        metavar="TARGET",
        help="backend:device[:precision]; several are measured in the same rounds (default: auto)",
    )
    where.add_argument("--threads", type=int, metavar="N", help="how many CPU threads a model may use, of all")
    where.add_argument("--warm-up", type=int, default=1, metavar="N", help="rounds before the first that counts (1)")
    where.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds that count (7)")
    where.add_argument("--seed", type=int, default=0, metavar="N", help="of the first round; each next has the next")
    where.add_argument("--cache", type=Path, metavar="DIR", help="where engines, presets and peers are kept")
    where.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the report")
    where.add_argument("--force", action="store_true", help="replace a report that is there")


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset", metavar="NAME", help="export a published architecture with random weights, and measure that"
    )
    group.add_argument("--scale", choices=("full", "tiny"), default="full", help="of the preset (default: full)")
    group.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of its weights (default: fp32)")


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", "--plan", metavar="STEPS", help="25, 10,15 or unet:10,unet_small:15; see generate")
    group.add_argument("--guidance-scale", type=float, metavar="X", help="default: the bundle's")
    group.add_argument("--placement", choices=PLACEMENTS, default="batched", help="of guidance's branches")
    group.add_argument("--decoder", metavar="NAME", help="default: the bundle's first")
    group.add_argument("--size", metavar="PIXELS", help="512, or 768x512; default: the bundle's")
    group.add_argument("--num-images-per-prompt", "--batch-size", type=int, default=1, metavar="N", help="a call (1)")
    group.add_argument("--prompt", default="a red circle left of a blue square", metavar="TEXT")


def _add_beside(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--peer",
        action="append",
        dest="peers",
        default=[],
        metavar="NAME",
        help=f"{', '.join(PEERS)}; several are measured in the same rounds",
    )
    group.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="what the bundle was made of, for peers that read that"
    )
    group.add_argument("--small", type=Path, metavar="DIR", help="the checkpoint of its `unet_small`")
    group.add_argument("--tiny-vae", type=Path, metavar="DIR", help="the checkpoint of its `vae_decoder_tiny`")
    group.add_argument("--add", action="append", default=[], metavar="NAME=DIR", help="that of any other component")


def plan_from_arguments(namespace: argparse.Namespace) -> RunPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    if (namespace.bundle is None) == (namespace.preset is None):
        raise ArgumentError("BUNDLE, --preset", "what to measure", expected="one of the two")
    thread_count("--threads", namespace.threads)
    for option, number, least in (
        ("--warm-up", namespace.warm_up, 0),
        ("--rounds", namespace.rounds, 1),
        ("--num-images-per-prompt", namespace.num_images_per_prompt, 1),
    ):
        if number < least:
            raise ArgumentError(option, "not usable", got=number, expected=f"{least} or more")
    for name in namespace.peers:
        named_peer(name)
    parsed = {
        "sources": parse_sources(namespace.small, namespace.tiny_vae, namespace.add),
        "targets": tuple(dict.fromkeys(str(parse_target(target)) for target in namespace.targets or ("auto",))),
        "peers": tuple(dict.fromkeys(namespace.peers)),
        "size": None if namespace.size is None else parse_size(namespace.size),
        "rounds": Rounds(namespace.warm_up, namespace.rounds, namespace.seed),
        "cache": cache_folder(namespace.cache),
    }
    as_given = {name: getattr(namespace, name) for name in RunPlan.__slots__ if name not in parsed}
    return RunPlan(**as_given, **parsed)
