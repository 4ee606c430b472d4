"""The bench of step engines runs on any denoiser, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench.step_engines import FOLDED, FUSED, LOOP, SLOTTED, main
from tandemrt.engines.graph_files import read_graph

from ..runtime.tiny_bundle import write_tiny_bundle


def test_figures_of_both_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    for name in ("unet", "unet_small"):
        path = tmp_path / "bundle" / name / "model.onnx"
        graph = read_graph(path)
        for index, node in enumerate(graph.graph.node):
            node.name = f"module_{index}/{node.op_type}"  # what has LoRA slots needs a name
        path.write_bytes(graph.SerializeToString())
    out, small = tmp_path / "figures.json", ["--latent", "8", "--repeats", "3", "--threads", "1"]
    folders = ["--one-step", str(tmp_path / "bundle" / "unet"), "--schedule", str(tmp_path / "bundle" / "unet_small")]
    main([*folders, "--json", str(out), "--target", "onnxruntime:cpu:fp32", *small])
    facts = json.loads(out.read_text())
    assert [case["case"] for case in facts["cases"]] == ["one step", "25 steps, guided"]
    for case in facts["cases"]:
        graphs, (timing,) = case["graphs"], case["timings"]
        assert graphs["denoiser, folded"]["nodes"] < graphs["denoiser"]["nodes"]
        assert graphs[FOLDED]["nodes"] < graphs[FUSED]["nodes"]
        assert (timing["step_ms"][LOOP]["count"], timing["ratios"][FOLDED]["count"]) == (9, 3)
        assert timing["step_ms"][LOOP]["minimum"] > 0
        assert timing["max_relative_difference"][FUSED] == 0
        assert timing["max_relative_difference"][FOLDED] < 1e-5 < timing["max_relative_difference"][SLOTTED]
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| 25 steps, guided, `onnxruntime:cpu:fp32` |" in table
