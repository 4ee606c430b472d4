"""ControlNets on a miniature bundle: what they are given, what they leave, when they run, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from tandemrt.runtime import BundleError, CancelledError, ExecutionError, Pipeline, RequestError
from tandemrt.runtime.backends.base import Array
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.manifest import Component, Manifest

from .recorded import Recorded, RecordedBinding
from .tiny_bundle import RESIDUALS, denoiser, resign, write_tiny_bundle
from .tiny_families import write_tiny_control

SIZE = 64


def picture(seed: int = 0, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("control") / "bundle"
    write_tiny_control(folder)
    with Pipeline.open(folder, threads=1) as pipeline:
        yield Recorded(pipeline)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("alone") / "bundle"
    write_tiny_control(folder, ["canny"])
    with Pipeline.open(folder, threads=1) as pipeline:
        yield Recorded(pipeline)


def residuals(recorded: Recorded, row: dict[str, Array], images: dict[str, Array], scales: dict[str, float]) -> Any:
    """What ONNX Runtime makes of a denoiser's row by itself, summed over the ControlNets."""
    total = [np.zeros_like(row[name]) for name, _, _ in RESIDUALS]
    for name, image in images.items():
        session = onnxruntime.InferenceSession(recorded.pipeline.bundle.model_path(f"controlnet_{name}"))
        batch = len(row["sample"])
        given = {
            "sample": row["sample"],
            "encoder_hidden_states": row["encoder_hidden_states"],
            "timestep": np.broadcast_to(row["timestep"], batch),
            "controlnet_cond": np.broadcast_to(image.transpose(2, 0, 1) / np.float32(255), (batch, 3, SIZE, SIZE)),
            "conditioning_scale": np.array([scales[name]], np.float32),
        }
        made = session.run([result for _, result, _ in RESIDUALS], given)
        total = [one + other for one, other in zip(total, made, strict=True)]
    return total


def latents(recorded: Recorded, **arguments: Any) -> np.ndarray:
    settings = {"prompt": "red", "seed": 7, "num_inference_steps": 4, "output_type": "latent", **arguments}
    return recorded.pipeline(**settings).latents


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_residuals_of_several_are_scaled_and_summed(recorded: Recorded, guidance_scale: float) -> None:
    images, scales = {"canny": picture(0), "depth": picture(1)}, {"canny": 0.8, "depth": -0.5}
    rows = recorded.given(
        control_image=images, controlnet_conditioning_scale=scales, num_inference_steps=3, guidance_scale=guidance_scale
    )
    assert len(rows) == 3
    for row in rows:
        for (name, _, _), expected in zip(RESIDUALS, residuals(recorded, row, images, scales), strict=True):
            np.testing.assert_allclose(row[name], expected, atol=1e-6)
            assert row[name].any()


def test_outside_its_interval_a_controlnet_neither_runs_nor_steers(recorded: Recorded) -> None:
    arguments: dict[str, Any] = {
        "control_image": {"canny": picture()}, "num_inference_steps": 8,
        "control_guidance_start": 0.25, "control_guidance_end": 0.7,
    }  # fmt: skip
    rows = recorded.given(**arguments)
    steered = [bool(row[RESIDUALS[0][0]].any()) for row in rows]
    assert steered == [not (i / 8 < 0.25 or (i + 1) / 8 > 0.7) for i in range(8)]
    assert steered == [False, False, True, True, True, False, False, False]
    assert len(recorded.given("controlnet_canny", **arguments)) == 3
    assert not recorded.given("controlnet_depth", **arguments)


def test_intervals_are_each_controlnet_s_own(recorded: Recorded) -> None:
    arguments: dict[str, Any] = {
        "control_image": {"canny": picture(), "controlnet_depth": picture(1)}, "num_inference_steps": 4,
        "control_guidance_end": {"canny": 0.5}, "control_guidance_start": {"controlnet_depth": 0.25},
    }  # fmt: skip
    assert len(recorded.given("controlnet_canny", **arguments)) == 2
    assert len(recorded.given("controlnet_depth", **arguments)) == 3
    rows = recorded.given(**arguments)
    expected = residuals(recorded, rows[3], {"depth": picture(1)}, {"depth": 1.0})
    np.testing.assert_allclose(rows[3][RESIDUALS[2][0]], expected[2], atol=1e-6)


def test_without_an_image_nothing_is_steered(recorded: Recorded) -> None:
    for row in recorded.given(num_inference_steps=2):
        assert not any(row[name].any() for name, _, _ in RESIDUALS)
    plain = latents(recorded)
    np.testing.assert_array_equal(
        latents(recorded, control_image={"canny": picture()}, controlnet_conditioning_scale=0.0), plain
    )
    assert np.abs(latents(recorded, control_image={"canny": picture()}) - plain).max() > 1e-3


