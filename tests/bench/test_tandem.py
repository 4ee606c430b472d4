"""The bench of guidance in tandem runs on any bundle, beside diffusers on small modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench.tandem import BATCHED, SHAPES_WAYS, WAYS, main
from tandemrt.bench.tandem_contenders import EAGER, OURS, Case, Contender

from ..runtime.tiny_bundle import write_tiny_bundle

ORT = ["--target", "onnxruntime:cpu"]


def test_ways_of_guidance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    out, small = tmp_path / "figures.json", ["--size", "64", "--rows", "4", "--repeats", "3", "--threads", "2"]
    main(["--json", str(out), "--ways", str(tmp_path / "bundle"), *ORT, *small])
    facts = json.loads(out.read_text())
    (figures,) = facts["ways"]
    assert list(figures["ways"]) == list(WAYS)
    for way in figures["ways"].values():
        assert (way["row_ms"]["count"], way["host_share"]["count"]) == (3, 9)
        assert 0 < way["host_share"]["minimum"] < way["host_share"]["maximum"] < 1
    assert figures["ways"][BATCHED]["psnr_db"] == 200
    assert figures["ways"]["parallel"]["psnr_db"] > 60
    assert figures["ways"]["parallel"]["guided"]["median"] == 4
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| bundle, `onnxruntime:cpu`: parallel |" in table


@pytest.mark.slow
def test_pictures_of_the_shapes_family(shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, small = tmp_path / "figures.json", ["--prompts", "1", "--repeats", "1", "--warm-up", "1", "--threads", "2"]
    main(["--json", str(out), "--shapes", str(shapes_bundle), *ORT, *small])
    made = {one["plan"]: one for one in json.loads(out.read_text())["accuracy"]}
    assert {plan: list(one["scores"]) for plan, one in made.items()} == {
        plan: list(ways) for plan, ways in SHAPES_WAYS.items()
    }
    for one in made.values():
        assert {ratio["count"] for ratio in one["ratio"].values()} == {1}
        assert all(score["psnr_db"] > 15 for name, score in one["scores"].items() if name != BATCHED)
    assert {one["rows"] for one in made.values()} == {25}
    assert {figures["count"] for one in made.values() for figures in one["guided"].values()} == {1}
    assert 18 <= made["25/0"]["guided"]["hybridiff"]["median"] < made["25/0"]["guided"][BATCHED]["median"] == 25
    assert "| 25/0, `onnxruntime:cpu`: hybridiff |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.deep
def test_pictures_beside_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    bundle, out = str(tmp_path / "bundle"), tmp_path / "figures.json"
    small = ["--size", "64", "--steps", "1,2", "--scale", "tiny", "--repeats", "2", "--threads", "1"]
    main(["--json", str(out), "--hybrid", bundle, "--one-step", bundle, *ORT, *small])
    peers = json.loads(out.read_text())["peers"]
    assert [one["case"]["name"] for one in peers] == ["hybrid 1/2", "one step"]
    for one in peers:
        assert {kind: taken["count"] for kind, taken in one["seconds"].items()} == {OURS: 2, EAGER: 2}
        assert one["times_faster"][EAGER]["minimum"] > 0
    assert f"| hybrid 1/2, `onnxruntime:cpu`: {EAGER} |" in capsys.readouterr().out


def test_a_contender_that_fails_is_an_error(tmp_path: Path) -> None:
    case = Case("none", str(tmp_path), "hybrid-sd", "tiny", {"unet": 1}, 1.0, "vae_decoder", 64)
    contender = Contender(OURS, case, "onnxruntime:cpu", 1)
    with pytest.raises(RuntimeError, match="exit status 1"):
        contender.seconds(0)
    contender.close()
