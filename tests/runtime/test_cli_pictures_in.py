"""`tandemrt generate` from pictures and with further prompts: what is painted, recorded and refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tandemrt.runtime.cli import picture_files
from tandemrt.runtime.cli.picture_files import read_picture
from tandemrt.runtime.cli.values import parse_named
from tandemrt.runtime.errors import ArgumentError, RequestError
from tandemrt.runtime.pipeline import Pipeline

from .test_cli_generate import generate, names, pixels, texts
from .tiny_families import write_tiny_control, write_tiny_sdxl

STEPS = ["--steps", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture, a mask and two pictures to steer by."""
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for seed, name in enumerate(("image", "canny", "depth")):
        paths[name] = folder / f"{name}.png"
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(paths[name])
    paths["mask"] = folder / "mask.png"
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(paths["mask"])
    return paths


def painted_again(control_bundle: Path, path: Path) -> Any:
    """The picture that a PNG's own facts and files give."""
    facts = texts(path)
    pictures: dict[str, Any] = {}
    for argument, recorded in json.loads(facts["pictures"]).items():
        entries = recorded if "path" not in recorded else {None: recorded}
        opened = {}
        for name, entry in entries.items():
            assert hashlib.sha256(Path(entry["path"]).read_bytes()).hexdigest() == entry["sha256"]
            opened[name] = Image.open(entry["path"])
        pictures[argument] = opened.get(None) or opened
    with Pipeline.open(control_bundle) as pipe:
        return np.asarray(pipe(**json.loads(facts["request"]), **pictures).images[0])


