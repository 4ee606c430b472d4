"""The bench of precisions paints the shapes family in each, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tandemrt.bench import precisions
from tandemrt.bench.precisions import captions, main, picture_facts
from tandemrt.bench.shapes.scenes import render, scenes
from tandemrt.runtime.errors import ArgumentError


def test_captions_are_apart_and_there_once() -> None:
    held_out = captions(104, "held_out")
    assert len(set(held_out)) == 104
    assert not set(held_out) & set(captions(1000, "train"))
    assert captions(3, "held_out") == held_out[:3]
    with pytest.raises(ArgumentError, match="of the held_out split, each once, got 3000, expected"):
        captions(3000, "held_out")


def test_pictures_are_compared_and_checked() -> None:
    chosen = scenes(0, 4, "held_out")
    prompts = [scene.caption for scene in chosen]
    meant = np.stack([render(scene) for scene in chosen])
    made = meant.copy()
    made[0] = 0
    facts = picture_facts(made, meant, prompts)
    assert facts["right"]["successes"] == 3
    assert facts["points_below_fp32"] == 25
    assert facts["median_psnr_db"] == 99
    error = float(np.square(meant[0].astype(float)).mean())
    assert facts["worst_psnr_db"] == pytest.approx(10 * np.log10(255**2 / error))
    assert facts["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error * 4), abs=0.01)


@pytest.mark.slow
def test_a_table_of_precisions(
    shapes_bundle: Path,
    shapes_int8: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is in int8 is there already.
    monkeypatch.setattr(precisions, "collected", lambda *_: shapes_int8 / "trajectories")
    monkeypatch.setattr(precisions, "quantized", lambda *_: shapes_int8 / "bundle")
    out = tmp_path / "figures.json"
    asked = ["--only", "onnxruntime:cpu,float", "--only", "onnxruntime:cpu,int8", "--prompts", "3", "--steps", "2"]
    main([str(shapes_bundle), "--json", str(out), *asked, "--repeats", "2", "--threads", "1"])
    facts = json.loads(out.read_text())
    float_, int8 = facts["rows"]
    assert (float_["psnr_db"], float_["of_fp32"]["median"], float_["points_below_fp32"]) == (99, 1, 0)
    assert 15 < int8["worst_psnr_db"] <= int8["median_psnr_db"] < 99
    assert int8["picture_ms"]["count"] == 2
    assert int8["megabytes"] < float_["megabytes"] / 2
    assert min(float_["loaded_mib"], int8["loaded_mib"]) > 0
    assert set(facts["seconds"]) == {"trajectories", "int8"}
    table = capsys.readouterr().out
    assert table == out.with_suffix(".md").read_text()
    assert "| `onnxruntime:cpu`, int8 |" in table
    with pytest.raises(SystemExit):
        main([str(shapes_bundle), "--json", str(out), "--only", "onnxruntime:cpu,int2"])
