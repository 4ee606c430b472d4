"""The bench of int8 runs on any denoiser, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench.quantized import cases_of, main, markdown

from ..runtime.tiny_bundle import write_tiny_bundle


def test_figures_of_a_denoiser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    out = tmp_path / "figures.json"
    targets = ("onnxruntime:cpu:fp32", "onnxruntime:cpu:int8", "openvino:cpu:int8")
    asked = [word for target in targets for word in ("--target", target)]
    small = ["--latent", "8", "--samples", "2", "--repeats", "3", "--threads", "1"]
    main([str(tmp_path / "bundle" / "unet"), "--json", str(out), "--weights", *asked, *small])
    facts = json.loads(out.read_text())
    assert facts["calibration"]["layers"] > 0
    assert facts["calibration"]["peak_gib"] > 0.01
    forms = ["float", "int8-weights", "int4-weights", "int8", "int8"]
    assert [row["format"] for row in facts["rows"]] == forms
    float_, *smaller, quantized, alone = facts["rows"]
    assert (quantized["target"], alone["target"]) == targets[1:]
    assert float_["relative_rms"] == alone["relative_rms"] == 0
    for row in (*smaller, quantized):
        assert 0 < row["relative_rms"] < 0.1
        assert set(row["speed_over"]) == {targets[0]}
        assert row["model_mib"] > 0
    assert alone["speed_over"] == {}
    assert quantized["call_ms"]["count"] == 3
    assert all(row["loaded_mib"] > 0 for row in facts["rows"])
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    for label in ("`onnxruntime:cpu:int8`", "`onnxruntime:cpu:fp32`, int4-weights"):
        assert f"| {label} |" in table
    main([str(tmp_path / "bundle" / "unet"), "--json", str(out), "--calibrate-only", *small])
    assert json.loads(out.read_text())["rows"] == []
    assert "| ms |" not in capsys.readouterr().out
    # Without int8 nothing is calibrated.
    assert markdown({**facts, "calibration": None}).startswith("A latent of 8x8.\n\n| a call |")


def test_what_runs_on_a_target() -> None:
    targets = ("openvino:cpu:bf16", "openvino:cpu:int8")
    assert cases_of(targets, weights=False) == [(targets[0], "float"), (targets[1], "int8")]
    assert cases_of(targets, weights=True)[1] == (targets[0], "int8-weights")
