"""Small denoisers of every family: as diffusers' modules of random weights, and as the graphs that are exported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from tandemrt.export.checkpoint import Part
from tandemrt.export.denoisers import denoiser_graph
from tandemrt.export.graph import onnx_from_module, save
from tandemrt.export.weight_files import read_weights

TEXT_WIDTH, POOLED_WIDTH = 16, 10
_UNET = {
    "sample_size": 8,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16, 16),
}


def sd15() -> nn.Module:
    """Two resnets and attentions a level, the lowest without attention, as Stable Diffusion 1.5's four levels are."""
    return UNet2DConditionModel(
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def bk_sdm(**more: Any) -> nn.Module:
    """One resnet a level and no middle, as BK-SDM-Tiny."""
    return UNet2DConditionModel(
        **_UNET,
        **more,
        layers_per_block=1,
        mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )


def inpainting() -> nn.Module:
    """It reads a mask and a masked image behind the latent, as Stable Diffusion's for inpainting."""
    return bk_sdm(in_channels=9)


def sdxl() -> nn.Module:
    """Attentions of several transformer blocks; pooled text and sizes join the time embedding."""
    return UNet2DConditionModel(
        **_UNET,
        layers_per_block=1,
        transformer_layers_per_block=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + POOLED_WIDTH,
    )


def sd3() -> nn.Module:
    """A transformer of eight blocks with two streams, of the text and of the latent."""
    return SD3Transformer2DModel(
        sample_size=16,
        num_layers=8,
        attention_head_dim=4,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=48,
    )


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {"sd15": sd15, "bk-sdm": bk_sdm, "sdxl": sdxl, "sd3": sd3}
FURTHER: Mapping[str, Callable[[], nn.Module]] = {"inpainting": inpainting}


def module(family: str) -> Any:
    """The denoiser of a family, or one of `FURTHER`; the weights are the same every time."""
    torch.manual_seed(3)
    return {**FAMILIES, **FURTHER}[family]().eval()


def export(denoiser: Any, folder: Path) -> Path:
    """Its graph, in `folder`."""
    denoiser.save_pretrained(folder / "checkpoint")
    weights = read_weights(folder / "checkpoint" / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "checkpoint" / "config.json").read_bytes())
    part = Part(folder / "checkpoint", type(denoiser).__name__, config, weights)
    return save(onnx_from_module("unet", denoiser_graph(part)), folder)
