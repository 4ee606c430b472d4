"""What a bundle says of guidance where a request says nothing: an interval, adaptive guidance's numbers, the taus."""

from __future__ import annotations

import msgspec

from .adaptive import AdaptiveRule
from .arguments import finite_number
from .discrepancy import Taus, default_taus
from .errors import BundleError, PlanError, RequestError
from .manifest import Defaults, Manifest

WHOLE = (0.0, 1.0)


def stored_rule(manifest: Manifest) -> AdaptiveRule:
    """Adaptive guidance's numbers: the bundle's, else those of `AdaptiveRule`."""
    stored = manifest.defaults.adaptive
    return AdaptiveRule() if stored is None else AdaptiveRule(**msgspec.structs.asdict(stored))


def stored_taus(manifest: Manifest, denoiser: str) -> Taus:
    """The window's numbers for a denoiser: the bundle's, else Hybridiff's own for one of its inputs."""
    stored = manifest.defaults.taus
    if stored is None:
        return default_taus(manifest.components[denoiser].inputs)
    return Taus(**msgspec.structs.asdict(stored))


def stored_interval(manifest: Manifest, guidance: str, placement: str) -> tuple[float, float]:
    """The part of the steps with guidance where a request names none.

    The bundle's is that of fixed guidance: the other two ways to do with fewer calls were measured on all steps, and
    Hybridiff's window takes no unguided rows.
    """
    stored = manifest.defaults.guidance_interval
    return WHOLE if stored is None or guidance != "fixed" or placement == "hybridiff" else stored


def checked_interval(given: object) -> tuple[float, float]:
    """`given` as fractions (start, end) of the steps; raises PlanError unless 0 <= start <= end <= 1."""
    ends = [finite_number(end) for end in given] if isinstance(given, tuple | list) and len(given) == 2 else [None] * 2
    start, end = ends
    if start is None or end is None or not 0 <= start <= end <= 1:
        expected = "two numbers, 0 <= start <= end <= 1"
        raise PlanError("guidance_interval", "fractions of the steps", got=given, expected=expected)
    return start, end


def check_guidance_defaults(defaults: Defaults, where: str) -> None:
    """Raise BundleError, in which `where` names the manifest, for numbers that no generation could use."""
    try:
        if defaults.guidance_interval is not None:
            checked_interval(defaults.guidance_interval)
        if defaults.adaptive is not None:
            AdaptiveRule.of(msgspec.structs.asdict(defaults.adaptive))
        if defaults.taus is not None:
            Taus(**msgspec.structs.asdict(defaults.taus))
    except (PlanError, RequestError) as error:
        remedy = "Run `tandemrt calibrate guidance` again."
        raise BundleError(f"{where}: defaults", f"guidance that cannot be ({error})", remedy=remedy) from error
