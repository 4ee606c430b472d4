"""LoRAs as inputs of a generation: they come, mix and go on built engines, and paint what they paint when fused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import read_sidecar
from tandemrt.runtime.errors import EngineError
from tandemrt.runtime.onnx_files import projections
from tandemrt.runtime.output import Output
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import Variant

from ..runtime.lora_writing import write_lora

SLOTS, RANK = 2, 4
TARGETS = ("onnxruntime:cpu", "openvino:cpu")
REQUEST: Mapping[str, Any] = {
    "prompt": "a red circle left of a blue square",
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "seed": 7,
    "output_type": "latent",
}
# Of the largest number: the low-rank products are added up in another order than the fused weights' products.
TOLERANCE = 1e-4


def build(bundle: Path, cache: Path, target: str, components: Sequence[str], **options: Any) -> None:
    plan = BuildPlan(bundle, (parse_target(target),), cache, tuple(components), (parse_profile("64x64:b1"),), **options)
    for request in requests_of(plan, Bundle.open(bundle)):
        ensure_engine(request, cache, lambda label, done, total: None, {})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def loras(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One LoRA for the large denoiser and the text encoder, in kohya's layout, one for the denoiser, in diffusers'."""
    folder = tmp_path_factory.mktemp("loras")
    unet, text = (projections(shapes_bundle / name / "model.onnx") for name in ("unet", "text_encoder"))
    return (
        write_lora(folder / "both.safetensors", {"unet": unet, "text_encoder": text}, rank=RANK, seed=1),
        write_lora(folder / "denoiser.safetensors", {"unet": unet}, rank=RANK - 1, seed=2, layout="diffusers"),
    )


def distance(one: Output, other: Output) -> float:
    """The largest difference, as a fraction of the largest number."""
    difference: npt.NDArray[np.float32] = np.abs(one.latents - other.latents)
    return float(difference.max() / np.abs(other.latents).max())


@pytest.mark.parametrize("target", TARGETS)
def test_a_walk_over_loras_ends_at_the_bases_bits(
    shapes_bundle: Path, cache: Path, loras: tuple[Path, Path], target: str
) -> None:
    a, b = loras
    build(shapes_bundle, cache, target, ("unet", "text_encoder"))
    build(shapes_bundle, cache, target, ("unet", "text_encoder"), lora_slots=SLOTS, lora_rank=RANK)
    with Pipeline.open(shapes_bundle, target) as pipe:
        walk = [pipe(**REQUEST, loras=wanted) for wanted in (None, {a: 0.8}, {str(b): 0.5}, {a: 0.8, b: 0.5}, {})]
        silent = pipe(**REQUEST, loras={a: 0.0, b: 0})
        again = pipe(**REQUEST, loras={a: 0.8})
    for same in (walk[-1], silent):
        np.testing.assert_array_equal(same.latents, walk[0].latents)
    np.testing.assert_array_equal(again.latents, walk[1].latents)
    for changed in walk[1:4]:
        assert all(distance(changed, other) > 0.01 for other in walk[:4] if other is not changed)
    assert walk[1].loras == {str(a): ("text_encoder", "unet")}
    assert walk[3].loras == {str(a): ("text_encoder", "unet"), str(b): ("unet",)}
    assert walk[0].loras == {}


def test_step_engines_take_the_same_loras(shapes_bundle: Path, cache: Path, loras: tuple[Path, Path]) -> None:
    wanted, slots = {loras[1]: 0.5}, {"lora_slots": 1, "lora_rank": RANK}
    build(shapes_bundle, cache, TARGETS[0], ("unet",), **slots)
    with Pipeline.open(shapes_bundle, TARGETS[0]) as pipe:
        expected = pipe(**REQUEST, loras=wanted)
    build(shapes_bundle, cache, TARGETS[0], ("unet",), step=True, **slots)
    with Pipeline.open(shapes_bundle, TARGETS[0]) as pipe:
        got = pipe(**REQUEST, loras=wanted)
        plain = pipe(**REQUEST)
    assert (expected.timings.step_engines, got.timings.step_engines) == (False, True)
    np.testing.assert_array_equal(got.latents, expected.latents)
    assert not plain.timings.step_engines


def test_loras_that_the_same_engines_serve_share_them(tiny_path: Path, cache: Path, tmp_path: Path) -> None:
    modules = {name: projections(tiny_path / name / "model.onnx") for name in ("unet", "text_encoder")}
    files = [write_lora(tmp_path / f"{rank}.safetensors", modules, rank=rank) for rank in (1, 2)]
    build(tiny_path, cache, "onnxruntime:cpu", ("unet", "text_encoder"), lora_slots=2, lora_rank=2)
    with Pipeline.open(tiny_path, "onnxruntime:cpu") as pipe:
        for wanted in (files[:1], files[1:], files):
            pipe("red", num_inference_steps=1, loras=dict.fromkeys(wanted, 1.0))
        assert len(pipe._models._encoders) == 1
        assert all(len(loader._loaded) == 1 for loader in pipe._models._loaders.values())


