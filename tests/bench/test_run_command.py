"""`tandemrt bench` on a bundle of a few kilobytes, in processes of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tandemrt.bench import picture_limits, run_command
from tandemrt.bench.graph_work import work_of
from tandemrt.bench.peer_table import PEERS
from tandemrt.bench.reports.schema import read_report
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import read_sidecar

from ..runtime.tiny_bundle import write_tiny_bundle

ORT, OURS = ["--target", "onnxruntime:cpu:fp32", "--threads", "1"], "tandemrt onnxruntime:cpu:fp32"
QUICK = [*ORT, "--no-limits"]
SMALL = [*QUICK, "--steps", "3", "--rounds", "4"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    write_tiny_bundle(folder)
    return folder


def test_a_report_of_a_bundle(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    asked = ["bench", str(bundle), *SMALL, "--peer", "diffusers", "--out", str(out), "--cache", str(tmp_path)]
    assert main(asked) == 0
    report = read_report(out / "report.json")
    pictures, parts, start, ran, models = report.sections
    ours = pictures.row(OURS)
    assert ours is not None
    assert len(ours.figures["total"].samples) == 4
    assert (report.method.rounds, report.method.warm_up, report.method.threads) == (4, 2, 1)
    assert report.request["prompt"] == "'a red circle left of a blue square' and the seed"
    peer = pictures.row("diffusers")
    assert peer is not None and "reads a checkpoint, and none was named" in peer.failed
    assert "Not measured: diffusers, reads a checkpoint" in report.caveats[0]
    assert [row.name for row in parts.rows] == [
        f"{OURS}: {part}" for part in ("text encoders", "decoder", "unet", "the loop itself")
    ]
    shares = sum(row.figures["share"].values for row in parts.rows)
    assert 0 < shares.max() <= 1
    unet = next(row for row in models.rows if row.name == "unet")
    assert unet.words[OURS] == "graph"
    assert unet.figures[OURS] == unet.figures["file"]
    assert not {"processors_j", "gpu_mib", "limit"} & {column.of for column in pictures.columns}
    assert report.machine.other_cores is not None and "processor" in report.machine.energy
    opened = start.row(OURS)
    assert opened is not None and opened.figures["open"].median < opened.figures["first"].median
    own = ran.row(OURS)
    assert own is not None and (own.words["threads"], own.words["precision"]) == ("1", "fp32")
    assert {"Python", "onnxruntime"} <= {one.split()[0] for one in own.words["runs"].split(", ")}
    assert report.subjects[0].random_weights is False
    told = capsys.readouterr().out
    assert all(str(out / name) in told for name in ("report.json", "report.md", "report.html"))
    assert str(tmp_path) not in (out / "report.json").read_text(encoding="utf-8")


def test_a_report_beside_the_limit(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_limits, "SIDE", 64)
    monkeypatch.setattr(picture_limits, "COPIED", 4096)
    asked = ["bench", str(bundle), *ORT, "--steps", "3", "--rounds", "2", "--batch-size", "2", "--size", "64x48"]
    assert main([*asked, "--out", str(tmp_path), "--cache", str(tmp_path)]) == 0
    pictures, parts, peaks, *_ = read_report(tmp_path / "report.json").sections
    products, copies = peaks.rows
    assert (products.name, copies.name) == (f"{OURS}: products, fp32", f"{OURS}: copies")
    opened = Bundle.open(bundle)
    flops = 0.0
    for name, calls, batch in (("text_encoder", 1, 1), ("unet", 3, 4), ("vae_decoder", 2, 1)):
        specs = opened.component(name).inputs
        fixed = {"sample": (batch, 4, 6, 8), "latent_sample": (1, 4, 6, 8), "encoder_hidden_states": (batch, 12, 8)}
        shapes = {"input_ids": (1, 12), "timestep": (1,), **fixed}
        flops += calls * work_of(opened, name, {spec.name: shapes[spec.name] for spec in specs}, "fp32").flops
    whole = pictures.rows[0].figures
    assert whole["gflops"].values * whole["total"].values * 1e9 == pytest.approx(flops)
    assert whole["limit"].values == pytest.approx(whole["gflops"].values / products.figures["gflops"].median)
    told = {row.name.removeprefix(f"{OURS}: ") for row in parts.rows if "limit" in row.figures}
    assert told == {"text encoders", "unet", "decoder"}


@pytest.fixture(scope="module")
def cache(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with an engine of the UNet."""
    cache = tmp_path_factory.mktemp("engines")
    asked = ["--target", ORT[1], "--component", "unet", "--cache", str(cache)]
    assert main(["build-engine", str(bundle), *asked]) == 0
    return cache


