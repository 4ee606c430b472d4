"""The shapes family as a bundle, exported from the weights that come with the package."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import msgspec

from tandemrt.export.plan import Added, ExportPlan, Progress, no_progress
from tandemrt.export.sources import read_sources
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError, ExportError
from tandemrt.runtime.manifest import Manifest, SchedulerDefaults
from tandemrt.runtime.manifest_files import MANIFEST_NAME

from .accuracy import GUIDANCE_SCALE

WEIGHTS = Path(__file__).parent / "weights"
STEPS = 25
ADDED = {
    "unet_small": "small",
    "unet_one_step": "one_step",
    "vae_decoder_small": "vae_small",
    "vae_decoder_tiny": "vae_tiny",
}
_SCHEDULERS = "schedulers"


def export_plan(out: Path, weights: Path = WEIGHTS) -> ExportPlan:
    """How the family in `weights` becomes the bundle `out`."""
    return ExportPlan(
        checkpoint=weights / "large",
        out=out,
        added=tuple(Added(name, weights / folder) for name, folder in ADDED.items()),
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=STEPS,
    )


def ensure_bundle(out: Path, progress: Progress = no_progress, weights: Path = WEIGHTS) -> Path:
    """Export the family to `out`, unless a whole bundle of these weights by this version is there already.

    Raises:
        CheckpointError: the weights are missing or damaged.
        ExportError: the export failed, or `out` is something else than a bundle.
    """
    plan = export_plan(out, weights)
    if is_current(out, expected_digests(plan)):
        return out
    if out.exists() and not (out / MANIFEST_NAME).exists():
        raise ExportError(str(out), "exists and is no bundle", remedy="Remove it, or give another --output-dir.")
    # Imports torch, which takes seconds that a bundle already there need not cost.
    from tandemrt.export.bundle import export_bundle  # noqa: PLC0415

    export_bundle(dataclasses.replace(plan, force=(out / MANIFEST_NAME).exists()), progress)
    return out


def expected_digests(plan: ExportPlan) -> dict[str, str]:
    """For each component the digest its source has now, and one for the schedulers."""
    sources = read_sources(plan)
    own = {name: sources.own_scheduler(name) for name in sources.parts()}
    return {
        **{name: sources.digest(part) for name, part in sources.parts().items()},
        _SCHEDULERS: _schedulers_digest(sources.main.scheduler, own),
    }


def is_current(out: Path, digests: Mapping[str, str]) -> bool:
    """Whether `out` is an undamaged bundle, made as it would be now: same sources, defaults and package versions."""
    try:
        manifest = Bundle.open(out).manifest
    except BundleError:
        return False
    made_with = {name: _installed_version(name) for name in manifest.producers}
    defaults = (manifest.defaults.num_inference_steps, manifest.defaults.guidance_scale)
    return (
        made_with == manifest.producers and defaults == (STEPS, GUIDANCE_SCALE) and _source_digests(manifest) == digests
    )


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _source_digests(manifest: Manifest) -> dict[str, str]:
    own = {name: component.scheduler for name, component in manifest.components.items()}
    return {
        **{name: component.source.sha256 for name, component in manifest.components.items()},
        _SCHEDULERS: _schedulers_digest(manifest.scheduler, own),
    }


def _schedulers_digest(main: SchedulerDefaults, own: Mapping[str, SchedulerDefaults | None]) -> str:
    return hashlib.sha256(msgspec.json.encode((main, own), order="deterministic")).hexdigest()
