"""Defaults that were measured with other models than a bundle has now: inspect and generate say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.calibrations import Calibrations, GuidanceCalibration, SplitCalibration
from tandemrt.runtime.cli import main
from tandemrt.runtime.manifest import AdaptiveNumbers, Manifest

from .tiny_bundle import resign, write_tiny_bundle

STEPS = (("unet", 2), ("unet_small", 2))
RAN = {"target": "onnxruntime:cpu", "threads": 1, "machine": (), "versions": {}, "seed": 0, "prompts": 8}
RAN |= {"prompts_sha256": "0" * 64, "scorer": None, "scorer_sha256": None}


def calibrations(files_sha256: str) -> Calibrations:
    split = SplitCalibration(
        files_sha256=files_sha256, large="unet", small="unet_small", row_times={}, budget=0.9, chosen_by="ssim",
        points=(), **RAN,
    )  # fmt: skip
    numbers = dict.fromkeys(("threshold", "release", "probe", "steady"), 1.0)
    guidance = GuidanceCalibration(
        files_sha256=files_sha256, numbers=numbers, steps=STEPS, guidance_scale=5.0, held_out=4,
        held_out_sha256="1" * 64, min_psnr_db=30.0, max_lost=None, branches=6.0, full_branches=8, time_ratio=0.8,
        psnr_db=31.5, worst_psnr_db=25.0, **RAN,
    )  # fmt: skip
    return Calibrations(split=split, guidance={"interval": guidance, "adaptive": guidance})


def write_calibrated(folder: Path) -> None:
    """The tiny bundle with a split, an interval and adaptive guidance stored, each with its evidence."""
    write_tiny_bundle(folder)

    def calibrated(manifest: Manifest) -> Manifest:
        numbers = AdaptiveNumbers(threshold=0.2, release=0.5, probe=3, steady=1.5)
        stored = {"steps": STEPS, "num_inference_steps": 4, "guidance_interval": (0.0, 0.5), "adaptive": numbers}
        defaults = msgspec.structs.replace(manifest.defaults, **stored)
        measured = calibrations(manifest.files_digest)
        return msgspec.structs.replace(manifest, defaults=defaults, calibrations=measured)

    resign(folder, calibrated)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_calibrated(tmp_path / "bundle")
    return tmp_path / "bundle"


def change_a_model(bundle: Path) -> None:
    (bundle / "model_index.json").write_text("{}")
    resign(bundle)


def told_by(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    told = capsys.readouterr()
    return told.out + told.err


def test_inspect_tells(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = told_by(capsys, "inspect", str(bundle))
    assert "other models" not in before
    assert "25.0% of the branches' runs saved at 31.5 dB to full guidance, 4 held-out prompts" in before
    held_for = "for 4 steps (unet 2, unet_small 2), guidance scale 5, on onnxruntime:cpu, 1 thread\n"
    assert before.count(held_for) == 2
    change_a_model(bundle)
    assert told_by(capsys, "inspect", str(bundle)).count("; measured with other models than these\n") == 3
    assert json.loads(told_by(capsys, "inspect", str(bundle), "--json"))["outdated"] == [
        "split",
        "interval",
        "adaptive",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ["split", "interval"]),
        (("--steps", "4"), ["interval"]),
        (("--num-inference-steps", "4", "--guidance-interval", "0,1"), []),
        (("--steps", "4", "--guidance", "adaptive"), ["adaptive"]),
    ],
)
def test_generate_tells_of_those_it_uses(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: list[str]
) -> None:
    command = ("generate", str(bundle), "--prompt", "red", "--seed", "1", "--output-dir", str(tmp_path), *arguments)
    planned: dict[str, Any] = json.loads(told_by(capsys, *command, "--print-plan", "--json"))
    assert planned["outdated"] == []
    change_a_model(bundle)
    planned = json.loads(told_by(capsys, *command, "--print-plan", "--json"))
    assert planned["outdated"] == expected


def test_generate_warns_and_goes_on(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_a_model(bundle)
    command = (
        "generate",
        str(bundle),
        "--prompt",
        "red",
        "--seed",
        "1",
        "--output-dir",
        str(tmp_path),
        "--threads",
        "1",
    )
    told = told_by(capsys, *command)
    assert "warning: the bundle's split of the steps was measured with other models than it has now: run `tand" in told
    assert told.count("warning: ") == 2
    assert Bundle.open(bundle).manifest.calibrations.outdated("other") == ("split", "interval", "adaptive")


def test_the_interval_is_of_fixed_guidance_alone(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `Pipeline` has it: adaptive guidance and the window were measured on all steps."""
    command = ("generate", str(bundle), "--prompt", "red", "--steps", "unet:20", "--output-dir", str(tmp_path))
    for guidance, guided in (((), [True] * 10 + [False] * 10), (("--guidance", "adaptive"), [True] * 20)):
        planned = json.loads(told_by(capsys, *command, *guidance, "--print-plan", "--json"))
        assert planned["plan"]["guided"] == guided
    # A window of rows without guidance would be refused before its engines are looked for.
    window = ("--steps", "unet:25", "--placement", "hybridiff", "--threads", "2", "--cache", str(tmp_path))
    assert main([*command, *window, "--print-plan"]) == 1
    assert "there is no engine for onnxruntime:cpu:fp32 (stage 1 of 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "passed_over"),
    [
        ((), False),
        (("--steps", "4"), True),
        (("--num-inference-steps", "4"), True),
        (("--timesteps", "999,500"), True),
        (("--steps", "unet:4"), False),  # said on purpose
        (("--steps", "unet:2", "--timesteps", "999,500"), False),
        (("--steps", "2,2"), False),
    ],
)
def test_a_number_of_steps_passes_over_the_split_and_is_told(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], passed_over: bool
) -> None:
    command = ("generate", str(bundle), "--prompt", "red", "--seed", "1", "--output-dir", str(tmp_path), *arguments)
    planned = json.loads(told_by(capsys, *command, "--print-plan", "--json"))
    assert planned["passed_over"] == ([list(run) for run in STEPS] if passed_over else [])
    assert len(planned["plan"]["steps"]) == (2 if arguments in ((), ("--steps", "2,2")) else 1)
    line = "the bundle's own split, --steps unet:2,unet_small:2, is passed over\n"
    assert (line in told_by(capsys, *command, "--print-plan")) == passed_over
    if passed_over and arguments[0] == "--num-inference-steps":
        assert line in told_by(capsys, *command, "--threads", "1")


