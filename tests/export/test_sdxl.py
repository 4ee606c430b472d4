"""SDXL: two text encoders, sizes, KOALA as the small model, and the solvers that Hyper-SD is distilled for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler, UNet2DConditionModel

from ..engines.families import require_engines
from .family import Family, require_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    family = Family("hybrid-sdxl", tmp_path_factory.mktemp("sdxl"), ("unet_small",))
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


def test_sdxl_builds_on_every_backend(sdxl: Family, tmp_path: Path) -> None:
    require_engines(sdxl.pipe.bundle, tmp_path)
