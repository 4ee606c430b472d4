"""Numbers of guidance that were found become a bundle's own, with what they were found to cost beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..runtime.bundle import Bundle
from ..runtime.calibrations import GuidanceCalibration
from ..runtime.manifest import AdaptiveNumbers, Defaults, Manifest, WindowNumbers
from .stored import store


def store_guidance(bundle: Bundle, facts: Mapping[str, Any], chosen: Mapping[str, Mapping[str, Any]]) -> Bundle:
    """Store what was chosen, by kind; what is stored of another kind stays.

    facts: of the whole measurement. chosen: of a kind, what held-out prompts said of it; both as the command tells.

    Raises:
        BundleError: see `store`.
    """
    evidence = {kind: _evidence(facts, one) for kind, one in chosen.items()}

    def change(manifest: Manifest) -> Manifest:
        defaults = manifest.defaults
        for kind, one in chosen.items():
            defaults = with_numbers(defaults, kind, one["numbers"])
        calibrations = msgspec.structs.replace(
            manifest.calibrations, guidance={**manifest.calibrations.guidance, **evidence}
        )
        return msgspec.structs.replace(manifest, defaults=defaults, calibrations=calibrations)

    return store(bundle, change)


def with_numbers(defaults: Defaults, kind: str, numbers: Mapping[str, float]) -> Defaults:
    """Defaults with the numbers of a kind, named as a request names them."""
    if kind == "interval":
        return msgspec.structs.replace(defaults, guidance_interval=(numbers["start"], numbers["end"]))
    if kind == "adaptive":
        return msgspec.structs.replace(defaults, adaptive=msgspec.convert(dict(numbers), AdaptiveNumbers))
    taus = {("l_slope" if name == "L_slope" else name): value for name, value in numbers.items()}
    return msgspec.structs.replace(defaults, taus=msgspec.convert(taus, WindowNumbers))


def _evidence(facts: Mapping[str, Any], one: Mapping[str, Any]) -> GuidanceCalibration:
    loss, scorer = facts["loss"], facts["scorer"] or {}
    figures = ("branches", "full_branches", "time_ratio", "psnr_db", "worst_psnr_db", "right", "right_in_full")
    return GuidanceCalibration(
        files_sha256=facts["bundle"],
        numbers=dict(one["numbers"]),
        steps=tuple((name, count) for name, count in facts["steps"]),
        guidance_scale=facts["guidance_scale"],
        target=facts["target"],
        threads=facts["threads"],
        machine=tuple(facts["machine"]),
        versions=dict(facts["versions"]),
        seed=facts["seed"],
        prompts=facts["prompts"]["count"],
        prompts_sha256=facts["prompts"]["sha256"],
        held_out=facts["held_out"]["count"],
        held_out_sha256=facts["held_out"]["sha256"],
        min_psnr_db=loss["min_psnr_db"],
        scorer=scorer.get("name"),
        scorer_sha256=scorer.get("sha256"),
        max_lost=loss["max_lost"],
        **{name: one[name] for name in figures},
    )