ADAPTIVE = ("--guidance", "adaptive")
OWN = tuple(f"--guidance-config={number}" for number in ("threshold=0.1", "release=0.2", "probe=4", "steady=1.5"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), []),
        (("--steps", "unet:6"), ["interval"]),
        (("--guidance-scale", "3"), ["interval"]),
        (("--guidance-scale", "0"), []),  # which leaves nothing to decide
        (ADAPTIVE, []),
        ((*ADAPTIVE, "--guidance-scale", "3"), ["adaptive"]),
        ((*ADAPTIVE, "--steps", "unet:4", *OWN[:1]), ["adaptive"]),  # the others are the bundle's
        ((*ADAPTIVE, "--steps", "unet:4", *OWN), []),
    ],
)
def test_generate_tells_of_guidance_measured_with_other_steps_or_guidance(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: list[str]
) -> None:
    command = ("generate", str(bundle), "--prompt", "red", "--seed", "1", "--output-dir", str(tmp_path), *arguments)
    planned = json.loads(told_by(capsys, *command, "--print-plan", "--json"))
    assert list(planned["measured_for"]) == expected
    assert (" was measured with --steps " in told_by(capsys, *command, "--print-plan")) == bool(expected)


def test_generate_warns_of_them_and_goes_on(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", str(bundle), "--prompt", "red", "--output-dir", str(tmp_path), "--steps", "unet:6")
    told = told_by(capsys, *command, *ADAPTIVE, "--threads", "1")
    assert (
        "warning: the bundle's adaptive guidance was measured with --steps unet:2,unet_small:2 --guidance-scale 5, and "
        "is used with --steps unet:6 --guidance-scale 5: run `tandemrt calibrate guidance` with these, or give numbers "
    ) in told
