"""`tandemrt bench setup`: installs a peer into an environment of its own, also where there is no package registry."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemrt.runtime.cache import cache_folder
from tandemrt.runtime.cli.reporter import Reporter

from .peer_table import PEERS, collect, named_peer, set_up


@dataclass(frozen=True, slots=True)
class SetupPlan:
    """The peers to install, and the cache that their environments are in.

    find_links: a folder of wheels to install from, without a registry. download: one to fill, instead of installing.
    """

    names: tuple[str, ...]
    cache: Path
    find_links: Path | None
    download: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench setup`."""
    own = [name for name, peer in PEERS.items() if peer.requirements]
    parser.add_argument("names", nargs="+", metavar="PEER", help=f"{', '.join(own)}; others need no more than export")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where environments are kept; see build-engine")
    wheels = parser.add_mutually_exclusive_group()
    wheels.add_argument("--download", type=Path, metavar="DIR", help="fill a folder with wheels, and install nothing")
    wheels.add_argument("--find-links", type=Path, metavar="DIR", help="install from that folder, without a registry")


def plan_from_arguments(namespace: argparse.Namespace) -> SetupPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: a peer is unknown.
    """
    for name in namespace.names:
        named_peer(name, "PEER")
    names = tuple(dict.fromkeys(namespace.names))
    return SetupPlan(names, cache_folder(namespace.cache), namespace.find_links, namespace.download)


def run(plan: SetupPlan, reporter: Reporter) -> dict[str, Any]:
    """Install them, or fill the folder.

    Raises:
        BenchmarkError: one cannot be installed.
    """
    made = {}
    for done, name in enumerate(plan.names):
        reporter.progress(f"install {name}", done, len(plan.names))
        if not named_peer(name).requirements:
            made[name] = ""
        elif plan.download is None:
            made[name] = str(set_up(name, plan.cache, plan.find_links))
        else:
            collect(name, plan.download)
            made[name] = str(plan.download)
    reporter.progress("installed", len(plan.names), len(plan.names))
    return {"environments" if plan.download is None else "wheels": made}


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as lines."""
    for made in result.values():
        for name, folder in made.items():
            yield f"{name}: {folder or 'runs in this environment'}"
