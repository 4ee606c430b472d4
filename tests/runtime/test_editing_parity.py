"""End to end: image-to-image and inpainting give diffusers' picture of the same weights, seed and image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw

from tandemrt.runtime import Pipeline

from ..interop.picture import psnr_db
from .test_parity import MINIMUM_PSNR_DB, SOLVERS, WEIGHTS, scheduler

PROMPT = "a red circle left of a blue square on a white background"


def drawn(size: int = 64) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((6, 20, 28, 42), fill="green")
    draw.ellipse((36, 22, 58, 44), fill="blue")
    return image


def mask(size: int = 64) -> Image.Image:
    image = Image.new("L", (size, size), 0)
    ImageDraw.Draw(image).rectangle((0, 0, size // 2, size), fill=255)
    return image


@pytest.fixture(scope="module")
def pipe(shapes_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(shapes_bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    return dict(StableDiffusionPipeline.from_pretrained(WEIGHTS / "large", dtype=torch.float32).components)


def reference(
    components: dict[str, Any], solver: str, *, seeds: list[int] | None = None, **arguments: Any
) -> np.ndarray:
    """diffusers' pictures in [0, 1], one generator a picture where `seeds` are given."""
    class_name, overrides, _, eta = SOLVERS[solver]
    kind = StableDiffusionInpaintPipeline if "mask_image" in arguments else StableDiffusionImg2ImgPipeline
    pipeline = kind(**{**components, "scheduler": scheduler(class_name, overrides)})
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [7]]
    settings = {"prompt": PROMPT, "num_inference_steps": 8, "guidance_scale": 2.0, "eta": eta, **arguments}
    return pipeline(**settings, generator=generators if seeds else generators[0], output_type="np").images


def ours(pipe: Pipeline, solver: str, **arguments: Any) -> np.ndarray:
    _, overrides, name, eta = SOLVERS[solver]
    settings = {"prompt": PROMPT, "num_inference_steps": 8, "guidance_scale": 2.0, "eta": eta, "seed": 7, **arguments}
    return np.stack(pipe(**settings, solver=name, solver_config=overrides, output_type="np").images)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("solver", ["ddim", "euler ancestral", "dpmsolver++", "pndm", "lcm"])
def test_image_to_image(pipe: Pipeline, components: dict[str, Any], solver: str, strength: float) -> None:
    arguments = {"image": drawn(), "strength": strength}
    expected = reference(components, solver, **arguments)
    assert psnr_db(ours(pipe, solver, **arguments), expected) >= MINIMUM_PSNR_DB
    assert psnr_db(ours(pipe, solver, **arguments, seed=8), expected) < MINIMUM_PSNR_DB - 10


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("solver", ["ddim", "ddim eta", "euler", "euler ancestral", "heun", "dpmsolver++ sde", "unipc"])
def test_inpainting(pipe: Pipeline, components: dict[str, Any], solver: str, strength: float) -> None:
    arguments = {"image": drawn(), "mask_image": mask(), "strength": strength}
    expected = reference(components, solver, height=64, width=64, **arguments)
    assert psnr_db(ours(pipe, solver, **arguments), expected) >= MINIMUM_PSNR_DB


@pytest.mark.parametrize(
    ("theirs", "arguments"),
    [
        ({"num_images_per_prompt": 2}, {"num_images_per_prompt": 2}),
        ({"num_images_per_prompt": 2, "seeds": [3, 4]}, {"num_images_per_prompt": 2, "seed": [3, 4]}),
        ({"prompt": ["a green star", PROMPT]}, {"prompt": ["a green star", PROMPT]}),
    ],
    ids=["pictures", "seeds", "prompts"],
)
def test_batches(pipe: Pipeline, components: dict[str, Any], theirs: Any, arguments: Any) -> None:
    image = [drawn(), mask().convert("RGB")] if "prompt" in arguments else drawn()
    expected = reference(components, "euler ancestral", image=image, strength=0.7, **theirs)
    assert psnr_db(ours(pipe, "euler ancestral", image=image, strength=0.7, **arguments), expected) >= MINIMUM_PSNR_DB


def test_an_image_of_another_size_is_resized_as_diffusers_does_it(pipe: Pipeline, components: dict[str, Any]) -> None:
    arguments = {"image": drawn(100), "mask_image": mask(90), "height": 64, "width": 64, "strength": 0.7}
    expected = reference(components, "ddim", **arguments)
    assert psnr_db(ours(pipe, "ddim", **arguments), expected) >= MINIMUM_PSNR_DB
