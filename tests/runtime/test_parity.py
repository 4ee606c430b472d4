"""End to end: the same weights, seed and prompt give diffusers' picture, with every solver, alone and in tandem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tandemrt.export.checkpoint import read_checkpoint, read_denoiser
from tandemrt.export.denoisers import denoiser_graph
from tandemrt.runtime import Pipeline

from ..export.mini import loaded
from ..interop.picture import psnr_db

WEIGHTS = Path(__file__).parents[2] / "bench" / "shapes" / "weights"
PROMPT = "a red circle left of a blue square on a white background"
MINIMUM_PSNR_DB = 50.0

# diffusers' class and overrides, our solver name and overrides, eta
SOLVERS: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "ddim": ("DDIMScheduler", {}, "ddim", 0.0),
    "ddim eta": ("DDIMScheduler", {}, "ddim", 0.7),
    "ddim trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}, "ddim", 0.0),
    "ddpm": ("DDPMScheduler", {}, "ddpm", 0.0),
    "euler": ("EulerDiscreteScheduler", {}, "euler", 0.0),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler", 0.0),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, "euler_a", 0.0),
    "heun": ("HeunDiscreteScheduler", {}, "heun", 0.0),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}, "dpmsolver++", 0.0),
    "dpmsolver++ karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmsolver++", 0.0),
    "dpmsolver++ sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmsolver++sde", 0.0),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, "pndm", 0.0),
    "lms": ("LMSDiscreteScheduler", {}, "lms", 0.0),
    "unipc": ("UniPCMultistepScheduler", {}, "unipc", 0.0),
    "deis": ("DEISMultistepScheduler", {}, "deis", 0.0),
    "lcm": ("LCMScheduler", {}, "lcm", 0.0),
    "tcd": ("TCDScheduler", {}, "tcd", 0.3),
}


@pytest.fixture(scope="module")
def pipe(shapes_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(shapes_bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reference() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "large", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler(class_name: str, overrides: dict[str, Any]) -> Any:
    """A diffusers scheduler from the checkpoint's configuration."""
    config = getattr(diffusers, class_name).load_config(WEIGHTS / "large" / "scheduler")
    return getattr(diffusers, class_name).from_config(config, **overrides)


def diffusers_picture(pipeline: StableDiffusionPipeline, **arguments: Any) -> np.ndarray:
    defaults = {"prompt": PROMPT, "num_inference_steps": 8, "guidance_scale": 2.0, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(7)
    return pipeline(**{**defaults, **arguments}, generator=generator, output_type="np").images


def our_picture(pipeline: Pipeline, **arguments: Any) -> np.ndarray:
    prompt = arguments.pop("prompt", PROMPT)
    steps = arguments.pop("steps", 8)
    out = pipeline(prompt, steps=steps, seed=7, output_type="np", **{"guidance_scale": 2.0, **arguments})
    return np.stack(out.images)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_paints_diffusers_picture(pipe: Pipeline, reference: StableDiffusionPipeline, name: str) -> None:
    class_name, overrides, solver, eta = SOLVERS[name]
    reference.scheduler = scheduler(class_name, overrides)
    expected = diffusers_picture(reference, eta=eta)
    ours = our_picture(pipe, solver=solver, solver_config=overrides, eta=eta)
    assert psnr_db(ours, expected) >= MINIMUM_PSNR_DB


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": ["a green star", "a red ring above a pink cross"]},
        {"num_images_per_prompt": 3},
        {"negative_prompt": "a blue square"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"height": 96, "width": 80},
    ],
    ids=["prompts", "pictures", "negative", "unguided", "zero", "size"],
)
def test_arguments_mean_what_they_mean_in_diffusers(
    pipe: Pipeline, reference: StableDiffusionPipeline, arguments: dict[str, Any]
) -> None:
    reference.scheduler = scheduler("DDIMScheduler", {})
    expected = diffusers_picture(reference, **arguments)
    assert psnr_db(our_picture(pipe, solver="ddim", **arguments), expected) >= MINIMUM_PSNR_DB


@pytest.mark.parametrize("large_steps", [0, 1, 4, 7, 8])
@pytest.mark.parametrize("name", ["dpmsolver++", "euler ancestral", "pndm", "unipc"])
def test_tandem_equals_swapping_unets_inside_diffusers(
    pipe: Pipeline, reference: StableDiffusionPipeline, name: str, large_steps: int
) -> None:
    class_name, overrides, solver, _ = SOLVERS[name]
    reference.scheduler = scheduler(class_name, overrides)
    source = read_denoiser(WEIGHTS / "small", read_checkpoint(WEIGHTS / "large"))
    large, small = reference.unet, loaded(denoiser_graph(source.part)).unet
    steps = {"unet": large_steps, "unet_small": 8 - large_steps}
    # diffusers' loop counts model calls; PNDM makes one more call than steps, the first step taking two.
    calls_by_large = large_steps + (1 if name == "pndm" and large_steps else 0)

    def swap(
        pipeline: StableDiffusionPipeline, call: int, _timestep: object, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if call == calls_by_large - 1:
            pipeline.unet = small
        return tensors

    reference.unet = large if large_steps else small
    try:
        expected = diffusers_picture(reference, callback_on_step_end=swap)
    finally:
        reference.unet = large
    ours = our_picture(pipe, solver=solver, solver_config=overrides, steps=steps)
    assert psnr_db(ours, expected) >= MINIMUM_PSNR_DB


def test_another_seed_is_far_away(pipe: Pipeline, reference: StableDiffusionPipeline) -> None:
    """The threshold above tells pictures apart."""
    reference.scheduler = scheduler("DDIMScheduler", {})
    expected = diffusers_picture(reference)
    other = np.stack(pipe(PROMPT, steps=8, seed=8, solver="ddim", guidance_scale=2.0, output_type="np").images)
    assert psnr_db(other, expected) < MINIMUM_PSNR_DB - 10
