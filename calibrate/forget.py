"""`tandemrt calibrate forget`: what was measured and stored is a bundle's no longer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.bundle import Bundle
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError
from ..runtime.manifest import Manifest
from .shared_arguments import add_bundle
from .stored import store

# What a bundle's defaults call it.
_FIELDS = {"split": "steps", "interval": "guidance_interval", "adaptive": "adaptive", "hybridiff": "taus"}
DESCRIPTION = (
    "Take what `split` and `guidance` stored out of a bundle, with what was measured of it: requests that say nothing "
    "of steps run on the first denoiser again, as many as before, and guidance goes by what is built in."
)
EPILOG = """\
examples:
  tandemrt calibrate forget bundle/ split
  tandemrt calibrate forget bundle/ interval adaptive
"""


@dataclass(frozen=True, slots=True)
class ForgetPlan:
    """kinds: of what is stored, as `_FIELDS` has it."""

    bundle: Path
    kinds: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt calibrate forget`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_bundle(parser)
    parser.add_argument("kinds", nargs="+", choices=tuple(_FIELDS), metavar="KIND", help=f"of {', '.join(_FIELDS)}")


def plan_from_arguments(namespace: argparse.Namespace) -> ForgetPlan:
    """The command line as a plan."""
    return ForgetPlan(namespace.bundle, tuple(dict.fromkeys(namespace.kinds)))


def plan_facts(plan: ForgetPlan) -> dict[str, Any]:
    """What would be forgotten.

    Raises:
        ArgumentError: nothing of a kind is stored.
        BundleError: the bundle is damaged, foreign or newer than this runtime.
    """
    manifest = Bundle.open(plan.bundle).manifest
    _without(manifest, plan)
    stored = msgspec.to_builtins(manifest.defaults)
    return {"bundle": str(plan.bundle), "forgets": {kind: stored[_FIELDS[kind]] for kind in plan.kinds}}


def plan_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What would be forgotten, for a person."""
    yield from (f"{facts['bundle']}: {kind} {json.dumps(stored)}" for kind, stored in facts["forgets"].items())


def run(plan: ForgetPlan, reporter: Reporter) -> dict[str, Any]:
    """Replace the bundle's manifest with one without.

    Raises:
        ArgumentError: nothing of a kind is stored.
        BundleError: the bundle cannot be used, or see `store`.
    """
    facts = plan_facts(plan)
    changed = store(Bundle.open(plan.bundle), lambda manifest: _without(manifest, plan))
    return {**facts, "digest": changed.digest}


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """What was forgotten."""
    yield f"{result['bundle']}: {', '.join(result['forgets'])} forgotten, digest {result['digest']}"


def _without(manifest: Manifest, plan: ForgetPlan) -> Manifest:
    """A manifest with neither the defaults of these kinds nor what was measured of them."""
    defaults, calibrations = manifest.defaults, manifest.calibrations
    there = {kind for kind, field in _FIELDS.items() if getattr(defaults, field) is not None}
    for kind in plan.kinds:
        if kind not in there:
            stored = ", ".join(sorted(there)) or "nothing"
            raise ArgumentError(str(plan.bundle), f"nothing of the kind {kind} is stored", expected=f"of {stored}")
    kept = {kind: one for kind, one in calibrations.guidance.items() if kind not in plan.kinds}
    split = None if "split" in plan.kinds else calibrations.split
    return msgspec.structs.replace(
        manifest,
        defaults=msgspec.structs.replace(defaults, **dict.fromkeys(_FIELDS[kind] for kind in plan.kinds)),
        calibrations=msgspec.structs.replace(calibrations, split=split, guidance=kept),
    )
