"""Pictures of the shapes family on a GPU and on the CPU, compared; `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import Pipeline

PROMPT = "a red circle left of a blue square on a white background"

Painted = Callable[..., np.ndarray]


@pytest.fixture
def painted() -> Painted:
    """The pictures a bundle paints on a target, (N, H, W, 3) float32 in [0, 1]."""

    def paint(bundle: Path, target: str, **arguments: Any) -> np.ndarray:
        defaults = {"prompt": PROMPT, "num_inference_steps": 8, "guidance_scale": 2.0, "seed": 7}
        with Pipeline.open(bundle, target=target) as pipeline:
            return np.stack(pipeline(**{**defaults, **arguments}, output_type="np").images)

    return paint
