"""SDXL: two text encoders, sizes, KOALA, a ControlNet, Hyper-SD's solvers, image-to-image, engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from PIL import Image

from tandemrt.engines.formulas import sizes_of
from tandemrt.runtime.shapes import evaluated

from ..engines.families import require_engines
from ..engines.tandem import require_tandem
from .family import PROMPT, SIZE, Family, drawn, require_one_time_step_serves, require_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory, true_depth: bool) -> Iterator[Family]:
    added = {"unet_small": "unet-koala-700m", "controlnet_canny": "controlnet-sdxl-canny"}
    family = Family("sdxl", tmp_path_factory.mktemp("sdxl"), added, true_depth=true_depth)
    yield family
    family.pipe.close()


def test_sdxl_without_a_negative_prompt(sdxl: Family) -> None:
    same = {"num_inference_steps": 3, "guidance_scale": 5.0}
    require_same(sdxl.actual(**same), sdxl.expected(**same))


def test_sdxl_with_two_prompts_and_sizes(sdxl: Family) -> None:
    same = {
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "prompt_2": "an oil painting",
        "negative_prompt": "blurry",
        "negative_prompt_2": "a photograph",
        "original_size": (512, 768),
        "target_size": (64, 128),
        "crops_coords_top_left": (8, 16),
    }
    found = sdxl.actual(**same)
    require_same(found, sdxl.expected(**same))
    assert np.abs(found - sdxl.actual(num_inference_steps=2, guidance_scale=5.0)).max() > 1e-3


def test_sdxl_hands_over_to_koala(sdxl: Family) -> None:
    small = UNet2DConditionModel.from_pretrained(sdxl.folders["unet_small"], dtype=torch.float32)
    expected = sdxl.expected(switch=(2, small), num_inference_steps=4, guidance_scale=7.0)
    found = sdxl.actual(steps={"unet": 2, "unet_small": 2}, guidance_scale=7.0)
    require_same(found, expected)
    assert np.abs(found - sdxl.actual(num_inference_steps=4, guidance_scale=7.0)).max() > 1e-3


@pytest.mark.parametrize(
    ("scheduler", "ours", "theirs"),
    [
        (LCMScheduler, {"solver": "lcm", "timesteps": [800]}, {"timesteps": [800]}),
        (TCDScheduler, {"solver": "tcd", "eta": 1.0, "num_inference_steps": 3}, {"eta": 1.0, "num_inference_steps": 3}),
    ],
)
def test_sdxl_as_hyper_sd_samples_it(
    sdxl: Family, scheduler: Any, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    own = sdxl.reference.scheduler
    sdxl.reference.scheduler = scheduler.from_config(own.config)
    try:
        expected = sdxl.expected(guidance_scale=0.0, **theirs)
    finally:
        sdxl.reference.scheduler = own
    require_same(sdxl.actual(guidance_scale=0.0, **ours), expected)


def test_a_controlnet_steers_sdxl(sdxl: Family) -> None:
    controlnet = ControlNetModel.from_pretrained(sdxl.folders["controlnet_canny"], dtype=torch.float32)
    shared = {"num_inference_steps": 3, "guidance_scale": 5.0}
    same = {**shared, "controlnet_conditioning_scale": 0.7}
    expected = sdxl.painted_by(StableDiffusionXLControlNetPipeline, {"controlnet": controlnet}, image=drawn(), **same)
    found = sdxl.actual(control_image={"canny": drawn()}, **same)
    require_same(found, expected)
    assert np.abs(found - sdxl.actual(**shared)).max() > 1e-2


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_sdxl_starts_from_a_picture(sdxl: Family, strength: float) -> None:
    same = {"num_inference_steps": 5, "guidance_scale": 5.0, "strength": strength, "negative_prompt": "blurry"}
    found = sdxl.actual(image=drawn(), **same)
    require_same(found, sdxl.painted_by(StableDiffusionXLImg2ImgPipeline, {}, image=drawn(), **same))
    mirrored = drawn().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(found - sdxl.actual(image=mirrored, **same)).max() > 1e-2


def test_one_time_step_serves_a_whole_batch_of_sizes(sdxl: Family) -> None:
    bundle, random = sdxl.pipe.bundle, np.random.default_rng(0)
    inputs = bundle.component("unet").inputs
    sizes = sizes_of(inputs, batch=3, height=8, width=8, sequence=7)
    shapes = {one.name: evaluated(one.shape, sizes) for one in inputs if one.name != "timestep"}
    given = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    require_one_time_step_serves(bundle.model_path("unet"), given)


def test_sdxl_builds_on_every_backend(sdxl: Family, tmp_path: Path) -> None:
    require_engines(sdxl.pipe.bundle, tmp_path, ("text_encoder_2", "unet"))


def test_sdxl_in_tandem(sdxl: Family, tmp_path: Path) -> None:
    require_tandem(sdxl.pipe.bundle.path, tmp_path, "unet", prompt=PROMPT, guidance_scale=5.0, **SIZE)
