"""The shapes family as a bundle, exported from the weights that come with the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from tandemrt.export.checkpoint import read_checkpoint, read_decoder, read_denoiser
from tandemrt.export.plan import Added, ExportPlan, Progress, no_progress
from tandemrt.export.weights import source_digest
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError
from tandemrt.runtime.manifest import MANIFEST_NAME, Manifest

from .accuracy import GUIDANCE_SCALE

WEIGHTS = Path(__file__).parent / "weights"
STEPS = 25
ADDED = {
    "unet_small": "small",
    "unet_one_step": "one_step",
    "vae_decoder_small": "vae_small",
    "vae_decoder_tiny": "vae_tiny",
}


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
    # Imports torch, which takes seconds that a bundle already there need not cost.
    from tandemrt.export.bundle import export_bundle  # noqa: PLC0415

    export_bundle(dataclasses.replace(plan, force=(out / MANIFEST_NAME).exists()), progress)
    return out


def expected_digests(plan: ExportPlan) -> dict[str, str]:
    """For each component the digest its source has now."""
    large = read_checkpoint(plan.checkpoint)
    parts = {"unet": large.unet, "text_encoder": large.text_encoder, "vae_decoder": large.vae, "vae_encoder": large.vae}
    for added in plan.added:
        denoises = added.role == "denoiser"
        parts[added.name] = read_denoiser(added.folder).unet if denoises else read_decoder(added.folder)
    return {name: source_digest(part.files) for name, part in parts.items()}


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
    return {name: component.source.sha256 for name, component in manifest.components.items()}
