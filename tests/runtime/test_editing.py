"""Image-to-image and inpainting on miniature bundles: the draws, what denoisers see, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from tandemrt.runtime import (
    ArgumentError,
    BundleError,
    ExecutionError,
    Pipeline,
    PlanError,
    Request,
    RequestError,
)
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.editing import begin, checked_editing
from tandemrt.runtime.manifest import Component, Manifest
from tandemrt.runtime.noise import Noise
from tandemrt.runtime.plan import compile_plan
from tandemrt.runtime.ran_on import Ran
from tandemrt.runtime.rng import new_generator

from .recorded import Recorded
from .tiny_bundle import Graph, described, float_spec, resign, write_tiny_bundle
from .tiny_families import write_tiny_editing

SIZE = 64
SCALE, SHIFT = 0.5, 0.1
LATENT = (1, 4, 8, 8)


def picture(seed: int = 0, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def left_half(height: int = SIZE, width: int = SIZE) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("editing") / "bundle"
    write_tiny_editing(folder)
    with Pipeline.open(folder, threads=1) as pipeline:
        yield Recorded(pipeline)


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_editing(folder, encoded="latent_sample")
    with Pipeline.open(folder, threads=1) as pipeline:
        yield Recorded(pipeline)


def encoded(recorded: Recorded, image: np.ndarray) -> np.ndarray:
    """What the encoder makes of an 8-bit picture, by itself."""
    return of_pixels(recorded, (image.astype(np.float32) / 255 * 2 - 1).transpose(2, 0, 1)[None])


def of_pixels(recorded: Recorded, pixels: np.ndarray) -> np.ndarray:
    return recorded.pipeline._models.encode_pictures("vae_encoder", pixels, before=lambda: None, ran=Ran())


def sampled(parameters: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    mean, log_variance = np.split(parameters, 2, axis=1)
    return (mean + np.exp(log_variance / 2) * drawn - SHIFT) * SCALE


def latents(recorded: Recorded, **arguments: Any) -> np.ndarray:
    settings = {"prompt": "red", "seed": 7, "num_inference_steps": 4, "output_type": "latent", **arguments}
    return recorded.pipeline(**settings).latents


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmsolver++", "lcm"])
def test_image_to_image_draws_for_the_image_and_then_for_the_noise(recorded: Recorded, solver: str) -> None:
    generator = new_generator(7)
    clean = sampled(encoded(recorded, picture()), generator.randn(LATENT))
    arguments = {"image": picture(), "num_inference_steps": 4, "strength": 0.5, "solver": solver}
    plan = recorded.pipeline("red", **arguments).plan
    assert len(set(plan.table.steps)) == 2
    kept, added = plan.table.noised[0]
    expected = (kept * clean + added * generator.randn(LATENT)) * plan.table.model_input[0, 0]
    rows = recorded.given(**arguments)
    np.testing.assert_allclose(rows[0]["sample"][0], expected[0], atol=1e-5)


def test_an_image_is_encoded_once_from_minus_one_to_one(recorded: Recorded) -> None:
    (run,) = recorded.given("vae_encoder", image=picture(), strength=1.0, num_images_per_prompt=3)
    np.testing.assert_allclose(run["sample"][0], picture().transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_strength_is_diffusers_default_where_it_is_not_given(recorded: Recorded) -> None:
    def rows(**arguments: Any) -> int:
        return recorded.pipeline("red", num_inference_steps=10, **arguments).plan.table.rows

    assert rows(image=picture()) == 8
    assert rows(image=picture(), mask_image=left_half()) == 10
    assert rows(image=picture(), strength=0.25) == 2


def test_the_same_picture_in_any_form_starts_the_same(recorded: Recorded) -> None:
    expected = latents(recorded, image=picture())
    forms = [Image.fromarray(picture()), picture().astype(np.float32) / np.float32(255), picture()[None], [picture()]]
    for form in forms:
        np.testing.assert_allclose(latents(recorded, image=form), expected, atol=1e-5)
    assert np.abs(latents(recorded, image=picture(1)) - expected).max() > 1e-2
    assert np.abs(latents(recorded) - expected).max() > 1e-2


def test_the_picture_has_the_image_s_size_unless_another_is_asked_for(recorded: Recorded) -> None:
    image = Image.fromarray(picture(height=32, width=80))
    assert latents(recorded, image=image).shape == (1, 4, 4, 10)
    resized = image.resize((64, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(latents(recorded, image=image, width=64), latents(recorded, image=resized))
    with pytest.raises(RequestError, match=r"height: not usable, got 40, expected a positive multiple of 16.*Ask for"):
        latents(recorded, image=picture(height=40))


def test_prompts_start_from_their_own_images(recorded: Recorded) -> None:
    both = latents(recorded, prompt=["red", "blue"], image=[picture(0), picture(1)], num_images_per_prompt=2)
    assert both.shape[0] == 4
    seeds = latents(
        recorded, prompt=["red", "blue"], image=[picture(0), picture(1)], num_images_per_prompt=2, seed=[1, 2, 3, 4]
    )
    for row, (prompt, image) in enumerate([("red", 0), ("red", 0), ("blue", 1), ("blue", 1)]):
        alone = latents(recorded, prompt=prompt, image=picture(image), seed=[row + 1])
        np.testing.assert_allclose(seeds[row : row + 1], alone, atol=1e-5)


def test_a_tiny_encoder_s_latent_is_taken_as_it_is(tiny_encoder: Recorded) -> None:
    clean = (encoded(tiny_encoder, picture()) - SHIFT) * SCALE
    arguments: dict[str, Any] = {"image": picture(), "num_inference_steps": 4, "solver": "ddim", "strength": 0.5}
    kept, added = tiny_encoder.pipeline("red", **arguments).plan.table.noised[0]
    rows = tiny_encoder.given(**arguments)
    np.testing.assert_allclose(
        rows[0]["sample"][0], (kept * clean + added * new_generator(7).randn(LATENT))[0], atol=1e-5
    )


def test_latents_stand_in_for_the_noise_that_is_added(recorded: Recorded) -> None:
    noise = np.random.default_rng(0).normal(size=LATENT).astype(np.float32)
    clean = sampled(encoded(recorded, picture()), new_generator(7).randn(LATENT))
    arguments: dict[str, Any] = {"image": picture(), "num_inference_steps": 4, "solver": "ddim", "latents": noise}
    kept, added = recorded.pipeline("red", **arguments).plan.table.noised[0]
    rows = recorded.given(**arguments)
    np.testing.assert_allclose(rows[0]["sample"][0], (kept * clean + added * noise)[0], atol=1e-5)


@pytest.mark.parametrize("solver", ["ddim", "euler_a", "heun", "dpmsolver++"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_keeps_the_rest_noised_as_far_as_each_row(recorded: Recorded, solver: str, strength: float) -> None:
    generator = new_generator(7)
    clean = sampled(encoded(recorded, picture()), generator.randn(LATENT))
    noise = generator.randn(LATENT)
    arguments: dict[str, Any] = {
        "image": picture(), "mask_image": left_half(), "num_inference_steps": 4, "solver": solver,
        "strength": strength, "guidance_scale": 1.0,
    }  # fmt: skip
    table = recorded.pipeline("red", **arguments).plan.table
    rows = recorded.given(**arguments)
    for n, row in enumerate(rows):
        kept, added = table.noised[n]
        if n == 0 and strength == 1:
            kept, added = 0.0, table.init_noise_sigma
        expected = (kept * clean + added * noise) * table.model_input[n, 0]
        np.testing.assert_allclose(row["sample"][0, :, :, 4:], expected[0, :, :, 4:], atol=1e-4)
    made = latents(recorded, prompt="red blue", **arguments)
    np.testing.assert_allclose(made[..., 4:], clean[..., 4:], atol=1e-5)
    assert np.abs(made[..., :4] - clean[..., :4]).max() > 1e-2


def test_what_is_drawn_later_comes_after_the_masked_image_s_draw(recorded: Recorded) -> None:
    """diffusers draws for the masked image too, although a plain UNet never reads it."""
    request = Request("red", image=picture(), mask_image=left_half(), num_inference_steps=3, seed=7)
    manifest = recorded.pipeline.bundle.manifest
    plan = compile_plan(manifest, request.schedule)
    editing, noise = checked_editing(request, manifest, plan, (SIZE, SIZE)), Noise(request, LATENT)
    begin(editing, plan, noise, lambda _, pixels: of_pixels(recorded, pixels), None)
    generator = new_generator(7)
    drawn = [generator.randn(LATENT) for _ in range(4)]
    np.testing.assert_array_equal(noise.draw(), drawn[3])


def test_an_inpainting_denoiser_reads_mask_and_masked_image(recorded: Recorded) -> None:
    generator = new_generator(7)
    noise = generator.randn(LATENT)
    masked = picture().astype(np.float32) / 255 * 2 - 1
    masked[:, : SIZE // 2] = 0
    behind = sampled(of_pixels(recorded, masked.transpose(2, 0, 1)[None]), generator.randn(LATENT))
    arguments: dict[str, Any] = {
        "num_inference_steps": None, "steps": {"unet_inpaint": 2}, "image": picture(), "mask_image": left_half(),
        "solver": "euler",
    }  # fmt: skip
    table = recorded.pipeline("red", **arguments).plan.table
    rows = recorded.given("unet_inpaint", **arguments)
    expected = noise * table.init_noise_sigma * table.model_input[0, 0]
    for branch in (0, 1):
        np.testing.assert_allclose(rows[0]["sample"][branch, :4], expected[0], atol=1e-5)
        for row in rows:
            np.testing.assert_array_equal(row["sample"][branch, 4], left_half()[::8, ::8] / 255)
            np.testing.assert_allclose(row["sample"][branch, 5:], behind[0], atol=1e-5)


def test_plain_and_inpainting_denoisers_take_turns(recorded: Recorded) -> None:
    steps = {"unet_inpaint": 2, "unet": 2}
    arguments: dict[str, Any] = {"image": picture(), "mask_image": left_half(), "num_inference_steps": None}
    arguments = {**arguments, "steps": steps, "solver": "ddim", "guidance_scale": 1.0}
    table = recorded.pipeline("red", **arguments).plan.table
    generator = new_generator(7)
    clean, noise = sampled(encoded(recorded, picture()), generator.randn(LATENT)), generator.randn(LATENT)
    inpainting, plain = recorded.given("unet_inpaint", **arguments), recorded.given("unet", **arguments)
    assert [row["timestep"].tolist() for row in (*inpainting, *plain)] == [[step] for step in table.timesteps]
    np.testing.assert_allclose(inpainting[0]["sample"][:, :4], noise, atol=1e-5)
    for row in inpainting:
        np.testing.assert_array_equal(row["sample"][0, 4], left_half()[::8, ::8] / 255)
    # The plain one's first latent is what the inpainting one left: only after a row of its own is the rest put back.
    kept, added = table.noised[3]
    np.testing.assert_allclose(plain[1]["sample"][..., 4:], (kept * clean + added * noise)[..., 4:], atol=1e-5)
    kept, added = table.noised[2]
    assert np.abs(plain[0]["sample"][..., 4:] - (kept * clean + added * noise)[..., 4:]).max() > 1e-3
    made = latents(recorded, prompt="red blue", **arguments)
    np.testing.assert_allclose(made[..., 4:], clean[..., 4:], atol=1e-5)


def test_masks_are_cut_at_half_brightness(recorded: Recorded) -> None:
    soft = np.full((SIZE, SIZE), 127, np.uint8)
    soft[:, : SIZE // 2] = 128
    expected = latents(recorded, image=picture(), mask_image=left_half())
    for mask in (soft, left_half() > 0, Image.fromarray(soft), Image.fromarray(left_half()).convert("RGB")):
        np.testing.assert_array_equal(latents(recorded, image=picture(), mask_image=mask), expected)


def test_the_time_of_encoding_is_told(recorded: Recorded) -> None:
    timings = recorded.pipeline("red", image=picture(), num_inference_steps=2).timings
    assert 0 < timings.image_ms < timings.total_ms


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"mask_image": left_half()}, RequestError, "mask_image: given without image"),
        ({"strength": 0.5}, RequestError, "strength: given without image"),
        ({"image": picture(), "strength": 0.0}, PlanError, "strength.*got 0.0, expected a number above 0"),
        ({"image": picture(), "strength": 1.5}, PlanError, "strength"),
        ({"image": picture(), "strength": "0.5"}, PlanError, "strength"),
        (
            {"image": picture(), "strength": 0.01},
            PlanError,
            "strength: of 10 steps, none is left.*expected 0.1 or more",
        ),
        ({"image": "picture.png"}, RequestError, "image: no picture, got 'str', expected a PIL image"),
        ({"image": []}, RequestError, "image: an empty list"),
        ({"image": [None]}, RequestError, "image: no picture, got 'NoneType'"),
        ({"image": left_half()}, RequestError, r"image: no picture, got \(64, 64\)"),
        ({"image": picture()[..., :2]}, RequestError, r"image: no picture, got \(64, 64, 2\)"),
        ({"image": picture()[:0]}, RequestError, "image: no picture"),
        (
            {"image": picture().astype(np.float32)},
            RequestError,
            r"image: values, got '0..255', expected float32 in 0..1",
        ),
        ({"image": np.full((64, 64, 3), np.nan, np.float32)}, RequestError, "image: values, got 'nan..nan'"),
        ({"image": picture().astype(np.float64) / 255}, RequestError, "image: type, got dtype.'float64'"),
        (
            {"image": picture(), "height": 32},
            RequestError,
            r"image: height and width, got \(64, 64\), expected \(32, 64\)",
        ),
        ({"image": [picture(), picture(height=32)]}, RequestError, r"image: height and width, got \(32, 64\)"),
        ({"image": [picture()] * 2}, RequestError, "image: how many there are, got 2, expected 1 or 1"),
        ({"image": picture(), "mask_image": picture()}, RequestError, "mask_image: height and width"),
        ({"image": picture(), "mask_image": left_half(32)}, RequestError, "mask_image: height and width"),
        ({"image": picture(), "mask_image": [left_half()] * 3}, RequestError, "mask_image: how many"),
        (
            {"steps": {"unet_inpaint": 2}, "image": picture()},
            RequestError,
            "mask_image: denoiser 'unet_inpaint' inpaints and needs one",
        ),
        ({"steps": {"unet_inpaint": 2}}, RequestError, "mask_image: denoiser 'unet_inpaint'"),
    ],
)
def test_images_that_cannot_be_used_are_refused_before_anything_runs(
    recorded: Recorded, arguments: dict[str, Any], error: type[ArgumentError], words: str
) -> None:
    with pytest.raises(error, match=words):
        recorded.pipeline.stream("red", **arguments)


def test_a_bundle_without_an_encoder_starts_from_no_image(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    with (
        Pipeline.open(tmp_path / "bundle") as pipeline,
        pytest.raises(RequestError, match="image: the bundle has no encoder for images"),
    ):
        pipeline.stream("red", image=picture())


def with_encoder(folder: Path, channels: int, output: str = "latent_parameters", stride: int = 8) -> None:
    """Another encoder in an editing bundle, which states symbols where its sizes would be."""
    write_tiny_editing(folder)
    graph = Graph("vae_encoder", 5)
    weight = graph.weight(channels, 3, stride, stride, scale=0.2)
    graph.node("Conv", ["sample", weight], output, strides=[stride, stride])
    outputs = (float_spec(output, "batch", "channels", "down", "across"),)
    inputs = (float_spec("sample", "batch", 3, "height", "width"),)
    model, component = described(graph, inputs, outputs, role="vae_encoder")
    onnx.save_model(model, str(folder / "vae_encoder" / "model.onnx"))
    resign(folder, lambda manifest: with_component(manifest, "vae_encoder", component))


def with_component(manifest: Manifest, name: str, component: Component) -> Manifest:
    return msgspec.structs.replace(manifest, components={**manifest.components, name: component})


@pytest.mark.parametrize(
    ("channels", "output", "stride", "got"),
    [
        (4, "latent_parameters", 8, r"\(1, 4, 8, 8\), expected \(1, 8, 8, 8\)"),
        (1, "latent_sample", 8, r"\(1, 1, 8, 8\), expected \(1, 4, 8, 8\)"),
        (8, "latent_parameters", 64, r"\(1, 8, 1, 1\), expected \(1, 8, 8, 8\)"),
    ],
)
def test_what_an_encoder_makes_has_the_latent_s_size(
    channels: int, output: str, stride: int, got: str, tmp_path: Path
) -> None:
    with_encoder(tmp_path / "bundle", channels, output, stride)
    with (
        Pipeline.open(tmp_path / "bundle", threads=1) as pipeline,
        pytest.raises(BundleError, match=f"vae_encoder: shape of {output}, got {got}"),
    ):
        pipeline("red", image=picture(), num_inference_steps=2)


@pytest.mark.parametrize(
    "outputs",
    [
        [float_spec("latent_parameters", "batch", 4, "h", "w")],
        [float_spec("latent_parameters", "batch", 8, "h", "w"), float_spec("latent_sample", "batch", 4, "h", "w")],
    ],
)
def test_a_manifest_s_encoder_makes_one_thing_of_the_latent_s_channels(outputs: list[Any], tmp_path: Path) -> None:
    write_tiny_editing(tmp_path / "bundle")

    def changed(manifest: Manifest) -> Manifest:
        component = msgspec.structs.replace(manifest.components["vae_encoder"], outputs=tuple(outputs))
        return with_component(manifest, "vae_encoder", component)

    resign(tmp_path / "bundle", changed)
    with pytest.raises(BundleError, match=r"channels of vae_encoder 'vae_encoder', got .*latent_sample of 4"):
        Bundle.open(tmp_path / "bundle")


def test_nan_from_the_encoder_is_blamed_on_it(recorded: Recorded) -> None:
    with pytest.raises(ExecutionError, match="vae_encoder: NaN or Inf in latent_parameters"):
        of_pixels(recorded, np.full((1, 3, SIZE, SIZE), np.nan, np.float32))


def test_a_batch_of_masks_with_one_image(recorded: Recorded) -> None:
    masks = [left_half(), 255 - left_half()]
    arguments: dict[str, Any] = {"image": picture(), "solver": "ddim", "strength": 0.5, "guidance_scale": 1.0}
    both = latents(recorded, prompt=["red", "blue"], mask_image=masks, seed=[1, 2], **arguments)
    for index, prompt in enumerate(["red", "blue"]):
        alone = latents(recorded, prompt=prompt, mask_image=masks[index], seed=[index + 1], **arguments)
        np.testing.assert_allclose(both[index : index + 1], alone, atol=1e-5)


def test_previews_show_what_an_edit_has_become(recorded: Recorded) -> None:
    arguments: dict[str, Any] = {"image": picture(), "mask_image": left_half(), "num_inference_steps": 4}
    events = list(recorded.pipeline.stream("red", previews=2, seed=7, **arguments))
    assert [len(event.preview) for event in events] == [0, 1, 0, 1]
    assert events[1].preview[0].size == (SIZE, SIZE)
