"""`tandemrt bench setup`: installs a peer into an environment of its own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemrt.runtime.cache import cache_folder
from tandemrt.runtime.cli.reporter import Reporter

from .peer_table import PEERS, named_peer, set_up


@dataclass(frozen=True, slots=True)
class SetupPlan:
    """The peers to install, and the cache that their environments are in."""

    names: tuple[str, ...]
    cache: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench setup`."""
    own = [name for name, peer in PEERS.items() if peer.requirements]
    parser.add_argument("names", nargs="+", metavar="PEER", help=f"{', '.join(own)}; others need no more than export")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where environments are kept; see build-engine")


def plan_from_arguments(namespace: argparse.Namespace) -> SetupPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: a peer is unknown.
    """
    for name in namespace.names:
        named_peer(name)
    return SetupPlan(tuple(dict.fromkeys(namespace.names)), cache_folder(namespace.cache))


def run(plan: SetupPlan, reporter: Reporter) -> dict[str, Any]:
    """Install them.

    Raises:
        BenchmarkError: one cannot be installed.
    """
    made = {}
    for done, name in enumerate(plan.names):
        reporter.progress(f"install {name}", done, len(plan.names))
        made[name] = str(set_up(name, plan.cache)) if named_peer(name).requirements else ""
    reporter.progress("installed", len(plan.names), len(plan.names))
    return {"environments": made}


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as lines."""
    for name, folder in result["environments"].items():
        yield f"{name}: {folder or 'runs in this environment'}"
