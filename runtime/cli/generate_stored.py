"""What of a bundle's stored calibrations a run of `tandemrt generate` uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..guidance_defaults import stored_interval
from ..manifest import Manifest
from ..plan import Plan
from ..plan_steps import parse_steps
from .generate_arguments import GeneratePlan


def own_steps(plan: GeneratePlan, manifest: Manifest) -> tuple[tuple[str, int], ...] | None:
    """The steps asked for, or those of the bundle's stored plan: calibrated anew, it would run others by default."""
    if plan.steps is not None:
        return parse_steps(plan.steps, manifest.names("denoiser"))
    named = (plan.num_inference_steps, plan.timesteps, manifest.defaults.timesteps)
    return manifest.defaults.steps if named == (None, None, None) else None


def own_interval(plan: GeneratePlan, manifest: Manifest) -> tuple[float, float] | None:
    """The interval asked for, or the bundle's, where it holds for this guidance and placement."""
    if plan.guidance_interval is not None or manifest.defaults.guidance_interval is None:
        return plan.guidance_interval
    return stored_interval(manifest, plan.guidance, plan.placement)


def stored_facts(plan: GeneratePlan, manifest: Manifest, compiled: Plan) -> dict[str, Any]:
    """What a run is to be told of the bundle's calibrations, JSON-able.

    `outdated`: those that give the run its defaults, and were measured with other models than the bundle's.
    `measured_for`: the steps and guidance of those of guidance that it uses, where its own are others.
    `passed_over`: the stored split, where a number of steps or time steps has the first denoiser run them all.
    """
    used = _used(plan, manifest)
    counted = (plan.num_inference_steps, plan.timesteps) != (None, None)
    if plan.steps is not None:
        counted = plan.steps.strip().isdigit()
    return {
        "outdated": [name for name in manifest.calibrations.outdated(manifest.files_digest) if used.get(name)],
        "measured_for": {
            name: {"steps": [list(run) for run in one.steps], "guidance_scale": one.guidance_scale}
            for name, one in manifest.calibrations.guidance.items()
            if used.get(name)
            and any(compiled.guided)
            and (one.steps, one.guidance_scale) != (compiled.steps, compiled.guidance_scale)
        },
        "passed_over": [list(run) for run in (manifest.defaults.steps or ()) if counted],
    }


def _used(plan: GeneratePlan, manifest: Manifest) -> dict[str, bool]:
    """Which calibrations give the run its defaults, if the bundle has them."""
    fixed = plan.guidance == "fixed" and plan.placement != "hybridiff"
    return {
        "split": plan.steps is None and own_steps(plan, manifest) is not None,
        "interval": fixed and plan.guidance_interval is None,
        "adaptive": plan.guidance == "adaptive" and not _brings(plan.guidance_config, manifest, "adaptive"),
        "hybridiff": plan.placement == "hybridiff" and not _brings(plan.placement_config, manifest, "hybridiff"),
    }


def _brings(config: Mapping[str, Any], manifest: Manifest, name: str) -> bool:
    """Whether a request has numbers of its own for all that were measured of a kind."""
    measured = manifest.calibrations.guidance.get(name)
    return measured is not None and config.keys() >= measured.numbers.keys()
