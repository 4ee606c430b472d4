"""The bench of int8 runs on any denoiser, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench.quantized import main

from ..runtime.tiny_bundle import write_tiny_bundle


def test_figures_of_a_denoiser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    out = tmp_path / "figures.json"
    targets = ("onnxruntime:cpu:fp32", "onnxruntime:cpu:int8", "openvino:cpu:int8")
    asked = [word for target in targets for word in ("--target", target)]
    small = ["--latent", "8", "--samples", "2", "--repeats", "3", "--threads", "1"]
    main([str(tmp_path / "bundle" / "unet"), "--json", str(out), *asked, *small])
    facts = json.loads(out.read_text())
    assert facts["calibration"]["layers"] > 0
    assert facts["calibration"]["peak_gib"] > 0.01
    assert [row["target"] for row in facts["rows"]] == list(targets)
    float_, quantized, alone = facts["rows"]
    assert float_["relative_rms"] == alone["relative_rms"] == 0 < quantized["relative_rms"] < 0.1
    assert set(quantized["speed_over"]) == {targets[0]}
    assert alone["speed_over"] == {}
    assert quantized["call_ms"]["count"] == 3
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| `onnxruntime:cpu:int8` |" in table
    main([str(tmp_path / "bundle" / "unet"), "--json", str(out), "--calibrate-only", *small])
    assert json.loads(out.read_text())["rows"] == []
    assert "| ms |" not in capsys.readouterr().out
