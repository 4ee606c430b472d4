"""The inputs of comparisons: enough different shapes for every component, whatever its size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tandemrt.export.modules import Graph
from tandemrt.export.samples import PROMPTS, Samples
from tandemrt.runtime.manifest import LatentSpace, Role, SchedulerDefaults

AXES: dict[Role, tuple[str, ...]] = {
    "text_encoder": ("input_ids",),
    "denoiser": ("sample", "encoder_hidden_states"),
    "vae_decoder": ("latent_sample",),
    "vae_encoder": ("sample",),
}


def encode_text(ids: Tensor) -> tuple[Tensor]:
    return (torch.zeros(*ids.shape, 16),)


def encode_picture(picture: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(picture, 2)[:, [0, 1, 2, 0]]


@pytest.mark.parametrize("role", AXES)
@pytest.mark.parametrize(("size", "multiple"), [(1, 1), (2, 8), (8, 8), (8, 2), (9, 2), (64, 8)])
@pytest.mark.parametrize("length", [3, 24, 77])
def test_every_axis_has_three_sizes_in_two_batches(role: Role, size: int, multiple: int, length: int) -> None:
    samples = Samples(
        np.zeros((len(PROMPTS), length), np.int64),
        encode_text,
        encode_picture,
        LatentSpace(channels=4, downsampling=2, scaling_factor=1.0),
        SchedulerDefaults(class_name="DDIMScheduler", config={"clip_sample": False}),
        size,
    )
    cases = samples.cases(Graph(role, nn.Identity(), (), (), {}, multiple if role == "denoiser" else 1))
    for name in AXES[role]:
        shapes = [case[name].shape for case in cases]
        assert {shape[0] for shape in shapes} == {1, 2}
        varied = {shape[2:] if len(shape) == 4 else shape[1:2] for shape in shapes}
        assert len(varied) == 3
        if role == "denoiser" and name == "sample":
            assert all(extent % multiple == 0 for shape in varied for extent in shape)


def test_autoencoders_are_compared_on_maps_that_onnx_runtime_normalizes_well() -> None:
    arguments = (
        LatentSpace(channels=4, downsampling=2, scaling_factor=1.0),
        SchedulerDefaults(class_name="DDIMScheduler", config={"clip_sample": False}),
    )
    samples = Samples(np.zeros((len(PROMPTS), 77), np.int64), encode_text, encode_picture, *arguments, 96)
    decoder = samples.cases(Graph("vae_decoder", nn.Identity(), (), (), {}))
    assert max(max(case["latent_sample"].shape) for case in decoder) == 40
    denoiser = samples.cases(Graph("denoiser", nn.Identity(), (), (), {}, 8))
    assert max(max(case["sample"].shape) for case in denoiser) == 120
