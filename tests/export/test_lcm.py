"""Latent consistency models: guidance is an input, and a large one hands over to a small one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tandemrt.export.checkpoint import read_checkpoint, read_denoiser
from tandemrt.export.denoisers import denoiser_graph

from .family import Family, require_same
from .mini import loaded


@pytest.mark.deep
def test_latent_consistency_models_of_two_sizes(tmp_path: Path) -> None:
    added = {"unet_small": "unet-hybrid-sd-224m-lcm"}
    family = Family("hybrid-sd-lcm", tmp_path, added)
    part = read_denoiser(family.folders["unet_small"], read_checkpoint(family.checkpoint)).part
    small = loaded(denoiser_graph(part)).unet
    with family.pipe:
        expected = family.expected(switch=(2, small), num_inference_steps=4, guidance_scale=7.0)
        found = family.actual(steps={"unet": 2, "unet_small": 2}, guidance_scale=7.0)
        require_same(found, expected)
        assert np.abs(found - family.actual(steps={"unet": 2, "unet_small": 2}, guidance_scale=2.0)).max() > 1e-4
