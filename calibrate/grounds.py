"""What all figures of a measurement rest on, whichever is made."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

import msgspec

from ..runtime.architecture import cpu_architecture, usable_cpus
from ..runtime.backends import gpu_names
from ..runtime.bundle import Bundle
from ..runtime.calibrations import Calibrations
from ..runtime.manifest import Manifest
from ..runtime.targets import Target, installed_version
from .scorers import NamedScorer


def ground_of(
    bundle: Bundle, target: Target, threads: int | None, scorer: NamedScorer | None, **defaults: Any
) -> dict[str, Any]:
    """Models, where they run, and who scores; JSON-able, see `Ledger`.

    bundle: `Manifest.files_digest`. facts: the sha256 of what else the manifest says, but for what was stored by
    calibrations. defaults: those of `Manifest` that the measurement does not go by, as they are in its own runs.
    """
    manifest = bundle.manifest
    return {
        "bundle": manifest.files_digest,
        "facts": _facts_sha256(manifest, defaults),
        "target": str(target),
        "threads": threads,
        "machine": [cpu_architecture(), f"{usable_cpus()} CPUs", *gpu_names(target)],
        "versions": {"tandemrt": version("tandemrt"), target.backend: installed_version(target.backend)},
        "scorer": None if scorer is None else scorer.facts(),
    }


def _facts_sha256(manifest: Manifest, defaults: dict[str, Any]) -> str:
    own = msgspec.structs.replace(manifest.defaults, **defaults)
    facts = msgspec.structs.replace(manifest, defaults=own, calibrations=Calibrations())
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()
