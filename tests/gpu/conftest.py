"""Pictures of the shapes family on a GPU and on the CPU, compared; `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends import cuda
from tandemrt.runtime.backends.modules import imported
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.targets import PORTABLE, parse_target

PROMPT = "a red circle left of a blue square on a white background"

FLAVOURS = [name for name in ("tensorrt-rtx", "tensorrt") if find_spec(name.replace("-", "_")) is not None]
Painted = Callable[..., np.ndarray]
Build = Callable[..., Bundle]


@pytest.fixture
def painted() -> Painted:
    """The pictures a bundle paints on a target, (N, H, W, 3) float32 in [0, 1]."""

    def paint(bundle: Path, target: str, devices: tuple[int, ...] | None = None, **arguments: Any) -> np.ndarray:
        defaults = {"prompt": PROMPT, "num_inference_steps": 8, "guidance_scale": 2.0, "seed": 7}
        with Pipeline.open(bundle, target=target, devices=devices) as pipeline:
            return np.stack(pipeline(**{**defaults, **arguments}, output_type="np").images)

    return paint


@pytest.fixture(params=FLAVOURS)
def name(request: pytest.FixtureRequest) -> str:
    """A flavour of TensorRT."""
    return str(request.param)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds a bundle's engines for the GPU here into a cache of the test's own."""
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))

    def build(
        folder: Path, name: str, *components: str, profiles: tuple[str, ...] = ("64:b1-b2", "96"), **options: Any
    ) -> Bundle:
        bundle = Bundle.open(folder)
        target = parse_target(f"{name}:{device_of(name)}")
        plan = BuildPlan(bundle.path, (target,), tmp_path, components, tuple(map(parse_profile, profiles)), **options)
        for request in requests_of(plan, bundle):
            ensure_engine(request, tmp_path, lambda *_: None, {"tandemrt": "0"})
        return bundle

    return build


def device_of(name: str) -> str:
    """What engines are built for: the architecture here, or every one where the flavour does not know it."""
    here = cuda.device().architecture
    known = name == "tensorrt" or hasattr(imported(name).ComputeCapability, here.upper())
    return here if known else PORTABLE
