"""Pruned UNets filled from the large one, before they are distilled."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


@torch.no_grad()
def inherit(unet: nn.Module, large: nn.Module) -> None:
    """Fill a pruned UNet from the large one: the first layer of each down block, the first and last of each up block.

    Inside narrowed ResNet blocks the channels with the largest weights are kept, as Hybrid-SD's significance score
    does; narrowed attentions keep their first heads.
    """
    source = large.state_dict()
    for name, target in unet.state_dict().items():
        tensor = source[_origin(name)]
        if tensor.shape != target.shape and ".resnets." not in name:
            tensor = tensor[tuple(slice(0, size) for size in target.shape)]
        if tensor.shape == target.shape:
            target.copy_(tensor)
    for name, block in unet.named_modules():
        if isinstance(block, ResnetBlock2D):
            _inherit_channels(block, large.get_submodule(_origin(name)))


def _origin(name: str) -> str:
    """The large UNet's name for a tensor or module of the one-layer UNet."""
    parts = name.split(".")
    if parts[0] == "up_blocks" and parts[2] in ("resnets", "attentions") and parts[3] == "1":
        parts[3] = "2"
    return ".".join(parts)


def _inherit_channels(block: ResnetBlock2D, origin: ResnetBlock2D) -> None:
    width = block.conv1.out_channels
    score = origin.conv1.weight.abs().sum((1, 2, 3)) * origin.conv2.weight.abs().sum((0, 2, 3))
    kept = score.topk(width).indices.sort().values
    block.conv1.weight.copy_(origin.conv1.weight[kept])
    block.conv1.bias.copy_(origin.conv1.bias[kept])
    block.time_emb_proj.weight.copy_(origin.time_emb_proj.weight[kept])
    block.time_emb_proj.bias.copy_(origin.time_emb_proj.bias[kept])
    block.norm2.weight.copy_(origin.norm2.weight[kept])
    block.norm2.bias.copy_(origin.norm2.bias[kept])
    block.conv2.weight.copy_(origin.conv2.weight[:, kept])