def test_generate_takes_loras_and_its_picture_says_which(
    tiny_path: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lora(tmp_path / "a:b.safetensors", {"unet": projections(tiny_path / "unet" / "model.onnx")}, rank=1)
    arguments = ["generate", str(tiny_path), "--prompt", "red", "--seed", "7", "--steps", "2,1", "--output-dir"]
    lora = ["--lora", f"{file}:0.5"]
    assert main([*arguments, str(tmp_path / "none"), *lora]) == 1
    assert "--component unet --lora-slots 1 --lora-rank 1 --profile 64x64:b1 --cache " in capsys.readouterr().err
    build(tiny_path, cache, "onnxruntime:cpu", ("unet",), lora_slots=1, lora_rank=1)
    assert main([*arguments, str(tmp_path / "plain")]) == 0
    assert main([*arguments, str(tmp_path / "lora"), *lora]) == 0
    assert f"{file} changed unet\n" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "silent"), "--lora", f"{file}:0"]) == 0
    assert f"{file} changed nothing: its scale is 0\n" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "twice"), *lora, "--lora", str(file)]) == 2
    assert "--lora: a file given twice" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "strange"), "--lora", f"{file}:x"]) == 2
    assert f"--lora: scale of {file}, got 'x', expected a number" in capsys.readouterr().err
    plain, changed = (Image.open(tmp_path / name / "0001-seed7-red.png") for name in ("plain", "lora"))
    assert (np.asarray(plain) != np.asarray(changed)).any()
    texts = cast("PngImageFile", changed).text
    assert json.loads(texts["loras"]) == {str(file): {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}}
    with Pipeline.open(tiny_path) as pipe:
        again = pipe(**json.loads(texts["request"])).images[0]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(changed))


def test_slots_that_fit_the_calls_shapes_serve_it(tiny_path: Path, cache: Path, tmp_path: Path) -> None:
    modules = {name: projections(tiny_path / name / "model.onnx") for name in ("unet", "text_encoder")}
    file = write_lora(tmp_path / "x.safetensors", modules, rank=1)
    for size, slots in ((64, 1), (96, 2)):
        for component in ("unet", "text_encoder"):
            profile = (parse_profile(f"{size}x{size}:b1"),)
            plan = BuildPlan(
                tiny_path, (parse_target("openvino:cpu"),), cache, (component,), profile, lora_slots=slots, lora_rank=1
            )
            for request in requests_of(plan, Bundle.open(tiny_path)):
                ensure_engine(request, cache, lambda label, done, total: None, {})
    arguments: dict[str, Any] = {"prompt": "red", "seed": 7, "num_inference_steps": 2, "output_type": "latent"}
    with Pipeline.open(tiny_path, "openvino:cpu") as pipe:
        for size, slots in ((64, 1), (96, 2), (64, 1)):
            made = pipe(**arguments, loras={file: 0.5}, height=size, width=size)
            assert [one.variant for one in made.timings.ran_on["unet"]] == [str(Variant(lora_slots=slots, lora_rank=1))]
            assert distance(made, pipe(**arguments, height=size, width=size)) > 0.001
        command = r"no profile for this call: .* --lora-slots 1 --lora-rank 1 --profile 128x128:b1 --cache .*`"
        with pytest.raises(EngineError, match=command):
            pipe(**arguments, loras={file: 0.5}, height=128, width=128)


def test_slots_that_are_damaged_leave_the_call_to_others(tiny_path: Path, cache: Path, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "x.safetensors", {"unet": projections(tiny_path / "unet" / "model.onnx")}, rank=1)
    for slots in (1, 2):
        build(tiny_path, cache, "openvino:cpu", ["unet"], lora_slots=slots, lora_rank=1)
    listed = engines_folder(cache).iterdir()
    folders = {read_sidecar(folder).ingredients.variant.lora_slots: folder for folder in listed}
    (folders[1] / "engine.blob").write_bytes(b"")
    request = {**REQUEST, "loras": {file: 0.5}, "height": 64, "width": 64}
    with Pipeline.open(tiny_path, "openvino:cpu") as pipe:
        (ran,) = pipe(**request).timings.ran_on["unet"]
    assert ran.engine == folders[2].name
    (why,) = ran.refused
    assert f"{folders[1]}/engine.blob: size" in why
    assert " --lora-slots 1 --lora-rank 1 --profile 64x64:b1" in why
    (folders[2] / "engine.blob").write_bytes(b"")
    command = r"no engine can be run: .*; .*--lora-slots 1 --lora-rank 1"
    with Pipeline.open(tiny_path, "openvino:cpu") as pipe, pytest.raises(EngineError, match=command):
        pipe(**request)


@pytest.mark.deep
def test_loras_paint_what_they_paint_when_fused_at_export(
    shapes_bundle: Path, cache: Path, tmp_path: Path, loras: tuple[Path, Path]
) -> None:
    from tandemrt.bench.shapes.bundle import export_plan  # noqa: PLC0415 — the other tests need none of its imports
    from tandemrt.export.bundle import export_bundle  # noqa: PLC0415
    from tandemrt.export.plan import LoraSource  # noqa: PLC0415

    scales = dict(zip(loras, (0.8, -0.5), strict=True))
    sources = tuple(LoraSource(path, scale) for path, scale in scales.items())
    fused = export_bundle(dataclasses.replace(export_plan(tmp_path / "fused"), added=(), loras=sources))
    for target in TARGETS:
        build(shapes_bundle, cache, target, ("unet", "text_encoder"), lora_slots=SLOTS, lora_rank=RANK)
        with Pipeline.open(fused, target) as pipe:
            expected = pipe(**REQUEST)
        with Pipeline.open(shapes_bundle, target) as pipe:
            assert distance(pipe(**REQUEST), expected) > 0.01
            assert distance(pipe(**REQUEST, loras=scales), expected) <= TOLERANCE
