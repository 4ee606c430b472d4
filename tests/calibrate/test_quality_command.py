"""`tandemrt calibrate quality`: what it measures of two folders, what it says of what it cannot, and bad input."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tandemrt.calibrate import quality_command
from tandemrt.calibrate.frechet import FeatureStatistics, frechet_distance
from tandemrt.calibrate.quality import psnr_db, ssim
from tandemrt.runtime.cli import main
from tandemrt.runtime.images import save_png

from .test_perceptual import means_of_rows

COUNT, PROMPTS = 20, ("a red circle", "a blue square")
RNG = np.random.default_rng(7)
REFERENCES = RNG.integers(0, 256, (COUNT, 24, 16, 3), dtype=np.uint8)
PICTURES = np.clip(REFERENCES + RNG.integers(-20, 21, REFERENCES.shape), 0, 255).astype(np.uint8)
PICTURES[3] = REFERENCES[3]

Measured = Callable[..., tuple[int, dict[str, Any], str]]


def write(folder: Path, pictures: np.ndarray, **facts: str) -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        told = {"prompt": PROMPTS[index % 2], **facts}
        save_png(Image.fromarray(picture), folder / f"{index:06d}.png", told)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "pictures", PICTURES), write(tmp_path / "references", REFERENCES)


@pytest.fixture
def measured(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Measured:
    """Exit status, result and what stderr was told, of measuring the pictures against the references."""

    def measured(*arguments: str, against: bool = True) -> tuple[int, dict[str, Any], str]:
        pictures, references = map(str, folders)
        command = ["calibrate", "quality", pictures, *(("--against", references) if against else ()), "--json"]
        status = main([*command, *arguments])
        told = capsys.readouterr()
        return status, json.loads(told.out), told.err

    return measured


def test_pairs_by_name(measured: Measured) -> None:
    status, result, _ = measured("--measure", "psnr", "ssim")
    assert (status, result["count"], result["not_measured"]) == (0, COUNT, {})
    for name, measure in (("psnr", psnr_db), ("ssim", ssim)):
        values = [measure(*pair) for pair in zip(PICTURES, REFERENCES, strict=True)]
        expected = {"mean": np.mean(values), "median": np.median(values), "worst": min(values)}
        assert result["measures"][name] == pytest.approx(expected)


def test_fid_of_a_network_of_ones_own(measured: Measured, tmp_path: Path) -> None:
    """In parts, of two folders whose pictures need not have the same names nor number."""
    onnx.save(means_of_rows(), tmp_path / "means.onnx")
    (tmp_path / "references" / "000000.png").rename(tmp_path / "references" / "other.png")
    (tmp_path / "references" / "000001.png").unlink()
    status, result, _ = measured("--measure", "fid", "--inception", str(tmp_path / "means.onnx"))
    found = [FeatureStatistics(), FeatureStatistics()]
    for statistics_of, pictures in zip(found, (PICTURES, np.delete(REFERENCES, 1, axis=0)), strict=True):
        statistics_of.add(2 * pictures.transpose(0, 3, 1, 2).astype(np.float64).mean(axis=3).reshape(len(pictures), -1))
    assert status == 0
    assert result["measures"]["fid"]["value"] == pytest.approx(frechet_distance(*found), rel=1e-4)


def test_it_fails_where_nothing_was_measured(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where nothing was asked for by name."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for path in (tmp_path / "references").iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    status, result, told = measured("--clip", str(tmp_path))
    assert (status, result["measures"]) == (1, {})
    assert f"psnr: {tmp_path / 'references'} has no picture named as one of {tmp_path / 'pictures'}" in told


def test_what_cannot_be_had_is_told_and_the_rest_measured(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    status, result, told = measured("--clip", str(tmp_path))
    assert status == 0
    assert list(result["measures"]) == ["psnr", "ssim"]
    assert list(result["not_measured"]) == ["lpips", "fid", "clip"]
    for name, sentence in result["not_measured"].items():
        assert sentence.startswith(f"{name}: ")
        assert f"warning: not measured: {sentence}" in told
    status, result, _ = measured("--measure", "ssim", "lpips")
    assert (status, list(result["measures"]), list(result["not_measured"])) == (1, ["ssim"], ["lpips"])


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (lambda: means_of_rows(batch=1), "Got invalid dimensions"),
        (lambda: means_of_rows(factor=float("nan")), "features: hold NaN or Inf"),
    ],
)
def test_a_network_that_fails_leaves_the_other_measures(
    measured: Measured, tmp_path: Path, network: Callable[[], onnx.ModelProto], told: str
) -> None:
    onnx.save(network(), tmp_path / "own.onnx")
    status, result, _ = measured("--measure", "fid", "psnr", "--inception", str(tmp_path / "own.onnx"))
    assert (status, list(result["measures"]), list(result["not_measured"])) == (1, ["psnr"], ["fid"])
    assert result["not_measured"]["fid"].startswith("fid: cannot be computed of these pictures (")
    assert told in result["not_measured"]["fid"]


def test_pictures_smaller_than_the_window_of_ssim_have_psnr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write(tmp_path / name, PICTURES[:2, :10])) for name in ("small", "references")]
    assert (
        main(["calibrate", "quality", folders[0], "--against", folders[1], "--measure", "ssim", "psnr", "--json"]) == 1
    )
    result = json.loads(capsys.readouterr().out)
    assert (list(result["measures"]), list(result["not_measured"])) == (["psnr"], ["ssim"])
    assert "sides from 11 on" in result["not_measured"]["ssim"]


def test_pictures_without_their_like_are_told_and_the_others_measured(measured: Measured, tmp_path: Path) -> None:
    own, other = tmp_path / "pictures", tmp_path / "references"
    (other / "000004.png").rename(other / "stray.png")
    status, result, told = measured("--measure", "psnr")
    values = np.delete([psnr_db(*pair) for pair in zip(PICTURES, REFERENCES, strict=True)], 4)
    assert status == 0
    assert result["measures"]["psnr"] == pytest.approx(
        {"mean": np.mean(values), "median": np.median(values), "worst": min(values)}
    )
    assert result["unpaired"] == [str(own / "000004.png"), str(other / "stray.png")]
    strays = f"{own / '000004.png'}, {other / 'stray.png'}"
    assert f"warning: {COUNT - 1} pairs of pictures are compared; without their like are 2: {strays}\n" in told
    (other / "stray.png").unlink()
    save_png(Image.new("RGB", (16, 12)), tmp_path / "references" / "000004.png", {})
    assert "000004.png has another size, got '16x24', expected 16x12" in measured("--measure", "psnr")[2]


def test_scorers_are_given_prompts_and_pictures(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the pictures' own text, or of a file in the order of their names."""
    (tmp_path / "my_scores.py").write_text(
        "def red(prompts, pictures):\n"
        "    assert pictures.dtype == 'uint8' and len(pictures) == len(prompts)\n"
        "    return ['red' in text for text in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    scored = ("--scorer", "my_scores:red", "--measure", "psnr")
    _, result, _ = measured(*scored)
    assert result["measures"]["scorer"]["share"] == 0.5
    assert result["measures"]["scorer"]["low"] < 0.5 < result["measures"]["scorer"]["high"]
    (tmp_path / "prompts.txt").write_text("".join(f"red {index}\n" for index in range(COUNT)))
    _, result, _ = measured(*scored, "--prompts", "prompts.txt")
    assert result["measures"]["scorer"]["share"] == 1
    (tmp_path / "prompts.txt").write_text("red\nblue\n" * (COUNT // 2))
    _, result, _ = measured(*scored, "--prompts", "prompts.txt")
    assert result["measures"]["scorer"]["share"] == 0.5
    for count in (1, COUNT + 1):
        (tmp_path / "others.txt").write_text("red\n" * count)
        status, result, _ = measured(*scored, "--prompts", "others.txt")
        assert status == 2
        assert f"prompts, got {count}, expected 20, one for each picture" in result["error"]["message"]


def test_a_scorer_that_fails_leaves_the_other_measures(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second batch, when it has answered for the first; named, it is asked for, whatever else is."""
    (tmp_path / "failing_scores.py").write_text(
        "def shows(prompts, pictures):\n    return [True if len(prompts) == 16 else 1 / 0 for _ in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for asked in ((), ("--measure", "psnr")):
        status, result, told = measured("--scorer", "failing_scores:shows", *asked, "--clip", str(tmp_path))
        assert status == 1
        assert result["measures"]["psnr"]["worst"] > 0
        assert "scorer" not in result["measures"]
        sentence = "--scorer failing_scores:shows: failed (ZeroDivisionError: division by zero)."
        assert result["not_measured"]["scorer"] == sentence
        assert f"warning: not measured: {sentence}" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--measure", "psnr"), "--measure: psnr without --against"),
        (("--measure", "ncc"), "ncc"),
        (("--scorer", "nowhere:shows"), "nowhere cannot be imported"),
        (("--against", "missing"), "--against missing: cannot be read"),
    ],
)
def test_arguments_that_cannot_be_used(measured: Measured, arguments: tuple[str, ...], told: str) -> None:
    status, result, _ = measured(*arguments, against=False)
    assert status == 2
    assert told in result["error"]["message"]


def test_folders_without_pictures_and_damaged_pictures(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "000002.png").write_bytes(b"nothing")
    status, result, _ = measured("--measure", "psnr")
    assert status == 2
    assert "000002.png: not a usable picture" in result["error"]["message"]
    for path in (tmp_path / "pictures").iterdir():
        path.unlink()
    status, result, _ = measured("--measure", "psnr")
    assert status == 2
    assert "holds no picture" in result["error"]["message"]


def test_pictures_without_prompts(measured: Measured, tmp_path: Path, clip_folder: Path) -> None:
    _, result, _ = measured("--measure", "clip", "--clip", str(clip_folder), against=False)
    assert 0 <= result["measures"]["clip"]["worst"] <= result["measures"]["clip"]["mean"] <= 100
    Image.new("RGB", (16, 24)).save(tmp_path / "pictures" / "000003.png")
    status, result, _ = measured("--measure", "psnr", "clip", "--clip", str(clip_folder))
    assert (status, list(result["measures"])) == (1, ["psnr"])
    assert "000003.png: holds no prompt" in result["not_measured"]["clip"]


@pytest.mark.parametrize(("name", "option"), [("clip", "clip_likeness"), ("lpips", "lpips_distance")])
def test_nan_is_no_measure_and_its_picture_is_named(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str
) -> None:
    """Of one picture behind the first batch."""
    values = iter([1.0] * 17 + [math.nan] + [1.0] * 20)
    own: dict[str, Any] = {
        "clip": lambda folder: lambda prompts, pictures: tuple(next(values) for _ in prompts),
        "lpips": lambda: lambda picture, reference: next(values),
    }
    monkeypatch.setattr(quality_command, option, own[name])
    status, result, _ = measured("--measure", name, "psnr")
    assert (status, list(result["measures"])) == (1, ["psnr"])
    told = f"{name}: of {tmp_path / 'pictures' / '000017.png'}, got nan, expected a finite number."
    assert result["not_measured"][name].startswith(told)


def test_a_person_is_told_a_line_a_measure(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pictures, references = map(str, folders)
    assert main(["calibrate", "quality", pictures, "--against", references, "--measure", "psnr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{COUNT} pictures of {pictures}"
    assert lines[1].startswith("psnr: mean ")
