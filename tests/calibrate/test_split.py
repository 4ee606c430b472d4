"""`tandemrt calibrate split`: measured, interrupted, resumed, drawn, and stored as what runs by default."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from tandemrt.bench.precisions import captions
from tandemrt.calibrate import split, split_command
from tandemrt.calibrate.quality import psnr_db
from tandemrt.calibrate.split_plans import name_of
from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.calibrations import RowTime
from tandemrt.runtime.cli import main

from ..runtime.tiny_bundle import write_tiny_bundle

STEPS = ["--num-inference-steps", "4", "--points", "0,2", "--threads", "1", "--target", "onnxruntime:cpu"]
PROMPTS = ["a blue red", "red", "blue blue red"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def measured(bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on the bundle with further arguments; its status, its JSON, and what it wrote to stderr."""

    def run(*arguments: str) -> tuple[int, Any, str]:
        told = ["calibrate", "split", str(bundle), "--prompts", str(prompts), "--out", str(tmp_path / "report"), *STEPS]
        status = main([*told, *arguments, "--json"])
        stdout, stderr = capsys.readouterr()
        return status, json.loads(stdout) if stdout else None, stderr

    return run


def test_every_plan_is_measured_beside_the_large_denoiser(measured: Any, bundle: Path, tmp_path: Path) -> None:
    status, result, _ = measured()
    points = {point["plan"]: point for point in result["points"]}
    assert status == 0
    assert list(points) == [
        "unet:4",
        "unet:2,unet_small:2",
        "unet_small:4",
        "unet_small:2,unet:2",
        "unet:1,unet_small:1,unet:1,unet_small:1",
    ]
    alone = points["unet:4"]
    assert (alone["cost"], alone["latent_error"], alone["psnr_db"], alone["ssim"]) == (1, 0, 99, 1)
    assert alone["front"]
    large, small = (result["row_times"][name]["median_ms"] for name in ("unet", "unet_small"))
    assert points["unet_small:4"]["cost"] == pytest.approx(small / large)
    assert points["unet_small:2,unet:2"]["cost"] == pytest.approx((1 + small / large) / 2)
    with Pipeline.open(bundle, "onnxruntime:cpu", threads=1) as pipe:
        pictures = [
            split._pixels(pipe(PROMPTS, steps=steps, seed=[0, 1, 2])) for steps in ({"unet": 4}, {"unet_small": 4})
        ]
    decibels = sorted(psnr_db(one, other) for one, other in zip(*pictures, strict=True))
    assert points["unet_small:4"]["psnr_db"] == pytest.approx(decibels[1], abs=0.01)
    drawn = ElementTree.parse(tmp_path / "report" / "split.svg").getroot()
    titles = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    # In the panel of PSNR the large denoiser itself is beyond the axis.
    assert len(titles) == 2 * len(points) - 1
    assert any(title.startswith("unet_small:2,unet:2: cost ") for title in titles)
    assert json.loads((tmp_path / "report" / "split.json").read_text())["points"] == result["points"]


