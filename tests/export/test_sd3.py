"""SD3: the transformer, three text encoders, rectified flow and latents of 16 channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ..engines.families import require_engines
from .family import Family, require_same


@pytest.mark.slow
def test_sd3_with_three_text_encoders_and_on_every_backend(tmp_path: Path) -> None:
    family = Family("sd3-medium", tmp_path)
    with family.pipe:
        same = {
            "num_inference_steps": 3,
            "guidance_scale": 7.0,
            "prompt_3": "an oil painting",
            "negative_prompt": "blur",
        }
        found = family.actual(**same)
        require_same(found, family.expected(**same))
        assert np.abs(found - family.actual(**{**same, "prompt_3": "a photograph"})).max() > 1e-4
    require_engines(family.pipe.bundle, tmp_path / "cache")
    assert family.pipe.bundle.manifest.latent.channels == 16
    assert family.pipe.bundle.manifest.text.max_length == 77 + 256
