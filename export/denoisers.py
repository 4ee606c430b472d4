"""Denoisers as graphs: stock or pruned UNets."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .agreement import spatial_multiple
from .checkpoint import Part
from .modules import UNUSABLE, Graph, fill, float_spec, frozen, full_config, unusable
from .pruned import resize_inner_widths
from .weights import load_tensors


class _Denoiser(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def denoiser_graph(part: Part, text_width: int) -> Graph:
    """A UNet, its inner widths those of the tensors.

    Inputs: sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, sequence, text_width); all float32.
    """
    tensors = load_tensors(part.weights)
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(part.config))
            resize_inner_widths(unet, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except UNUSABLE as error:
        raise unusable(part, error) from error
    fill(unet, tensors, part)
    channels = unet.config.in_channels
    latent = float_spec("sample", "batch", channels, "height", "width")
    text = float_spec("encoder_hidden_states", "batch", "sequence", text_width)
    return Graph(
        role="denoiser",
        module=frozen(_Denoiser(unet)),
        inputs=(latent, float_spec("timestep", "batch"), text),
        outputs=(float_spec("out_sample", "batch", unet.config.out_channels, "height", "width"),),
        config=full_config(unet.config, part),
        multiple=spatial_multiple(part),
    )