def test_a_sweep_is_kept_in_the_cache_and_old_ones_go(
    bundle: Path, prompts: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = cache / "splits" / ("0" * 64)
    stale.mkdir(parents=True)
    (stale / "sweep.jsonl").touch()
    for path in (stale / "sweep.jsonl", stale):
        os.utime(path, (0, 0))
    assert main(["calibrate", "split", str(bundle), "--prompts", str(prompts), *STEPS, "--points", "4", "--json"]) == 0
    (kept,) = (cache / "splits").iterdir()
    assert json.loads(capsys.readouterr().out)["report"] == str(kept)
    assert {path.name for path in kept.iterdir()} == {"sweep.jsonl", "split.json", "split.svg"}


@pytest.mark.parametrize("by", ["latent_error", "psnr_db"])
def test_the_large_denoiser_alone_is_drawn_without_its_psnr(measured: Any, tmp_path: Path, by: str) -> None:
    """Which is that of equal pictures, and beyond every axis."""
    status, result, _ = measured("--points", "4", "--by", by)
    assert (status, [point["plan"] for point in result["points"]]) == (0, ["unet:4"])
    drawn = ElementTree.parse(tmp_path / "report" / "split.svg").getroot()
    assert [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")] == [
        "unet:4: cost 1.000, latent_error 0"
    ]


def test_an_interrupted_sweep_goes_on_to_the_same_figures(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted: list[int] = []
    real = split._painted

    def interrupted(pipeline: Any, sweep: Any, runs: Any, chosen: Any) -> Any:
        painted.extend(chosen)
        if len(painted) == 7:
            raise KeyboardInterrupt
        return real(pipeline, sweep, runs, chosen)

    monkeypatch.setattr(split, "_painted", interrupted)
    assert measured("--batch", "1")[0] == 130
    before = len(painted)
    status, result, _ = measured("--batch", "1")
    # The second prompt's reference once more, its four other plans, and the third prompt's five.
    assert (status, len(painted) - before) == (0, 1 + 4 + 5)
    before = len(painted)
    _, again, _ = measured("--batch", "2")
    assert (again["points"], len(painted)) == (result["points"], before)
    _, anew, _ = measured("--batch", "1", "--discard")
    assert len(painted) - before == 15
    for name in ("latent_error", "psnr_db", "ssim"):
        assert [point[name] for point in anew["points"]] == [point[name] for point in result["points"]]


def test_a_scorer_that_was_changed_scores_anew(measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "changing_scores.py"
    source.write_text("def shows(prompts, pictures):\n    return [True] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    scored = ("--scorer", "changing_scores:shows", "--points", "4")
    status, result, _ = measured(*scored)
    assert (status, result["points"][0]["right"]) == (0, 3)
    monkeypatch.delitem(sys.modules, "changing_scores")
    source.write_text("def shows(prompts, pictures):\n    return [False] * len(prompts)\n")
    importlib.invalidate_caches()
    status, _, stderr = measured(*scored)
    assert (status, "holds another run: scorer sha256 is '" in stderr) == (2, True)
    monkeypatch.delitem(sys.modules, "changing_scores", raising=False)
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert measured(*scored, "--discard")[1]["points"][0]["right"] == 0


def test_more_plans_and_prompts_are_measured_beside_what_is_there(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, few, _ = measured("-n", "2")
    painted: list[tuple[str, int]] = []
    real = split._painted

    def watched(pipeline: Any, sweep: Any, runs: Any, chosen: Any) -> Any:
        painted.extend((name_of(runs), index) for index in chosen)
        return real(pipeline, sweep, runs, chosen)

    monkeypatch.setattr(split, "_painted", watched)
    own = "unet_small:1,unet:2,unet_small:1"
    status, more, _ = measured("--plan", own, "--batch", "1")
    plans = [point["plan"] for point in few["points"]]
    assert status == 0
    assert [point["plan"] for point in more["points"]] == [*plans, own]
    assert more["points"][-1]["order"] == "given"
    # Of the two prompts that are there, the reference and the new plan.
    assert painted == [("unet:4", 0), (own, 0), ("unet:4", 1), (own, 1), *((plan, 2) for plan in [*plans, own])]


def test_the_best_plan_within_a_budget_runs_by_default(
    measured: Any, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Bundle.open(bundle)
    status, result, _ = measured("--budget", "1e9", "--by", "ssim", "--plan", "unet:3,unet_small:1")
    after = Bundle.open(bundle)
    assert status == 0
    # Nothing is like the large denoiser's pictures as these themselves.
    assert (after.manifest.defaults.steps, after.manifest.defaults.num_inference_steps) == ((("unet", 4),), 4)
    assert result["stored"] == {"steps": "unet:4", "digest": after.digest}
    assert after.digest != before.digest
    split_ = after.manifest.calibrations.split
    assert split_ is not None
    assert (split_.chosen_by, split_.budget, split_.prompts) == ("ssim", 1e9, 3)
    assert [point.cost for point in split_.points] == [point["cost"] for point in result["points"]]
    # The sweep does not go by what sweeps store.
    status, result, _ = measured("--budget", "1e9", "--by", "ssim", "--plan", "unet:3,unet_small:1")
    assert (status, Bundle.open(bundle).digest) == (0, after.digest)
    assert main(["inspect", str(bundle)]) == 0
    assert "4 steps (unet 4)" in capsys.readouterr().out


def test_a_budget_within_the_interval_of_a_cost_is_warned_of(
    measured: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of nine rounds the least and the most are left out; rounds are compared with themselves."""
    large = (10.0, 20.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0)
    small = (4.0, 8.0, 3.0, 1.0, 9.0, 5.0, 4.0, 4.0, 4.0)
    rows = {
        name: RowTime(median_ms=median, least_ms=min(taken), most_ms=max(taken), rounds_ms=taken)
        for name, median, taken in (("unet", 10.0, large), ("unet_small", 4.0, small))
    }
    monkeypatch.setattr(split_command, "measured_rows", lambda *given: rows)
    given = ("--points", "0", "--by", "ssim")
    for budget, warned in (("0.45", True), ("0.55", False)):
        status, result, told = measured(*given, "--budget", budget)
        unsure = f"--budget {budget} lies within the interval of what some plans cost"
        assert (status, unsure in told) == (0, warned)
    point = result["points"][-1]
    assert (point["plan"], point["cost"], point["cost_interval"]) == ("unet_small:4", 0.4, [0.3, 0.5])
    assert "unet_small:4 0.400 (0.300–0.500). Measure on a quieter machine" in measured(*given, "--budget", "0.45")[2]
    assert result["points"][0]["cost_interval"] == [1, 1]
    assert any("unet_small:4  0.400 (0.300–0.500)  " in line for line in split_command.summary(result))
    assert main(["inspect", str(bundle)]) == 0
    assert "the default costs 0.400 (0.300–0.500) of unet alone" in capsys.readouterr().out


def test_what_is_chosen_is_judged_by_prompts_that_it_was_not_chosen_with(
    measured: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "red_scores.py").write_text(
        "def red(prompts, pictures):\n    return ['red' in one for one in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.txt").write_text("blue\nred blue\nblue blue\n")
    given = ["--held-out", str(tmp_path / "held.txt"), "--scorer", "red_scores:red", "--points", "0,2"]
    monkeypatch.setattr(split_command, "plan_costs", lambda *given: [1.0, 0.6, 0.9, 0.9, 0.9])
    assert measured(*given)[1]["held_out"] is None
    status, result, _ = measured(*given, "--budget", "0.7", "--judge", "2")
    judged = result["held_out"]
    assert (status, result["stored"]["steps"]) == (0, "unet:2,unet_small:2")
    assert (judged["prompts"], judged["seed"], judged["chosen"]["right"], judged["large"]["right"]) == (2, 3, 1, 1)
    with Pipeline.open(bundle, "onnxruntime:cpu", threads=1) as pipe:
        plans = ({"unet": 4}, {"unet": 2, "unet_small": 2})
        large, chosen = (split._pixels(pipe(["blue", "red blue"], steps=steps, seed=[3, 4])) for steps in plans)
    apart = sorted(psnr_db(one, other) for one, other in zip(chosen, large, strict=True))
    assert judged["chosen"]["psnr_db"] == pytest.approx(sum(apart) / 2, abs=0.01)
    assert (judged["large"]["psnr_db"], judged["chosen"]["cost"]) == (99, 0.6)
    evidence = Bundle.open(bundle).manifest.calibrations.split
    assert evidence is not None and evidence.held_out is not None
    assert json.loads(msgspec.json.encode(evidence.held_out)) == judged
    assert main(["inspect", str(bundle)]) == 0
    told = (
        f"on 2 held-out prompts latent error {judged['chosen']['latent_error']:.4f}, {sum(apart) / 2:.1f} dB, 1 right"
    )
    assert f"{told} (1 by the large one alone)" in capsys.readouterr().out
    # The large denoiser alone is judged beside itself.
    _, result, _ = measured(*given, "--budget", "1", "--by", "ssim")
    judged = result["held_out"]
    assert (result["stored"]["steps"], judged["prompts"], judged["chosen"]) == ("unet:4", 3, judged["large"])


def test_a_budget_that_no_plan_meets_stores_nothing(measured: Any, bundle: Path) -> None:
    before = Bundle.open(bundle)
    status, result, stderr = measured("--budget", "1e-9")
    assert status == 1
    assert "--budget: no plan costs so little, got 1e-09, expected" in stderr
    assert "Nothing was stored" in result["error"]["message"]
    assert Bundle.open(bundle) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--points", "0,5"], "--points: steps of the large denoiser, got 5, expected 0 to 4"),
        (["--points", "0;2"], "--points: not numbers"),
        (["--plan", "unet:2,unet_small:3"], "--plan: number of steps in unet:2,unet_small:3, got 5, expected 4"),
        (["--plan", "unet:2,unet_tiny:2"], "steps: unknown denoiser"),
        (["--large", "unet_large"], "--large: unknown denoiser"),
        (["--small", "vae_decoder"], "--small: unknown denoiser"),
        (["--large", "unet", "--small", "unet"], "--small: the large denoiser itself"),
        (["--budget", "0"], "--budget: not usable"),
        (["--budget", "nan"], "--budget: not usable"),
        (["--judge", "2"], "--judge: nothing to judge, got 2"),
        (["--by", "accuracy"], "Give --scorer"),
        (["-n", "0"], "-n: not usable"),
        (["-n", "4"], "prompts, got 3, expected -n 4. Give -n 3, or more prompts."),
        (["--batch", "0"], "--batch: not usable"),
        (["--scorer", "nothing"], "--scorer: not a scorer"),
    ],
)
def test_what_cannot_be_used_is_refused(measured: Any, tmp_path: Path, arguments: list[str], words: str) -> None:
    status, _, stderr = measured(*arguments)
    assert (status, words in stderr) == (2, True), stderr
    assert not (tmp_path / "report").exists()


def test_prompts_that_are_held_out_are_refused(measured: Any, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("RED\n")
    status, _, stderr = measured("--held-out", str(tmp_path / "held.txt"))
    assert status == 2
    assert "held out and calibrated with" in stderr


def test_the_report_does_not_go_into_the_bundle(measured: Any, bundle: Path) -> None:
    status, _, stderr = measured("--out", str(bundle / "report"))
    assert status == 2
    assert "bundle" in stderr
    Bundle.open(bundle)


def test_the_plan_is_told(measured: Any) -> None:
    status, facts, _ = measured("--print-plan")
    assert (status, facts["prompts"], len(facts["plans"])) == (0, 3, 5)


@pytest.mark.slow
def test_the_shapes_bundle_is_split_and_paints_held_out_prompts_as_well(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(shapes_bundle, tmp_path / "bundle")
    prompts, held_out = captions(8, "development"), captions(52, "held_out")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "held-out.txt").write_text("\n".join(held_out))
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--held-out", str(tmp_path / "held-out.txt")]
    told = ["calibrate", "split", str(bundle), *files, "--out", str(tmp_path / "report"), "--batch", "8"]
    told += ["--num-inference-steps", "10", "--points", "0,5", "--threads", "1", "--target", "onnxruntime:cpu"]
    assert main([*told, "--scorer", "tandemrt.bench.shapes.checker:shows", "--budget", "0.8"]) == 0
    assert "by default from now on" in capsys.readouterr().out
    manifest = Bundle.open(bundle).manifest
    calibration = manifest.calibrations.split
    assert calibration is not None
    assert calibration.chosen_by == "accuracy"
    chosen = next(point for point in calibration.points if point.steps == manifest.defaults.steps)
    assert chosen.cost <= 0.8
    assert chosen.right is not None and chosen.right >= 7
    judged = calibration.held_out
    assert judged is not None and judged.chosen.right is not None and judged.large.right is not None
    assert (judged.prompts, judged.seed, judged.chosen.steps) == (len(held_out), len(prompts), chosen.steps)
    # The small denoiser alone loses four.
    assert judged.chosen.right >= judged.large.right - 3
    with Pipeline.open(bundle, "onnxruntime:cpu", threads=1) as pipe:
        assert pipe(held_out[0], seed=judged.seed, output_type="latent").plan.steps == chosen.steps
