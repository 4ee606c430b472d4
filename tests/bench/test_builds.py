"""`tandemrt bench build` on models of a few kilobytes: real builds, and engines that are there."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import onnx
import pytest

from tandemrt.bench import builds
from tandemrt.bench.reports.schema import read_report
from tandemrt.engines.plan import Request
from tandemrt.runtime.cli import main

from ..runtime.tiny_bundle import resign, write_tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_figures_of_every_component_asked_for(bundle: Path, tmp_path: Path) -> None:
    wanted = ["--target", "onnxruntime:cpu", "--component", "unet", "--component", "vae_decoder", "--profile", "64"]
    cache, out = tmp_path / "cache", tmp_path / "report"
    asked = ["bench", "build", str(bundle), *wanted, "--rounds", "2"]
    assert main([*asked, "--cache", str(cache), "--out", str(out)]) == 0
    report = read_report(out / "report.json")
    (section,) = report.sections
    assert [row.name for row in section.rows] == ["unet", "vae_decoder"]
    for row in section.rows:
        built = row.figures["build"].values
        assert len(built) == 2
        assert 0 < row.figures["again"].median / 1e3 < built.min()
        assert row.figures["peak"].median > 10 and row.figures["size"].median > 0
    assert (report.request["components"], report.method.warm_up) == ("unet, vae_decoder", 0)
    assert not list(cache.iterdir())


def test_a_build_that_fails_is_told_and_the_others_go_on(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle / "vae_decoder" / "model.onnx"
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    resign(bundle)
    asked = ["bench", "build", str(bundle), "--target", "onnxruntime:cpu", "--profile", "64", "--rounds", "1"]
    asked += ["--cache", str(tmp_path / "cache"), "--component", "vae_decoder"]
    assert main([*asked, "--component", "vae_decoder_tiny", "--out", str(tmp_path / "report")]) == 0
    (section,) = read_report(tmp_path / "report" / "report.json").sections
    broken, tiny = section.rows
    assert "NoSuchOperator" in broken.failed and not broken.figures
    assert tiny.figures["build"].median > 0
    assert main([*asked, "--out", str(tmp_path / "none")]) == 1
    assert "engines for onnxruntime:cpu: none could be built" in capsys.readouterr().err


def test_a_target_for_which_nothing_can_be_built_is_told(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = builds._build

    def failing(request: Request, cache: Path, took: builds.Builds) -> None:
        if request.ingredients.backend == "onnxruntime":
            took.fail("no operator")
        else:
            build(request, cache, took)

    monkeypatch.setattr(builds, "_build", failing)
    asked = ["bench", "build", str(bundle), "--target", "onnxruntime:cpu", "--target", "openvino:cpu"]
    asked += ["--component", "vae_decoder_tiny", "--profile", "64", "--rounds", "1", "--cache", str(tmp_path / "cache")]
    assert main([*asked, "--out", str(tmp_path / "report")]) == 0
    report = read_report(tmp_path / "report" / "report.json")
    failed, built = (section.rows[0] for section in report.sections)
    assert failed.failed == "no operator" and built.figures["build"].median > 0
    assert "Not measured: vae_decoder_tiny, no operator" in report.caveats


def test_engines_for_gpus_are_built_beside_plain_ones(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    asked = ["bench", "build", str(bundle), "--target", "tensorrt-rtx:sm89", "--component", "unet_small"]
    asked += ["--rounds", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "report")]
    assert main(asked) == 0
    (section,) = read_report(tmp_path / "report" / "report.json").sections
    own, plain, update = section.rows
    assert [row.name for row in section.rows] == ["unet_small", "unet_small, plain", "unet_small (update)"]
    assert not plain.failed
    assert "engine building" not in "".join(capfd.readouterr())
    assert own.figures["times"].median == pytest.approx(own.figures["build"].median / plain.figures["build"].median)
    assert plain.figures["size"].median == pytest.approx(own.figures["size"].median, rel=0.2)
    assert "times" not in update.figures


def test_a_plain_build_that_fails_is_told(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")

    def killed(*_: object) -> None:
        raise BrokenProcessPool("A process was terminated\nabruptly")

    monkeypatch.setattr(builds, "in_fresh_process", killed)
    asked = ["bench", "build", str(bundle), "--target", "tensorrt-rtx:sm89", "--component", "vae_decoder_tiny"]
    assert main([*asked, "--rounds", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "report")]) == 0
    report = read_report(tmp_path / "report" / "report.json")
    own, plain = report.sections[0].rows
    assert own.figures["build"].median > 0 and "times" not in own.figures
    assert plain.failed == "BrokenProcessPool: A process was terminated abruptly"
    assert any("Not measured: vae_decoder_tiny, plain" in caveat for caveat in report.caveats)
