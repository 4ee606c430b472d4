"""The bench of engine builds measures real builds and hits, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench.engine_builds import main

from ..runtime.tiny_bundle import write_tiny_bundle


def test_figures_of_every_component_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    out = tmp_path / "figures.json"
    wanted = ["--target", "onnxruntime:cpu", "--component", "unet", "--component", "vae_decoder", "--profile", "64"]
    main([str(tmp_path / "bundle"), *wanted, "--json", str(out), "--scratch", str(tmp_path)])
    facts = json.loads(out.read_text())
    assert [row["component"] for row in facts["builds"]] == ["unet", "vae_decoder"]
    for row in facts["builds"]:
        assert 0 < row["cached_s"] < row["build_s"]
        assert row["peak_gib"] > 0.01 and row["size_mb"] > 0 and row["layers"] > 0
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| bundle unet, `onnxruntime:cpu" in table