def test_an_only_controlnet_needs_no_name(alone: Recorded) -> None:
    named = latents(alone, control_image={"canny": picture()})
    np.testing.assert_array_equal(latents(alone, control_image=picture()), named)
    np.testing.assert_array_equal(latents(alone, control_image=Image.fromarray(picture())), named)


def test_the_picture_has_the_control_image_s_size_unless_another_is_asked_for(alone: Recorded) -> None:
    image = Image.fromarray(picture(height=32, width=80))
    assert latents(alone, control_image=image).shape == (1, 4, 4, 10)
    resized = image.resize((64, 64), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(
        latents(alone, control_image=image, height=64, width=64), latents(alone, control_image=resized)
    )


def test_prompts_have_their_own_control_images(alone: Recorded) -> None:
    both = latents(
        alone,
        prompt=["red", "blue"],
        control_image=[picture(0), picture(1)],
        num_images_per_prompt=2,
        seed=[1, 2, 3, 4],
    )
    for index, (prompt, image) in enumerate([("red", 0), ("red", 0), ("blue", 1), ("blue", 1)]):
        single = latents(alone, prompt=prompt, control_image=picture(image), seed=[index + 1])
        np.testing.assert_allclose(both[index : index + 1], single, atol=1e-5)


def test_denoisers_are_steered_in_turn_and_left_alone_after_the_interval(recorded: Recorded) -> None:
    steps = {"unet": 2, "unet_second": 2, "unet_free": 4}
    arguments: dict[str, Any] = {
        "control_image": {"canny": picture()}, "control_guidance_end": 0.5, "num_inference_steps": None, "steps": steps,
    }  # fmt: skip
    for name in ("unet", "unet_second"):
        rows = recorded.given(name, **arguments)
        assert len(rows) == 2
        assert all(row[RESIDUALS[0][0]].any() for row in rows)
    assert len(recorded.given("controlnet_canny", **arguments)) == 4


def test_images_to_start_from_and_to_steer_by_go_together(recorded: Recorded) -> None:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, : SIZE // 2] = 255
    editing: dict[str, Any] = {"image": picture(3), "mask_image": mask, "strength": 0.5}
    steered = latents(recorded, **editing, control_image={"canny": picture()})
    plain = latents(recorded, **editing)
    np.testing.assert_array_equal(steered[..., 4:], plain[..., 4:])
    assert np.abs(steered - plain).max() > 1e-4
    assert (
        len(recorded.given("controlnet_canny", **editing, control_image={"canny": picture()}, num_inference_steps=4))
        == 2
    )


def test_heun_s_rows_are_counted_as_diffusers_counts_model_calls(recorded: Recorded) -> None:
    arguments: dict[str, Any] = {"control_image": {"canny": picture()}, "solver": "heun", "num_inference_steps": 4}
    assert len(recorded.given("controlnet_canny", **arguments)) == 7
    assert len(recorded.given("controlnet_canny", **arguments, control_guidance_end=0.5)) == 3


IMAGES = {"canny": picture()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"control_image": picture()},
            "control_image: several ControlNets in the bundle, expected images by name, of canny",
        ),
        (
            {"control_image": {"pose": picture()}},
            "control_image: unknown ControlNet, got 'pose', expected one of canny, depth",
        ),
        ({"control_image": {}}, "control_image: an empty mapping"),
        ({"control_image": {"canny": "edges.png"}}, "control_image: no picture, got 'str'"),
        ({"control_image": {"canny": None}}, "control_image: no picture"),
        ({"control_image": {"canny": [picture()] * 2}}, "control_image: how many there are, got 2"),
        ({"control_image": IMAGES, "height": 32}, "control_image: height and width"),
        ({"controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale: given without control_image"),
        ({"control_guidance_end": 0.5}, "control_guidance_end: given without control_image"),
        (
            {"control_image": IMAGES, "controlnet_conditioning_scale": "1"},
            "controlnet_conditioning_scale: not usable, got '1'",
        ),
        ({"control_image": IMAGES, "controlnet_conditioning_scale": {"canny": np.nan}}, "scale: not usable, got nan"),
        ({"control_image": IMAGES, "controlnet_conditioning_scale": -1e39}, r"scale: not usable, got -1e\+39"),
        (
            {"control_image": {**IMAGES, "controlnet_canny": picture(1)}},
            "control_image: a ControlNet given twice, got 'canny'",
        ),
        (
            {"control_image": IMAGES, "control_guidance_end": {"canny": 0.5, "controlnet_canny": 0.7}},
            "control_guidance_end: a ControlNet given twice",
        ),
        (
            {"control_image": IMAGES, "control_guidance_start": 0.31, "control_guidance_end": 0.39},
            "_end of 'canny': interval, got '0.31 and 0.39', expected one that holds a row of the plan, which has 10",
        ),
        (
            {"control_image": IMAGES, "controlnet_conditioning_scale": {"depth": 1.0}},
            "controlnet_conditioning_scale: no image is given for this ControlNet, got 'depth', expected one of canny",
        ),
        (
            {"control_image": IMAGES, "control_guidance_start": 0.5, "control_guidance_end": 0.5},
            "of 'canny': fractions, got",
        ),
        (
            {"control_image": IMAGES, "control_guidance_end": 1.5},
            "fractions, got '0 and 1.5', expected 0 <= start < end <= 1",
        ),
        (
            {"control_image": IMAGES, "steps": {"unet": 3, "unet_free": 7}},
            "row 3 is to run 'controlnet_canny', but its denoiser 'unet_free' takes nothing from ControlNets. "
            "End it before, at control_guidance_end=0.3, or take steps on another denoiser",
        ),
        ({"control_image": IMAGES, "steps": {"unet_free": 1}}, "Begin it later with control_guidance_start, or"),
        (
            {"control_image": IMAGES, "steps": {"unet_other": 1}},
            r"'controlnet_canny' is of another architecture than denoiser 'unet_other', "
            r"got 'residuals of \[8, 8, 8\] channels', expected \[6, 6, 6\]",
        ),
    ],
)
def test_control_that_cannot_be_is_refused_before_anything_runs(
    recorded: Recorded, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        recorded.pipeline.stream("red", **arguments)


@pytest.mark.parametrize("share", [(1, 2), (2, 1), (7, 3), (1, 6), (2, 5)])
def test_the_interval_that_is_advised_is_the_longest_possible(recorded: Recorded, share: tuple[int, int]) -> None:
    arguments: dict[str, Any] = {"control_image": IMAGES, "steps": {"unet": share[0], "unet_free": share[1]}}
    with pytest.raises(RequestError) as caught:
        recorded.pipeline.stream("red", **arguments)
    end = float(str(caught.value).split("control_guidance_end=")[1].split(",")[0])
    rows = recorded.given("controlnet_canny", **arguments, num_inference_steps=None, control_guidance_end=end)
    assert len(rows) == share[0]


def test_a_bundle_without_controlnets_is_not_steered(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    with (
        Pipeline.open(tmp_path / "bundle") as pipeline,
        pytest.raises(RequestError, match="control_image: the bundle has no ControlNet"),
    ):
        pipeline.stream("red", control_image=picture())


@pytest.mark.parametrize(
    ("name", "kind", "drop"),
    [
        ("unet", "inputs", "mid_block_additional_residual"),
        ("unet", "inputs", "down_block_additional_residual_0"),
        ("controlnet_canny", "outputs", "mid_block_res_sample"),
        ("controlnet_canny", "outputs", "down_block_res_sample_0"),
        ("controlnet_canny", "inputs", "conditioning_scale"),
    ],
)
def test_residuals_are_complete_or_refused(name: str, kind: str, drop: str, tmp_path: Path) -> None:
    write_tiny_control(tmp_path / "bundle")

    def changed(manifest: Any) -> Any:
        component = manifest.components[name]
        left = tuple(spec for spec in getattr(component, kind) if spec.name != drop)
        component = msgspec.structs.replace(component, **{kind: left})
        return msgspec.structs.replace(manifest, components={**manifest.components, name: component})

    resign(tmp_path / "bundle", changed)
    with pytest.raises(BundleError, match=f"{kind} of .* '{name}', got "):
        Bundle.open(tmp_path / "bundle")


def with_component(name: str, component: Component) -> Callable[[Manifest], Manifest]:
    return lambda manifest: msgspec.structs.replace(manifest, components={**manifest.components, name: component})


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_nan_from_a_controlnet_is_blamed_on_it(recorded: Recorded, guidance_scale: float) -> None:
    arguments: dict[str, Any] = {
        "control_image": {"canny": picture(), "depth": picture(1)}, "guidance_scale": guidance_scale,
        "controlnet_conditioning_scale": {"depth": 3.0}, "prompt": "red", "num_inference_steps": 4,
        "num_images_per_prompt": 3,  # as no other test here: what is bound is kept for the next request
    }  # fmt: skip
    broken = recorded.sessions["controlnet_depth"]
    original = broken.bind

    def bind(shapes: Any) -> RecordedBinding:
        binding = original(shapes)
        run = binding.run

        def run_to_nan() -> None:
            run()
            binding.outputs[RESIDUALS[2][1]][0, 0] = np.nan

        binding.run = run_to_nan  # type: ignore[method-assign]
        return binding

    broken.bind = bind  # type: ignore[method-assign]
    try:
        with pytest.raises(ExecutionError, match=r", controlnet_depth\): NaN or Inf in .* scaled by 3\. Lower"):
            recorded.pipeline(**arguments)
    finally:
        broken.bind = original  # type: ignore[method-assign]


def test_residuals_of_other_sizes_than_the_denoiser_takes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    manifest = write_tiny_control(folder, ["canny"])
    path = folder / "controlnet_canny" / "model.onnx"
    model, component = onnx.load_model(str(path)), manifest.components["controlnet_canny"]
    for output in model.graph.output:
        for axis, symbol in ((2, f"{output.name}_h"), (3, f"{output.name}_w")):
            output.type.tensor_type.shape.dim[axis].dim_param = symbol
    (pool,) = (node for node in model.graph.node if node.op_type == "AveragePool")
    for attribute in pool.attribute:
        attribute.ints[:] = [4, 4]
    onnx.save_model(model, str(path))
    outputs = tuple(
        msgspec.structs.replace(spec, shape=(*spec.shape[:2], f"{spec.name}_h", f"{spec.name}_w"))
        for spec in component.outputs
    )
    resign(folder, with_component("controlnet_canny", msgspec.structs.replace(component, outputs=outputs)))
    with (
        Pipeline.open(folder, threads=1) as pipeline,
        pytest.raises(BundleError, match=r"canny: shapes of the residuals, got .*\(1, 8, 2, 2\).*expected"),
    ):
        pipeline("red", control_image=picture(), num_inference_steps=1, guidance_scale=1.0)


@pytest.mark.parametrize(("name", "other"), [("controlnet_canny", "canny"), ("unet_free", "controlnet_free")])
def test_a_controlnet_is_told_by_its_name(name: str, other: str, tmp_path: Path) -> None:
    write_tiny_control(tmp_path / "bundle")

    def changed(manifest: Manifest) -> Manifest:
        renamed = {other if key == name else key: part for key, part in manifest.components.items()}
        return msgspec.structs.replace(manifest, components=renamed)

    resign(tmp_path / "bundle", changed)
    with pytest.raises(BundleError, match=f"name of a .*, got '{other}', expected controlnet_NAME for a ControlNet"):
        Bundle.open(tmp_path / "bundle")


def test_previews_and_cancellation_while_steered(recorded: Recorded) -> None:
    stream = recorded.pipeline.stream("red", control_image=IMAGES, num_inference_steps=4, previews=1, seed=7)
    first = next(stream)
    assert first.preview[0].size == (SIZE, SIZE)
    stream.cancel()
    with pytest.raises(CancelledError, match="cancelled after row 1 of 4"):
        stream.result()


def mixed(folder: Path, name: str, model: tuple[onnx.ModelProto, Component]) -> None:
    """A control bundle with another denoiser, which `canny` can steer."""
    write_tiny_control(folder, ["canny"])
    (folder / name).mkdir()
    onnx.save_model(model[0], str(folder / name / "model.onnx"))
    resign(folder, with_component(name, model[1]))


def test_a_distilled_and_a_plain_denoiser_are_steered_in_turn(tmp_path: Path) -> None:
    mixed(tmp_path / "bundle", "unet_lcm", denoiser("unet_lcm", 9, 8, widths={"timestep_cond": 16}, steered=True))
    arguments: dict[str, Any] = {
        "control_image": picture(), "num_inference_steps": None, "steps": {"unet_lcm": 2, "unet": 2},
    }  # fmt: skip
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:
        recorded = Recorded(pipeline)
        for name, branches in (("unet_lcm", 1), ("unet", 2)):
            rows = recorded.given(name, **arguments)
            assert [len(row["sample"]) for row in rows] == [branches] * 2
            for row in rows:
                made = residuals(recorded, row, {"canny": picture()}, {"canny": 1.0})
                for (residual, _, _), expected in zip(RESIDUALS, made, strict=True):
                    np.testing.assert_allclose(row[residual], expected, atol=1e-6)


def test_an_inpainting_denoiser_is_steered_by_its_latent_alone(tmp_path: Path) -> None:
    mixed(tmp_path / "bundle", "unet_inpaint", denoiser("unet_inpaint", 9, 8, behind=5, steered=True))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, : SIZE // 2] = 255
    arguments: dict[str, Any] = {
        "control_image": picture(), "image": picture(3), "mask_image": mask, "steps": {"unet_inpaint": 2},
        "num_inference_steps": None,
    }  # fmt: skip
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:
        recorded = Recorded(pipeline)
        rows = recorded.given("unet_inpaint", **arguments)
        assert [row["sample"].shape[1] for row in rows] == [9, 9]
        for row in rows:
            latent = {**row, "sample": np.ascontiguousarray(row["sample"][:, :4])}
            made = residuals(recorded, latent, {"canny": picture()}, {"canny": 1.0})
            for (residual, _, _), expected in zip(RESIDUALS, made, strict=True):
                np.testing.assert_allclose(row[residual], expected, atol=1e-6)
