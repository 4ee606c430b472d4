"""The inputs of comparisons: enough different shapes for every component, whatever its size."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor, nn

from tandemrt.export.modules import Graph
from tandemrt.export.samples import PROMPTS, Samples, SampleText
from tandemrt.runtime.manifest import LatentSpace, Role, SchedulerDefaults, TensorSpec

AXES: dict[Role, tuple[str, ...]] = {
    "text_encoder": ("input_ids",),
    "denoiser": ("sample", "encoder_hidden_states"),
    "vae_decoder": ("latent_sample",),
    "vae_encoder": ("sample",),
}


SCHEDULER = SchedulerDefaults(class_name="DDIMScheduler", config={"clip_sample": False})
LATENT = LatentSpace(channels=4, downsampling=2, scaling_factor=1.0)


def encode_picture(picture: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(picture, 2)[:, [0, 1, 2, 0]]


def samples_of(size: int, length: int = 77) -> Samples:
    text = SampleText(
        {"text_encoder": np.zeros((len(PROMPTS), length), np.int64)},
        np.zeros((len(PROMPTS), length, 16), np.float32),
        np.arange(len(PROMPTS) * 5, dtype=np.float32).reshape(-1, 5),
    )
    return Samples(text, encode_picture, LATENT, SCHEDULER, size)


def graph_of(role: Role, multiple: int = 1, channels: int = 4) -> Graph:
    inputs = {
        "sample": ("batch", channels, "height", "width"),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "sequence", 16),
        "text_embeds": ("batch", 5),
        "time_ids": ("batch", 6),
        "timestep_cond": ("batch", 8),
    }
    specs = [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in inputs.items()]
    denoiser = role == "denoiser"
    return Graph(role, nn.Identity(), tuple(specs) if denoiser else (), (), {}, multiple if denoiser else 1)


@pytest.mark.parametrize("role", AXES)
@pytest.mark.parametrize(("size", "multiple"), [(1, 1), (2, 8), (8, 8), (8, 2), (9, 2), (64, 8)])
@pytest.mark.parametrize("length", [3, 24, 77])
def test_every_axis_has_three_sizes_in_two_batches(role: Role, size: int, multiple: int, length: int) -> None:
    cases = samples_of(size, length).cases(role, graph_of(role, multiple))
    for name in AXES[role]:
        shapes = [case[name].shape for case in cases]
        assert {shape[0] for shape in shapes} == {1, 2}
        varied = {shape[2:] if len(shape) == 4 else shape[1:2] for shape in shapes}
        assert len(varied) == 3
        if role == "denoiser" and name == "sample":
            assert all(extent % multiple == 0 for shape in varied for extent in shape)


def test_a_denoiser_is_given_all_its_conditioning() -> None:
    for case in samples_of(8).cases("unet", graph_of("denoiser", 2)):
        batch, _, height, width = case["sample"].shape
        assert {name: array.shape for name, array in case.items() if array.ndim < 3} == {
            "timestep": (batch,), "text_embeds": (batch, 5), "time_ids": (batch, 6), "timestep_cond": (batch, 8),
        }  # fmt: skip
        assert case["time_ids"][0].tolist() == [2 * height, 2 * width, 0, 0, 2 * height, 2 * width]
        assert all(array.dtype == np.float32 for array in case.values())


def test_an_inpainting_unet_is_given_a_mask_and_what_it_leaves() -> None:
    for case in samples_of(8).cases("unet", graph_of("denoiser", 2, channels=9)):
        mask, rest = case["sample"][:, 4:5], case["sample"][:, 5:]
        assert set(np.unique(mask)) == {0, 1}
        assert not (rest * mask).any()
        assert rest.any()


def test_autoencoders_are_compared_on_maps_that_onnx_runtime_normalizes_well() -> None:
    decoder = samples_of(96).cases("vae_decoder", graph_of("vae_decoder"))
    assert max(max(case["latent_sample"].shape) for case in decoder) == 32
    denoiser = samples_of(96).cases("unet", graph_of("denoiser", 8))
    assert max(max(case["sample"].shape) for case in denoiser) == 96
