"""`tandemrt generate`: files, what they say, and how bad input ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
from PIL import Image

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.cli.generate_told import guidance_line
from tandemrt.runtime.manifest import Manifest, QuantizationFormat
from tandemrt.runtime.pipeline import Pipeline
from tandemrt.runtime.plan import RowGuidance
from tandemrt.runtime.solvers import SOLVERS

from .tiny_bundle import call_quantized, resign, write_tiny_bundle

STEPS = ["--steps", "2,2"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "bundle"
    write_tiny_bundle(folder)
    return folder


def generate(bundle: Path, out: Path, *arguments: str) -> int:
    return main(["generate", str(bundle), "--output-dir", str(out), *arguments])


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("form", "target", "told"),
    [
        ("int8", "onnxruntime:cpu:fp32", "onnxruntime:cpu:fp32, int8 layers"),
        ("fp8", "openvino:cpu:fp32", "openvino:cpu:fp32, fp8 layers"),
        ("int8", "onnxruntime:cpu:int8", "onnxruntime:cpu:int8"),
        ("int8", "onnxruntime:cpu", "onnxruntime:cpu"),
        ("int8-weights", "onnxruntime:cpu:fp32", "onnxruntime:cpu:fp32"),  # which all compute in
    ],
)
def test_a_precision_is_told_as_that_of_what_is_not_quantized(
    form: QuantizationFormat, target: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    call_quantized(tmp_path / "bundle", form, "unet")
    arguments = ["--prompt", "red", "--seed", "1", "--target", target, *STEPS]
    assert generate(tmp_path / "bundle", tmp_path / "out", *arguments, "--print-plan") == 0
    assert f"target {told}: asked for\n" in capsys.readouterr().out
    assert generate(tmp_path / "bundle", tmp_path / "out", *arguments) == 0
    assert f" on {told}, seed 1\n" in capsys.readouterr().out
    assert texts(tmp_path / "out" / "0001-seed1-red.png")["target"] == told
    with Pipeline.open(tmp_path / "bundle", target) as pipe:
        assert f" on {told}, open>" in repr(pipe)


def test_a_picture_says_how_it_was_made(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["--prompt", "A Röd circle!", "--negative-prompt", "blue ■", "--seed", "7", "--guidance-scale", "3"]
    assert generate(bundle, out, *arguments, "--solver", "euler", "--size", "64x80", *STEPS) == 0
    path = out / "0001-seed7-a-rod-circle.png"
    stdout, _ = capsys.readouterr()
    assert stdout.splitlines()[0] == str(path)
    assert names(out) == [path.name]
    facts = texts(path)
    assert facts["prompt"] == "A Röd circle!"
    assert facts["negative_prompt"] == "blue ■"
    assert facts["seed"] == "7"
    assert facts["bundle"] == Bundle.open(bundle).digest
    assert facts["tandemrt"] == version("tandemrt")
    assert facts["target"] == "onnxruntime:cpu"
    plan = json.loads(facts["plan"])
    assert plan["steps"] == [["unet", 2], ["unet_small", 2]]
    assert plan["guidance_scale"] == 3
    assert pixels(path).shape == (80, 64, 3)


def test_a_picture_can_be_painted_again_from_its_text(bundle: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "red", "--seed", "11", "--batch-size", "2", "--solver", "dpmsolver++", "--eta", "0"]
    settings = ["--solver-config", "use_karras_sigmas=true", "--guidance-interval", "0.0,0.5"]
    assert generate(bundle, tmp_path, *arguments, *settings, "--decoder", "vae_decoder_tiny", *STEPS) == 0
    assert names(tmp_path) == ["0001-seed11-red.png", "0001-seed12-red.png"]
    for index, name in enumerate(names(tmp_path)):
        request = json.loads(texts(tmp_path / name)["request"])
        with Pipeline.open(bundle) as pipe:
            again = pipe(**request)
        assert again.plan.facts() == json.loads(texts(tmp_path / name)["plan"])
        np.testing.assert_array_equal(np.asarray(again.images[index]), pixels(tmp_path / name))


def test_a_picture_can_be_painted_again_where_other_defaults_were_stored(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")

    def stored(steps: tuple[tuple[str, int], ...], interval: tuple[float, float]) -> None:
        def edit(manifest: Manifest) -> Manifest:
            total = sum(count for _, count in steps)
            changes = {"steps": steps, "num_inference_steps": total, "guidance_interval": interval}
            return msgspec.structs.replace(manifest, defaults=msgspec.structs.replace(manifest.defaults, **changes))

        resign(tmp_path / "bundle", edit)

    stored((("unet_small", 1), ("unet", 2)), (0.0, 0.5))
    assert generate(tmp_path / "bundle", tmp_path / "out", "--prompt", "red", "--seed", "3") == 0
    stored((("unet", 4),), (0.0, 1.0))
    told = texts(tmp_path / "out" / "0001-seed3-red.png")
    with Pipeline.open(tmp_path / "bundle") as pipe:
        again = pipe(**json.loads(told["request"]))
    assert again.plan.steps == (("unet_small", 1), ("unet", 2))
    assert again.plan.facts() == json.loads(told["plan"])
    np.testing.assert_array_equal(np.asarray(again.images[0]), pixels(tmp_path / "out" / "0001-seed3-red.png"))


def test_the_second_picture_is_that_of_the_next_seed(bundle: Path, tmp_path: Path) -> None:
    assert generate(bundle, tmp_path / "two", "--prompt", "red", "--seed", "5", "--batch-size", "2", *STEPS) == 0
    assert generate(bundle, tmp_path / "one", "--prompt", "red", "--seed", "6", *STEPS) == 0
    both = (pixels(tmp_path / folder / "0001-seed6-red.png").astype(int) for folder in ("two", "one"))
    # A batch of another size may round differently in the last bit.
    assert np.abs(np.subtract(*both)).max() <= 1


def test_prompts_do_not_depend_on_each_other(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffred\r\n\r\n  \nblå cirkel \n".encode())
    assert generate(bundle, tmp_path / "all", "--prompts-file", str(file), "--seed", "3", *STEPS) == 0
    assert names(tmp_path / "all") == ["0001-seed3-red.png", "0002-seed3-bla-cirkel.png"]
    assert generate(bundle, tmp_path / "one", "--prompt", "blå cirkel", "--seed", "3", *STEPS) == 0
    alone, among = tmp_path / "one" / "0001-seed3-bla-cirkel.png", tmp_path / "all" / "0002-seed3-bla-cirkel.png"
    np.testing.assert_array_equal(pixels(alone), pixels(among))


def test_json_describes_the_run(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(bundle, tmp_path, "--prompt", "red", "--prompt", "blue", "--json", *STEPS) == 0
    stdout, stderr = capsys.readouterr()
    result = json.loads(stdout)
    assert [image["prompt"] for image in result["images"]] == ["red", "blue"]
    assert {image["seed"] for image in result["images"]} == {result["seed"]}
    assert [Path(image["path"]).name for image in result["images"]] == names(tmp_path)
    assert "1/2 red: 4/4" in stderr


@pytest.mark.parametrize("asked", [["--placement", "auto"], ["--guidance", "adaptive"]])
def test_what_became_of_guidance_is_told(
    asked: list[str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path / "cache"))
    assert generate(bundle, tmp_path / "out", "--prompt", "red", "--prompt", "blue", "--json", *STEPS, *asked) == 0
    stdout, stderr = capsys.readouterr()
    result = json.loads(stdout)
    image = result["images"][0]
    assert result["plan"]["placement"] == image["placement"] == image["guidance"][0]["placement"] != "auto"
    assert json.loads(texts(Path(image["path"]))["plan"]) == result["plan"]
    both = sum(row["guided"] for row in image["guidance"])
    if "auto" in asked:
        assert list(image["tried_ms"]) == ["batched", "parallel", "sequential"]
        assert "placement auto: each placement is tried first" in stderr
    else:
        assert image["tried_ms"] == {}
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in image["tried_ms"].items())
    told = f" ({times} a row when auto tried them)" if times else ""
    assert f"guidance: both branches in {both} of 4 rows, {image['placement']}{told}\n" in stderr


def test_hybridiffs_window_is_told() -> None:
    ran = [RowGuidance(True, "parallel", "guided"), RowGuidance(False, "pipelined", "in the window", taus=(1, 2))]
    plan = Mock(ran=ran, taus=(1, 2), placement="hybridiff")
    assert guidance_line(plan, {}) == "guidance: both branches in 1 of 2 rows, hybridiff, tau1 1, tau2 2"


def test_a_random_seed_is_another_one_each_time(bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert generate(bundle, tmp_path, "--prompt", "red", *STEPS) == 0
    assert len(names(tmp_path)) == 2


def test_print_plan_writes_nothing(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(bundle, tmp_path / "out", "--prompt", "red", "--seed", "3", "--print-plan", "--json", *STEPS) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["plan"]["steps"] == [["unet", 2], ["unet_small", 2]]
    assert facts["files"] == [str(tmp_path / "out" / "0001-seed3-red.png")]
    assert facts["bundle"]["digest"] == Bundle.open(bundle).digest
    reason = "the fastest here that keeps the precision a bundle was exported in"
    assert facts["target"] == {"name": "onnxruntime:cpu", "reason": reason}
    assert not (tmp_path / "out").exists()


def test_print_plan_is_in_words(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--prompt", "red", "--prompt", "blue " * 20, "--seed", "3", "--batch-size", "2", "--print-plan"]
    assert generate(bundle, tmp_path, *asked, *STEPS, "--guidance", "adaptive") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"bundle {bundle} (digest {Bundle.open(bundle).digest[:12]})"
    assert lines[1].startswith("target onnxruntime:cpu: the fastest here")
    assert lines[2].startswith("steps: 2 of unet, 2 of unet_small; DPMSolverMultistepScheduler, 4 model calls, ")
    assert lines[3].endswith("adaptive (threshold 0.05, release 0.075, probe 4, steady 1.25), batched")
    assert re.match(r"not painted, \d+ tokens too many: '.*' of 'blue ", lines[4])
    assert lines[5:8] == ["'red': 2 pictures", *(f"  {tmp_path}/0001-seed{seed}-red.png" for seed in (3, 4))]
    assert len(lines) == 11
    assert generate(bundle, tmp_path, "--prompt", "red", "--print-plan") == 0
    assert capsys.readouterr().out.endswith("'red': 1 picture, with a seed that is drawn\n")


def test_print_plan_does_not_invent_a_seed(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(bundle, tmp_path, "--prompt", "red", "--print-plan", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["requests"][0]["seed"] is None
    assert facts["files"] is None


def test_help_lists_every_solver_and_says_that_a_denoiser_may_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(SOLVERS) in text
    assert "A name may come back" in text


def test_previews_lie_beside_the_pictures(bundle: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "red", "--seed", "1", "--solver", "ddim", "--num-inference-steps", "5", "--previews", "2"]
    assert generate(bundle, tmp_path, *arguments) == 0
    previews = ["previews/0001-seed1-red-row002.png", "previews/0001-seed1-red-row004.png"]
    assert names(tmp_path) == ["0001-seed1-red.png", *previews]
    assert texts(tmp_path / previews[0])["prompt"] == "red"
    assert [texts(tmp_path / preview)["row"] for preview in previews] == ["2", "4"]
    assert "row" not in texts(tmp_path / "0001-seed1-red.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "999936"], "at most 16384"),
        (["--steps", "9" * 5000], "not a number of steps"),
        (["--solver-config", "beta_start=" + "[" * 100_000], "--solver-config beta_start: value"),
        (["--batch-size", "1000000000"], "num_images_per_prompt"),
    ],
)
def test_outsized_options_end_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert generate(bundle, tmp_path, "--prompt", "red", *arguments) == 2
    stderr = capsys.readouterr().err
    assert words in stderr
    assert "unexpectedly" not in stderr
    assert stderr.count("\n") == 1


def test_a_folder_of_an_impossible_name_ends_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(bundle, tmp_path / ("x" * 300), "--prompt", "red") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_picture_that_appears_meanwhile_is_not_replaced(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0001-seed1-red.png"

    def appears(*_: object, **__: object) -> None:
        path.write_bytes(b"another's")

    monkeypatch.setattr("tandemrt.runtime.cli.generate.check_folder", appears)
    assert generate(bundle, tmp_path, "--prompt", "red", "--seed", "1", "--steps", "1") == 2
    assert "already there" in capsys.readouterr().err
    assert path.read_bytes() == b"another's"
    assert generate(bundle, tmp_path, "--prompt", "red", "--seed", "1", "--steps", "1", "--force") == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_are_not_replaced(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(bundle, tmp_path, "--prompt", "red", "--seed", "1", "--steps", "2") == 0
    path = tmp_path / "0001-seed1-red.png"
    before = path.read_bytes()
    capsys.readouterr()
    for only in ([], ["--print-plan"]):
        assert generate(bundle, tmp_path, "--prompt", "red", "--seed", "1", "--steps", "3", *only) == 2
        assert capsys.readouterr().err.startswith(f"tandemrt generate: {path}: already there")
    assert path.read_bytes() == before
    assert generate(bundle, tmp_path, "--prompt", "red", "--seed", "1", "--steps", "3", "--force") == 0
    assert path.read_bytes() != before
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("inside", [".", "out", "unet/new", "link"])
@pytest.mark.parametrize("only", [[], ["--print-plan"]])
def test_pictures_do_not_go_into_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: str, only: list[str]
) -> None:
    bundle = tmp_path / "bundle"
    write_tiny_bundle(bundle)
    (tmp_path / "link").symlink_to(bundle / "unet")
    out = tmp_path / "link" / "out" if inside == "link" else bundle / inside
    assert generate(bundle, out, "--prompt", "red", "--seed", "1", "--steps", "1", *only) == 2
    stderr = capsys.readouterr().err
    assert f"{out}: inside the bundle {bundle}. Choose a folder outside the bundle." in stderr
    Bundle.open(bundle)


def test_a_long_prompt_is_cut_and_reported(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(bundle, tmp_path, "--prompt", "red blue " * 9 + "x", "--json", *STEPS) == 0
    stdout, stderr = capsys.readouterr()
    (dropped,) = json.loads(stdout)["dropped_text"]
    assert dropped["text"].endswith("blue x")
    assert f"warning: {dropped['tokens']} tokens too many" in stderr


def test_strict_prompts_are_refused_before_any_is_painted(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "red", "--prompt", "red blue " * 9]
    assert generate(bundle, tmp_path / "out", *prompts, "--strict-prompts", *STEPS) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_generate_runs_without_torch(bundle: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers', 'onnx')))\n"
        "from tandemrt.runtime.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["generate", str(bundle), "--prompt", "red", "--seed", "1", "--output-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    assert names(tmp_path) == ["0001-seed1-red.png"]
