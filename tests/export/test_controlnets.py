"""ControlNets: components of their own, the residuals of the denoisers they fit, and those that fit none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from tandemrt.export.plan import Added, ExportPlan
from tandemrt.export.sources import read_sources
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import ArgumentError, CheckpointError
from tandemrt.runtime.tensors import GIVEN, TAKEN

from .mini import edit_json
from .steered import write_controlnet

pytestmark = pytest.mark.slow


def plan(checkpoint: Path, out: Path, *controlnets: Path) -> ExportPlan:
    return ExportPlan(
        checkpoint, out, tuple(Added(f"controlnet_{index}", each) for index, each in enumerate(controlnets))
    )


@pytest.fixture
def bundle(steered: Path) -> Path:
    return steered / "bundle"


def test_only_denoisers_that_a_controlnet_fits_take_residuals(bundle: Path) -> None:
    components = Bundle.open(bundle).manifest.components
    assert components["controlnet_edges"].role == "controlnet"
    given = [spec.name for spec in components["controlnet_edges"].outputs]
    assert given == list(GIVEN.names(given))
    taken = [spec.name for spec in components["unet"].inputs][3:]
    assert taken == list(TAKEN.names(taken))
    assert len(given) == len(taken) == 5
    assert len(components["unet_other"].inputs) == 3


def test_residuals_and_steered_prediction_are_diffusers(steered: Path, bundle: Path, checkpoint: Path) -> None:
    controlnet = ControlNetModel.from_pretrained(steered / "edges").eval()
    model = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((2, 4, 6, 10), np.float32),
        "timestep": np.full(2, 417.0, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 7, 16), np.float32),
    }
    picture = rng.uniform(size=(2, 3, 12, 20)).astype(np.float32)
    with torch.inference_mode():
        arguments = [torch.from_numpy(array) for array in inputs.values()]
        down, mid = controlnet(*arguments, torch.from_numpy(picture), 0.6, return_dict=False)
        expected = model(
            *arguments, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )[0].numpy()
        alone = model(*arguments, return_dict=False)[0].numpy()
    steering = {"controlnet_cond": picture, "conditioning_scale": np.array([0.6], np.float32)}
    found = _run(bundle / "controlnet_edges", {**inputs, **steering})
    for array, tensor in zip(found, (*down, mid), strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), atol=1e-5)
    residuals = dict(zip(TAKEN.names([f"{TAKEN.down}{n}" for n in range(len(down))]), found, strict=True))
    np.testing.assert_allclose(_run(bundle / "unet", {**inputs, **residuals})[0], expected, atol=1e-5)
    nothing = {name: np.zeros_like(array) for name, array in residuals.items()}
    np.testing.assert_allclose(_run(bundle / "unet", {**inputs, **nothing})[0], alone, atol=1e-5)
    assert np.abs(expected - alone).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"block_out_channels": (8, 24)}, r"controlnet_0: skip connections: channels and reductions, got .*24, 2"),
        ({"layers_per_block": 2}, "controlnet_0: skip connections"),
        (
            {"cross_attention_dim": 24},
            "controlnet_0: cross_attention_dim: text conditioning width, got 24, expected 16",
        ),
        ({"in_channels": 8}, "controlnet_0: in_channels: latent channels, got 8, expected 4"),
        ({"conditioning_embedding_out_channels": (4, 8, 8)}, "reduction, got 4, expected 2"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused(
    changes: dict[str, Any], complaint: str, checkpoint: Path, tmp_path: Path
) -> None:
    controlnet = write_controlnet(tmp_path / "controlnet", **changes)
    with pytest.raises(CheckpointError, match=complaint):
        read_sources(plan(checkpoint, tmp_path / "out", controlnet))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: edit_json(folder / "config.json", _class_name="UNetMotionModel"), "_class_name: class"),
        (lambda folder: edit_json(folder / "config.json", class_embed_type="timestep"), "class_embed_type"),
        (
            lambda folder: edit_json(folder / "config.json", global_pool_conditions=True),
            "global_pool_conditions: conditioning that is not supported, got True, expected False",
        ),
        (
            lambda folder: edit_json(folder / "config.json", conditioning_channels=6),
            "conditioning_channels: conditioning that is not supported, got 6, expected 3",
        ),
        (
            lambda folder: edit_json(folder / "config.json", conditioning_embedding_out_channels=16),
            "conditioning_embedding_out_channels: value, got 16, expected a list of widths",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no ControlNet here"),
    ],
)
def test_what_is_no_controlnet_is_refused(
    damage: Callable[[Path], None], complaint: str, checkpoint: Path, tmp_path: Path
) -> None:
    controlnet = write_controlnet(tmp_path / "controlnet")
    damage(controlnet)
    with pytest.raises(CheckpointError, match=complaint):
        read_sources(plan(checkpoint, tmp_path / "out", controlnet))


def test_a_controlnet_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"component name, got 'controlnet', expected .*controlnet_NAME"):
        Added("controlnet", Path("c"))


def _run(folder: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, inputs)
