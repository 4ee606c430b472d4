"""SDXS: one step at time step 999, and the ControlNet that turns sketches into pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from ..engines.families import require_engines
from .family import Family, drawn, require_same


@pytest.mark.slow
def test_a_sketch_in_one_step_and_its_engines(tmp_path: Path, true_depth: bool) -> None:
    added = {"controlnet_sketch": "controlnet-sdxs-sketch"}
    family = Family("sdxs-512-sketch", tmp_path, added, true_depth=true_depth)
    controlnet = ControlNetModel.from_pretrained(family.folders["controlnet_sketch"], dtype=torch.float32)
    sketch, same = drawn(), {"num_inference_steps": 1, "guidance_scale": 0.0, "controlnet_conditioning_scale": 0.8}
    parts = {"controlnet": controlnet, "requires_safety_checker": False}
    expected = family.painted_by(StableDiffusionControlNetPipeline, parts, image=sketch, **same)
    with family.pipe:
        found = family.actual(control_image={"sketch": sketch}, **same)
        require_same(found, expected)
        assert np.abs(found - family.actual(num_inference_steps=1, guidance_scale=0.0)).max() > 1e-3
        assert family.pipe("a cat", num_inference_steps=1, output_type="latent").plan.table.timesteps.tolist() == [999]
    if true_depth:
        require_engines(family.pipe.bundle, tmp_path / "cache", ("unet",))
