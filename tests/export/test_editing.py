"""Image-to-image, inpainting and ControlNets, compared with diffusers' own pipelines on the same weights and seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import ExportPlan
from tandemrt.runtime import Pipeline

from .family import require_same as require_alike
from .mini import unet, write_checkpoint

pytestmark = pytest.mark.slow

PSNR_DB = 60
PROMPT = "a red circle"
WIDTH, HEIGHT = 24, 16
SOLVERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmsolver++": DPMSolverMultistepScheduler}


@pytest.fixture(scope="module")
def pipe(steered: Path) -> Iterator[Pipeline]:
    with Pipeline.open(steered / "bundle", threads=1) as pipeline:
        yield pipeline


def reference(kind: Any, steered: Path, solver: str = "ddim", **parts: Any) -> Any:
    loaded = kind.from_pretrained(steered / "checkpoint", dtype=torch.float32, safety_checker=None, **parts)
    loaded.scheduler = SOLVERS[solver].from_config(loaded.scheduler.config)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def mask() -> Image.Image:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[4:12, 6:20] = 255
    return Image.fromarray(values)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def require_same(actual: Any, expected: Any) -> None:
    require_alike(actual, expected, PSNR_DB)


def paint(pipe: Pipeline, **arguments: Any) -> Any:
    return np.stack(pipe(PROMPT, seed=7, output_type="np", **arguments).images)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("strength", [0.35, 0.8, 1.0])
def test_image_to_image(pipe: Pipeline, steered: Path, solver: str, strength: float) -> None:
    same = {"num_inference_steps": 6, "guidance_scale": 4.0, "strength": strength, "image": picture()}
    expected = reference(StableDiffusionImg2ImgPipeline, steered, solver)(
        PROMPT, generator=generator(), output_type="np", **same
    ).images
    found = paint(pipe, solver=solver, **same)
    require_same(found, expected)
    # At strength 1 hardly anything of a picture is left under the noise.
    least = 1e-2 if strength < 1 else 1e-4
    assert np.abs(found - paint(pipe, solver=solver, **{**same, "image": picture(1)})).max() > least


def test_image_to_image_of_several_pictures(pipe: Pipeline, steered: Path) -> None:
    same = {"num_inference_steps": 4, "guidance_scale": 4.0, "strength": 0.6, "num_images_per_prompt": 2}
    expected = reference(StableDiffusionImg2ImgPipeline, steered)(
        PROMPT, image=picture(), generator=generator(), output_type="np", **same
    ).images
    require_same(paint(pipe, image=picture(), solver="ddim", **same), expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(pipe: Pipeline, steered: Path, solver: str, strength: float) -> None:
    same = {"num_inference_steps": 5, "guidance_scale": 4.0, "strength": strength}
    expected = reference(StableDiffusionInpaintPipeline, steered, solver)(
        PROMPT,
        image=picture(),
        mask_image=mask(),
        height=HEIGHT,
        width=WIDTH,
        generator=generator(),
        output_type="np",
        **same,
    ).images
    found = paint(pipe, image=picture(), mask_image=mask(), solver=solver, **same)
    require_same(found, expected)
    elsewhere = Image.fromarray(255 - np.asarray(mask()))
    others = ({"image": picture(1), "mask_image": mask()}, {"image": picture(), "mask_image": elsewhere})
    # At strength 1 little of a picture is left under the noise; it still counts for more than the way to diffusers'.
    least = max(2 * np.mean(np.square(found - expected)), 1e-6)
    for other in others:
        assert np.mean(np.square(found - paint(pipe, solver=solver, **other, **same))) > least


@pytest.mark.deep
def test_an_inpainting_unet_of_nine_channels(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    torch.manual_seed(9)
    UNet2DConditionModel.from_config({**unet().config, "in_channels": 9}).save_pretrained(checkpoint / "unet")
    bundle = export_bundle(ExportPlan(checkpoint, tmp_path / "bundle"))
    same = {"num_inference_steps": 4, "guidance_scale": 4.0}
    expected = reference(StableDiffusionInpaintPipeline, tmp_path)(
        PROMPT,
        image=picture(),
        mask_image=mask(),
        height=HEIGHT,
        width=WIDTH,
        generator=generator(),
        output_type="np",
        **same,
    ).images
    with Pipeline.open(bundle, threads=1) as pipe:
        require_same(paint(pipe, image=picture(), mask_image=mask(), solver="ddim", **same), expected)


def test_a_controlnet(pipe: Pipeline, steered: Path) -> None:
    controlnet = ControlNetModel.from_pretrained(steered / "edges")
    same = {"num_inference_steps": 4, "guidance_scale": 4.0, "controlnet_conditioning_scale": 0.7}
    expected = reference(StableDiffusionControlNetPipeline, steered, controlnet=controlnet)(
        PROMPT, image=picture(), generator=generator(), output_type="np", **same
    ).images
    found = paint(pipe, control_image={"edges": picture()}, solver="ddim", **same)
    require_same(found, expected)
    assert np.abs(found - paint(pipe, height=HEIGHT, width=WIDTH, solver="ddim", num_inference_steps=4)).max() > 1e-2


def test_two_controlnets_in_their_intervals(pipe: Pipeline, steered: Path) -> None:
    names = ("edges", "depth")
    controlnets = [ControlNetModel.from_pretrained(steered / name) for name in names]
    shared = {"num_inference_steps": 5, "guidance_scale": 4.0}
    settings = {
        "controlnet_conditioning_scale": [0.7, 1.1],
        "control_guidance_start": [0.0, 0.4],
        "control_guidance_end": [0.6, 1.0],
    }
    pictures = [picture(0), picture(1)]
    expected = reference(StableDiffusionControlNetPipeline, steered, controlnet=controlnets)(
        PROMPT, image=pictures, generator=generator(), output_type="np", **shared, **settings
    ).images
    by_name = {key: dict(zip(names, values, strict=True)) for key, values in settings.items()}
    steered = dict(zip(names, pictures, strict=True))
    require_same(paint(pipe, control_image=steered, solver="ddim", **shared, **by_name), expected)


def test_without_control_the_picture_is_the_plain_one(pipe: Pipeline, steered: Path) -> None:
    same = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": HEIGHT, "width": WIDTH}
    expected = reference(StableDiffusionPipeline, steered)(
        PROMPT, generator=generator(), output_type="np", **same
    ).images
    require_same(paint(pipe, solver="ddim", **same), expected)
