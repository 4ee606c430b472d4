"""What was stored of a bundle is taken out again, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main

from ..runtime.test_outdated import STEPS, write_calibrated


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_calibrated(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_what_is_named_goes_and_the_rest_stays(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(bundle)
    assert main(["calibrate", "forget", str(bundle), "split", "adaptive", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    after = Bundle.open(bundle)
    assert told["digest"] == after.digest != before.digest
    assert list(told["forgets"]) == ["split", "adaptive"]
    assert told["forgets"]["split"] == [list(run) for run in STEPS]
    defaults = msgspec.structs.replace(before.manifest.defaults, steps=None, adaptive=None)
    assert after.manifest.defaults == defaults
    kept = {"interval": before.manifest.calibrations.guidance["interval"]}
    assert (after.manifest.calibrations.split, after.manifest.calibrations.guidance) == (None, kept)
    assert after.manifest.files == before.manifest.files
    assert [path.name for path in bundle.iterdir() if path.name.startswith(".")] == []


def test_what_is_not_there_is_refused_and_nothing_changes(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(bundle).digest
    assert main(["calibrate", "forget", str(bundle), "split", "hybridiff"]) == 2
    refused = "nothing of the kind hybridiff is stored, expected of adaptive, interval, split"
    assert refused in capsys.readouterr().err
    assert main(["calibrate", "forget", str(bundle), "taus"]) == 2
    assert Bundle.open(bundle).digest == before


def test_the_plan_changes_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(bundle).digest
    assert main(["calibrate", "forget", str(bundle), "split", "--print-plan"]) == 0
    assert capsys.readouterr().out == f'{bundle}: split [["unet", 2], ["unet_small", 2]]\n'
    assert Bundle.open(bundle).digest == before
