"""What a bundle says of guidance: used where a request says nothing, shown by inspect, refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandemrt.runtime.adaptive import AdaptiveRule
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.discrepancy import UNET, Taus
from tandemrt.runtime.errors import BundleError, PlanError
from tandemrt.runtime.manifest import AdaptiveNumbers, Manifest, WindowNumbers
from tandemrt.runtime.plan import Plan, Schedule, compile_plan

from .tiny_bundle import resign, write_tiny_bundle

NUMBERS = AdaptiveNumbers(threshold=0.2, release=0.5, probe=3, steady=1.5)
WINDOW = WindowNumbers(l_slope=3, eps_slope=0.01, k=4, tau_cap=6)
STORED = {"guidance_interval": (0.0, 0.5), "adaptive": NUMBERS, "taus": WINDOW}


def with_defaults(folder: Path, **stored: Any) -> Manifest:
    write_tiny_bundle(folder)
    resign(
        folder,
        lambda manifest: msgspec.structs.replace(
            manifest, defaults=msgspec.structs.replace(manifest.defaults, **stored)
        ),
    )
    return Bundle.open(folder).manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return with_defaults(tmp_path / "bundle", **STORED)


def planned(manifest: Manifest, **arguments: Any) -> Plan:
    return compile_plan(manifest, Schedule(steps=20, **arguments))


def test_what_is_stored_is_used(manifest: Manifest) -> None:
    assert planned(manifest).guided == (True,) * 10 + (False,) * 10
    assert planned(manifest, guidance="adaptive").adaptive == AdaptiveRule(0.2, 0.5, 3, 1.5)
    window = planned(manifest, placement="hybridiff").window
    assert window is not None
    assert window.taus == Taus(l_slope=3, eps_slope=0.01, k=4, tau_cap=6)


def test_the_interval_is_of_fixed_guidance_outside_of_a_window(manifest: Manifest) -> None:
    assert all(planned(manifest, guidance="adaptive").guided)
    assert all(planned(manifest, placement="hybridiff").guided)
    assert not all(planned(manifest, placement="sequential").guided)


def test_what_is_asked_for_wins(manifest: Manifest) -> None:
    assert all(planned(manifest, guidance_interval=(0.0, 1.0)).guided)
    # One limit moves the other with it, as far as they are apart in the bundle.
    rule = planned(manifest, guidance="adaptive", guidance_config={"threshold": 0.1}).adaptive
    assert rule is not None
    assert (rule.threshold, rule.release, rule.probe, rule.steady) == (0.1, pytest.approx(0.25), 3, 1.5)
    window = planned(manifest, placement="hybridiff", placement_config={"k": 2, "L_slope": 5}).window
    assert window is not None
    assert window.taus == Taus(l_slope=5, eps_slope=0.01, k=2, tau_cap=6)


def test_without_them_the_built_in_numbers_are_used(tmp_path: Path) -> None:
    manifest = with_defaults(tmp_path / "bundle")
    assert all(planned(manifest).guided)
    assert planned(manifest, guidance="adaptive").adaptive == AdaptiveRule()
    window = compile_plan(manifest, Schedule(steps=25, placement="hybridiff")).window
    assert window is not None
    assert window.taus == UNET


def test_stored_numbers_that_do_not_fit_the_steps_are_refused(manifest: Manifest) -> None:
    with pytest.raises(PlanError, match="tau_cap or k in the request's placement_config"):
        compile_plan(manifest, Schedule(steps=8, placement="hybridiff"))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval.*got \(0.5, 0.2\)"),
        ({"adaptive": msgspec.structs.replace(NUMBERS, probe=1)}, "probe: rows, got 1"),
        ({"adaptive": msgspec.structs.replace(NUMBERS, release=0.1)}, "release: discrepancy, got 0.1"),
        ({"taus": msgspec.structs.replace(WINDOW, k=0)}, "k: out of range, got 0"),
    ],
)
def test_a_bundle_with_numbers_that_cannot_be_is_refused(tmp_path: Path, stored: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=f"defaults: guidance that cannot be.*{words}.*calibrate guidance"):
        with_defaults(tmp_path / "bundle", **stored)


def test_inspect_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_defaults(tmp_path / "bundle", **STORED)
    assert main(["inspect", str(tmp_path / "bundle")]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("guidance"))
    assert "in the part 0 to 0.5 of the steps; adaptive threshold 0.2, release 0.5, probe 3, steady 1.5; " in told
    assert "hybridiff l_slope 3, eps_slope 0.01, k 4, tau_cap 6" in told
