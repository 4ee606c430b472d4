"""ONNX Runtime's GPU providers, those that are installed: the CPU's pictures, on one thread and on several."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.providers import devices_here
from tandemrt.runtime.targets import Target

from ..interop.picture import psnr_db
from .conftest import Painted

pytestmark = pytest.mark.gpu

DEVICES = [device for device in devices_here(onnxruntime) if device != "cpu"]
SHAPES = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 24, 128)}


def test_a_gpu_provider_is_installed() -> None:
    assert DEVICES


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_equal_those_of_the_cpu(shapes_bundle: Path, painted: Painted, device: str) -> None:
    for arguments in ({}, {"steps": {"unet": 4, "unet_small": 4}, "num_inference_steps": None}):
        expected = painted(shapes_bundle, "onnxruntime:cpu:fp32", **arguments)
        assert psnr_db(painted(shapes_bundle, f"onnxruntime:{device}:fp32", **arguments), expected) >= 60.0


@pytest.mark.parametrize("device", DEVICES)
def test_threads_with_a_binding_each_repeat_themselves(shapes_bundle: Path, device: str) -> None:
    session = open_session(shapes_bundle / "unet" / "model.onnx", Target("onnxruntime", device, "fp32"))

    def outputs(seed: int) -> np.ndarray:
        binding, random = session.bind(SHAPES), np.random.default_rng(seed)
        for array in binding.inputs.values():
            array[...] = random.standard_normal(array.shape)
        binding.run()
        return binding.outputs["out_sample"].copy()

    serial = [outputs(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for expected, result in zip(serial, pool.map(outputs, range(8)), strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(serial[0] - serial[1]).max() > 0.1