def test_engines_are_told_with_their_size(bundle: Path, cache: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--cache", str(cache)]
    assert main(["bench", str(bundle), *QUICK, "--rounds", "1", *out]) == 0
    report = read_report(tmp_path / "report.json")
    unet = report.sections[-1].rows[1]
    (engine,) = (cache / "engines").glob("*/engine.json")
    assert unet.words[OURS] == f"engine {engine.parent.name[:12]}"
    assert unet.figures[OURS].median == read_sidecar(engine.parent).size_bytes / 1e6
    assert not any("unet" in caveat for caveat in report.caveats)


@pytest.mark.parametrize(
    "asked",
    [
        ["run", "--no-limits"],
        ["cold"],
        ["cfg", "--steps", "2"],
        ["hybrid", "--steps", "2", "--points", "1,0"],
        ["onestep", "--steps", "unet:1", "--no-limits"],
    ],
)
def test_what_ran_otherwise_is_told_first(asked: list[str], bundle: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    (engine,) = (tmp_path / "cache" / "engines").glob("*/model.onnx")
    engine.write_bytes(b"damaged")
    kind, *rest = asked
    out = ["--out", str(tmp_path), "--cache", str(tmp_path / "cache"), "--rounds", "1"]
    assert main(["bench", kind, str(bundle), *ORT, *rest, *out]) == 0
    first = read_report(tmp_path / "report.json").caveats[0]
    assert ": unet ran on graph: CACHE/engines/" in first and "model.onnx" in first
    assert str(tmp_path) not in first


def test_a_report_names_no_place_of_the_machine(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = "import json, sys; job = json.loads(input()); sys.exit('{checkpoint}, {cache}'.format(**job))"
    (tmp_path / "failing.py").write_text(failing, encoding="utf-8")
    monkeypatch.setitem(PEERS, "diffusers", replace(PEERS["diffusers"], script=str(tmp_path / "failing.py")))
    monkeypatch.chdir(bundle)
    asked = ["bench", ".", *QUICK, "--steps", "1", "--rounds", "1", "--peer", "diffusers", "--checkpoint", ".."]
    assert main([*asked, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 0
    report = read_report(tmp_path / "out" / "report.json")
    assert (report.title, report.request["of"]) == ("bundle: a benchmark", "bundle")
    assert report.sections[0].rows[1].failed == "ended with exit status 1. CHECKPOINT, CACHE"
    told = (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in told and str(bundle.parent) not in told


def test_a_preset_without_what_exports_it_is_told(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from tandemrt.runtime.cli import main; sys.exit(main())"
    asked = ["bench", "--preset", "sdxs-512-0.9", *ORT[:2], "--out", str(tmp_path), "--cache", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told = '--preset: needs torch, which cannot be imported here. Install it: pip install "tandemrt[export]"'
    assert told in done.stderr


def test_two_reports_are_compared(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert main(["bench", str(bundle), *SMALL, "--out", str(out)]) == 0
    slower = json.loads((out / "report.json").read_bytes())
    for row in slower["sections"][0]["rows"]:
        row["figures"]["total"]["samples"] = [9.0 + value for value in row["figures"]["total"]["samples"]]
    slower["sections"] = [section for section in slower["sections"] if section["key"] != "start"]
    (tmp_path / "slower.json").write_text(json.dumps(slower), encoding="utf-8")
    capsys.readouterr()
    assert main(["bench", "compare", str(out / "report.json"), str(tmp_path / "slower.json")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"in one alone: Start, {OURS}: measured → not there"
    assert told[1].startswith(f"worse  Whole pictures, {OURS}: total")
    assert told[-1].startswith("1 of ") and told[-1].endswith(" figures changed beyond noise")


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        (["bench", "compare", "no.json", "no.json"], 1, "no.json: cannot be read"),
        (["bench", "--out", "report"], 2, "BUNDLE, --preset: what to measure"),
        (["bench", "bundle", "--preset", "sd15", "--out", "report"], 2, "BUNDLE, --preset: what to measure"),
        (["bench", "bundle", "--peer", "difusers", "--out", "report"], 2, "Did you mean 'diffusers'"),
        (["bench", "bundle", "--rounds", "0", "--out", "report"], 2, "--rounds: not usable, got 0, expected 1 or more"),
        (["bench", "bundle", "--target", "tpu", "--out", "report"], 2, "target"),
        (["bench", "no-bundle", "--out", "report"], 1, "no-bundle"),
        (["bench", "limits", "bundle", "--prompt", "a", "--out", "report"], 2, "unrecognized arguments: --prompt"),
        (["bench", "setup", "torch"], 2, "PEER: unknown peer, got 'torch'"),
        (["bench", "hybird"], 2, "BUNDLE: no such folder or command, got 'hybird', expected a folder"),
        (["bench", "hybird"], 2, "Did you mean 'hybrid'?"),
        (["bench", "."], 2, "--out: not given, expected the folder for the report"),
        (["bench", "bundle", "--scale", "tiny", "--out", "report"], 2, "--scale: is of a --preset. Leave it out"),
        (["bench", "bundle", *ORT, *ORT, "--out", "report"], 2, "--target: given twice, got 'onnxruntime:cpu:fp32'"),
        (["bench", "bundle", *["--peer", "diffusers"] * 2, "--out", "r"], 2, "--peer: given twice, got 'diffusers'"),
        (
            ["bench", "bundle", *ORT, "--checkpoint", "no/sd15", "--out", "r"],
            1,
            "the checkpoint of the bundle: is no folder, got",
        ),
        (
            ["bench", "bundle", *ORT, "--small", "no/small", "--out", "r"],
            1,
            "the checkpoint of unet_small: is no folder, got",
        ),
        (
            ["bench", "bundle", *ORT, "--out", "/proc/report"],
            1,
            "/proc/report: cannot be written (No such file or directory)",
        ),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_runs(
    asked: list[str],
    status: int,
    told: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(asked) == status
    assert told in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_report_that_is_there_is_kept(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    assert main(["bench", str(bundle), *SMALL, "--out", str(tmp_path)]) == 1
    assert "report.json: exists already. Give another --out, or --force" in capsys.readouterr().err


def test_steps_that_the_bundle_cannot_run_are_told(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(bundle), *QUICK, "--steps", "unet_big:3", "--out", str(tmp_path / "out")]) == 2
    assert "unknown denoiser, got 'unet_big'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([*ORT, "--size", "65"], "height: not usable, got 65, expected a positive multiple of 16 pixels"),
        (["--target", "onnxruntime:cpu:fp16"], "precision of the exported model, got 'fp32', expected fp16"),
    ],
)
def test_what_the_bundle_cannot_do_is_told_before_the_machine_is_measured(
    asked: list[str],
    told: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_command, "limits_by_target", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", str(bundle), *asked, "--out", str(tmp_path / "out")]) in (1, 2)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fresh_starts_have_a_help_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cold", "--help"]) == 0
    told = capsys.readouterr().out
    assert "Start TandemRT and its peers anew" in told and "--out report/" not in told


def test_the_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert {"run", "compare", "setup"} <= set(capsys.readouterr().out.split())


def test_plans_from_large_to_small(bundle: Path, tmp_path: Path) -> None:
    asked = ["bench", "hybrid", str(bundle), *ORT, "--steps", "4", "--points", "2,0", "--rounds", "2"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    (section,) = read_report(tmp_path / "report.json").sections
    assert [row.name for row in section.rows] == ["4/0", "2/2", "0/4"]
    large, half, small = (row.figures for row in section.rows)
    assert "psnr" not in large
    assert 0 < small["psnr"].median < half["psnr"].median < 200
    assert all(0 < figures["denoise"].values.min() < figures["total"].values.min() for figures in (large, half, small))
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--steps", "2,1", "--peer", "diffusers", "--checkpoint", "."], "reads a checkpoint of unet_small, and none"),
        (
            ["--decoder", "vae_decoder_tiny", "--peer", "diffusers", "--checkpoint", "."],
            "checkpoint of vae_decoder_tiny",
        ),
        (["--steps", "2,1", "--peer", "optimum"], "runs one denoiser in a picture, this plan has several"),
        (["--steps", "unet_small:2", "--peer", "optimum"], "the pipeline's own denoiser, not with unet_small"),
        (["--decoder", "vae_decoder_tiny", "--peer", "optimum"], "paints with the bundle's first decoder, not with"),
        (["--peer", "optimum"], "Set it up, which installs it from the package registry: tandemrt bench setup optimum"),
    ],
)
def test_what_a_peer_cannot_do_is_told_in_the_report(asked: list[str], told: str, bundle: Path, tmp_path: Path) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["bench", str(bundle), *QUICK, "--rounds", "1", *asked, *cache, "--out", str(tmp_path)]) == 0
    report = read_report(tmp_path / "report.json")
    assert told in report.sections[0].rows[1].failed
    assert any(told in caveat for caveat in report.caveats)
    assert "Rounds: 1. Medians of so few tell little." in report.caveats


def test_fresh_starts(bundle: Path, tmp_path: Path) -> None:
    asked = ["bench", "cold", str(bundle), *ORT, "--rounds", "2", "--peer", "diffusers", "--out", str(tmp_path)]
    assert main(asked) == 0
    section, ran, models = read_report(tmp_path / "report.json").sections
    ours, peer = section.rows
    assert ran.rows[0].words["threads"] == "1"
    assert [row.words[OURS] for row in models.rows] == ["graph", "graph", "graph"]
    assert len(ours.figures["first"].samples) == 2
    until = [ours.figures[name].values for name in ("import", "open", "first")]
    assert (until[0] > 0).all() and (until[0] < until[1]).all() and (until[1] < until[2]).all()
    assert 20 < ours.figures["import_peak"].median < ours.figures["peak"].median
    assert "reads a checkpoint" in peer.failed


def test_decoders(bundle: Path, tmp_path: Path) -> None:
    asked = ["bench", "vae", str(bundle), *ORT, "--rounds", "3", "--latents", "2", "--out", str(tmp_path / "report")]
    assert main([*asked, "--steps", "2,1", "--target", "onnxruntime:cpu"]) == 0
    report = read_report(tmp_path / "report" / "report.json")
    assert report.request["steps"] == "2,1"
    section, other = report.sections
    base, tiny = section.rows
    assert ["psnr" in row.figures for row in other.rows] == ["psnr" in row.figures for row in section.rows]
    assert (base.name, tiny.name) == ("vae_decoder", "vae_decoder_tiny")
    assert len(set(tiny.figures["psnr"].samples)) == 2
    assert all(row.figures["peak"].median > 20 and row.figures["file"].median > 0 for row in (base, tiny))
    assert len(base.figures["decode"].samples) == 3


def test_a_picture_of_one_step(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_limits, "SIDE", 64)
    monkeypatch.setattr(picture_limits, "COPIED", 4096)
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["build-engine", str(bundle), *ORT[:2], "--component", "unet_small", *cache]) == 0
    asked = ["bench", "onestep", str(bundle), *ORT, "--steps", "unet_small:1", "--rounds", "2", *cache]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    report = read_report(tmp_path / "report.json")
    section, peaks = report.sections
    assert [row.name for row in peaks.rows] == [f"{ORT[1]}: {of}" for of in ("products, fp32", "copies")]
    *models, whole = section.rows
    assert [row.name for row in models] == ["text_encoder", "unet_small", "vae_decoder"]
    assert report.request["steps"] == "unet_small:1"
    totals = whole.figures["call"].values
    for row in models:
        assert row.words["precision"] == "fp32"
        on_engine = row.name == "unet_small"
        assert row.words["ran"].split()[0] == ("engine" if on_engine else "graph")
        assert (row.figures["file"].median != report.subjects[0].file_mb[row.name]) is on_engine
        assert row.figures["share"].values == pytest.approx(row.figures["call"].values / totals)
        assert row.figures["call"].values.max() < totals.max()
        assert 20 < row.figures["peak"].median < whole.figures["peak"].median
    least = [row.figures["limit"].values * row.figures["call"].values for row in section.rows]
    assert all(one[0] == pytest.approx(one[1]) for one in least)
    assert sum(one[0] for one in least[:-1]) == pytest.approx(least[-1][0])
    sizes = [row.figures["file"].median for row in models]
    assert whole.figures["file"].median == pytest.approx(sum(sizes))


def test_ways_of_guidance(bundle: Path, tmp_path: Path) -> None:
    asked = ["bench", "cfg", str(bundle), "--target", "onnxruntime:cpu:fp32", "--threads", "2", "--steps", "22"]
    assert main([*asked, "--rounds", "2", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 0
    (section,) = read_report(tmp_path / "report.json").sections
    rows = {row.name: row for row in section.rows}
    assert list(rows) == ["batched", "sequential", "parallel", "adaptive", "hybridiff"]
    assert all(rows[name].figures["psnr"].median > 60 for name in ("sequential", "parallel"))
    assert "build-engine" in rows["hybridiff"].failed
    assert rows["batched"].words["guided"] == "22 of 22"
    assert rows["adaptive"].words["guided"].endswith(" of 22")
    assert read_report(tmp_path / "report.json").request["size"] == "64x64"


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        (["hybrid", "--steps", "4", "--points", "5"], 2, "--points: more or fewer steps than there are, got '5'"),
        (["hybrid", "--points", "a"], 2, "--points: not numbers of steps, got 'a'"),
        (["vae", "--size", "60"], 2, "height: not usable, got 60, expected a positive multiple of 16 pixels"),
        (["cfg", "--guidance-scale", "1"], 1, "runs no guidance: guidance_scale is 1 or below"),
        (
            ["onestep"],
            1,
            "steps of its plan, got 'unet 10', expected one. Ask for --steps unet:1 or --steps unet_small:1",
        ),
    ],
)
def test_kinds_that_cannot_be_run_are_told(
    asked: list[str], status: int, told: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, *rest = asked
    assert main(["bench", kind, str(bundle), *ORT, *rest, "--out", str(tmp_path / "out")]) == status
    assert told in capsys.readouterr().err
