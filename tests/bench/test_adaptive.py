"""The bench of adaptive guidance runs on any bundle with two denoisers, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench.adaptive import SETTINGS, main

from ..runtime.tiny_bundle import write_tiny_bundle


def test_figures_of_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    out = tmp_path / "figures.json"
    main([str(tmp_path / "bundle"), "--json", str(out), "--prompts", "2", "--threads", "1"])
    facts = json.loads(out.read_text())
    assert len(facts["figures"]) == sum(len(setting.thresholds) + 1 for setting in SETTINGS)
    for one in facts["figures"]:
        steps = sum(one["steps"].values())
        assert steps == 25
        assert (one["rows"] == 0) == (one["threshold"] is None)
        # With both branches in every row the pictures are the same, else they are not.
        assert (one["psnr_db"] == 200) == (one["rows"] == steps)
        assert one["worst_psnr_db"] <= one["psnr_db"]
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| 5, 10/15 | no guidance | 0.0 |" in table
