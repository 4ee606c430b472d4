"""`tandemrt calibrate guidance`: what is found keeps to the loss, is stored, and used; what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from tandemrt.bench.shapes.scenes import scenes
from tandemrt.calibrate import guidance_command
from tandemrt.calibrate.guidance_runs import Painter
from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import BundleError, CacheFullError
from tandemrt.runtime.plan import Schedule, compile_plan

from ..runtime.tiny_bundle import resign, write_tiny_bundle
from ..runtime.tiny_families import write_tiny_lcm

CHOOSING, JUDGING = ("red", "red red", "blue red"), ("blue", "blue blue", "red blue")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_bundle(tmp_path / "bundle")
    (tmp_path / "prompts.txt").write_text("\n".join(CHOOSING))
    (tmp_path / "judged.txt").write_text("\n".join(JUDGING))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    """Those of the command on prompts and a bundle in a folder."""
    files = ["--prompts", str(folder / "prompts.txt"), "--held-out", str(folder / "judged.txt")]
    where = ["--out", str(folder / "out"), "--target", "onnxruntime:cpu"]
    return ["calibrate", "guidance", str(folder / "bundle"), *files, *where, *more]


SHORT = ("--steps", "8", "--kinds", "interval,adaptive", "--candidates", "8", "--min-psnr", "20")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_what_is_found_holds_and_is_stored_and_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, *SHORT, "--store", "interval,adaptive", "--json")) == 0
    result = told(capsys)
    assert result["stored"] == ["interval", "adaptive"]
    assert (result["prompts"]["count"], result["held_out"]["count"], result["rows"]) == (3, 3, 8)
    for found in result["kinds"].values():
        chosen = found["chosen"]
        assert chosen["psnr_db"] >= 20
        assert chosen["prompts"] == 3
        assert 8 <= chosen["branches"] < 16 == chosen["full_branches"]
        assert chosen["saved"] == 1 - chosen["branches"] / 16
        assert 0 < chosen["time_p10"] <= chosen["time_ratio"] <= chosen["time_p90"]
    bundle = Bundle.open(folder / "bundle")
    interval, adaptive = (result["kinds"][kind]["chosen"] for kind in ("interval", "adaptive"))
    evidence = bundle.manifest.calibrations.guidance["adaptive"]
    assert evidence.numbers == adaptive["numbers"]
    assert (evidence.psnr_db, evidence.held_out, evidence.min_psnr_db) == (adaptive["psnr_db"], 3, 20)
    guided = compile_plan(bundle.manifest, Schedule(steps=8)).guided
    assert 8 + sum(guided) == interval["branches"]
    rule = compile_plan(bundle.manifest, Schedule(steps=8, guidance="adaptive")).adaptive
    assert rule is not None
    assert rule.threshold == adaptive["numbers"]["threshold"]
    ElementTree.fromstring((folder / "out" / "curves.svg").read_bytes())
    front = ElementTree.fromstring((folder / "out" / "front.svg").read_bytes())
    # What was asked for, and of both kinds each setting that was run with all prompts, told apart by their shapes.
    assert len([line for line in front if "stroke-dasharray" in line.attrib]) == 1
    for kind, shape in (("interval", "circle"), ("adaptive", "polygon")):
        settings = [one for one in result["kinds"][kind]["settings"] if one["prompts"] == one["of"]]
        assert len([mark for mark in front if mark.tag.endswith(shape)]) == len(settings) + 1
    curves = json.loads((folder / "out" / "curves.json").read_text())
    assert [len(curve["discrepancy"]) for curve in curves] == [8, 8, 8]


def test_the_same_command_goes_on_and_paints_nothing_twice(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    painted, paint = 0, Painter._paint

    def counted(self: Painter, index: int, given: Any) -> Any:
        nonlocal painted
        painted += 1
        if painted == 12:
            raise KeyboardInterrupt
        return paint(self, index, given)

    monkeypatch.setattr(Painter, "_paint", counted)
    assert main(arguments(folder, *SHORT)) == 130
    assert main(arguments(folder, *SHORT, "--json")) == 0
    first, before = told(capsys), painted
    assert main(arguments(folder, *SHORT, "--json", "--store")) == 0
    assert painted == before
    second = told(capsys)
    assert [(one.pop("to_store"), one.pop("stored")) for one in (first, second)] == [
        ([], []),
        (["adaptive"], ["adaptive"]),
    ]
    assert second == first
    assert Bundle.open(folder / "bundle").manifest.defaults.guidance_interval is None
    assert main(arguments(folder, *SHORT, "--seed", "5")) == 2
    assert "seed is 0 there, 5 here" in capsys.readouterr().err
    # What else the manifest says decides the pictures too.
    larger = {"height": 80}
    resign(folder / "bundle", lambda one: replace(one, defaults=replace(one.defaults, **larger)))
    assert main(arguments(folder, *SHORT)) == 2
    assert "facts is " in capsys.readouterr().err


def test_a_window_that_cannot_run_here_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--steps", "8", "--kinds", "hybridiff", "--threads", "1", "--store", "--json")
    assert main(arguments(folder, *given, "--traceback")) == 1
    result = told(capsys)
    found = result["kinds"]["hybridiff"]
    assert found["why_not"].startswith("not run: placement: CPU threads for two workers, got 1")
    # What the curves tell is told nevertheless.
    assert all(len(one["tau1"]) == len(CHOOSING) and 8 <= one["forecast_branches"] < 16 for one in found["settings"])
    assert result["stored"] == []
    assert Bundle.open(folder / "bundle").manifest.defaults.taus is None


@pytest.mark.parametrize("full", [False, True])
def test_a_window_whose_stages_cannot_be_made_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """The tiny denoiser cannot be cut; of one that can the cache may be full."""

    def built(*given: Any) -> Any:
        raise CacheFullError("cache", "no room")

    if full:
        monkeypatch.setattr(guidance_command, "requests_of", lambda plan, bundle: (plan,))
        monkeypatch.setattr(guidance_command, "ensure_engine", built)
    (folder / "cache").mkdir(mode=0o700)
    more = ("--kinds", "hybridiff,interval", "--threads", "2", "--cache", str(folder / "cache"), "--json")
    assert main(arguments(folder, *SHORT, *more)) == 0
    result = told(capsys)
    why = "cache: no room" if full else "unet: no denoiser whose blocks are told by its nodes' names, got '12 nodes'"
    assert result["kinds"]["hybridiff"]["why_not"].startswith(f"not run: {why}")
    assert result["kinds"]["interval"]["chosen"]


def test_nothing_is_told_as_stored_that_is_not(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> Any:
        raise BundleError("tandem.json", "cannot be written")

    with monkeypatch.context() as patched:
        patched.setattr(guidance_command, "store_guidance", full)
        assert main(arguments(folder, *SHORT, "--store")) == 1
    report = folder / "out" / "guidance.json"
    assert not report.exists()
    capsys.readouterr()
    assert main(arguments(folder, *SHORT, "--store", "--json")) == 0
    assert json.loads(report.read_text())["stored"] == told(capsys)["stored"] == ["adaptive"]


def test_a_loss_that_nothing_keeps_to_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, *SHORT[:-1], "98.9", "--kinds", "interval", "--store", "interval", "--json")) == 1
    result = told(capsys)
    found = result["kinds"]["interval"]
    whole = [one for one in found["settings"] if one["prompts"] == one["of"]]
    nearest = max(whole, key=lambda one: one["psnr_db"])
    # What is told was measured with all prompts, and nothing that was given up could have come nearer.
    assert all(one["psnr_db"] <= nearest["psnr_db"] for one in found["settings"])
    numbers = ", ".join(f"{name} {value:g}" for name, value in nearest["numbers"].items())
    told_ = f"keeps to the loss; the nearest, interval {numbers}, comes to {nearest['psnr_db']:.1f} dB"
    assert found["why_not"].endswith(told_)
    assert result["stored"] == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--guidance-scale", "1"), "no guidance to leave out, got 'guidance 1 on 0 of 10 rows (guidance_scale is 1"),
        (("--steps", "2"), "rows, of which some are to run one branch, got 2"),
        (("--max-loss", "0.1"), "--max-loss: given without a scorer"),
        (("--min-psnr", "-3"), "--min-psnr: decibels, got -3"),
        (("--min-psnr", "nan"), "--min-psnr: decibels, got nan"),
        (("-n", "4"), "prompts.txt: prompts, got 3, expected -n 4. Give -n 3, or more prompts."),
        (("--judge", "4"), "judged.txt: prompts, got 3, expected --judge 4. Give --judge 3, or more prompts."),
        (("--kinds", "interval,taus"), "--kinds: unknown kind, got 'taus'"),
        (("--kinds", "interval", "--store"), "--store: not measured"),
        (("--kinds", "adaptive", "--store", "interval"), "--store: not measured"),
        (("--candidates", "0"), "--candidates: not usable, got 0"),
        (("--scorer", "no_such_module:f"), "--scorer"),
        (("--held-out", "PROMPTS"), "held out and calibrated with: 3 of them, the first is 'red'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    given = [str(folder / "prompts.txt") if one == "PROMPTS" else one for one in more]
    assert main(arguments(folder, "--steps", "10", *given)) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_embedded_guidance_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "bundle")
    write_tiny_lcm(folder / "bundle")
    assert main(arguments(folder, "--guidance-scale", "7")) == 2
    assert "guidance is embedded" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shapes_family_is_thresholded(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shapes_bundle, tmp_path / "bundle")
    (tmp_path / "cache").mkdir(mode=0o700)
    for name, split, count in (("prompts", "development", 3), ("judged", "held_out", 4)):
        captions = [scene.caption for scene in scenes(0, count, split)]  # type: ignore[arg-type]
        (tmp_path / f"{name}.txt").write_text("\n".join(captions))
    scorer = ("--scorer", "tandemrt.bench.shapes.checker:shows", "--max-loss", "0", "--min-psnr", "30")
    more = ("--threads", "2", "--cache", str(tmp_path / "cache"), "--candidates", "4", "--store", "--json")
    assert main(arguments(tmp_path, *scorer, *more)) == 0
    result = told(capsys)
    assert result["stored"] == ["adaptive", "hybridiff"]
    for kind in result["stored"]:
        chosen = result["kinds"][kind]["chosen"]
        assert chosen["psnr_db"] >= 30
        assert chosen["right"] == chosen["right_in_full"]
        assert chosen["saved"] > 0.1
    # What the curves said of a prompt is what a run of it does.
    window = next(one for one in result["kinds"]["hybridiff"]["settings"] if one["front"])
    with Pipeline.open(tmp_path / "bundle", "onnxruntime:cpu", threads=2, cache=tmp_path / "cache") as pipe:
        prompt = (tmp_path / "prompts.txt").read_text().splitlines()[0]
        out = pipe(prompt, seed=0, placement="hybridiff", placement_config=window["numbers"], output_type="latent")
        assert out.plan.taus == (window["tau1"][0], window["tau1"][0] + window["numbers"]["k"])
        stored = pipe(prompt, seed=0, placement="hybridiff", output_type="latent").plan.window
    assert stored is not None
    assert stored.taus.k == result["kinds"]["hybridiff"]["chosen"]["numbers"]["k"]
