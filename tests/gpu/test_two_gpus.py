"""Two GPUs of one architecture, where there are as many: the pictures of one, and whose GPU a thread has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends import cuda

from ..engines.tandem import PLACED, ROWS, WINDOW
from ..interop.picture import psnr_db
from .conftest import PROMPT, Build, Painted, device_of

pytestmark = pytest.mark.gpu


@pytest.fixture
def two() -> None:
    first, *others = (device.architecture for device in cuda.devices())
    if others[:1] != [first]:
        pytest.skip("there are no two GPUs of one architecture")


def test_what_is_set_up_is_known() -> None:
    """In a process of its own: in this one anything may have run."""
    program = """
from tandemrt.runtime.backends import cuda
first, *others = cuda.devices()
print(first._is_set_up(0))
cuda.Stream(first).wait()
print(first._is_set_up(0), any(first._is_set_up(other.index) for other in others), first.name)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, after = told.splitlines()
    assert before == "False"
    assert after.startswith("True False ")
    assert after.split()[2:]


@pytest.mark.usefixtures("two")
def test_branches_on_two_gpus_paint_what_one_call_does(
    shapes_bundle: Path, name: str, build: Build, painted: Painted
) -> None:
    build(shapes_bundle, name)
    target, before = f"{name}:{device_of(name)}:fp32", cuda._called(cuda.device().runtime, "cudaGetDevice")
    expected = painted(shapes_bundle, target)
    for devices, placement in (((0, 1), "parallel"), ((0, 1), "auto"), ((1, 0), "parallel"), ((1,), "batched")):
        assert psnr_db(painted(shapes_bundle, target, devices, placement=placement), expected) >= 60.0
    assert cuda._called(cuda.device().runtime, "cudaGetDevice") == before


@pytest.mark.usefixtures("two")
def test_a_window_of_stages_on_two_gpus_is_that_of_one(
    shapes_bundle: Path, name: str, build: Build, painted: Painted
) -> None:
    build(shapes_bundle, name)
    build(shapes_bundle, name, "unet", profiles=("64:b1",), stages=2)
    target = f"{name}:{device_of(name)}:fp32"
    asked: dict[str, Any] = {"num_inference_steps": ROWS, "placement": "hybridiff", "placement_config": WINDOW}
    assert psnr_db(painted(shapes_bundle, target, (0, 1), **asked), painted(shapes_bundle, target, **asked)) >= 60.0
    with Pipeline.open(shapes_bundle, target, devices=(0, 1)) as pipeline:
        out = pipeline(PROMPT, guidance_scale=2.0, seed=7, **asked)
    assert [row.placement for row in out.plan.ran] == PLACED[1]
    assert {one.gpu for one in out.timings.ran_on["unet"]} == {0, 1}
