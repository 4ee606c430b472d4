"""The shapes family quantized: its pictures stay right, and are nearly those of the float bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench.shapes.scenes import scenes
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main

PROMPTS, STEPS = 8, 10
COMPONENTS = ("text_encoder", "unet", "vae_decoder")
# Of the median picture, in dB: half of what was measured on 104 prompts is lost before it is missed.
MIN_PSNR_DB = 38


@pytest.fixture(scope="module")
def kept(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trajectories, and prompts that are held out."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, split, count in (("train", "train", 6), ("held-out", "held_out", 2 * PROMPTS)):
        captions = dict.fromkeys(scene.caption for scene in scenes(0, count, split))
        (folder / f"{name}.txt").write_text("\n".join(captions))
    words = ("collect", shapes_bundle, "--prompts", folder / "train.txt", "--steps", STEPS, "--denoiser", "unet")
    assert main(["calibrate", *map(str, words), "--out", str(folder / "kept"), "--threads", "1"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "int8-weights"])
def test_pictures_stay_right(
    form: str, shapes_bundle: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantize", shapes_bundle, "--out", tmp_path / "out", "--trajectories", kept / "kept", "--format", form,
             "--prompts", kept / "held-out.txt", "-n", PROMPTS, "--scorer", "tandemrt.bench.shapes.checker:shows",
             "--min-psnr", MIN_PSNR_DB, "--min-accuracy", "0.9x", "--threads", 1, "--json")  # fmt: skip
    named = [word for name in COMPONENTS for word in ("--component", name)]
    assert main(["calibrate", *map(str, words), *named]) == 0
    told = json.loads(capsys.readouterr().out)
    made = Bundle.open(tmp_path / "out")
    for name in COMPONENTS:
        one = told["components"][name]
        quantization = made.component(name).quantization
        assert quantization is not None
        assert quantization.settings["kept_for_the_budget"] == 0
        psnr, accuracy = quantization.losses
        assert psnr.value >= MIN_PSNR_DB
        assert accuracy.reference is not None
        # One picture more or less.
        assert abs(accuracy.value - accuracy.reference) < 1.5 / PROMPTS
        assert one["size_bytes"] < one["size_bytes_before"] * 0.4