def test_a_picture_is_painted_from_others_and_again_from_what_it_says(
    control_bundle: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [
        "--image",
        files["image"],
        "--mask",
        files["mask"],
        "--strength",
        "0.75",
        "--control-scale",
        "depth=0.5",
    ]
    arguments += ["--control", f"canny={files['canny']}", "--control", f"depth={files['depth']}"]
    arguments += ["--control-interval", "canny=0,0.5", "--prompt", "red", "--seed", "7", *STEPS]
    assert generate(control_bundle, tmp_path, *map(str, arguments)) == 0
    path = tmp_path / "0001-seed7-red.png"
    request = json.loads(texts(path)["request"])
    assert request["strength"] == 0.75
    assert request["controlnet_conditioning_scale"] == {"depth": 0.5}
    assert (request["control_guidance_start"], request["control_guidance_end"]) == ({"canny": 0.0}, {"canny": 0.5})
    assert len(json.loads(texts(path)["plan"])["timesteps"]) == 3
    np.testing.assert_array_equal(painted_again(control_bundle, path), pixels(path))
    assert generate(control_bundle, tmp_path / "plain", "--prompt", "red", "--seed", "7", *STEPS) == 0
    assert json.loads(texts(tmp_path / "plain" / path.name)["pictures"]) == {}
    assert np.abs(pixels(tmp_path / "plain" / path.name).astype(int) - pixels(path)).max() > 3


def test_an_only_controlnet_needs_no_name(tmp_path: Path, files: dict[str, Path]) -> None:
    write_tiny_control(tmp_path / "bundle", ["canny"])
    shared = ["--prompt", "red", "--seed", "7", *STEPS, "--control-scale", "0.5", "--control-interval", "0,0.75"]
    assert generate(tmp_path / "bundle", tmp_path / "a", *shared, "--control", str(files["canny"])) == 0
    assert generate(tmp_path / "bundle", tmp_path / "b", *shared, "--control", f"canny={files['canny']}") == 0
    paths = [tmp_path / folder / "0001-seed7-red.png" for folder in ("a", "b")]
    np.testing.assert_array_equal(*map(pixels, paths))
    for path in paths:
        np.testing.assert_array_equal(painted_again(tmp_path / "bundle", path), pixels(path))


def test_the_print_plan_names_the_pictures_and_their_digests(
    control_bundle: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt", "red", "--image", str(files["image"]), "--print-plan"]
    assert generate(control_bundle, tmp_path, *asked) == 0
    assert f"image: {files['image']}\n" in capsys.readouterr().out
    assert generate(control_bundle, tmp_path, *asked, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    digest = hashlib.sha256(files["image"].read_bytes()).hexdigest()
    assert facts["pictures"] == {"image": {"path": str(files["image"]), "sha256": digest}}
    assert facts["plan"]["timesteps"]
    assert names(tmp_path) == []


def test_further_prompts_reach_their_encoders_and_are_recorded(tmp_path: Path) -> None:
    write_tiny_sdxl(tmp_path / "bundle")
    arguments = ["--prompt", "red", "--negative-prompt", "blue", "--seed", "7", "--steps", "2"]
    further = ["--prompt-2", "blue blue", "--negative-prompt-2", "red"]
    assert generate(tmp_path / "bundle", tmp_path / "one", *arguments) == 0
    assert generate(tmp_path / "bundle", tmp_path / "two", *arguments, *further) == 0
    one, two = (tmp_path / folder / "0001-seed7-red.png" for folder in ("one", "two"))
    assert (pixels(one) != pixels(two)).any()
    request = json.loads(texts(two)["request"])
    assert (request["prompt_2"], request["negative_prompt_2"]) == ("blue blue", "red")
    np.testing.assert_array_equal(painted_again(tmp_path / "bundle", two), pixels(two))


def test_text_that_no_encoder_reads_is_told_of_further_prompts_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_sdxl(tmp_path / "bundle")
    assert generate(tmp_path / "bundle", tmp_path, "--prompt", "red", "--prompt-2", "blue " * 12, "--steps", "1") == 0
    assert "2 tokens too many, not painted: 'blue blue '" in capsys.readouterr().err


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_picture("--image", tmp_path / "turned.png").image.size == (16, 32)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"--image .*picture\.png: cannot be read \(No such file"),
        (b"", r"--image .*picture\.png: not a usable picture"),
        (b"not a picture", "not a usable picture.*expected a whole file of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a usable picture"),
        ("truncated", "not a usable picture"),
        ("bomb", "not a usable picture.*exceeds limit"),
        ("large", "size, got 'over 100 bytes'"),
    ],
)
def test_files_that_are_no_pictures_are_refused(
    content: bytes | str | None, words: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    if content == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)
    elif isinstance(content, str):
        path.write_bytes(files["image"].read_bytes()[: 3000 if content == "truncated" else None])
    elif content is not None:
        path.write_bytes(content)
    if content == "large":
        monkeypatch.setattr(picture_files, "MAX_PICTURE_BYTES", 100)
    with pytest.raises(ArgumentError, match=words):
        read_picture("--image", path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "{image}.jpg"], "image.png.jpg: cannot be read (No such file or directory)"),
        (["--mask", "{mask}"], "mask_image: given without image"),
        (["--strength", "0.5"], "strength: given without image"),
        (["--image", "{image}", "--strength", "2"], "strength: cannot be used, got 2.0"),
        (["--control", "{canny}"], "several ControlNets in the bundle"),
        (["--control", "pose={canny}"], "unknown ControlNet, got 'pose'"),
        (["--control", "canny={canny}", "--control", "canny={depth}"], "--control: values that are not told apart"),
        (["--control", "canny={canny}", "--control", "{depth}"], "--control: values that are not told apart"),
        (["--control-scale", "0.5"], "controlnet_conditioning_scale: given without control_image"),
        (["--control", "canny={canny}", "--control-scale", "strong"], "--control-scale: not a number, got 'strong'"),
        (["--control", "canny={canny}", "--control-scale", "depth=1"], "no image is given for this ControlNet"),
        (["--control", "canny={canny}", "--control-interval", "0.5"], "--control-interval: not an interval, got '0.5'"),
        (["--control", "canny={canny}", "--control-interval", "1,0"], "of 'canny': fractions"),
        (["--prompt-2", "blue"], "prompt_2: text encoders of the bundle, expected at most 1"),
        (["--prompt-3", "\udcff"], "--prompt-3: not text"),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(
    arguments: list[str], words: str, control_bundle: Path, files: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    filled = [argument.format(**files) for argument in arguments]
    assert generate(control_bundle, tmp_path / "out", "--prompt", "red", *filled) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_named_values_are_told_apart() -> None:
    assert parse_named("--control", []) == {}
    assert parse_named("--control", ["a/b=c.png"]) == {None: "a/b=c.png"}
    assert parse_named("--control", ["a=b=c.png", "d=e"]) == {"a": "b=c.png", "d": "e"}
    with pytest.raises(RequestError, match="not told apart"):
        parse_named("--control", ["x.png", "y.png"])
