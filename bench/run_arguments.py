"""The arguments of `tandemrt bench BUNDLE`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemrt.runtime.cli.values import parse_sources
from tandemrt.runtime.plan import PLACEMENTS

from .peer_table import PEERS, named_peer
from .shared_arguments import BUNDLES, Shared, add_shared, different, require_least, shared_from

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
    """What to measure and beside what; None stands for the bundle's default.

    sources: checkpoints by component. limits: whether what the machine does at best is measured too.
    """

    shared: Shared
    checkpoint: Path | None
    sources: Mapping[str, Path]
    peers: tuple[str, ...]
    steps: str | None
    placement: str
    decoder: str | None
    num_images_per_prompt: int
    limits: bool

    @property
    def facts(self) -> Mapping[str, str]:
        """What was asked for, for the report."""
        return {
            **self.shared.facts,
            "beside": ", ".join(self.peers) or "nothing",
            "steps": self.steps or BUNDLES,
            "placement": self.placement,
            "decoder": self.decoder or "the bundle's first",
            "pictures a call": str(self.num_images_per_prompt),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `tandemrt bench run` and `tandemrt bench cold` are told."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_shared(parser)
    how = parser.add_argument_group("how it is painted")
    how.add_argument("--steps", "--plan", metavar="STEPS", help="25, 10,15 or unet:10,unet_small:15; see generate")
    how.add_argument("--placement", choices=PLACEMENTS, default="batched", help="of guidance's branches")
    how.add_argument("--decoder", metavar="NAME", help="default: the bundle's first")
    how.add_argument("--num-images-per-prompt", "--batch-size", type=int, default=1, metavar="N", help="a call (1)")
    beside = parser.add_argument_group("beside what")
    beside.add_argument(
        "--peer",
        action="append",
        dest="peers",
        default=[],
        metavar="NAME",
        help=f"{', '.join(PEERS)}; several are measured in the same rounds",
    )
    beside.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="what the bundle was made of, for peers that read that"
    )
    beside.add_argument("--small", type=Path, metavar="DIR", help="the checkpoint of its `unet_small`")
    beside.add_argument("--tiny-vae", type=Path, metavar="DIR", help="the checkpoint of its `vae_decoder_tiny`")
    beside.add_argument("--add", action="append", default=[], metavar="NAME=DIR", help="that of any other component")


def plan_from_arguments(namespace: argparse.Namespace) -> RunPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    require_least("--num-images-per-prompt", namespace.num_images_per_prompt, 1)
    for name in namespace.peers:
        named_peer(name)
    parsed: dict[str, Any] = {
        "shared": shared_from(namespace),
        "sources": parse_sources(namespace.small, namespace.tiny_vae, namespace.add),
        "peers": different("--peer", namespace.peers),
        "limits": getattr(namespace, "limits", False),
    }
    as_given = {name: getattr(namespace, name) for name in RunPlan.__slots__ if name not in parsed}
    return RunPlan(**as_given, **parsed)
